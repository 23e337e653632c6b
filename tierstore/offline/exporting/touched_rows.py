"""The rows that a training changed, in ascending order, on disk: two sequential passes in bounded memory.

Input: a stream of records, oldest first, in any order of rows; of two records of one row the later one counts. Output:
`TouchedRows`, from which the rows of a range are read. Errors: `OSError` of the disk, which the caller names.

Pass one cuts the table into stretches so that the records of each fit in memory, and appends every record to the file
of its stretch. Pass two loads one stretch after another, keeps the last record of each row, sorts, and appends what
`encode` makes of them to the output. Neither pass writes at random places.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ...durable import read_exactly, write_all
from ...errors import BudgetError
from ...units import format_bytes

ROWS = "rows"  # the output that a table's own rows are read from
ROW_IDS = "row_ids"
BINS_MAX = 1 << 16  # of row ids, that are counted to cut the table into stretches
STRETCHES_MAX = 1 << 14
STRETCH_BYTES_MIN = 1 << 20
BUFFER_BYTES_MIN = 4096
COPIES = 6  # of a stretch in memory while it is sorted: as read, sorted, and encoded, with row ids and order
IDS_AT_ONCE = 1 << 16


class RecordStream(Protocol):
    """Records of one table, oldest first."""

    @property
    def record_bytes(self) -> int:
        """Bytes of a record, without its row id."""

    def row_ids(self) -> Iterator[np.ndarray]:
        """Yields the row ids of all records, int64 [n] each. Blocks on the disk."""

    def records(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields row ids, int64 [n], and records, uint8 [n, record_bytes], each checked. Blocks on the disk."""


Encode = Callable[[np.ndarray, np.ndarray], Mapping[str, np.ndarray]]
"""Makes of ascending row ids, int64 [n], and their records, uint8 [n, record_bytes], what is kept: arrays by name."""


@dataclass(frozen=True)
class TouchedRows:
    """Touched rows of a table in files of a folder: ascending row ids, and beside them each output of `encode`.

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


def sort_touched_rows(
    stream: RecordStream, num_rows: int, folder: Path, memory_bytes: int, encode: Encode
) -> TouchedRows:
    """Sorts the newest record of each row by row id, and keeps what `encode` makes of them. Blocks on the disk.

    Args:
        stream: The records.
        num_rows: Of the table.
        folder: A new folder for the files; it is made.
        memory_bytes: What sorting may take.
        encode: Makes rows of records; its array `ROWS` is what `TouchedCursor` reads.

    Raises:
        BudgetError: So little memory would cut the table into too many stretches.
    """
    folder.mkdir(parents=True)
    borders = _borders(stream, num_rows, memory_bytes)
    num_stretches = len(borders) + 1
    _partition(stream, borders, folder, memory_bytes)
    widths: dict[str, int] = {}
    num_touched = 0
    for stretch in range(num_stretches):
        row_ids, records = _newest(folder, stretch, stream.record_bytes)
        if not len(row_ids):
            continue
        num_touched += len(row_ids)
        _append(folder / ROW_IDS, row_ids)
        for name, array in encode(row_ids, records).items():
            assert len(array) == len(row_ids), name
            widths[name] = array.nbytes // len(array)
            _append(folder / name, array)
    return TouchedRows(folder, num_touched, widths)


def _borders(stream: RecordStream, num_rows: int, memory_bytes: int) -> np.ndarray:
    """Returns where stretches end, int64 ascending: row ids, but for the last one's end."""
    bin_rows = -(-num_rows // min(num_rows, BINS_MAX))
    counts = np.zeros(-(-num_rows // bin_rows), dtype=np.int64)
    for row_ids in stream.row_ids():
        counts += np.bincount(row_ids // bin_rows, minlength=len(counts))
    stretch_records = max(1, memory_bytes // (COPIES * (stream.record_bytes + 8)))
    borders, in_stretch = [], 0
    for number, count in enumerate(counts.tolist()):
        if in_stretch and in_stretch + count > stretch_records:
            borders.append(number * bin_rows)
            in_stretch = 0
        in_stretch += count
    if memory_bytes < STRETCH_BYTES_MIN or (len(borders) + 1) * BUFFER_BYTES_MIN > memory_bytes:
        needed = max(STRETCH_BYTES_MIN, (len(borders) + 1) * BUFFER_BYTES_MIN)
        raise BudgetError(
            f"{format_bytes(memory_bytes)} ({memory_bytes} bytes) of memory to sort {int(counts.sum())} records of "
            f"{stream.record_bytes} bytes, at least {format_bytes(needed)} ({needed} bytes) are needed; raise --dram"
        )
    return np.array(borders, dtype=np.int64)


def _partition(stream: RecordStream, borders: np.ndarray, folder: Path, memory_bytes: int) -> None:
    """Appends every record, and its row id, to the files of its stretch."""
    buffered: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(len(borders) + 1)]
    buffered_bytes = 0
    for row_ids, records in stream.records():
        stretches = np.searchsorted(borders, row_ids, side="right")
        order = np.argsort(stretches, kind="stable")
        row_ids, records = row_ids[order], records.take(order, axis=0)
        ends = np.cumsum(np.bincount(stretches, minlength=len(buffered))).tolist()
        for stretch, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if start < end:
                buffered[stretch].append((row_ids[start:end], records[start:end]))
        buffered_bytes += row_ids.nbytes + records.nbytes
        if buffered_bytes > memory_bytes // 3:
            _flush(buffered, folder)
            buffered_bytes = 0
    _flush(buffered, folder)


def _flush(buffered: list[list[tuple[np.ndarray, np.ndarray]]], folder: Path) -> None:
    for stretch, pieces in enumerate(buffered):
        if pieces:
            _append(_ids_file(folder, stretch), *(row_ids for row_ids, _ in pieces))
            _append(_records_file(folder, stretch), *(records for _, records in pieces))
        pieces.clear()


def _ids_file(folder: Path, stretch: int) -> Path:
    return folder / f"{stretch:05d}.ids"


def _records_file(folder: Path, stretch: int) -> Path:
    return folder / f"{stretch:05d}.records"


def _append(path: Path, *pieces: np.ndarray) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
    try:
        for piece in pieces:
            write_all(fd, np.ascontiguousarray(piece))
    finally:
        os.close(fd)


def _newest(folder: Path, stretch: int, record_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads and removes a stretch's files; returns ascending row ids, int64 [n], and the last record of each."""
    if not _ids_file(folder, stretch).exists():
        return np.empty(0, dtype=np.int64), np.empty((0, record_bytes), dtype=np.uint8)
    row_ids = _taken(_ids_file(folder, stretch)).view(np.int64)
    records = _taken(_records_file(folder, stretch)).reshape(len(row_ids), record_bytes)
    order = np.argsort(row_ids, kind="stable")
    ascending = row_ids[order]
    is_last = np.append(ascending[1:] != ascending[:-1], True)
    return ascending[is_last], records.take(order[is_last], axis=0)


def _taken(path: Path) -> np.ndarray:
    """Returns what a file holds, uint8 [n], and removes it."""
    data = np.empty(path.stat().st_size, dtype=np.uint8)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        read_exactly(fd, data, 0, "a stretch of touched rows")
    finally:
        os.close(fd)
    path.unlink()
    return data
