"""export: a store's rows back into a checkpoint that any loader takes: the layout that they came from, byte for byte.

Input: a store, the checkpoint that it was built from, and which commit or version. Output: a new folder with the
checkpoint's files, in which rows that training touched are new and all other bytes are the same; and the SHA-256 of
every file. Errors: before anything is written, a checkpoint that has changed since the build, by name, and what the
disk has no room for.

Rows that nobody touched come from the checkpoint's files if these are still the very files that the store was built
from, else from the store, page by page with their checksums. The folder appears whole, when everything is durable.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass
from pathlib import Path

from tierstore.causes import named
from tierstore.errors import BudgetError, ConfigError
from tierstore.formats.catalog import read_catalog
from tierstore.offline.exporting.new_files import write_files
from tierstore.offline.exporting.new_folder import check_free, new_folder
from tierstore.offline.exporting.touched_rows import TouchedRows
from tierstore.offline.slice_set import at_one_version, join_slices
from tierstore.process.progress import OnProgress
from tierstore.process.workers import joined_pool
from tierstore.units import format_bytes, parse_bytes

from .export_origin import ExportOrigin, find_origin
from .export_rows import TouchedTables, open_touched
from .tables_layout import lay_out_states

JOBS_MAX = 64
SPARE_DISK_BYTES = 64 << 20
WAIT_SECONDS = 0.25
PARTS_FOLDER = ".parts"  # of touched rows while they are sorted; gone before the export appears
_UNSORTED = TouchedRows(Path(), 0, {})


@dataclass(frozen=True)
class ExportedFile:
    """A file of an export."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        files: In order of name.
        left_out: Files of the checkpoint that the export does not have, each with the reason.
        from_store: Tables whose untouched rows came from the store, because the checkpoint's files were copied or
            moved since the build, or are not there.
        commit: The commit that was exported, or None.
        version: The version that was exported, or None.
        touched_rows: Rows that training changed, by table.
        saturated_values: Changed values beyond the codec's largest, which they became, by table.
        seconds: All of it took.
    """

    files: tuple[ExportedFile, ...]
    left_out: Mapping[str, str]
    from_store: tuple[str, ...]
    commit: int | None
    version: int | None
    touched_rows: Mapping[str, int]
    saturated_values: Mapping[str, int]
    seconds: float

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.num_bytes for file in self.files)


def export_checkpoint(
    store_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    version: int | None = None,
    commit: int | None = None,
    states: bool = False,
    tables_only: bool = False,
    dram: int | str = "256MiB",
    jobs: int | None = None,
    on_progress: OnProgress | None = None,
) -> ExportReport:
    """Writes a store's tables as a checkpoint, in the layout of the one that it was built from. Blocks until durable.

    Args:
        store_path: The store, or all stores with slices of its tables. Readers and a training go on meanwhile.
        out: A new folder, which appears whole.
        source: The checkpoint that the store was built from; of a store in place it is found.
        version: A published version; 0: the rows as they were built.
        commit: A commit of the training; of slices, by its number in the one with row 0. Without version and commit:
            the newest commit, without any the newest version.
        states: Also write the optimizer's state of all touched rows, as safetensors in the folder "states".
        tables_only: Write the tables' tensors alone, under their published names. `source` may then be a folder
            without tensors, whose other files come along. So it is with a store that `init` made.
        dram: What sorting touched rows may take.
        jobs: Threads that sort touched rows, then files written at once; by default one for each processor, at most 4.
        on_progress: Called with (bytes done, bytes in all), in the calling thread.

    Raises:
        ConfigError: Slices are missing, or not of one store; the checkpoint is another one by now; there is no such
            commit or version; or `out` holds something or cannot be written.
        BudgetError: The disk has too little room, or `dram` is too small.
        FormatError: A file changed while it was read.
        CorruptPageError: A page, block or training record that is needed is damaged.
        ValueError: Both a version and a commit are given, or states of a version.
    """
    started = time.monotonic()
    paths = [Path(store_path)] if isinstance(store_path, str | os.PathLike) else [Path(path) for path in store_path]
    out, memory_bytes = Path(out), parse_bytes(dram, "dram")
    jobs = min(os.cpu_count() or 1, 4) if jobs is None else jobs
    if not 1 <= jobs <= JOBS_MAX:
        raise ConfigError(f"jobs: {jobs} is not within 1 to {JOBS_MAX}")
    check_free(out)
    images = [read_catalog(path, may_be_initial=True) for path in paths]
    is_one = len(images) == 1 and not images[0].is_slice
    slices = None if is_one else at_one_version(join_slices(images), 0)
    image = images[0] if slices is None else slices.whole_image()
    found = find_origin(image, None if source is None else Path(source), tables_only, slices)
    with contextlib.closing(open_touched(image, version, commit, states=states, slices=slices)) as touched:
        written = _write(out, paths, found, touched, memory_bytes, jobs, on_progress)
    return ExportReport(
        tuple(sorted(written.files, key=lambda file: file.name)),
        written.left_out,
        tuple(name for name, each in found.rows.items() if not each.from_files and not image.is_initial),
        touched.commit,
        touched.version,
        written.touched_rows,
        touched.saturated,
        time.monotonic() - started,
    )


@dataclass(frozen=True)
class _Written:
    files: list[ExportedFile]
    left_out: Mapping[str, str]
    touched_rows: dict[str, int]


def _write(
    out: Path,
    store_paths: Sequence[Path],
    found: ExportOrigin,
    touched: TouchedTables,
    memory_bytes: int,
    jobs: int,
    on_progress: OnProgress | None,
) -> _Written:
    """Writes the folder. Touched rows are sorted in it first, table after table."""
    kept_apart = [*store_paths, out]
    preview = found.lay_out(dict.fromkeys(touched.tables, _UNSORTED), kept_apart)
    needed = sum(file.num_bytes for file in preview.files) + touched.disk_bytes
    _check_room(out, needed)
    try:
        with new_folder(out) as folder:
            parts = folder / PARTS_FOLDER
            rows = _sort(parts, found, touched, memory_bytes, jobs)
            layout = found.lay_out(rows, kept_apart)
            states = [] if touched.states is None else lay_out_states(rows, touched.states)
            files = [*states, *layout.files]
            digests = write_files(folder, files, jobs, on_progress)
            shutil.rmtree(parts, ignore_errors=True)
    except OSError as error:
        raise named(error, out, error.filename, writing=True, needed_bytes=needed) from error
    exported = [ExportedFile(file.name, file.num_bytes, digests[file.name]) for file in files]
    return _Written(exported, layout.left_out, {name: each.num_rows for name, each in rows.items()})


def _sort(
    folder: Path, found: ExportOrigin, touched: TouchedTables, memory_bytes: int, jobs: int
) -> dict[str, TouchedRows]:
    """Sorts the touched rows of all tables; names come in their order.

    As many tables at once as memory has room for, up to `jobs`: one that has to be cut is written and read once more.
    Threads that are left over share the pieces of a table.
    """
    needed = max(map(touched.sorting_bytes, touched.tables), default=1)
    at_once = max(1, min(jobs, len(touched.tables), memory_bytes // needed))
    stop = threading.Event()

    def sort(name: str, number: int) -> TouchedRows:
        return touched.sort(
            name, found.rows[name].before, folder / f"{number}", memory_bytes // at_once, stop, -(-jobs // at_once)
        )

    with joined_pool(at_once, "tierstore-sort") as pool:
        try:
            tasks = {name: pool.submit(sort, name, number) for number, name in enumerate(touched.tables)}
            pending = set(tasks.values())
            while pending:
                finished, pending = wait(pending, timeout=WAIT_SECONDS, return_when=FIRST_EXCEPTION)
                for task in finished:
                    task.result()
            return {name: task.result() for name, task in tasks.items()}
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _check_room(out: Path, total: int) -> None:
    existing = out.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if total + SPARE_DISK_BYTES > free:
        raise BudgetError(
            f"{out}: the export needs {format_bytes(total + SPARE_DISK_BYTES)} ({total + SPARE_DISK_BYTES} bytes), the "
            f"disk has {format_bytes(free)} free ({free} bytes); free some or give a path on another disk"
        )
