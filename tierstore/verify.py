"""verify: every page, placed entry, digest and catalog record of a store, and every row against its checkpoint.

Flows in: a store's path, and the checkpoint's `TableSource`s where rows are to be compared. Flows out: a report with one
line for each fault. It reads shards front to back with plain reads, apart from the lookup path that it vouches for.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import kernels
from .errors import ConfigError, FormatError
from .formats.catalog import CatalogImage, TableLayout, read_catalog
from .formats.checkpoint import PlaneReader, TableSource
from .formats.page import page_faults
from .formats.placement import PlacedTable
from .formats.tensor_files import read_exactly
from .tiers.placed import PlacementFile

CHUNK_BYTES = 4 << 20
FAULTS_PER_SHARD_MAX = 20
ROWS_DRAWN_AT_ONCE = 1 << 20

OnProgress = Callable[[int, int], None]


@dataclass
class VerifyReport:
    """What was checked and what is wrong; the store is good where `faults` is empty.

    Faults of the store as a whole come first, rows that differ last: those mostly follow from the others.
    """

    pages_checked: int = 0
    rows_compared: int = 0
    shards_checked: int = 0
    entries_checked: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, other: VerifyReport) -> None:
        """Adds another part's findings to this one."""
        self.pages_checked += other.pages_checked
        self.rows_compared += other.rows_compared
        self.shards_checked += other.shards_checked
        self.entries_checked += other.entries_checked
        self.faults += other.faults


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
    """Checks a finished store: catalog, shard lengths and SHA-256, every page, every placement; rows against `sources`.

    sample_rows: check the pages of that many random rows of each table (drawn with `seed`), with all rows in them, instead
    of everything (placements are checked whole); a table of no more rows is checked whole. origin:
    the checkpoint's record; another digest than the store's is a fault. Blocks; memory stays below 16 MiB a job. Raises
    `StoreNotReadyError` or `FormatError` where the catalog cannot be read at all, `ConfigError` where sources lack a table.
    """
    image = read_catalog(path)
    report = VerifyReport()
    of_all: list[str] = []  # faults of the store as a whole: they explain the others, so they come first
    if origin is not None and origin["digest"] != image.origin.get("digest"):
        of_all.append(
            f"the store was built from another checkpoint: digest {str(image.origin.get('digest'))[:12]}, "
            f"this one has {origin['digest'][:12]}"
        )
    by_name = {source.spec.name: source for source in sources or ()}
    if sources is not None and by_name.keys() != image.tables.keys():
        raise ConfigError(f"the store has tables {sorted(image.tables)}, the checkpoint gives {sorted(by_name)}")
    with ExitStack() as stack, ThreadPoolExecutor(jobs or min(os.cpu_count() or 1, 4)) as pool:
        tasks = []
        for name, table in image.tables.items():
            source = by_name.get(name)
            if source is not None and source.spec != table.spec:
                of_all.append(f"table {name}: the checkpoint gives {source.spec}, the store has {table.spec}")
                source = None  # its rows cannot be compared; its pages can be checked
            reader = stack.enter_context(PlaneReader(source)) if source is not None else None
            sampled = _sampled_pages(table, sample_rows, seed)
            for index in range(table.num_shards):
                tasks.append(pool.submit(_verify_shard, image, table, index, reader, sampled))
        tasks += [pool.submit(_verify_placement, image, epoch) for epoch in sorted(image.placements)]
        for done, task in enumerate(as_completed(tasks), start=1):
            report.add(task.result())
            if on_progress:
                on_progress(done, len(tasks))
    report.faults = of_all + sorted(report.faults, key=lambda fault: (fault.startswith("row "), fault))
    return report


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


