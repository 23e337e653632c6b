"""The lookup path in C++ (kernels/cpu/engine.h): this module hands it tables and memory.

Input: what the engine contract says. Output: the same rows, at the speed of memory and disk. Errors: those of the
contract, which `faults` names and the C++ side raises.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .. import kernels
from ..causes import allow_open_files, short_of_something
from ..decisions.budget import DramPlan, StagingPlan, TableShare
from ..formats.page import PAGE_VERSION
from ..process.progress import OnProgress
from ..process.workers import aside
from ..stats import latency_of
from .engine import READ_WAIT_S, HostEngine, Request, RowRange, in_slices
from .faults import FaultNames
from .files import AnyFiles
from .huge_pages import bytes_on_huge_pages, keep_on_huge_pages
from .in_place import InPlaceFiles, SideMemory, load_side, side_memory
from .memory import allocate
from .nvme import SERVED, IoChoice, load_rows
from .overlay import Patches, RowsInMemory, TableOverlay
from .placed import PlacementFile, load_all_static
from .served import ServedFiles

logger = logging.getLogger("tierstore")

PREAD_THREADS = 16
PART_BYTES = 256 << 10  # of rows: what each thread that shares a large lookup copies at a time
JOBS_MAX = 256  # tickets under way; beyond it, submit waits for one to end
LOAD_BYTES = 1 << 20


@dataclass(frozen=True)
class TableMemory:
    """What of a table lies in memory: all rows, uint8 [bytes], or a `kernels.EntryCache`; and its static set, if any.

    tag: of its entries in the cache, below 16; another version of the table may share that. side: of a table in place.
    overlay: of rows that versions have; a resident table has none.
    """

    rows_or_cache: np.ndarray | kernels.EntryCache
    statics: kernels.StaticRecord | None = None
    tag: int = 0
    side: SideMemory | None = None
    overlay: TableOverlay | None = None


@dataclass(frozen=True)
class SharedEpochs:
    """Where a daemon publishes epochs: its control block, the number of the version, and the client's own block.

    reports: whether lookups are reported in that block.
    """

    control: np.ndarray
    version: int
    block: np.ndarray
    reports: bool


def open_native(
    what: str,
    files: Sequence[AnyFiles],
    plan: DramPlan,
    choice: IoChoice,
    placed: PlacementFile | None,
    on_progress: OnProgress | None,
) -> NativeEngine:
    """Allocates a plan's memory, loads resident tables and static sets, and returns the engine over it. Blocks."""
    layouts = [file.table for file in files]
    block = allocate(plan.block_bytes)
    shares = [plan.shares[layout.spec.name] for layout in layouts]
    parts = [block[share.byte_start : share.byte_start + share.num_bytes] for share in shares]
    overlays = [_load_overlay(*each) for each in zip(files, shares, parts, strict=True)]
    if placed is not None:
        placed.overlays = overlays_by_name(overlays)
    statics = load_all_static(placed, layouts, shares, parts, on_progress)
    memories = []
    for file, share, part, static, overlay in zip(files, shares, parts, statics, overlays, strict=True):
        if share.resident:
            memories.append(TableMemory(part))
            continue
        rest = part[share.static_bytes + share.index_bytes :]
        new_cache = partial(
            kernels.EntryCache, num_sets=share.num_sets, entry_bytes=file.table.spec.entry_bytes, is_new=True
        )
        cache = aside(new_cache, rest)
        side = None
        if isinstance(file, InPlaceFiles):
            memory = part[share.num_bytes - share.side_bytes :]
            side = side_memory(file.table, memory, tuple(load_side(file, memory)))
        native = None if static is None else static.to_native()
        memories.append(TableMemory(cache, native, side=side, overlay=overlay))
    engine = NativeEngine(what, files, memories, choice, plan.staging, placed)
    engine.huge_pages = keep_on_huge_pages(block)
    for index, (file, share, part) in enumerate(zip(files, shares, parts, strict=True)):
        if share.resident:
            engine.set_resident(index, load_table(file, part))
    return engine


def _load_overlay(file: AnyFiles, share: TableShare, part: np.ndarray) -> TableOverlay | None:
    """Loads the index of a table's versions into its place in the table's part; None if it needs none."""
    if share.resident or file.versions is None:
        return None
    assert share.overlay_bytes, "a plan that knows of no versions would serve the base's rows"
    memory = part[share.num_bytes - share.side_bytes - share.overlay_bytes :]
    overlay = TableOverlay.within(file.versions, memory)
    overlay.load_index()
    return overlay


def overlays_by_name(overlays: Sequence[TableOverlay | None]) -> dict[str, TableOverlay]:
    """Returns what a placement file's `overlays` are."""
    return {overlay.files.spec.name: overlay for overlay in overlays if overlay is not None}


