"""Rows of versions over a table's own: the index of what versions have, and entries of the base brought up to date.

Input: the files of versions, memory for the index; placed entries. Output: for the engine, the newest row of each id;
for whoever loads placed entries, which are the base's, the same entries at the version. Errors: `FormatError` for row
ids that are damaged.

The index is that of placed entries (kernels/cpu/entry_index.h), with row ids for keys and places for record numbers: 18
bytes a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .. import kernels
from ..decisions.budget import overlay_buckets
from ..errors import FormatError
from ..formats.page import PAGE_VERSION
from ..spec import TableSpec
from .version_files import VersionFiles

PATCHED_AT_ONCE = 1 << 16  # rows of records that are looked up, sorted and replaced together
_BUCKET_BYTES = kernels.INDEX_BUCKET.itemsize
_TRAILER_BYTES = kernels.RECORD_TRAILER.itemsize


class Patches(Protocol):
    """What brings placed entries of the base to a version."""

    def patch(self, records: np.ndarray, seed: int) -> int:
        """Puts rows of versions into placed entries of the base, uint8 [n, record_bytes], and seals those anew. Blocks.

        seed: of the records' checksums. Returns how many could not be put together; those are marked as damaged.
        """


@dataclass(frozen=True)
class RowsInMemory:
    """`Patches` of a table that is in memory whole, at its version.

    spec: the table's. rows: uint8 [num_rows, row_bytes]. bad_rows: says of row ids, int64 [n], which could not be
    loaded, bool [n].
    """

    spec: TableSpec
    rows: np.ndarray
    bad_rows: Callable[[np.ndarray], np.ndarray]

    def patch(self, records: np.ndarray, seed: int) -> int:
        """See `Patches`."""
        step = max(1, PATCHED_AT_ONCE // self.spec.rows_per_key)
        return sum(self._patch(records[start : start + step], seed) for start in range(0, len(records), step))

    def _patch(self, records: np.ndarray, seed: int) -> int:
        trailers, entries = _trailers(records), _rows_of(records, self.spec)
        row_ids = _row_ids(self.spec, trailers)
        number, head = np.nonzero(row_ids >= 0)
        ids = row_ids[number, head]
        differs = (entries[number, head] != self.rows[ids]).any(axis=1)
        number, head, ids = number[differs], head[differs], ids[differs]
        entries[number, head] = self.rows[ids]
        bad = np.zeros(len(records), dtype=bool)
        bad[number[self.bad_rows(ids)]] = True
        _seal(records, np.unique(number), bad, trailers, self.spec, seed)
        return int(bad.sum())


class TableOverlay:
    """The rows of versions over one table: open files and their index, uint8 [num_buckets, 64]."""

    def __init__(self, files: VersionFiles, buckets: np.ndarray) -> None:
        """buckets: filled by `load_index`, or by another process that did that."""
        self.files, self.buckets = files, buckets

    @classmethod
    def within(cls, files: VersionFiles | None, memory: np.ndarray) -> TableOverlay:
        """Returns the overlay of a table that versions have rows of; its index is the start of `memory`, uint8 at a
        multiple of 64."""
        assert files is not None, "versions have rows of the table"
        num_bytes = overlay_buckets(files.num_touched) * _BUCKET_BYTES
        return cls(files, memory[:num_bytes].reshape(-1, _BUCKET_BYTES))

    def load_index(self) -> None:
        """Fills the index from the files' row ids. Blocks on the disk. Raises `FormatError` if some are damaged."""
        kernels.clear_index(self.buckets)
        for file in self.files.files:
            place = file.place_start
            for ids in self.files.row_ids(file):
                if not kernels.put_rows(ids, place, self.buckets):
                    raise FormatError(
                        f"{file.path}: with it, versions have more rows than the {self.files.num_touched} that the "
                        f"catalog says; restore the catalog"
                    )
                place += len(ids)

    def to_native(self) -> kernels.OverlayRecord:
        """Returns it as the C++ side takes it."""
        shape = self.files.files[0].head.shape
        handles = [(file.fd, file.direct_fd, file.head.num_bytes) for file in self.files.files]
        parts = zip(handles, self.files.files, strict=True)
        return kernels.OverlayRecord(
            buckets=self.buckets,
            files=[(handle, file.head.pages_start, file.head.num_rows, file.head.seed) for handle, file in parts],
            page_bytes=shape.page_bytes,
            rows_per_page=shape.rows_per_page,
            page_version=PAGE_VERSION,
        )

    def patch(self, records: np.ndarray, seed: int) -> int:
        """See `Patches`."""
        step = max(1, PATCHED_AT_ONCE // self.files.spec.rows_per_key)
        return sum(self._patch(records[start : start + step], seed) for start in range(0, len(records), step))

    def _patch(self, records: np.ndarray, seed: int) -> int:
        spec, trailers, rows_of = self.files.spec, _trailers(records), _rows_of(records, self.files.spec)
        row_ids = _row_ids(spec, trailers)
        places = kernels.find_entries(self.buckets, row_ids.reshape(-1)).reshape(row_ids.shape)
        number, head = np.nonzero(places >= 0)
        if not len(number):
            return 0
        wanted = places[number, head]
        by_place = np.argsort(wanted, kind="stable")
        number, head, wanted = number[by_place], head[by_place], wanted[by_place]
        bad = np.zeros(len(records), dtype=bool)
        for part, rows in self.files.read_places(wanted):
            if isinstance(rows, str):
                bad[number[part]] = True
            else:
                rows_of[number[part], head[part]] = rows
        _seal(records, np.unique(number), bad, trailers, spec, seed)
        return int(bad.sum())


def _rows_of(records: np.ndarray, spec: TableSpec) -> np.ndarray:
    """Returns the rows of records, uint8 [n, rows_per_key, row_bytes]; no copy."""
    rows = records[:, : spec.entry_bytes].reshape(len(records), spec.rows_per_key, spec.row_bytes)
    assert np.shares_memory(rows, records) or not len(records), "rows would go to a copy"
    return rows


def _row_ids(spec: TableSpec, trailers: np.ndarray) -> np.ndarray:
    """Returns the row ids of entries, int64 [n, rows_per_key]; -1 of those that are damaged."""
    row_ids = np.full((len(trailers), spec.rows_per_key), -1, dtype=np.int64)
    for order in range(len(spec.orders)):
        of_order = np.flatnonzero((trailers["order_index"] == order) & (trailers["key"] >= 0))
        for row in range(spec.rows_per_key if len(of_order) else 0):
            head = order * spec.rows_per_key + row
            row_ids[of_order, row] = trailers["key"][of_order] % spec.moduli[head] + spec.offsets[head]
    return row_ids


def _seal(
    records: np.ndarray, touched: np.ndarray, bad: np.ndarray, trailers: np.ndarray, spec: TableSpec, seed: int
) -> None:
    """Seals touched records anew; bad ones as nobody's."""
    sealed = records[touched]
    keys = np.where(bad[touched], -1, trailers["key"][touched]).astype(np.int64)
    orders = np.ascontiguousarray(trailers["order_index"][touched])
    kernels.seal_records(sealed, keys, orders, spec.entry_bytes, seed)
    records[touched] = sealed


def _trailers(records: np.ndarray) -> np.ndarray:
    trailers = np.ascontiguousarray(records[:, -_TRAILER_BYTES:]).view(kernels.RECORD_TRAILER)
    return trailers.reshape(-1).copy()
