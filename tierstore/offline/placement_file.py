"""A placement's file: the entries of chosen keys back to back, and the indexes that find them.

Input: for each table the (order index, key) pairs that were chosen, hottest first, and the file's layout. Output: the
filled file, and its head with checksums. Every page that is needed is read once, in page order, and its rows go through
buckets of the destination, so that memory stays bounded whatever the size. Errors: damaged pages; `OSError` for a disk
that fails.

Memory: 13 bytes a chosen entry of one table, 32 bytes an entry of one order (its rows of one head, sorted), the index
of one order, and two buckets.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .. import kernels
from ..durable import write_all
from ..formats.catalog import CatalogImage
from ..formats.placement import PlacedTable, Placement, head_bytes
from ..layout import TableLayout
from ..process.progress import OnProgress
from ..process.workers import aside
from ..tiers.files import AnyFiles, open_table

BUCKET_BYTES = 96 << 20  # of the destination, filled at once in memory
SPARE_DISK_BYTES = 64 << 20  # left free beside what is written
READ_BYTES = 8 << 20  # of pages at once
ROWS_AT_ONCE = 1 << 15  # that are taken out of them together, however many keys share a row
DENSE_FRACTION = 0.25  # if more of a stretch of pages is needed, the whole stretch is read


@dataclass(frozen=True)
class Chosen:
    """The entries chosen of one table, hottest first: order_index, uint8 [n], and keys, int64 [n]; all pairs differ.

    static_fraction, hbm_entries: as in `PlacedTable`.
    """

    order_index: np.ndarray
    keys: np.ndarray
    static_fraction: float = 1.0
    hbm_entries: int = 0


def bytes_needed(placement: Placement, layouts: Mapping[str, TableLayout]) -> int:
    """The file; and beside it the rows of the largest table that does not fit one bucket, each with its place."""
    spilled = [
        table.num_entries * layouts[name].spec.rows_per_key * _placed_row(layouts[name]).itemsize
        for name, table in placement.tables.items()
        if table.num_entries > _entries_of_bucket(table)
    ]
    return placement.num_bytes + max(spilled, default=0) + SPARE_DISK_BYTES


def _entries_of_bucket(table: PlacedTable) -> int:
    return max(1, BUCKET_BYTES // table.record_bytes)


def _placed_row(layout: TableLayout) -> np.dtype[np.void]:
    """A row on its way: the head-th of the entry at a place of its bucket."""
    return np.dtype([("place", "<u4"), ("head", "<u4"), ("row", "u1", (layout.spec.row_bytes,))])


def write_placement(
    fd: int,
    image: CatalogImage,
    placement: Placement,
    chosen: Mapping[str, Chosen],
    work: Path,
    on_progress: OnProgress | None,
) -> tuple[Placement, int]:
    """Fills the empty file `fd`; returns the placement with its indexes' checksums, and how many pages were read."""
    total = sum(len(part.keys) * image.tables[name].spec.rows_per_key for name, part in chosen.items())
    done = pages_read = 0
    os.ftruncate(fd, placement.num_bytes)
    tables = {}
    for name, part in chosen.items():
        layout, table = image.tables[name], placement.tables[name]
        tables[name] = _write_indexes(fd, table, part)
        destination = _Destination(fd, layout, table, part, work)
        files = open_table(image, layout, direct=False)
        try:
            for places, heads, rows, num_pages in _needed_rows(files, part):
                destination.add(places, heads, rows)
                pages_read += num_pages
                done += len(rows)
                if on_progress:
                    on_progress(done, total)
        finally:
            files.close()
        destination.finish()
    placement = replace(placement, tables=tables)
    write_all(fd, head_bytes(placement), 0)
    return placement, pages_read


def _write_indexes(fd: int, table: PlacedTable, part: Chosen) -> PlacedTable:
    indexes = []
    for order_index, index in enumerate(table.indexes):
        places = np.flatnonzero(part.order_index == order_index)
        buckets = np.empty((index.num_buckets, kernels.INDEX_BUCKET.itemsize), dtype=np.uint8)
        room = aside(kernels.index_entries, part.keys[places], places.astype(np.uint32), buckets)
        assert room, "lay_out_placement gives a bucket for 3.5 keys"
        write_all(fd, buckets, index.byte_start)
        indexes.append(replace(index, checksum=aside(kernels.crc32c, buckets)))
    return replace(table, indexes=tuple(indexes))