def _verify_shard(
    image: CatalogImage, table: TableLayout, index: int, reader: PlaneReader | None, sampled: np.ndarray | None
) -> VerifyReport:
    """Checks one shard whole, or only the sampled pages that lie in it."""
    report = VerifyReport(shards_checked=1)
    shard = image.shards[table.spec.name][index]
    what = f"shard {index} of table {table.spec.name} ({shard.file})"
    try:
        fd = os.open(image.path / shard.file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait otherwise
    except OSError as error:
        remedy = "make it readable" if isinstance(error, PermissionError) else "restore it from a copy or rebuild"
        report.faults.append(f"{what}: {error.strerror}; {remedy}")
        return report
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            report.faults.append(f"{what}: it is no regular file; restore it from a copy or rebuild")
        elif found.st_size != shard.num_bytes:
            report.faults.append(f"{what}: {found.st_size} bytes on disk, the catalog says {shard.num_bytes}")
        elif sampled is None:
            sha256 = _verify_all_pages(fd, table, index, reader, report)
            if sha256 != shard.sha256:
                report.faults.append(f"{what}: SHA-256 {sha256[:16]}..., the catalog says {shard.sha256[:16]}...")
        else:
            _verify_sample(fd, table, index, reader, sampled, report)
    except (OSError, FormatError) as error:
        report.faults.append(f"{what}: cannot be read or compared: {error}")
    finally:
        os.close(fd)
    if len(report.faults) > FAULTS_PER_SHARD_MAX:
        more = len(report.faults) - FAULTS_PER_SHARD_MAX
        report.faults[FAULTS_PER_SHARD_MAX:] = [f"{what}: and {more} more faults"]
    return report


def _verify_placement(image: CatalogImage, epoch: int) -> VerifyReport:
    """Checks a placement's head, its indexes and every record by their checksums."""
    report = VerifyReport()
    try:
        file = PlacementFile(image, epoch, direct=False)
    except FormatError as error:
        report.faults.append(f"placement {epoch}: {error}")
        return report
    try:
        for table in file.placement.tables.values():
            _verify_placed(file, table, image.tables[table.name].seed, report)
    except (OSError, FormatError) as error:
        report.faults.append(f"placement {epoch}: {error}")
    finally:
        file.close()
    return report


def _verify_placed(file: PlacementFile, table: PlacedTable, seed: int, report: VerifyReport) -> None:
    what = f"placement {file.placement.epoch}, table {table.name}"
    for order_index, index in enumerate(table.indexes):
        checksum = 0
        for start in range(0, index.num_bytes, CHUNK_BYTES):
            part = np.empty(min(CHUNK_BYTES, index.num_bytes - start), dtype=np.uint8)
            read_exactly(file.fd, part, index.byte_start + start, what)
            checksum = kernels.crc32c(part, checksum)
        if checksum != index.checksum:
            report.faults.append(f"{what}: the index of its order {order_index} has a wrong checksum; plan again")
    step = max(1, CHUNK_BYTES // table.record_bytes)
    num_damaged = 0
    for start in range(0, table.num_entries, step):
        records = np.empty((min(step, table.num_entries - start), table.record_bytes), dtype=np.uint8)
        read_exactly(file.fd, records, table.byte_start + start * table.record_bytes, what)
        num_damaged += kernels.spoil_bad_records(records, table.entry_bytes, seed)
        report.entries_checked += len(records)
    if num_damaged:
        report.faults.append(f"{what}: {num_damaged} of {table.num_entries} entries have wrong checksums; plan again")


def _verify_all_pages(fd: int, table: TableLayout, index: int, reader: PlaneReader | None, report: VerifyReport) -> str:
    sha256 = hashlib.sha256()
    pages_per_chunk = max(1, CHUNK_BYTES // table.page_bytes)
    buffer = np.empty((pages_per_chunk, table.page_bytes), dtype=np.uint8)
    shard_start, shard_end = table.shard_pages(index)
    for page_start in range(shard_start, shard_end, pages_per_chunk):
        page_end = min(page_start + pages_per_chunk, shard_end)
        pages = buffer[: page_end - page_start]
        byte_start = (page_start - shard_start) * table.page_bytes
        read_exactly(fd, pages, byte_start, f"pages {page_start} to {page_end}")
        sha256.update(pages.data)
        _check_pages(pages, np.arange(page_start, page_end), table, report)
        if reader is not None:
            row_start = page_start * table.rows_per_page
            row_end = min(page_end * table.rows_per_page, table.spec.num_rows)
            rows = table.shape.rows_of(pages).reshape(-1, table.spec.row_bytes)[: row_end - row_start]
            _compare_rows(rows, reader, row_start, table, report)
    return sha256.hexdigest()


def _verify_sample(
    fd: int, table: TableLayout, index: int, reader: PlaneReader | None, sampled: np.ndarray, report: VerifyReport
) -> None:
    shard_start, shard_end = table.shard_pages(index)
    page = np.empty((1, table.page_bytes), dtype=np.uint8)
    for page_number in sampled:
        if not shard_start <= page_number < shard_end:
            continue
        read_exactly(fd, page, int(page_number - shard_start) * table.page_bytes, f"page {page_number}")
        _check_pages(page, np.array([page_number]), table, report)
        if reader is not None:
            row_start = int(page_number) * table.rows_per_page
            row_end = min(row_start + table.rows_per_page, table.spec.num_rows)
            _compare_rows(table.shape.rows_of(page)[0][: row_end - row_start], reader, row_start, table, report)


def _check_pages(pages: np.ndarray, page_numbers: np.ndarray, table: TableLayout, report: VerifyReport) -> None:
    report.pages_checked += len(pages)
    for page_number, what in page_faults(pages, page_numbers, table.seed):
        report.faults.append(f"page {page_number} of table {table.spec.name}: {what}")


def _compare_rows(
    rows: np.ndarray, reader: PlaneReader, row_start: int, table: TableLayout, report: VerifyReport
) -> None:
    """Compares rows, uint8 [R, row_bytes], plane by plane with the checkpoint's rows from row_start on."""
    differ = np.zeros(len(rows), dtype=bool)
    column = 0
    for plane in reader.read(row_start, row_start + len(rows)):
        differ |= (rows[:, column : column + plane.shape[1]] != plane).any(axis=1)
        column += plane.shape[1]
    report.rows_compared += len(rows)
    for row in np.flatnonzero(differ):
        report.faults.append(f"row {row_start + row} of table {table.spec.name} differs from the checkpoint's")
