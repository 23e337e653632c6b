"""verify: every page, placed entry, digest and catalog record of a store, and every row against its checkpoint.

Input: a store's path, and the checkpoint's `TableSource`s if rows are to be compared. Output: a report with one line
for each fault, and which shards and placements are damaged, for `repair.py`. It reads shards front to back with plain
reads, apart from the lookup path that it vouches for. Errors: an unreadable catalog,
or sources without the store's tables.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

import numpy as np

from .. import kernels
from ..causes import named
from ..durable import read_exactly
from ..errors import ConfigError, FormatError, TierStoreError
from ..formats.catalog import CatalogImage, read_catalog
from ..formats.checkpoint import PlaneReader, TableSource
from ..formats.in_place import InPlaceLayout
from ..formats.origin import same_checkpoint
from ..formats.page import page_faults
from ..formats.placement import PlacedTable
from ..formats.table_source import find_hole, source_of_slice
from ..layout import TableLayout
from ..process.progress import OnProgress
from ..process.workers import joined_pool
from ..tiers.placed import PlacementFile
from .verify_in_place import parts_of_files, parts_of_rows
from .verify_report import CHUNK_BYTES, FAULTS_PER_SHARD_MAX, VerifyReport, check_not_stopped
from .verify_versions import parts_of_versions

ROWS_DRAWN_AT_ONCE = 1 << 20
# What the system says of a file that is lost, or is another thing, or that its disk cannot read: a new file mends it.
DAMAGE_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.EIO, errno.EBADMSG}

Result = TypeVar("Result")


def verify_store(
    path: str | os.PathLike[str],
    *,
    sources: Sequence[TableSource] | None = None,
    origin: dict[str, Any] | None = None,
    sample_rows: int | None = None,
    seed: int = 0,
    jobs: int | None = None,
    on_progress: OnProgress | None = None,
) -> VerifyReport:
    """Checks a finished store: catalog, shard lengths and SHA-256, every page, every placement, every
    version; rows of the base against `sources`.

    sample_rows: check the pages of that many random rows of each table (drawn with `seed`), with all rows in them,
    instead of everything (placements are checked whole); a table of no more rows is checked whole. origin:
    the checkpoint's record; another digest than the store's is a fault. Blocks; memory stays below 16 MiB a job. Raises
    `StoreNotReadyError` or `FormatError` if the catalog cannot be read at all,
    `ConfigError` if sources lack a table.
    """
    image = read_catalog(path)
    report = VerifyReport()
    of_all: list[str] = []  # faults of the store as a whole: they explain the others, so they come first
    if origin is not None and not same_checkpoint(image.origin, origin, sources or ()):
        of_all.append(
            f"the store was built from another checkpoint: digest {str(image.origin.get('digest'))[:12]}, "
            f"this one has {origin['digest'][:12]}"
        )
    by_name = {source.spec.name: source for source in sources or ()}
    if sources is not None and by_name.keys() != image.tables.keys():
        raise ConfigError(f"the store has tables {sorted(image.tables)}, the checkpoint gives {sorted(by_name)}")
    with ExitStack() as stack:
        parts: list[Callable[[threading.Event], VerifyReport]] = []
        for name, table in image.tables.items():
            source = by_name.get(name)
            if source is not None:
                source = source_of_slice(source, table.public_spec)
            if source is not None and source.spec != table.public_spec:
                of_all.append(f"table {name}: the checkpoint gives {source.spec}, the store has {table.public_spec}")
                source = None  # its rows cannot be compared; its pages can be checked
            reader = stack.enter_context(source.open_reader()) if source is not None else None
            sampled = _sampled_pages(table, sample_rows, seed)
            parts += _parts_of_table(image, table, reader, sampled)
        parts += parts_of_files(image)
        parts += [partial(verify_placement, image, epoch) for epoch in sorted(image.placements)]
        parts += parts_of_versions(image)
        for part in run_parts(parts, jobs, on_progress):
            report.add(part)
    hole = find_hole(sources) if report.faults and sources is not None else None
    if hole is not None:
        of_all.append(f"the checkpoint has a hole: {hole}")
    report.sort_faults()
    report.faults[:0] = of_all
    return report


def _parts_of_table(
    image: CatalogImage, table: TableLayout, reader: PlaneReader | None, sampled: np.ndarray | None
) -> list[Callable[[threading.Event], VerifyReport]]:
    """Returns what there is to check of a table: its shards; of one in place its blocks, and its side tables' shards.

    Of a sample, side tables are checked as far as its rows need them.
    """
    if not isinstance(table, InPlaceLayout):
        return [partial(verify_shard, image, table, index, reader, sampled) for index in range(table.num_shards)]
    sides = table.side_tables if sampled is None else ()
    shards = [(side, index) for side in sides for index in range(side.num_shards)]
    return [
        *parts_of_rows(image, table, reader, sampled),
        *(partial(verify_shard, image, side, index, None, None) for side, index in shards),
    ]


def run_parts(
    parts: Sequence[Callable[[threading.Event], Result]], jobs: int | None = None, on_progress: OnProgress | None = None
) -> list[Result]:
    """Calls each of `parts`, `jobs` at once, and returns what they return, in order. Blocks.

    Each part gets an event that says to give up: it is set when another part fails or when the caller is interrupted,
    and a part looks at it once a chunk. on_progress: (parts done, parts in all), in the calling thread.
    """
    stop = threading.Event()
    with joined_pool(jobs or min(os.cpu_count() or 1, 4), "tierstore-verify") as pool:
        try:
            futures = [pool.submit(part, stop) for part in parts]
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                if on_progress:
                    on_progress(done, len(futures))
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)  # leaving the pool waits for the parts under way
            raise
    return [future.result() for future in futures]


def _sampled_pages(table: TableLayout, sample_rows: int | None, seed: int) -> np.ndarray | None:
    """Returns the pages that random rows lie in, int64, ascending; None for all. A byte a page, however many rows."""
    if sample_rows is None or sample_rows >= table.spec.num_rows:
        return None
    rng = np.random.default_rng([seed, table.seed])
    sampled = np.zeros(table.num_pages, dtype=bool)
    for start in range(0, sample_rows, ROWS_DRAWN_AT_ONCE):
        rows = rng.integers(0, table.spec.num_rows, size=min(ROWS_DRAWN_AT_ONCE, sample_rows - start))
        sampled[rows // table.rows_per_page] = True
    return np.flatnonzero(sampled)


def verify_shard(
    image: CatalogImage,
    table: TableLayout,
    index: int,
    reader: PlaneReader | None,
    sampled: np.ndarray | None,
    stop: threading.Event,
) -> VerifyReport:
    """Checks one shard whole, or only the sampled pages that lie in it."""
    shard = image.shards[table.spec.name][index]
    what = f"shard {index} of table {table.spec.name} ({shard.file})"
    found = _ShardCheck(table, index, what, stop)
    try:
        fd = os.open(image.path / shard.file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait otherwise
    except OSError as error:
        if error.errno in DAMAGE_ERRNOS:
            found.add_damage(str(error.strerror))
        else:
            found.others.append(str(named(error, what, image.path / shard.file)))
        return found.report()
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            found.add_damage("it is not a regular file")
        elif status.st_size != shard.num_bytes:
            found.add_damage(f"{status.st_size} bytes on disk, the catalog says {shard.num_bytes}")
        elif sampled is not None:
            _verify_sample(fd, found, reader, sampled)
        elif (sha256 := _verify_all_pages(fd, found, reader)) != shard.sha256:
            found.add_damage(f"SHA-256 {sha256[:16]}..., the catalog says {shard.sha256[:16]}...")
    except _UnreadableShardError as error:
        found.add_damage(f"cannot be read: {error}")
    except (OSError, TierStoreError) as error:
        found.others.append(f"{what}: its rows cannot be compared: {error}")
    finally:
        os.close(fd)
    return found.report()


class _UnreadableShardError(Exception):
    """The disk does not give a shard's bytes, or the file has become shorter."""


