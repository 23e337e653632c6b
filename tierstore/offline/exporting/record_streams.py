"""Records of a table on their way to be sorted: streams of them, and the files of a stream that was cut.

Input: a stream, and the row ids at which it is cut. Output: a stream for each stretch of the table. Errors: `OSError`
of the disk, which the caller names; `StoppedError`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from ...durable import read_exactly, write_all
from .new_files import StoppedError

READ_BYTES = 4 << 20  # of records at once


@dataclass(frozen=True)
class RecordPiece:
    """Records that lie together.

    Attributes:
        row_ids: int64 [n].
        read: Fills an array, contiguous uint8 [n, record_bytes], with the records, each checked. Blocks on the disk.
            Any number of threads may read pieces of a stream at the same time.
    """

    row_ids: np.ndarray
    read: Callable[[np.ndarray], None]


class RecordStream(Protocol):
    """Records of one table, oldest first."""

    @property
    def record_bytes(self) -> int:
        """Bytes of a record, without its row id."""

    def row_ids(self) -> Iterator[np.ndarray]:
        """Yields the row ids of all records, int64 [n] each. Blocks on the disk."""

    def pieces(self) -> Iterator[RecordPiece]:
        """Yields all records in the order of `row_ids`, `READ_BYTES` at once or less. Blocks on the disk."""


@dataclass(frozen=True)
class Stoppable:
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

    def pieces(self) -> Iterator[RecordPiece]:
        """See `RecordStream`."""
        for piece in self.stream.pieces():
            self._check()
            yield piece

    def _check(self) -> None:
        if self.stop.is_set():
            raise StoppedError


def partition(stream: RecordStream, borders: np.ndarray, folder: Path, memory_bytes: int) -> None:
    """Appends every record, and its row id, to the files of its stretch. Blocks on the disk."""
    buffered: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(len(borders) + 1)]
    buffered_bytes = 0
    for piece in stream.pieces():
        records = np.empty((len(piece.row_ids), stream.record_bytes), dtype=np.uint8)
        piece.read(records)
        stretches = np.searchsorted(borders, piece.row_ids, side="right")
        order = np.argsort(stretches, kind="stable")
        row_ids, records = piece.row_ids[order], records.take(order, axis=0)
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
            append(_ids_file(folder, stretch), *(row_ids for row_ids, _ in pieces))
            append(_records_file(folder, stretch), *(records for _, records in pieces))
        pieces.clear()


def _ids_file(folder: Path, stretch: int) -> Path:
    return folder / f"{stretch:05d}.ids"


def _records_file(folder: Path, stretch: int) -> Path:
    return folder / f"{stretch:05d}.records"


def append(path: Path, *pieces: np.ndarray) -> None:
    """Appends arrays to a file, which is made if it is not there. Blocks on the disk."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
    try:
        for piece in pieces:
            write_all(fd, np.ascontiguousarray(piece))
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Stretch:
    """The files of a stretch; keeps the `RecordStream` contract."""

    folder: Path
    number: int
    record_bytes: int

    def row_ids(self) -> Iterator[np.ndarray]:
        """See `RecordStream`."""
        path = _ids_file(self.folder, self.number)
        if path.exists():  # no record is of the stretch
            yield from (ids for _, ids in _ids_of(path, READ_BYTES // 8))

    def pieces(self) -> Iterator[RecordPiece]:
        """See `RecordStream`. Every piece opens the file for itself: it may be read after the last one was given."""
        at_once, file = max(1, READ_BYTES // self.record_bytes), _records_file(self.folder, self.number)
        for start, ids in _ids_of(_ids_file(self.folder, self.number), at_once):
            yield RecordPiece(ids, partial(_read_records, file, start * self.record_bytes))

    def remove(self) -> None:
        """Removes the files."""
        for path in (_ids_file(self.folder, self.number), _records_file(self.folder, self.number)):
            path.unlink(missing_ok=True)


def _read_records(file: Path, byte_start: int, out: np.ndarray) -> None:
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _read(fd, byte_start, out)
    finally:
        os.close(fd)


def _read(fd: int, byte_start: int, out: np.ndarray) -> None:
    read_exactly(fd, out, byte_start, "a stretch of touched rows")


def _ids_of(path: Path, at_once: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the row ids of a file: the place of the first, and int64 [at_once] at most."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        count = os.fstat(fd).st_size // 8
        for start in range(0, count, at_once):
            ids = np.empty(min(at_once, count - start), dtype=np.int64)
            _read(fd, start * 8, ids.view(np.uint8))
            yield start, ids
    finally:
        os.close(fd)
