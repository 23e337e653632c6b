"""The newest record of every row, rounded and in ascending order: the records are read once, front to back.

Input: a stream of records, oldest first, in any order of rows; of two records of one row the later one counts. Output:
`TouchedRows`. Errors: `BudgetError`; `OSError` of the disk, which the caller names.

Row ids come first: sorted, they say which records are the newest, and where each belongs. Then the stream passes by, a
few MiB at once, and every newest record is rounded into its place in memory: rows of a codec, a quarter of their
records, and no copy of the records themselves. If memory has no room for the rows of the whole table, a pass before
cuts the table into stretches that fit, and appends every record to the file of its stretch; then each file is such a
stream. Nothing is written at random places.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ...durable import read_exactly, write_all
from ...errors import BudgetError
from ...units import format_bytes
from .new_files import StoppedError
from .touched_rows import ROW_IDS, ROWS, TouchedRows

BINS_MAX = 1 << 16  # of row ids, that are counted to cut the table into stretches
STRETCH_BYTES_MIN = 1 << 20
BUFFER_BYTES_MIN = 4096
READ_BYTES = 4 << 20  # of records at once
PASSING_BYTES = 4 * READ_BYTES  # of memory: records as read, their values, rows before and after
SORTING_BYTES = 40  # of a record in memory beside what becomes of it: row ids, order and places


class RecordStream(Protocol):
    """Records of one table, oldest first."""

    @property
    def record_bytes(self) -> int:
        """Bytes of a record, without its row id."""

    def row_ids(self) -> Iterator[np.ndarray]:
        """Yields the row ids of all records, int64 [n] each. Blocks on the disk."""

    def records(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields row ids, int64 [n], and records, uint8 [n, record_bytes], each checked, in the order of `row_ids`.

        The next step overwrites what this one yielded. Blocks on the disk.
        """


class Rounding(Protocol):
    """What becomes of records: some arrays by name, among them `ROWS`."""

    @property
    def widths(self) -> Mapping[str, int]:
        """Bytes of a row of each array."""

    def fill_before(self, row_ids: np.ndarray, rows: np.ndarray) -> None:
        """Fills rows, uint8 [n, width of `ROWS`], with the rows before, if rounding asks for them.

        row_ids: int64 [n], ascending. Blocks on the disk.
        """

    def __call__(self, records: np.ndarray, before: np.ndarray) -> Mapping[str, np.ndarray]:
        """Returns what is kept of records, uint8 [n, record_bytes]: contiguous [n, ...] by name. Only computes.

        before: uint8 [n, width of `ROWS`], as `fill_before` left them.
        """


def sort_touched_rows(
    stream: RecordStream, num_rows: int, folder: Path, memory_bytes: int, rounding: Rounding, stop: threading.Event
) -> TouchedRows:
    """Rounds the newest record of each row, and keeps the rows in ascending order. Blocks on the disk.

    Args:
        stream: The records.
        num_rows: Of the table.
        folder: A new folder for the files; it is made.
        memory_bytes: What sorting may take.
        rounding: Makes rows of records.
        stop: Set by another thread that does not want the rows any more.

    Raises:
        StoppedError: `stop` was set.
        BudgetError: So little memory would cut the table into too many stretches.
    """
    folder.mkdir(parents=True)
    stream = _Stoppable(stream, stop)
    borders = _borders(stream, num_rows, memory_bytes, SORTING_BYTES + sum(rounding.widths.values()))
    num_touched = 0
    if not len(borders):
        num_touched = _sort_stretch(stream, folder, rounding)
    else:
        _partition(stream, borders, folder, memory_bytes)
        for number in range(len(borders) + 1):
            stretch = _Stretch(folder, number, stream.record_bytes)
            num_touched += _sort_stretch(_Stoppable(stretch, stop), folder, rounding)
            stretch.remove()
    return TouchedRows(folder, num_touched, rounding.widths)