class _ShardCheck:
    """What one shard's check has found so far. Faults beyond the first
    FAULTS_PER_SHARD_MAX of a kind are only counted."""

    def __init__(self, table: TableLayout, index: int, what: str, stop: threading.Event) -> None:
        self.table, self.index, self.what, self.stop = table, index, what, stop
        self.pages_checked = self.rows_compared = 0
        self.others: list[str] = []  # what is wrong, but not with the shard's file: no repair mends it
        self._damage: list[str] = []
        self._pages: list[str] = []
        self._rows: list[str] = []
        self._num_pages = self._num_rows = 0

    def add_damage(self, fault: str) -> None:
        """Notes what is wrong with the file as a whole."""
        self._damage.append(f"{self.what}: {fault}")

    def check_pages(self, pages: np.ndarray, page_numbers: np.ndarray) -> None:
        """Checks pages, uint8 [P, page_bytes], that must be page_numbers, int64 [P]."""
        self.pages_checked += len(pages)
        bad = page_faults(pages, page_numbers, self.table.seed)
        room = FAULTS_PER_SHARD_MAX - len(self._pages)
        self._pages += [f"page {number} of table {self.table.spec.name}: {what}" for number, what in bad[:room]]
        self._num_pages += len(bad)

    def compare_rows(self, rows: np.ndarray, reader: PlaneReader, row_start: int) -> None:
        """Compares rows, uint8 [R, row_bytes], plane by plane with the checkpoint's rows from row_start on."""
        differ = np.zeros(len(rows), dtype=bool)
        column = 0
        for plane in reader.read(row_start, row_start + len(rows)):
            differ |= (rows[:, column : column + plane.shape[1]] != plane).any(axis=1)
            column += plane.shape[1]
        self.rows_compared += len(rows)
        row_ids = np.flatnonzero(differ) + row_start + self.table.public_spec.row_start
        room = FAULTS_PER_SHARD_MAX - len(self._rows)
        name = self.table.spec.name
        self._rows += [f"row {row_id} of table {name} differs from the checkpoint's" for row_id in row_ids[:room]]
        self._num_rows += len(row_ids)

    def report(self) -> VerifyReport:
        """Returns what was found."""
        report = VerifyReport(self.pages_checked, self.rows_compared, shards_checked=1)
        damaged = self._damage + self._pages + self._more(self._num_pages, len(self._pages), "pages")
        if damaged:
            report.damaged_shards[self.table.spec.name, self.index] = damaged
        report.faults = damaged + self.others + self._rows + self._more(self._num_rows, len(self._rows), "rows")
        return report

    def _more(self, count: int, shown: int, of_what: str) -> list[str]:
        return [f"{self.what}: and {count - shown} more {of_what}"] if count > shown else []

    def read(self, fd: int, pages: np.ndarray, byte_start: int) -> None:
        """Fills pages, uint8, from byte_start of the shard on; raises `_UnreadableShardError`."""
        check_not_stopped(self.stop)
        try:
            read_exactly(fd, pages, byte_start, "the shard")
        except (OSError, FormatError) as error:
            raise _UnreadableShardError(str(error)) from error


