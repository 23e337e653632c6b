"""Shards of a build: written by a pool of threads, or made again to compare them with those that are there.

Input: readers of the tables' rows, and what is done already. Output: shard files, each synced under its last name
before the catalog notes it. Errors: those of the readers, `OSError` of the disk, `ConfigError` for rows that are others
now.

Threads: each of `jobs` workers makes whole shards (read, interleave, digest; the interpreter lock is released in all
three), has the system read what comes next, and a thread write what is done; the calling thread reports progress.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..causes import NEW_SUFFIX
from ..durable import replacing, sync_folder
from ..errors import ConfigError, FormatError
from ..formats.catalog import CatalogImage, forget_shards, record_shard
from ..formats.checkpoint import PlaneReader, TableSource
from ..formats.origin import changed_files
from ..formats.page import seal_pages
from ..layout import ShardRecord, TableLayout
from ..process.progress import OnProgress
from ..process.workers import joined_pool
from .page_writer import writing

CHUNK_BYTES = 4 << 20  # pages that a worker makes at once; with those that are written and rows, 12 MiB a job
PROGRESS_SECONDS = 0.25
FILES_NAMED_MAX = 4  # in a message

_log = logging.getLogger(__name__)


@dataclass
class BuildProgress:
    """Bytes written so far, and whether to give up. Writers: the workers, under the lock."""

    bytes_done: int
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, num_bytes: int) -> None:
        with self.lock:
            self.bytes_done += num_bytes


def shards_still_right(
    path: Path,
    image: CatalogImage,
    sources: Sequence[TableSource],
    readers: dict[str, PlaneReader],
    done: dict[str, dict[int, ShardRecord]],
    jobs: int,
    on_progress: OnProgress | None,
) -> dict[str, dict[int, ShardRecord]]:
    """Returns those finished shards that the checkpoint's files, which are other ones now, still give.

    Each is made again without being written, and its SHA-256 compared. A finished store with others is refused.
    """
    names = ", ".join(changed_files(image.origin, sources)[:FILES_NAMED_MAX])
    shards = [(name, index) for name, of_table in done.items() for index in of_table]
    if shards:
        _log.warning("%s: %s may have changed since: comparing %d finished shards with it", path, names, len(shards))
    progress = BuildProgress(0)
    total = sum(shard.num_bytes for of_table in done.values() for shard in of_table.values())
    with joined_pool(jobs, "tierstore-compare") as pool:
        try:
            tasks = [
                pool.submit(_write_pages, None, readers[name], image.paged[name], index, progress)
                for name, index in shards
            ]
            _await(tasks, progress, total, on_progress)
        finally:
            progress.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    wrong = [
        (name, index)
        for (name, index), task in zip(shards, tasks, strict=True)
        if task.result() != done[name][index].sha256
    ]
    if wrong and image.ready:
        raise ConfigError(
            f"{path} is a finished store, and {names} changed since it was built: {len(wrong)} of {len(shards)} shards "
            f"hold other rows than the checkpoint now; remove {path} and build again, or give another path"
        )
    if wrong:
        _log.warning(
            "%s: %d of %d finished shards hold other rows; they are built again", path, len(wrong), len(shards)
        )
        forget_shards(path, wrong)
    return {
        name: {index: shard for index, shard in of_table.items() if (name, index) not in wrong}
        for name, of_table in done.items()
    }


def build_shards(
    path: Path,
    readers: dict[str, PlaneReader],
    tables: dict[str, TableLayout],
    done: dict[str, dict[int, ShardRecord]],
    jobs: int,
    progress: BuildProgress,
    total_bytes: int,
    on_progress: OnProgress | None,
) -> int:
    """Builds what is not done, `jobs` shards at once; returns how many. The first failure stops the others.

    If a file of the checkpoint changed meanwhile, no shard of this run counts.
    """
    todo = []
    for name, reader in readers.items():
        table = tables[name]
        (path / table.folder).mkdir(parents=True, exist_ok=True)
        missing = set(range(table.num_shards)) - done.get(name, {}).keys()
        todo += [(reader, table, index) for index in sorted(missing)]
    sync_folder(path)
    if todo:
        sync_folder(path / "shards")
    with joined_pool(jobs, "tierstore-build") as pool:
        try:
            futures = [pool.submit(_build_shard, path, reader, table, index, progress) for reader, table, index in todo]
            _await(futures, progress, total_bytes, on_progress)
        finally:
            progress.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    if todo:
        try:
            for reader in readers.values():
                reader.check_unchanged()
        except FormatError:
            forget_shards(path, [(table.spec.name, index) for _, table, index in todo])
            raise
    return len(todo)


def _await(futures: Sequence[Future[Any]], progress: BuildProgress, total: int, on_progress: OnProgress | None) -> None:
    pending = set(futures)
    while pending:
        finished, pending = wait(pending, timeout=PROGRESS_SECONDS, return_when=FIRST_EXCEPTION)
        for future in finished:
            future.result()
        if on_progress:
            on_progress(progress.bytes_done, total)


def _build_shard(path: Path, reader: PlaneReader, table: TableLayout, index: int, progress: BuildProgress) -> None:
    """Writes one shard and notes it in the catalog."""
    sha256 = write_shard(path / table.shard_file(index), reader, table, index, progress)
    if sha256 is not None:
        page_start, page_end = table.shard_pages(index)
        shard = ShardRecord(table.shard_file(index), (page_end - page_start) * table.page_bytes, sha256)
        record_shard(path, table.spec.name, index, shard)


def write_shard(
    file: Path,
    reader: PlaneReader,
    table: TableLayout,
    index: int,
    progress: BuildProgress,
    *,
    expected_sha256: str | None = None,
) -> str | None:
    """Writes one shard under a temporary name, syncs and renames it. Blocks until it is durable.

    Returns its SHA-256 (hex), None if `progress.stop` was set meanwhile. Raises `ConfigError`, and leaves the file that
    was there, if the rows give another digest than `expected_sha256`. Leaves no temporary file, whatever is raised.
    """
    with contextlib.suppress(_Stopped), replacing(file, file.with_suffix(NEW_SUFFIX), mode=0o644) as fd:
        sha256 = _write_pages(fd, reader, table, index, progress)
        if sha256 is None:
            raise _Stopped
        if expected_sha256 not in (None, sha256):
            raise ConfigError(
                f"shard {index} of table {table.spec.name}: the source's rows make SHA-256 {sha256[:16]}..., the "
                f"catalog says {expected_sha256[:16]}...: the source is another checkpoint, or it has changed since "
                f"the build; give the checkpoint that the store was built from"
            )
    return sha256


class _Stopped(Exception):
    """Another worker failed: the new file is not wanted."""


def _write_pages(
    fd: int | None, reader: PlaneReader, table: TableLayout, index: int, progress: BuildProgress
) -> str | None:
    """Streams a shard's rows into sealed pages; returns its SHA-256 (hex), None if another worker failed meanwhile.

    Without `fd` the pages are only digested.
    """
    sha256 = hashlib.sha256()
    pages_per_chunk = max(1, CHUNK_BYTES // max(table.page_bytes, table.rows_per_page * reader.source_row_bytes))
    shape = pages_per_chunk, table.page_bytes
    shard_start, shard_end = table.shard_pages(index)
    with contextlib.ExitStack() as stack:
        writer = None if fd is None else stack.enter_context(writing(fd, shape))
        buffer = np.empty(shape, dtype=np.uint8) if writer is None else writer.buffer()
        for page_start in range(shard_start, shard_end, pages_per_chunk):
            if progress.stop.is_set():
                return None
            page_end = min(page_start + pages_per_chunk, shard_end)
            rows = reader.read(*_rows_of(table, page_start, page_end))
            reader.will_read(*_rows_of(table, page_end, min(page_end + pages_per_chunk, shard_end)))
            if writer is not None:
                buffer = writer.buffer()
            pages = buffer[: page_end - page_start]
            seal_pages(rows, table.shape, page_start, table.seed, pages)
            if writer is not None:
                writer.write(pages)
            sha256.update(pages.data)
            progress.add(pages.nbytes)
        if writer is not None:
            writer.finish()
    return sha256.hexdigest()


def _rows_of(table: TableLayout, page_start: int, page_end: int) -> tuple[int, int]:
    """Returns the rows in a range of pages, half open."""
    return page_start * table.rows_per_page, min(page_end * table.rows_per_page, table.spec.num_rows)
