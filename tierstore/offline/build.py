"""build: checkpoint -> row stream -> pages -> shards + catalog.

Input: `TableSource`s, whose rows are read range by range. Output: a store that opens only after the ready mark,
the last thing written. A shard is written to a temporary name, synced, renamed, and then noted in the catalog; a build
killed anywhere goes on with the first shard that is not noted. Errors: before it writes, what cannot fit or is
another's; then it leaves no folder or lock behind. Threads: see `shards`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..causes import named
from ..errors import BudgetError, ConfigError, FormatError
from ..file_systems import file_system_of, why_not_local
from ..formats.catalog import (
    CATALOG_FILE,
    LOCK_FILE,
    CatalogImage,
    create_catalog,
    mark_ready,
    paged_layouts,
    read_catalog,
    record_origin,
)
from ..formats.checkpoint import TableSource
from ..formats.in_place import InPlaceLayout
from ..formats.origin import changed_files, same_checkpoint
from ..formats.page import page_seed, repair_command
from ..formats.table_source import cut_sources
from ..layout import PageShape, ShardRecord, TableLayout
from ..process.progress import OnProgress
from ..units import format_bytes
from .in_place import files_of, lay_out_tables_in_place, open_readers, sources_in_place
from .shards import BuildProgress, build_shards, shards_still_right
from .store_lock import locked_store

JOBS_MAX = 64
SPARE_DISK_BYTES = 64 << 20  # left free beside the shards: the catalog and the file system's own records


@dataclass(frozen=True)
class BuildPlan:
    """What a build will write, what is there already, and what the disk has: the preflight."""

    tables: tuple[TableLayout, ...]
    bytes_done: int
    bytes_free: int

    @property
    def paged(self) -> tuple[TableLayout, ...]:
        """What gets shards: the tables, or, of those in place, their side tables."""
        return tuple(paged_layouts({table.spec.name: table for table in self.tables}).values())

    @property
    def in_place(self) -> bool:
        """Whether rows stay in the checkpoint's files."""
        return any(isinstance(table, InPlaceLayout) for table in self.tables)

    @property
    def num_tables(self) -> int:
        """Tables in the store."""
        return len(self.tables)

    @property
    def num_rows(self) -> int:
        """Rows of all tables."""
        return sum(table.spec.num_rows for table in self.tables)  # a slice's own

    @property
    def num_shards(self) -> int:
        """Shards of all tables."""
        return sum(table.num_shards for table in self.paged)

    @property
    def table_bytes(self) -> int:
        """Bytes of all rows, without pages' padding."""
        return sum(table.spec.table_bytes for table in self.tables)

    @property
    def store_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(table.store_bytes for table in self.tables)

    @property
    def bytes_needed(self) -> int:
        """Bytes of disk that the rest of the build takes."""
        left = self.store_bytes - self.bytes_done
        return left + SPARE_DISK_BYTES if left else 0


@dataclass(frozen=True)
class BuildReport:
    """What a finished build did: shards built now, shards kept from an earlier run."""

    bytes_written: int
    seconds: float
    shards_built: int
    shards_kept: int