def verify_placement(image: CatalogImage, epoch: int, stop: threading.Event) -> VerifyReport:
    """Checks a placement's head, its indexes and every record by their checksums."""
    report = VerifyReport()
    damaged: list[str] = []
    try:
        file = PlacementFile(image, epoch, direct=False)
    except FormatError as error:
        cause = error.__cause__
        is_damage = not isinstance(cause, OSError) or cause.errno in DAMAGE_ERRNOS
        (damaged if is_damage else report.faults).append(f"placement {epoch}: {error}")
    else:
        try:
            for table in file.placement.tables.values():
                _verify_placed(file, table, image.tables[table.name].seed, report, damaged, stop)
        except (OSError, FormatError) as error:
            damaged.append(f"placement {epoch}: {error}")
        finally:
            file.close()
    if damaged:
        report.faults += damaged
        report.damaged_placements[epoch] = damaged
    return report


def _verify_placed(
    file: PlacementFile,
    table: PlacedTable,
    seed: int,
    report: VerifyReport,
    damaged: list[str],
    stop: threading.Event,
) -> None:
    what = f"placement {file.placement.epoch}, table {table.name}"
    for order_index, index in enumerate(table.indexes):
        checksum = 0
        for start in range(0, index.num_bytes, CHUNK_BYTES):
            check_not_stopped(stop)
            part = np.empty(min(CHUNK_BYTES, index.num_bytes - start), dtype=np.uint8)
            read_exactly(file.fd, part, index.byte_start + start, what)
            checksum = kernels.crc32c(part, checksum)
        if checksum != index.checksum:
            damaged.append(f"{what}: the index of its order {order_index} has a wrong checksum")
    step = max(1, CHUNK_BYTES // table.record_bytes)
    num_damaged = 0
    for start in range(0, table.num_entries, step):
        check_not_stopped(stop)
        records = np.empty((min(step, table.num_entries - start), table.record_bytes), dtype=np.uint8)
        read_exactly(file.fd, records, table.byte_start + start * table.record_bytes, what)
        num_damaged += kernels.invalidate_bad_records(records, table.entry_bytes, seed)
        report.entries_checked += len(records)
    if num_damaged:
        damaged.append(f"{what}: {num_damaged} of {table.num_entries} entries have wrong checksums")


def _verify_all_pages(fd: int, found: _ShardCheck, reader: PlaneReader | None) -> str:
    """Checks a shard's pages front to back; returns its SHA-256 (hex)."""
    table, sha256 = found.table, hashlib.sha256()
    pages_per_chunk = max(1, CHUNK_BYTES // table.page_bytes)
    buffer = np.empty((pages_per_chunk, table.page_bytes), dtype=np.uint8)
    shard_start, shard_end = table.shard_pages(found.index)
    for page_start in range(shard_start, shard_end, pages_per_chunk):
        page_end = min(page_start + pages_per_chunk, shard_end)
        pages = buffer[: page_end - page_start]
        found.read(fd, pages, (page_start - shard_start) * table.page_bytes)
        sha256.update(pages.data)
        found.check_pages(pages, np.arange(page_start, page_end))
        if reader is not None:
            row_start = page_start * table.rows_per_page
            row_end = min(page_end * table.rows_per_page, table.spec.num_rows)
            rows = table.shape.rows_of(pages).reshape(-1, table.spec.row_bytes)[: row_end - row_start]
            found.compare_rows(rows, reader, row_start)
    return sha256.hexdigest()


def _verify_sample(fd: int, found: _ShardCheck, reader: PlaneReader | None, sampled: np.ndarray) -> None:
    table = found.table
    shard_start, shard_end = table.shard_pages(found.index)
    page = np.empty((1, table.page_bytes), dtype=np.uint8)
    for page_number in sampled:
        if not shard_start <= page_number < shard_end:
            continue
        found.read(fd, page, int(page_number - shard_start) * table.page_bytes)
        found.check_pages(page, np.array([page_number]))
        if reader is not None:
            row_start = int(page_number) * table.rows_per_page
            row_end = min(row_start + table.rows_per_page, table.spec.num_rows)
            found.compare_rows(table.shape.rows_of(page)[0][: row_end - row_start], reader, row_start)