def load_table(file: AnyFiles, memory: np.ndarray, poll: Callable[[], None] | None = None) -> dict[int, str]:
    """Loads all rows of a table into memory, uint8 [table_bytes at least]; returns its bad pages, as `load_rows` does.

    poll: as of `load_rows`.
    """
    spec = file.table.spec
    scratch = np.empty(max(LOAD_BYTES, file.table.page_bytes), dtype=np.uint8)
    return load_rows(file, memory[: spec.table_bytes].reshape(spec.num_rows, spec.row_bytes), scratch, poll)


class NativeEngine(HostEngine):
    """See `Engine`."""

    def __init__(
        self,
        what: str,
        files: Sequence[AnyFiles],
        memories: Sequence[TableMemory],
        choice: IoChoice,
        staging: StagingPlan,
        placed: PlacementFile | None = None,
        shared: SharedEpochs | None = None,
    ) -> None:
        """`what` names the store in errors. Tables whose rows are in memory serve after `set_resident`.

        `layouts`, `memories`: of the tables; `memories` is empty once it is closed. `huge_pages`: what brings the
        memory that it was opened over onto huge pages, until it is closed.
        """
        self._what = what
        self.layouts = [file.table for file in files]
        self.memories = list(memories)
        self._has_versions = [file.versions is not None for file in files]
        self._resident = [isinstance(memory.rows_or_cache, np.ndarray) for memory in memories]
        self.bad_pages = {}
        self.huge_pages: kernels.HugePages | None = None
        self.io = choice.mode
        allow_open_files(staging.num_readers)
        try:
            self._engine = kernels.Engine(
                [_record(file, memory) for file, memory in zip(files, memories, strict=True)],
                mode=choice.mode,
                use_process_madvise=choice.use_process_madvise,
                num_readers=staging.num_readers,
                num_threads=choice.num_threads,
                part_bytes=PART_BYTES,
                # What another process serves comes by way of memory that is shared with it: the other half.
                depth=max(1, staging.depth // 2) if choice.mode == SERVED else staging.depth,
                assembly_bytes=staging.assembly_bytes,
                pread_threads=PREAD_THREADS,
                jobs_max=JOBS_MAX,
                wait_s=READ_WAIT_S,
                shared=None if shared is None else (shared.control, shared.version, shared.block, shared.reports),
                # Not a method of ours: the C++ side would hold us, and nothing collects a circle through it.
                make_fault=FaultNames(
                    what,
                    [file.table.spec.name for file in files],
                    placed.path if placed else None,
                    self.bad_pages,
                    {index: file.names for index, file in enumerate(files) if isinstance(file, InPlaceFiles)},
                    {index: file.versions.names for index, file in enumerate(files) if file.versions is not None},
                    {index: file.fault for index, file in enumerate(files) if isinstance(file, ServedFiles)},
                ),
                served_by=choice.served_by,
            )
        except RuntimeError as error:
            raise short_of_something(f"{what}: reading pages") from error
        self.try_lookup = self._engine.try_lookup
        num_readers, num_registered = self._engine.page_readers()[0], self._engine.registered_readers()
        if num_registered < num_readers:
            logger.info(
                "%s: the kernel registered files and staging of %d of %d page readers (ulimit -l, ulimit -n): the "
                "others' reads cost a little more", what, num_registered, num_readers,
            )  # fmt: skip
        for resource, num_found, num_wanted in self._engine.shortfalls():
            logger.warning(
                "%s: %d of %d %s could be had: lookups are slower; raise 'ulimit -n' and 'ulimit -l', or free memory",
                what, num_found, num_wanted, resource,
            )  # fmt: skip

    def set_resident(self, index: int, bad_pages: Mapping[int, str]) -> None:
        """Declares that a table's memory holds its rows, but for those of bad pages, and why those are bad."""
        self.bad_pages.update({(index, page): text for page, text in bad_pages.items()})
        self._engine.set_resident(index, list(bad_pages))

    @property
    def overlays(self) -> Mapping[str, Patches]:
        found: dict[str, Patches] = dict(overlays_by_name([memory.overlay for memory in self.memories]))
        for index, (layout, memory) in enumerate(zip(self.layouts, self.memories, strict=True)):
            if isinstance(memory.rows_or_cache, np.ndarray) and self._has_versions[index]:
                rows = memory.rows_or_cache[: layout.spec.table_bytes].reshape(-1, layout.spec.row_bytes)
                found[layout.spec.name] = RowsInMemory(layout.spec, rows, partial(self._are_bad, index))
        return found

    def _are_bad(self, index: int, row_ids: np.ndarray) -> np.ndarray:
        """Returns which rows of a resident table, by id, could not be loaded, bool [n]."""
        bad = [page for table, page in self.bad_pages if table == index]
        return np.isin(row_ids // self.layouts[index].rows_per_page, bad)

    def is_resident(self, index: int) -> bool:
        return self._resident[index]

    def lookup(
        self,
        index: int,
        keys: np.ndarray,
        out: np.ndarray,
        sources: np.ndarray | None = None,
        timeout_s: float | None = None,
    ) -> None:
        if not self._engine.lookup(index, keys, out, sources, timeout_s):
            raise self._overdue(timeout_s)

    def _overdue(self, timeout_s: float | None) -> TimeoutError:
        return TimeoutError(f"{self._what}: the rows were not there within {timeout_s} s; the lookup was given up")

    def submit(self, requests: Sequence[Request]) -> NativePending | None:
        return _pending(self._engine.submit(list(requests)))

    def submit_pairs(self, index: int, keys: np.ndarray, pairs: np.ndarray, out: np.ndarray) -> NativePending | None:
        return _pending(self._engine.submit_pairs(index, keys, pairs, out))

    def rows(
        self, index: int, row_ids: np.ndarray, out: np.ndarray, within: RowRange | None, timeout_s: float | None
    ) -> None:
        if not self._engine.rows(index, row_ids, out, within, timeout_s):
            raise self._overdue(timeout_s)

    def submit_rows(
        self, index: int, row_ids: np.ndarray, out: np.ndarray, within: RowRange | None
    ) -> NativePending | None:
        return _pending(self._engine.submit_rows(index, row_ids, out, within))

    def locate(self, index: int, keys: np.ndarray, sources: np.ndarray) -> None:
        self._engine.locate(index, keys, sources)

    def counters(self) -> dict[str, Any]:
        counters = self._engine.counters()
        counts, sum_ns = counters["latency"]
        return counters | {
            "latency": latency_of(counts, sum_ns),
            "tables": [list(table) for table in counters["tables"]],
        }

    def huge_page_bytes(self) -> tuple[int, int]:
        return bytes_on_huge_pages([self.huge_pages])

    def close(self, timeout_s: float) -> bool:
        ended = in_slices(self._engine.close, timeout_s)
        if ended:
            huge_pages, self.huge_pages = self.huge_pages, None  # once: another thread may close it, too
            if huge_pages is not None:
                huge_pages.stop()
            self.memories.clear()  # a closed store that somebody still names must not keep its budget
        return ended

    @property
    def native(self) -> kernels.Engine:
        return self._engine

    def before_fork(self) -> None:
        self._engine.before_fork()

    def after_fork(self, *, child: bool) -> None:
        self._engine.after_fork(child)


class NativePending:
    """A lookup that a thread of the C++ side finishes. See `Pending`; dropped while it is under way, it is
    cancelled."""

    def __init__(self, ticket: kernels.Ticket) -> None:
        self._ticket = ticket

    def done(self) -> bool:
        """See `Pending`."""
        return bool(self._ticket.done())

    def cancel(self) -> None:
        """See `Pending`."""
        self._ticket.cancel()

    def detach(self) -> None:
        """See `Pending`."""
        self._ticket.detach()

    def wait(self, timeout_s: float | None) -> None:
        """See `Pending`."""
        if not self._ticket.wait(READ_WAIT_S * 2 if timeout_s is None else max(0.0, timeout_s)):
            raise TimeoutError(f"the rows were not there within {timeout_s} s; the lookup goes on, wait again")


def _pending(ticket: kernels.Ticket | None) -> NativePending | None:
    if ticket is None:
        return None
    try:
        return NativePending(ticket)
    except BaseException:  # nobody has the ticket
        ticket.cancel()
        raise


def _record(file: AnyFiles, memory: TableMemory) -> kernels.TableRecord:
    layout, spec = file.table, file.table.spec
    return kernels.TableRecord(
        num_orders=len(spec.orders),
        rows_per_key=spec.rows_per_key,
        row_bytes=spec.row_bytes,
        num_rows=spec.num_rows,
        is_plain=spec.is_plain,
        moduli=spec.moduli,
        offsets=spec.offsets,
        page_bytes=layout.page_bytes,
        rows_per_page=layout.rows_per_page,
        num_pages=layout.num_pages,
        pages_per_shard=layout.pages_per_shard,
        page_version=PAGE_VERSION,
        seed=layout.seed,
        shards=[] if isinstance(file, InPlaceFiles) else file.handles(),
        memory=memory.rows_or_cache,
        statics=memory.statics,
        tag=memory.tag,
        residues=spec.residues,
        planes=_planes(file, memory) if isinstance(file, InPlaceFiles) else None,
        overlay=memory.overlay.to_native() if memory.overlay is not None else None,
    )


def _planes(file: InPlaceFiles, memory: TableMemory) -> list[kernels.PlaneRecord]:
    """Returns the planes of a table in place; none of a resident one, of which nothing more is read."""
    return [] if memory.side is None else file.plane_records(memory.side)