def build_store(
    store_path: str | os.PathLike[str],
    sources: Sequence[TableSource],
    *,
    origin: dict[str, Any],
    attachments: dict[str, bytes] | None = None,
    shard_bytes: int = 1 << 30,
    jobs: int | None = None,
    allow_network_fs: bool = False,
    in_place: bool = False,
    slice: tuple[int, int] | None = None,
    on_plan: Callable[[BuildPlan], None] | None = None,
    on_progress: OnProgress | None = None,
) -> BuildReport:
    """Builds a store, or resumes it if the same build stopped. Blocks until the store is ready.

    origin: who the checkpoint is (`Checkpoint.to_dict()`; its "digest" goes into every page's checksum). attachments:
    the adapter's own records, kept in the catalog (hash, token map). shard_bytes: the largest shard. jobs: shards built
    at once, by default one for each processor, at most 4. in_place: leave the rows where they are, and write what
    checks them (`formats.in_place`); the same build again notes where the files are now. slice: (I, N), only slice I of
    N of every table, of which alone bytes are read (`slices.slice_bounds`). on_plan gets the preflight
    before anything is written, on_progress (bytes done, bytes in all) now and then, both in the calling thread.

    Raises `BudgetError` if the disk has too little room (also midway: free some and run again), `ConfigError` if
    the path is another's, not writable, or not on a local file system (unless allowed), or there is no such slice.
    What is built stays for the next run.
    """
    path = Path(store_path)
    attachments = attachments or {}
    if slice is not None:
        if any(source.spec.is_slice for source in sources):
            raise ConfigError(f"{path}: slice {slice[0]}/{slice[1]} of a slice; make others of it: tierstore reslice")
        sources = cut_sources(sources, *slice)
        origin = origin | {"slice": f"{slice[0]}/{slice[1]}"}
    files = files_of(path, sources, origin) if in_place else ()
    lay_out = partial(_lay_out, sources, shard_bytes=shard_bytes, in_place=in_place)
    tables = lay_out(origin["digest"])
    jobs = min(os.cpu_count() or 1, 4) if jobs is None else jobs
    if not 1 <= jobs <= JOBS_MAX:
        raise ConfigError(f"jobs: {jobs} is not within 1 to {JOBS_MAX}")
    started = time.monotonic()
    progress, plan = None, None
    try:
        check_place(path, allow_network_fs)
        with locked_store(path) as made, contextlib.ExitStack() as stack:
            image = _begun(path)
            if image is not None and same_checkpoint(image.origin, origin, sources):
                origin = origin | {"digest": image.origin["digest"]}  # pages are sealed with it
                tables = lay_out(origin["digest"])
            _check_resumable(path, image, tables, origin, attachments)
            readers = open_readers(sources, tables, stack)
            for reader in readers.values():
                reader.check_unchanged()
            done = _finished_shards(path, image)
            if image is not None and changed_files(image.origin, sources):
                done = shards_still_right(path, image, sources, readers, done, jobs, on_progress)
                record_origin(path, origin, files)
            elif image is not None and image.files != files:
                record_origin(path, origin, files)  # moved, and nothing more
            bytes_done = sum(shard.num_bytes for shards in done.values() for shard in shards.values())
            plan = BuildPlan(tuple(tables.values()), bytes_done, shutil.disk_usage(path).free)
            if on_plan:
                on_plan(plan)
            _check_room(path, plan)
            made.clear()  # from here on a build has begun, and what it leaves is there to be resumed
            if image is None:
                create_catalog(path, tables, origin, attachments, files)
            progress = BuildProgress(bytes_done)
            paged = paged_layouts(tables)
            built = build_shards(path, readers, paged, done, jobs, progress, plan.store_bytes, on_progress)
            if image is None or not image.ready:
                mark_ready(path)
    except OSError as error:
        needed_bytes = plan.store_bytes - progress.bytes_done if progress and plan else None
        note = "run the same command then: finished shards are kept"
        raise named(error, path, error.filename, writing=True, needed_bytes=needed_bytes, note=note) from error
    kept = plan.num_shards - built
    return BuildReport(plan.store_bytes - bytes_done, time.monotonic() - started, built, kept)


def build_from_store(
    in_place_path: str | os.PathLike[str], store_path: str | os.PathLike[str], **options: Any
) -> BuildReport:
    """Builds a store with shards of a store in place: the same bytes as from its checkpoint, each block checked.

    options: as of `build_store`. Raises what that raises, `ConfigError` for a store that has shards already,
    `CorruptPageError` if a file of the checkpoint is not what it was.
    """
    image = read_catalog(in_place_path)
    if not image.is_in_place:
        raise ConfigError(
            f"{in_place_path} is a store with shards already; copy its folder, or build from a checkpoint"
        )
    sources = sources_in_place(image)
    return build_store(store_path, sources, origin=image.origin, attachments=image.attachments, **options)


def _lay_out(
    sources: Sequence[TableSource], origin_digest: str, *, shard_bytes: int, in_place: bool
) -> dict[str, TableLayout]:
    return (lay_out_tables_in_place if in_place else lay_out_tables)(sources, origin_digest, shard_bytes)


