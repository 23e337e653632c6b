"""Readers of a table's rows, front to back: of a store's pages or blocks, of a checkpoint's planes, of an initializer.

Input: a catalog's table, or a table's source. Output: rows, uint8 [rows, row_bytes], each as a store would give it.
Errors: `CorruptPageError` for a page or block that is damaged, `FormatError` for a file that changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ... import kernels
from ...formats.catalog import CatalogImage
from ...formats.in_place import InPlaceLayout
from ...formats.initial import InitialLayout
from ...formats.table_source import PlaneReader, TableSource
from ...layout import TableLayout
from ...tiers.in_place import InPlaceFiles
from ...tiers.nvme import TableFiles
from .quantized import quantized

STEP_BYTES = 4 << 20  # of whole rows that are read at once, however few bytes of each are wanted
NEAR_BYTES = 64 << 10  # rows that lie so near each other are read together


class RowReader(Protocol):
    """Reads the rows of a table in ascending order. One thread uses it."""

    def read(self, row_start: int, row_end: int) -> np.ndarray:
        """Returns rows [row_start, row_end), uint8 [rows, row_bytes], each checked. Blocks on the disk."""

    def take(self, row_ids: np.ndarray, out: np.ndarray) -> None:
        """Fills out, uint8 [n, row_bytes], with rows that lie near each other. row_ids: int64 [n >= 1], ascending."""

    def close(self) -> None:
        """Closes what it holds open; twice is harmless."""


class RowOrigin(Protocol):
    """Where the rows of a table come from."""

    def open(self) -> RowReader:
        """Opens a reader of them."""


def origin_of(image: CatalogImage, table: TableLayout) -> RowOrigin:
    """Returns what reads the rows of a store's table, as they were before any training."""
    return DrawnRows(table) if isinstance(table, InitialLayout) else StoredRows(image, table)


def read_rows_at(reader: RowReader, row_ids: np.ndarray, out: np.ndarray) -> None:
    """Fills out, uint8 [n, row_bytes], with single rows. row_ids: int64 [n], ascending. Blocks on the disk."""
    row_bytes = out.shape[1]
    step_rows, near_rows = max(1, STEP_BYTES // row_bytes), max(1, NEAR_BYTES // row_bytes)
    start = 0
    while start < len(row_ids):
        first = int(row_ids[start])
        end = int(np.searchsorted(row_ids, first + step_rows))
        gaps = np.flatnonzero(np.diff(row_ids[start:end]) > near_rows)
        end = start + int(gaps[0]) + 1 if len(gaps) else end
        reader.take(row_ids[start:end], out[start:end])
        start = end


@dataclass(frozen=True)
class StoredRows:
    """The rows of a store's table, as its pages or its checkpoint's blocks hold them, every one checked."""

    image: CatalogImage
    table: TableLayout

    def open(self) -> StoredRowReader:
        """Opens the table's files."""
        return StoredRowReader(self)


class StoredRowReader:
    """Reads `StoredRows`; keeps the `RowReader` contract."""

    def __init__(self, rows: StoredRows) -> None:
        self._table = rows.table
        self._files: TableFiles | InPlaceFiles
        if isinstance(rows.table, InPlaceLayout):
            self._files = InPlaceFiles(rows.image, rows.table, direct=False)
        else:
            self._files = TableFiles(rows.image, rows.table, direct=False)
        self._scratch = np.empty(0, dtype=np.uint8)

    def read(self, row_start: int, row_end: int) -> np.ndarray:
        """See `RowReader`. The next call overwrites what this one returned."""
        table = self._table
        pages = np.arange(row_start // table.rows_per_page, -(-row_end // table.rows_per_page))
        if len(self._scratch) < len(pages) * table.page_bytes:
            self._scratch = np.empty(len(pages) * table.page_bytes, dtype=np.uint8)
        rows = self._files.read_rows(pages, self._scratch).reshape(-1, table.spec.row_bytes)
        skipped = row_start - int(pages[0]) * table.rows_per_page
        return rows[skipped : skipped + row_end - row_start]

    def take(self, row_ids: np.ndarray, out: np.ndarray) -> None:
        """See `RowReader`."""
        first = int(row_ids[0])
        kernels.place_entries(self.read(first, int(row_ids[-1]) + 1), row_ids - first, out)

    def close(self) -> None:
        """See `RowReader`."""
        self._files.close()


@dataclass(frozen=True)
class SourceRows:
    """The rows of a table as its checkpoint's files hold them."""

    source: TableSource

    def open(self) -> SourceRowReader:
        """Opens the files."""
        return SourceRowReader(self.source.open_reader())


class SourceRowReader:
    """Reads `SourceRows`; keeps the `RowReader` contract."""

    def __init__(self, reader: PlaneReader) -> None:
        self._reader = reader

    def read(self, row_start: int, row_end: int) -> np.ndarray:
        """See `RowReader`."""
        return np.concatenate(self._reader.read(row_start, row_end), axis=1)

    def take(self, row_ids: np.ndarray, out: np.ndarray) -> None:
        """See `RowReader`. Planes are put beside each other in the rows that are wanted, not in all between them."""
        first, column = int(row_ids[0]), 0
        places = row_ids - first
        for plane in self._reader.read(first, int(row_ids[-1]) + 1):
            kernels.place_entries(plane, places, out, column)
            column += plane.shape[1]

    def close(self) -> None:
        """See `RowReader`."""
        self._reader.close()


@dataclass(frozen=True)
class DrawnRows:
    """The rows of a table from scratch: what its initializer draws, in the table's codec."""

    table: InitialLayout

    def open(self) -> DrawnRows:
        """Returns itself: there is nothing to open."""
        return self

    def read(self, row_start: int, row_end: int) -> np.ndarray:
        """See `RowReader`. Only computes."""
        return self._drawn(np.arange(row_start, row_end))

    def take(self, row_ids: np.ndarray, out: np.ndarray) -> None:
        """See `RowReader`. Only computes, and no rows but these."""
        out[:] = self._drawn(row_ids)

    def _drawn(self, row_ids: np.ndarray) -> np.ndarray:
        return quantized(drawn_values(self.table, row_ids), self.table.spec, None).rows

    def close(self) -> None:
        """Nothing is open."""


def drawn_values(table: InitialLayout, row_ids: np.ndarray) -> np.ndarray:
    """Returns the first values of rows of a table from scratch: int64 [n] -> float32 [n, dim]. Only computes.

    row_ids: as the table's `spec` counts them: of a slice, from its first row. Values depend on the whole table's ids.
    """
    values = np.empty((len(row_ids), table.spec.dim), dtype=np.float32)
    initializer = table.initializer
    kernels.initial_rows(
        row_ids + table.public_spec.row_start,
        initializer.kind,
        0.0,
        initializer.deviation,
        initializer.seed,
        initializer.table,
        values,
    )
    return values
