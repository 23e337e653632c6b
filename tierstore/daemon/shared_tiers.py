"""The host's tiers: what a daemon keeps in shared memory, and the only one who writes there.

Flows in: a store; which entries should be static; another version of the store. Flows out: shared blocks that clients
map, an engine that reads missed entries into the recency cache, and epochs. An epoch is published when its entries and
its index lie in memory; what only the epoch before it used is written over when clients have left that, or a while
later: who is in it still, reads from disk what it has copied. So two epochs are alive at most, and nobody holds up a
change for long; but while a GPU reads the epoch before, nothing is changed.
Refuses a version whose tables are not the same.

`changes` is held by whoever changes static sets or versions; everything else may come from any thread.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import kernels
from ..decisions.budget import CACHE_WAYS
from ..decisions.replan import hottest_indexes
from ..decisions.shared_budget import SharedPlan, divide_shared
from ..errors import ConfigError, CorruptPageError, DaemonError, FingerprintMismatchError
from ..formats.placement import Placement
from ..ipc.events import event
from ..ipc.identity import process_text
from ..ipc.mapped import Blocks, OpenVersion, pairs_as_tokens, recency_part, same_tables, static_parts, table_memories
from ..layout import UNIT_BYTES, round_up
from ..process.progress import OnProgress
from ..store.embedded import check_available, open_placement
from ..tiers.native import NativeEngine, SharedEpochs, load_table
from ..tiers.nvme import choose_io
from ..tiers.placed import index_head, load_indexes, load_records
from ..tiers.shared import SharedBlock
from ..tiers.slots import StaticSlots
from .attachments import Attachments
from .version import Version

logger = logging.getLogger("tierstore.daemon")

TAGS = 16
CLOSE_WAIT_S = 60.0  # for a change that is under way
GPU_INDEX_S = (
    4e-6  # for each slot, that a client may take to make its GPU's index of an epoch: five times what it takes
)
RECENCY_SAMPLE_SETS = 4096  # that are looked at to say how full a recency cache is
STATIC = kernels.SOURCES.index("static")
READ_TOKENS_MAX = 512  # packed keys of a lookup by which entries are read: a few MiB of rows

Pairs = tuple[np.ndarray, np.ndarray]  # order index uint8 [n], keys int64 [n]


class Host:
    """The tiers of one host. Blocks while they are made and warmed; `close` ends them,
    clients keep what they mapped."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        dram_bytes: int,
        io: str = "auto",
        placement: int | str | None = None,
        on_progress: OnProgress | None = None,
        *,
        gpu_clients: bool = False,
    ) -> None:
        """As `tierstore.open`, whose errors it raises too. on_progress: (bytes there, bytes in all).

        gpu_clients: whether clients who ask for it get the static set writable,
        as drivers want it that lock it for a GPU.
        """
        self.changes = threading.RLock()
        self._choice = choose_io(io)
        self.attachments = Attachments()
        self._tags: dict[str, int] = {}  # identities of versions -> tags
        self.epoch = 0  # the newest,
        self.settled_epoch = 0  # and the newest that is known to be the only one that is read
        self._published_at = 0.0
        self.num_changes = 0
        self._retiring: Version | None = None  # its clients are moving
        self.num_read_errors = 0
        opened = self._open(path, placement)
        blocks: list[SharedBlock] = []
        try:
            heading = opened.placed.placement if opened.placed else None
            self.plan: SharedPlan = divide_shared(opened.image.tables, dram_bytes, heading)
            check_available(self.plan.dram_bytes)
            progress = _Progress(
                on_progress, self.plan.static_bytes + self.plan.recency_bytes + self.plan.resident_bytes
            )
            self._control = SharedBlock("tierstore-control", kernels.CONTROL_BYTES)
            blocks.append(self._control)
            static_bytes = max(self.plan.static_bytes, UNIT_BYTES)
            self._static = SharedBlock("tierstore-static", static_bytes, progress.add, lent=gpu_clients)
            blocks.append(self._static)
            self._recency = SharedBlock("tierstore-recency", max(self.plan.recency_bytes, UNIT_BYTES), progress.add)
            blocks.append(self._recency)
            layouts = opened.image.tables
            cached = {name: share for name, share in self.plan.shares.items() if not share.resident}
            self.caches = {
                name: kernels.EntryCache(
                    recency_part(self._recency.array, layouts[name], share),
                    num_sets=share.num_sets, entry_bytes=layouts[name].spec.entry_bytes, is_new=True,
                )
                for name, share in cached.items()
            }  # fmt: skip
            self.slots: dict[str, StaticSlots] = {}
            for name, share in cached.items():
                parts, spec = static_parts(self._static.array, layouts[name], share), layouts[name].spec
                self.slots[name] = StaticSlots(
                    parts.records, parts.heads, parts.areas, len(spec.orders), spec.entry_bytes, share.capacity
                )
            self.attachments.gpu_index_s = GPU_INDEX_S * sum(len(slots.keys) for slots in self.slots.values())
            self.current = self._make_version(opened, 1, progress.add)
            self.previous_path: str | None = None
            self._load_placement(opened, heading, progress.add)
        except BaseException:
            opened.close()
            self.attachments.close()
            for block in blocks:
                block.close()
            raise

    def _open(self, path: str | os.PathLike[str], placement: int | str | None) -> OpenVersion:
        direct = self._choice.mode == "uring"
        image, placed = open_placement(Path(path).absolute(), placement, direct=direct)  # clients work in other folders
        return OpenVersion(image, placed, direct=direct)

    def _make_version(self, opened: OpenVersion, number: int, on_bytes: Callable[[int], None] | None) -> Version:
        """Loads resident tables, and makes the engine by which the daemon reads a version."""
        resident = None
        try:
            if self.plan.resident_bytes:
                resident = SharedBlock(f"tierstore-resident-{number}", self.plan.resident_bytes, on_bytes)
            return self._make_engine(opened, number, resident, on_bytes)
        except BaseException:
            self.attachments.own.left(number)
            if resident:
                resident.close()
            raise

    def _make_engine(
        self, opened: OpenVersion, number: int, resident: SharedBlock | None, on_bytes: Callable[[int], None] | None
    ) -> Version:
        identity = opened.image.identity
        self._tag(identity)
        bad_pages = {}
        for files in opened.files:
            share, name = self.plan.shares[files.table.spec.name], files.table.spec.name
            if resident and share.resident:
                # Progress counted these bytes when they were allocated;
                # whoever listens may want to end it all the same.
                poll = None if on_bytes is None else partial(on_bytes, 0)
                bad_pages[name] = load_table(files, resident.array[share.resident_start :], poll)
        _, block = self.attachments.own.give(number)
        blocks = self._blocks(resident)
        memories = table_memories(opened, self.plan.shares, blocks, self._tags[identity], self.caches)
        shared = SharedEpochs(self._control.array, number, block, reports=False)
        what = f"the store {opened.image.path}"
        engine = NativeEngine(what, opened.files, memories, self._choice, self.plan.staging, opened.placed, shared)
        for index, name in enumerate(opened.image.tables):
            if name in bad_pages:
                engine.set_resident(index, bad_pages[name])
        return Version(number, self._tags[identity], opened, resident, bad_pages, engine)

    def _tag(self, identity: str) -> None:
        """Gives a store's entries in the recency caches a tag of their own, the same as before where it is known."""
        if identity in self._tags:
            return
        if len(self._tags) == TAGS:
            served = self.current.opened.image.identity
            self._tags = {served: self._tags[served]}
        self._tags[identity] = next(tag for tag in range(TAGS) if tag not in self._tags.values())
        for cache in self.caches.values():
            cache.drop_tag(self._tags[identity])

    def _blocks(self, resident: SharedBlock | None) -> Blocks:
        empty = np.empty(0, dtype=np.uint8)
        rows = resident.array if resident else empty
        return Blocks(self._control.array, self._static.array, self._recency.array, rows)

    def _load_placement(
        self, opened: OpenVersion, placement: Placement | None, on_bytes: Callable[[int], None]
    ) -> None:
        """Fills the slots with the placement's hottest entries, and publishes the first epoch."""
        live = {}
        for name, slots in self.slots.items():
            placed = placement.tables.get(name) if placement else None
            num_loaded = 0
            if placed and opened.placed:
                layout, share = opened.image.tables[name], self.plan.shares[name]
                parts = static_parts(self._static.array, layout, share)
                load_indexes(opened.placed, placed, parts.file_area)
                parts.file_head[:] = index_head([index.num_buckets for index in placed.indexes])
                num_loaded = min(placed.num_entries, slots.capacity)
                end = share.records_start + round_up(num_loaded * placed.record_bytes, UNIT_BYTES)
                memory = self._static.array[share.records_start : end]
                load_records(opened.placed, placed, memory, num_loaded, layout.seed, lambda _: on_bytes(0))
                slots.adopt(num_loaded)
            live[name] = slots.keys >= 0
        self._publish(self.current, live)
        self._settle()

    # Clients

    def attach(
        self, who: object, pid: int, *, on_gpu: bool = False, pidfd: int | None = None
    ) -> tuple[dict[str, Any], list[int]]:
        """Returns what a new client needs to map the tiers: a message, and descriptors, which stay ours.

        on_gpu: its kernels would read the static set, and may, where that is lent. Raises `DaemonError` where there is
        no memory or descriptor for its block.
        """
        # Of a process of another PID namespace (0), only a pidfd tells the end.
        on_gpu = on_gpu and self._static.lent_fd >= 0 and (pid > 0 or pidfd is not None)
        with self.attachments.lock:
            version = self.current
            given = self.attachments.attach(who, pid, version.number, on_gpu=on_gpu, pidfd=pidfd)
        return self._layout(version, *given, on_gpu=on_gpu)

    def move(self, who: object) -> tuple[dict[str, Any], list[int]] | None:
        """Returns the same for a client that is to move to the version served now; None where it is gone,
        or has moved."""
        version = self.current
        given, on_gpu = self.attachments.move(who, version.number), self.attachments.is_on_gpu(who)
        return None if given is None else self._layout(version, *given, on_gpu=on_gpu)

    def _layout(
        self, version: Version, block_fd: int, block: np.ndarray, *, on_gpu: bool = False
    ) -> tuple[dict[str, Any], list[int]]:
        image, resident = version.opened.image, version.resident
        layout = {
            "lent": on_gpu,
            "store": version.path,
            "identity": image.identity,
            "version": version.number,
            "tag": version.tag,
            "placement": version.opened.placed.placement.epoch if version.opened.placed else None,
            "sizes": [len(self._control.array), len(self._static.array), len(self._recency.array), len(block)]
            + ([len(resident.array)] if resident else []),
            "tables": {name: share.to_dict() for name, share in self.plan.shares.items()},
            "bad_pages": {
                name: {str(page): text for page, text in bad.items()} for name, bad in version.bad_pages.items()
            },
            "budget_bytes": self.plan.budget_bytes,
            "dram_bytes": self.plan.dram_bytes,
        }
        shared = [self._control.fd, self._static.lent_fd if on_gpu else self._static.fd, self._recency.fd]
        return layout, [*shared, block_fd, *([resident.fd] if resident else [])]

    def left(self, who: object, version: int) -> None:
        """A client says that it looks nothing up in a version any more."""
        if version != self.current.number:
            self.attachments.left(who, version)

    # Epochs

    def _publish(self, version: Version, live: Mapping[str, np.ndarray]) -> None:
        """Publishes the next epoch, whose static sets are the slots of `live`, bool [S] by table;
        only one may be alive."""
        for name, slots in self.slots.items():
            slots.index(self.epoch + 1, live[name])
        for name, slots in self.slots.items():  # nothing fails from here on
            slots.live = live[name]
        self.epoch += 1
        version.epoch = self.epoch
        kernels.publish_epoch(self._control.array, version.number, self.epoch)
        self._published_at = time.monotonic()
        self.num_changes += 1

    def change(self, enter: Mapping[str, Pairs], leave: Mapping[str, np.ndarray]) -> int:
        """Writes entries into free slots, lets others go, and publishes that as the next epoch;
        returns how many entered.

        enter: by table, no more than it has free slots; leave: slots, int64, by table. Blocks: reads, and waits a while
        for the epoch before to be left. Entries that cannot be read are left out. Raises `DaemonError` where a GPU is
        still in the epoch before.
        """
        with self.changes:
            self._settle_first()
            live, num_entered = {}, 0
            try:
                for name, slots in self.slots.items():
                    live[name] = slots.live.copy()
                    if name in leave:
                        live[name][leave[name]] = False
                    if name in enter and len(enter[name][1]):
                        written = self._write(self.current, name, *enter[name])
                        live[name][written] = True
                        num_entered += len(written)
                self._publish(self.current, live)
            except BaseException:
                for slots in self.slots.values():
                    slots.free_dead()
                raise
            self._settle()
            return num_entered

    def _settle_first(self) -> None:
        """Settles what was changed before; raises `DaemonError` where that cannot be."""
        if not self._settle():
            if self.attachments.ending.is_set():
                raise DaemonError("the daemon ends; nothing is changed any more")
            processes = ", ".join(map(process_text, self.attachments.waiting_for))
            raise DaemonError(
                f"the GPU of {processes} still reads what epoch {self.epoch - 1} holds, though epoch {self.epoch} was "
                f"there for {time.monotonic() - self._published_at:.0f} s; nothing more is changed: end that process, "
                f"or let it go on, then ask again"
            )

    def _settle(self) -> bool:
        """Lets only the newest epoch be read, and frees what it does not name,
        and a version that is not served any more.

        Returns whether that was done: not, where a GPU still reads what only the epoch before names.
        """
        if self.settled_epoch == self.epoch:
            return True
        wait_left = partial(self.attachments.wait_left, since=self._published_at)
        if self._retiring:
            old = self._retiring
            if not wait_left(old.number, old.epoch, is_last=True):
                return False
            kernels.reclaim_version(self._control.array, old.number)
            if not wait_left(
                old.number, old.epoch, is_last=False
            ):  # a GPU may have come meanwhile, and none can any more
                return False
            self._retiring = None
            self.attachments.own.left(old.number)
            old.close()
        elif not wait_left(self.current.number, self.epoch - 1, is_last=False):
            return False
        kernels.reclaim_epochs_before(self._control.array, self.current.number, self.epoch)
        for slots in self.slots.values():
            slots.free_dead()
        self.settled_epoch = self.epoch
        return True

    def _write(self, version: Version, name: str, order_index: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Reads entries of a version and writes them into free slots; returns the slots,
        of those that could be read."""
        layout = version.opened.image.tables[name]
        written = [np.empty(0, dtype=np.int64)]
        for at in batches(order_index, len(layout.spec.orders)):
            good, entries = self.read(version, name, order_index[at], keys[at])
            written.append(self.slots[name].write(order_index[at][good], keys[at][good], entries, layout.seed))
        return np.concatenate(written)

    def read(self, version: Version, name: str, order_index: np.ndarray, keys: np.ndarray) -> Pairs:
        """Looks up entries of one of `batches`; what comes from NVMe is offered to the recency cache on the way.

        Returns which could be had, int64 [m], and those entries, uint8 [m, entry_bytes]. Blocks on the disk.
        """
        spec = version.opened.image.tables[name].spec
        tokens, places = pairs_as_tokens(order_index, keys, len(spec.orders))
        out = np.empty((len(tokens), spec.num_heads, spec.row_bytes), dtype=np.uint8)
        try:
            version.engine.lookup(list(version.opened.image.tables).index(name), tokens, out)
            return np.arange(len(keys)), out.reshape(-1, spec.entry_bytes)[places]
        except (CorruptPageError, TimeoutError) as error:
            self.num_read_errors += 1
            event(logger, logging.ERROR, "read_failed", table=name, keys=len(keys), why=str(error))
            is_late = isinstance(error, TimeoutError)  # a disk that does not answer would cost each half as long again
        if len(keys) == 1 or is_late:
            return np.empty(0, dtype=np.int64), np.empty((0, spec.entry_bytes), dtype=np.uint8)
        middle = len(keys) // 2  # one bad page costs its own entries only
        first, second = (
            self.read(version, name, order_index[half], keys[half]) for half in (np.s_[:middle], np.s_[middle:])
        )
        return np.concatenate([first[0], second[0] + middle]), np.concatenate([first[1], second[1]])

    def are_static(self, name: str, order_index: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Returns which (order index, key) pairs are static in the newest epoch, bool [n]."""
        opened = self.current.opened.image.tables
        tokens, places = pairs_as_tokens(order_index, keys, len(opened[name].spec.orders))
        sources = np.empty(tokens.shape, dtype=np.uint8)
        self.current.engine.locate(list(opened).index(name), tokens, sources)
        found: np.ndarray = sources.reshape(-1)[places] == STATIC
        return found

    def recency_entries(self) -> dict[str, int]:
        """Returns about how many entries the recency cache of each table holds: counted in a sample of its sets."""
        counted = {}
        for name, cache_share in self.plan.shares.items():
            if cache_share.resident:
                continue
            memory = recency_part(self._recency.array, self.current.opened.image.tables[name], cache_share)
            sets = memory[: cache_share.num_sets * kernels.CACHE_SET_BYTES].reshape(-1, kernels.CACHE_SET_BYTES)
            sample = (
                sets[:: max(1, cache_share.num_sets // RECENCY_SAMPLE_SETS), : 8 * CACHE_WAYS].copy().view(np.int64)
            )
            counted[name] = round(float((sample >= 0).mean()) * cache_share.num_sets * CACHE_WAYS)
        return counted

    # Versions

    def swap(
        self,
        path: str | os.PathLike[str],
        counts_of: Callable[[str, np.ndarray, np.ndarray], np.ndarray],
        move: Callable[[], None],
        note: Callable[[str, str, str], None] = lambda *_: None,
    ) -> dict[str, Any]:
        """Serves another store in place of this one, for every client; returns what was done.
        Blocks until all have moved.

        Half of the static slots go to the new version's hottest entries while clients still look up in the old; then
        they move. counts_of: (table, order index, keys) -> how often each is asked for; move: tells every
        client of the new version, by `move`; note: (path, identity, path before) of what is served from now on, kept
        before any client sees it. Raises what `note` and opening a store raises, and
        `FingerprintMismatchError` where the tables are not the same, `DaemonError` where a GPU is still in the epoch
        before; the old version is then still served.
        """
        with self.changes:
            started, old, previous, noted = time.monotonic(), self.current, self.previous_path, False
            self._settle_first()  # a version that is not over may still have the tag that the new one gets
            # Static is what is asked for now; the placement of the store itself is for what stays free.
            opened = self._open(path, "none")
            try:
                self._check_tables(opened)
                version = self._make_version(opened, old.number + 1, None)
            except BaseException:
                opened.close()
                raise
            try:
                hot = self._hottest_half(counts_of)
                self.change({}, {name: np.flatnonzero(slots.live & ~hot[name]) for name, slots in self.slots.items()})
                self._settle_first()
                live, num_warmed = {}, 0
                for name, slots in self.slots.items():
                    wanted = np.flatnonzero(hot[name])[: slots.num_free]
                    written = self._write(version, name, slots.order_index[wanted], slots.keys[wanted])
                    live[name] = np.zeros(len(slots.keys), dtype=bool)
                    live[name][written] = True
                    num_warmed += len(written)
                note(version.path, opened.image.identity, old.path)
                noted = True
                with self.attachments.lock:  # who attaches from here on gets the new version
                    self._publish(version, live)
                    self.current, self.previous_path, self._retiring = version, old.path, old
            except BaseException:
                if noted:
                    _note_again(note, old, previous)
                self.attachments.own.left(version.number)
                version.close()
                if self.settled_epoch == self.epoch:
                    for slots in self.slots.values():
                        slots.free_dead()
                raise
            event(logger, logging.INFO, "version_published", version=version.number, store=path, warmed=num_warmed)
            move()
            self._settle()
            return {
                "version": version.number,
                "store": version.path,
                "warmed": num_warmed,
                "seconds": time.monotonic() - started,
            }

    def _check_tables(self, opened: OpenVersion) -> None:
        ours = [layout.spec for layout in self.current.opened.image.tables.values()]
        difference = same_tables(ours, [layout.spec for layout in opened.image.tables.values()])
        if difference:
            kind = FingerprintMismatchError if "fingerprint" in difference else ConfigError
            raise kind(
                f"{opened.image.path} cannot take the place of {self.current.path}: {difference}; clients hash and "
                f"decode by the old tables: serve it by a daemon of its own"
            )

    def _hottest_half(self, counts_of: Callable[[str, np.ndarray, np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
        """Returns which live slots to keep so that half of all are free, bool [S] by table: those asked for most."""
        hot = {}
        for name, slots in self.slots.items():
            counted = slots.counted(partial(counts_of, name))
            hot[name] = np.zeros(len(slots.keys), dtype=bool)
            hot[name][hottest_indexes(counted, len(slots.keys) // 2)] = True
            hot[name] &= slots.live
        return hot

    def end_waits(self) -> None:
        """Has nobody wait for clients any more: what would be changed is given up."""
        self.attachments.ending.set()

    def close(self) -> None:
        """Ends the daemon's own lookups and closes files and descriptors. Clients keep what they mapped."""
        self.end_waits()
        if not self.changes.acquire(timeout=CLOSE_WAIT_S):
            event(logger, logging.ERROR, "change_does_not_end", seconds=CLOSE_WAIT_S)
            return
        with self.changes:
            self.changes.release()
            for version in filter(None, (self._retiring, self.current)):
                version.close()
        self.attachments.close()
        for block in (self._control, self._static, self._recency):
            block.close()


def _note_again(note: Callable[[str, str, str], None], version: Version, previous: str | None) -> None:
    """Takes back what was noted of a version that was not published after all."""
    try:
        note(version.path, version.opened.image.identity, previous or version.path)
    except DaemonError as error:
        event(logger, logging.ERROR, "swap_not_taken_back", store=version.path, error=error)


def batches(order_index: np.ndarray, num_orders: int) -> Iterator[np.ndarray]:
    """Cuts pairs into parts of at most READ_TOKENS_MAX of any order, few tokens when packed; yields places, int64."""
    rank = np.empty(len(order_index), dtype=np.int64)
    for order in range(num_orders):
        mine = np.flatnonzero(order_index == order)
        rank[mine] = np.arange(len(mine))
    by_rank = np.argsort(rank, kind="stable")
    ends = np.searchsorted(rank[by_rank], np.arange(0, rank.max(initial=-1) + 1 + READ_TOKENS_MAX, READ_TOKENS_MAX))
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        if end > start:
            yield by_rank[start:end]


class _Progress:
    """Adds up bytes for a callback of (bytes done, bytes in all)."""

    def __init__(self, on_progress: OnProgress | None, total: int) -> None:
        self._on_progress, self._total, self._done = on_progress, total, 0

    def add(self, num_bytes: int) -> None:
        """Counts more bytes."""
        self._done += num_bytes
        if self._on_progress:
            self._on_progress(min(self._done, self._total), self._total)
