"""The rows that a training changed, in ascending order, in files beside each other.

Input: a folder that `sort_touched_rows` filled. Output: `TouchedRows`, from which the rows of a range are read.
Errors: `OSError` of the disk, which the caller names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...durable import read_exactly

ROWS = "rows"  # the output that a table's own rows are read from
ROW_IDS = "row_ids"
IDS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class TouchedRows:
    """Touched rows of a table in files of a folder: ascending row ids, and beside them each output of their `Rounding`.

    widths: bytes of a row of each output, by name.
    """

    folder: Path
    num_rows: int
    widths: Mapping[str, int]

    def file(self, name: str) -> Path:
        """Returns the file of an output, or of the row ids."""
        return self.folder / name

    def open(self) -> TouchedCursor:
        """Opens a cursor over the rows."""
        return TouchedCursor(self)


class TouchedCursor:
    """Reads `TouchedRows` in ascending order. One thread uses it."""

    def __init__(self, rows: TouchedRows) -> None:
        self._rows = rows
        self._width = rows.widths[ROWS]
        self._ids = np.empty(0, dtype=np.int64)  # read ahead: those of rows [at, at + len)
        self._at = -1  # nothing was asked for yet
        self._fds: list[int] = []
        try:
            for name in (ROW_IDS, ROWS):
                self._fds.append(os.open(rows.file(name), os.O_RDONLY | os.O_CLOEXEC))
        except BaseException:
            self.close()
            raise

    def within(self, row_start: int, row_end: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the touched rows of a range: row ids, int64 [n] ascending, and rows, uint8 [n, row_bytes].

        Ranges must not go back by more than what the call before returned.
        """
        if self._at < 0:
            self._at = self._first_at_least(row_start)
        while self._at + len(self._ids) < self._rows.num_rows and (not len(self._ids) or self._ids[-1] < row_end):
            more = self._read_ids(self._at + len(self._ids))
            self._ids = np.concatenate([self._ids, more])
        low, high = np.searchsorted(self._ids, [row_start, row_end]).tolist()
        rows = np.empty((high - low, self._width), dtype=np.uint8)
        if len(rows):
            read_exactly(self._fds[1], rows, (self._at + low) * self._width, "touched rows")
        row_ids = self._ids[low:high]
        self._at, self._ids = self._at + low, self._ids[low:]
        return row_ids, rows

    def _read_ids(self, start: int) -> np.ndarray:
        ids = np.empty(min(IDS_AT_ONCE, self._rows.num_rows - start), dtype=np.int64)
        read_exactly(self._fds[0], ids.view(np.uint8), start * ids.itemsize, "touched row ids")
        return ids

    def _first_at_least(self, row_id: int) -> int:
        """Returns the place of the first touched row that is not below a row id, by bisection in the file."""
        low, high = 0, self._rows.num_rows
        one = np.empty(1, dtype=np.int64)
        while low < high:
            middle = (low + high) // 2
            read_exactly(self._fds[0], one.view(np.uint8), middle * one.itemsize, "touched row ids")
            low, high = (middle + 1, high) if one[0] < row_id else (low, middle)
        return low

    def close(self) -> None:
        """Closes the files; closing twice is harmless."""
        while self._fds:
            os.close(self._fds.pop())