def _needed_rows(files: AnyFiles, part: Chosen) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    """Yields (places [R], heads [R], rows [R, row_bytes], pages read) in page order, head by head:
    a head is a range of rows."""
    layout, spec = files.table, files.table.spec
    pages_max = max(1, READ_BYTES // layout.page_bytes)
    scratch = np.empty(pages_max * layout.page_bytes, dtype=np.uint8)
    heads = sorted(range(spec.num_heads), key=lambda head: spec.offsets[head])
    for head in heads:
        order_index, of_entry = divmod(head, spec.rows_per_key)
        places = np.flatnonzero(part.order_index == order_index)
        row_ids = part.keys[places] % spec.moduli[head] + spec.offsets[head]
        by_row = np.argsort(row_ids)
        places, row_ids = places[by_row].astype(np.uint32), row_ids[by_row]
        for stretch_start, stretch_end, page_numbers in _stretches(row_ids // layout.rows_per_page, pages_max):
            rows = files.read_rows(page_numbers, scratch)
            num_read = len(page_numbers)
            for start in range(stretch_start, stretch_end, ROWS_AT_ONCE):
                end = min(start + ROWS_AT_ONCE, stretch_end)
                at = np.searchsorted(page_numbers, row_ids[start:end] // layout.rows_per_page)
                found = rows[at, row_ids[start:end] % layout.rows_per_page]
                yield places[start:end], np.full(end - start, of_entry, dtype=np.uint32), found, num_read
                num_read = 0
    files.drop_cache()


def _stretches(pages: np.ndarray, pages_max: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Cuts pages, int64 [R] ascending, into (start, end, pages to read): those needed,
    or all between if many are."""
    needed, firsts = np.unique(pages, return_index=True)
    bounds = np.append(firsts, len(pages))
    i = 0
    while i < len(needed):
        dense_end = int(np.searchsorted(needed, needed[i] + pages_max))
        is_dense = dense_end - i > DENSE_FRACTION * pages_max
        j = dense_end if is_dense else min(i + pages_max, len(needed))
        read = np.arange(needed[i], needed[j - 1] + 1) if is_dense else needed[i:j]
        yield int(bounds[i]), int(bounds[j]), read
        i = j


class _Destination:
    """A table's records on their way into the file: filled in memory if they fit one bucket, else through a file.

    That file has a region for each bucket, which its rows fill in the order in which they are read.
    """

    def __init__(self, fd: int, layout: TableLayout, table: PlacedTable, part: Chosen, work: Path) -> None:
        self._fd, self._layout, self._table, self._part = fd, layout, table, part
        self._per_bucket = _entries_of_bucket(table)
        self._num_buckets = -(-table.num_entries // self._per_bucket)
        self._placed_row = _placed_row(layout)
        self._memory = np.empty((min(self._per_bucket, table.num_entries), table.record_bytes), dtype=np.uint8)
        self._file = (work / "rows").open("w+b") if self._num_buckets > 1 else None
        self._rows_added = np.zeros(self._num_buckets, dtype=np.int64)

    def add(self, places: np.ndarray, heads: np.ndarray, rows: np.ndarray) -> None:
        """Takes rows, uint8 [R, row_bytes], each the head-th of the entry at its place."""
        if self._file is None:
            self._rows_of(self._memory)[places, heads] = rows
            return
        bucket = places // self._per_bucket
        by_bucket = np.argsort(bucket, kind="stable")
        placed = np.empty(len(rows), dtype=self._placed_row)
        placed["place"], placed["head"] = places[by_bucket] % self._per_bucket, heads[by_bucket]
        placed["row"] = rows[by_bucket]
        buckets, starts = np.unique(bucket[by_bucket], return_index=True)
        for number, start, end in zip(
            buckets.tolist(), starts.tolist(), [*starts.tolist()[1:], len(rows)], strict=True
        ):
            at = self._region_start(number) + int(self._rows_added[number]) * self._placed_row.itemsize
            write_all(self._file.fileno(), placed[start:end].view(np.uint8), at)
            self._rows_added[number] += end - start

    def _region_start(self, bucket: int) -> int:
        return bucket * self._per_bucket * self._layout.spec.rows_per_key * self._placed_row.itemsize

    def finish(self) -> None:
        """Seals every record and writes it to its place."""
        for bucket in range(self._num_buckets):
            start = bucket * self._per_bucket
            records = self._memory[: min(self._per_bucket, self._table.num_entries - start)]
            if self._file is not None:
                self._gather(self._file, bucket, records)
            keys = self._part.keys[start : start + len(records)]
            order_index = self._part.order_index[start : start + len(records)].astype(np.uint32)
            aside(kernels.seal_records, records, keys, order_index, self._table.entry_bytes, self._layout.seed)
            write_all(self._fd, records, self._table.byte_start + start * self._table.record_bytes)
        if self._file is not None:
            self._file.close()
            Path(self._file.name).unlink()

    def _gather(self, file: BinaryIO, bucket: int, records: np.ndarray) -> None:
        num_rows = len(records) * self._layout.spec.rows_per_key
        assert self._rows_added[bucket] == num_rows, "every row of every entry was added once"
        placed = np.fromfile(file.name, self._placed_row, num_rows, offset=self._region_start(bucket))
        self._rows_of(records)[placed["place"], placed["head"]] = placed["row"]

    def _rows_of(self, records: np.ndarray) -> np.ndarray:
        """The rows of records, uint8 [n, H, row_bytes]; no copy."""
        spec = self._layout.spec
        shape, strides = (len(records), spec.rows_per_key, spec.row_bytes), (records.shape[1], spec.row_bytes, 1)
        return np.lib.stride_tricks.as_strided(records, shape, strides)