def lay_out_tables(sources: Sequence[TableSource], origin_digest: str, shard_bytes: int) -> dict[str, TableLayout]:
    """Returns each table's pages and shards, by name. Pure. Raises `ConfigError` for no tables, or two of one name."""
    if not sources:
        raise ConfigError("the checkpoint has no table to build; name a tensor with --tensor")
    tables: dict[str, TableLayout] = {}
    for index, source in enumerate(sources):
        spec = source.spec
        if spec.name in tables:
            raise ConfigError(f"two tables are called {spec.name}; a store needs different names")
        shape = PageShape.of_rows(spec.row_bytes)
        if shard_bytes < shape.page_bytes:
            raise ConfigError(f"--shard-bytes {shard_bytes} is less than one page of {shape.page_bytes} bytes")
        readable = re.sub(r"[^A-Za-z0-9._-]", "_", spec.name)[:80]
        tables[spec.name] = TableLayout(
            spec=spec,
            page_bytes=shape.page_bytes,
            rows_per_page=shape.rows_per_page,
            num_pages=shape.num_pages(spec.own_rows),
            pages_per_shard=shard_bytes // shape.page_bytes,
            seed=page_seed(spec, origin_digest),
            folder=f"shards/{index}-{readable}",
        )
    return tables


def check_place(path: Path, allow_network_fs: bool) -> None:
    """Refuses, before anything is made, a path that is a file, has something else in it, or is on a network."""
    existing = path
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(f"{existing} is a file; a store is a folder: give another path")
    if existing == path:
        check_foreign(path)
    reason = "" if allow_network_fs else why_not_local(file_system_of(existing))
    if reason:
        raise ConfigError(
            f"{path} is on {reason}: LMDB's locks and memory maps do not hold over a network; "
            f"build on a local disk, or pass --allow-network-fs if only one host ever uses it"
        )


def check_foreign(path: Path) -> None:
    """Refuses a folder with something in it and no catalog."""
    foreign = [e.name for e in path.iterdir() if e.name != LOCK_FILE and not e.name.startswith(CATALOG_FILE)]
    if foreign and not (path / CATALOG_FILE).exists():
        raise ConfigError(f"{path} holds {len(foreign)} other files ({foreign[0]}, ...); give an empty folder")


def _begun(path: Path) -> CatalogImage | None:
    """Returns the catalog of a build begun earlier, None if nothing was begun."""
    if not (path / CATALOG_FILE).exists():
        check_foreign(path)  # again, under the lock
        return None
    return read_catalog(path, must_be_ready=False)


def _check_resumable(
    path: Path,
    image: CatalogImage | None,
    tables: dict[str, TableLayout],
    origin: dict[str, Any],
    attachments: dict[str, bytes],
) -> None:
    """Refuses to go on with a build of something else."""
    if image is None:
        return
    state = "a finished store" if image.ready else "an unfinished build"
    remedy = "give another path" if image.ready else "give another path, or remove it"
    if image.origin.get("digest") != origin["digest"]:
        raise ConfigError(
            f"{path} holds {state} of another checkpoint (digest {str(image.origin.get('digest'))[:12]}, this one has "
            f"{origin['digest'][:12]}); {remedy}"
        )
    if image.tables != tables or image.attachments != attachments:
        raise ConfigError(
            f"{path} holds {state} of the same checkpoint with other tables, shard size or hash; "
            f"repeat its options, or {remedy}"
        )


def _finished_shards(path: Path, image: CatalogImage | None) -> dict[str, dict[int, ShardRecord]]:
    """Returns the shards that the catalog notes and the disk has whole; removes files that a killed build left."""
    done: dict[str, dict[int, ShardRecord]] = {}
    for name, shards in (image.shards if image else {}).items():
        done[name] = {}
        for index, shard in shards.items():
            file = path / shard.file
            if file.is_file() and file.stat().st_size == shard.num_bytes:
                done[name][index] = shard
            elif image is not None and image.ready:
                raise FormatError(
                    f"shard {index} of table {name}: {file} is missing or short in a finished store; repair it: "
                    f"{repair_command(path)}"
                )
    for leftover in (path / "shards").glob("*/*.new"):
        leftover.unlink()
    return done


def _check_room(path: Path, plan: BuildPlan) -> None:
    if plan.bytes_needed > plan.bytes_free:
        raise BudgetError(
            f"{path}: the store needs {format_bytes(plan.bytes_needed)} more ({plan.bytes_needed} bytes), the disk has "
            f"{format_bytes(plan.bytes_free)} free ({plan.bytes_free} bytes); free some or give a path on another disk"
        )