def _sort_stretch(stream: RecordStream, folder: Path, rounding: Rounding) -> int:
    """Appends the rows of a stream that fits in memory to the files of the table; returns how many there are."""
    row_ids, slots = _slots(stream)
    if not len(row_ids):
        return 0
    kept = {name: np.empty((len(row_ids), width), dtype=np.uint8) for name, width in rounding.widths.items()}
    rounding.fill_before(row_ids, kept[ROWS])
    place = 0
    for passing, records in stream.records():
        slot = slots[place : place + len(passing)]
        place += len(passing)
        is_newest = slot >= 0
        if not is_newest.all():
            slot, records = slot[is_newest], records[is_newest]
        for name, made in rounding(records, kept[ROWS].take(slot, axis=0)).items():
            kept[name][slot] = made.view(np.uint8).reshape(len(slot), -1)
    _append(folder / ROW_IDS, row_ids)
    for name, rows in kept.items():
        _append(folder / name, rows)
    return len(row_ids)


def _slots(stream: RecordStream) -> tuple[np.ndarray, np.ndarray]:
    """Returns the row ids of a stream, int64 [m] ascending; and for every record, int64 [n], which of these it is the
    newest of, or -1."""
    row_ids = np.concatenate([np.empty(0, dtype=np.int64), *stream.row_ids()])
    order = np.argsort(row_ids, kind="stable")
    row_ids = row_ids[order]
    is_last = np.ones(len(row_ids), dtype=bool)
    is_last[:-1] = row_ids[1:] != row_ids[:-1]
    row_ids, newest = row_ids[is_last], order[is_last]
    slots = np.full(len(order), -1, dtype=np.int64)
    slots[newest] = np.arange(len(newest))
    return row_ids, slots


def _borders(stream: RecordStream, num_rows: int, memory_bytes: int, kept_bytes: int) -> np.ndarray:
    """Returns where stretches end, int64 ascending: row ids, but for the last one's end.

    kept_bytes: of memory that a record takes while its stretch is sorted.
    """
    bin_rows = -(-num_rows // min(num_rows, BINS_MAX))
    counts = np.zeros(-(-num_rows // bin_rows), dtype=np.int64)
    for row_ids in stream.row_ids():
        counts += np.bincount(row_ids // bin_rows, minlength=len(counts))
    stretch_records = max(1, max(memory_bytes // 2, memory_bytes - PASSING_BYTES) // kept_bytes)
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


@dataclass(frozen=True)
class _Stoppable:
    """A stream that ends with `StoppedError` once `stop` is set; keeps the `RecordStream` contract."""

    stream: RecordStream
    stop: threading.Event

    @property
    def record_bytes(self) -> int:
        """See `RecordStream`."""
        return self.stream.record_bytes

    def row_ids(self) -> Iterator[np.ndarray]:
        """See `RecordStream`."""
        for row_ids in self.stream.row_ids():
            self._check()
            yield row_ids

    def records(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """See `RecordStream`."""
        for row_ids, records in self.stream.records():
            self._check()
            yield row_ids, records

    def _check(self) -> None:
        if self.stop.is_set():
            raise StoppedError


@dataclass(frozen=True)
class _Stretch:
    """The files of a stretch; keeps the `RecordStream` contract."""

    folder: Path
    number: int
    record_bytes: int

    def row_ids(self) -> Iterator[np.ndarray]:
        """See `RecordStream`."""
        path = _ids_file(self.folder, self.number)
        if path.exists():  # no record is of the stretch
            yield from (ids.view(np.int64) for ids in _pieces(path, READ_BYTES))

    def records(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """See `RecordStream`."""
        at_once = max(1, READ_BYTES // self.record_bytes)
        ids = _pieces(_ids_file(self.folder, self.number), at_once * 8)
        records = _pieces(_records_file(self.folder, self.number), at_once * self.record_bytes)
        for some_ids, some_records in zip(ids, records, strict=True):
            yield some_ids.view(np.int64), some_records.reshape(-1, self.record_bytes)

    def remove(self) -> None:
        """Removes the files."""
        for path in (_ids_file(self.folder, self.number), _records_file(self.folder, self.number)):
            path.unlink(missing_ok=True)


def _pieces(path: Path, piece_bytes: int) -> Iterator[np.ndarray]:
    """Yields a file's bytes, uint8 [piece_bytes] at most."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        for start in range(0, size, piece_bytes):
            data = np.empty(min(piece_bytes, size - start), dtype=np.uint8)
            read_exactly(fd, data, start, "a stretch of touched rows")
            yield data
    finally:
        os.close(fd)
