"""What new files consist of: ranges of other files, rows of a store, rows that training touched, and plain bytes.

Input: paths, open tables, touched rows. Output: `Part`s, whose bytes are read in ascending order into the caller's
buffer. Errors: `FormatError` for files that changed since they were looked at, those of a table's own reads.

A part only describes; `open` gives the reader, for one thread. So a file of any length needs no more memory than the
buffer of whoever writes it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ...causes import Fault, named, naming
from ...durable import read_exactly
from ...errors import FormatError
from ...formats.stored_tensor import FileIdentity, check_identity
from .row_readers import STEP_BYTES, RowOrigin
from .touched_rows import TouchedCursor, TouchedRows

_AGAIN = Fault(FormatError, "put it back and run again")


class PartReader(Protocol):
    """Reads a part. One thread uses it."""

    def read(self, byte_start: int, out: np.ndarray) -> None:
        """Fills out, contiguous uint8 [n], with the part's bytes from `byte_start` on. Blocks on the disk."""

    def close(self) -> None:
        """Ends the reading; raises `FormatError` if what was read has changed meanwhile."""


class Part(Protocol):
    """A range of a new file's bytes."""

    @property
    def num_bytes(self) -> int:
        """How many."""

    def open(self) -> PartReader:
        """Opens what they are read from."""


@dataclass(frozen=True)
class BytesPart:
    """Bytes that are known."""

    data: bytes

    @property
    def num_bytes(self) -> int:
        """How many."""
        return len(self.data)

    def open(self) -> BytesPart:
        """Returns itself: there is nothing to open."""
        return self

    def read(self, byte_start: int, out: np.ndarray) -> None:
        """See `PartReader`."""
        out[:] = np.frombuffer(self.data, np.uint8, len(out), byte_start)

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True)
class FilePart:
    """Bytes of a file that must still be the one of `identity`; None: nobody looked."""

    path: Path
    byte_start: int
    num_bytes: int
    identity: FileIdentity | None = None

    def open(self) -> FileReader:
        """Opens the file."""
        return FileReader(self)


class FileReader:
    """Reads a `FilePart`."""

    def __init__(self, part: FilePart) -> None:
        self._part = part
        try:
            self._fd = os.open(part.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise named(error, part.path, fault=_AGAIN) from error
        try:
            self._check()
            os.posix_fadvise(self._fd, part.byte_start, part.num_bytes, os.POSIX_FADV_SEQUENTIAL)
        except BaseException:
            os.close(self._fd)
            raise

    def read(self, byte_start: int, out: np.ndarray) -> None:
        """See `PartReader`."""
        with naming(self._part.path, self._part.path):
            read_exactly(self._fd, out, self._part.byte_start + byte_start, str(self._part.path))

    def close(self) -> None:
        """See `PartReader`."""
        try:
            self._check()
        finally:
            os.close(self._fd)

    def _check(self) -> None:
        if self._part.identity is not None:
            check_identity(self._part.path, os.fstat(self._fd), self._part.identity)


@dataclass(frozen=True)
class RowsPart:
    """One plane of consecutive rows of a table: columns [column_start, column_start + width_bytes) of each.

    Attributes:
        row_start: The table's row that the part begins with.
        num_rows: How many rows it has.
        column_start: The plane's first byte in a row of the store.
        width_bytes: Bytes of the plane in a row.
        row_bytes: Bytes of a whole row.
        untouched: Where rows come from that training did not touch: the same bytes of a checkpoint's file, or the
            table's rows.
        touched: Rows that take their place, or None.
    """

    row_start: int
    num_rows: int
    column_start: int
    width_bytes: int
    row_bytes: int
    untouched: FilePart | RowOrigin
    touched: TouchedRows | None = None

    @property
    def num_bytes(self) -> int:
        """How many."""
        return self.num_rows * self.width_bytes

    def open(self) -> RowsPartReader:
        """Opens what the rows are read from."""
        return RowsPartReader(self)


class RowsPartReader:
    """Reads a `RowsPart`."""

    def __init__(self, part: RowsPart) -> None:
        self._part = part
        untouched = part.untouched
        self._file = untouched.open() if isinstance(untouched, FilePart) else None
        try:
            self._rows = None if isinstance(untouched, FilePart) else untouched.open()
            self._touched: TouchedCursor | None = part.touched.open() if part.touched is not None else None
        except BaseException:
            if self._file is not None:
                self._file.close()
            raise

    def read(self, byte_start: int, out: np.ndarray) -> None:
        """See `PartReader`."""
        step_bytes = max(1, STEP_BYTES // self._part.row_bytes) * self._part.width_bytes
        for start in range(0, len(out), step_bytes):
            self._read_step(byte_start + start, out[start : start + step_bytes])

    def _read_step(self, byte_start: int, out: np.ndarray) -> None:
        part, width = self._part, self._part.width_bytes
        first, end = byte_start // width, -(-(byte_start + len(out)) // width)
        columns = slice(part.column_start, part.column_start + width)
        if self._file is not None:
            self._file.read(byte_start, out)
        elif self._rows is not None:
            rows = self._rows.read(part.row_start + first, part.row_start + end)[:, columns]
            skipped = byte_start - first * width
            out[:] = np.ascontiguousarray(rows).reshape(-1)[skipped : skipped + len(out)]
        if self._touched is not None:
            row_ids, rows = self._touched.within(part.row_start + first, part.row_start + end)
            put_rows(out, row_ids - part.row_start, rows[:, columns], byte_start)

    def close(self) -> None:
        """See `PartReader`."""
        if self._touched is not None:
            self._touched.close()
        for reader in (self._rows, self._file):
            if reader is not None:
                reader.close()


def put_rows(out: np.ndarray, numbers: np.ndarray, rows: np.ndarray, byte_start: int) -> None:
    """Puts rows, uint8 [n, width], where they belong in out, uint8 [m]: the bytes from `byte_start` on of rows
    that lie back to back. numbers: of the rows, ascending. Rows at either end may lie in it in part."""
    width = rows.shape[1]
    whole_start, whole_end = -(-byte_start // width), (byte_start + len(out)) // width
    if whole_start < whole_end:
        at = whole_start * width - byte_start
        inner = out[at : at + (whole_end - whole_start) * width].reshape(-1, width)
        is_whole = (numbers >= whole_start) & (numbers < whole_end)
        inner[numbers[is_whole] - whole_start] = rows[is_whole]
    else:
        is_whole = np.zeros(len(numbers), dtype=bool)
    for index in np.flatnonzero(~is_whole):
        start = int(numbers[index]) * width - byte_start
        low, high = max(start, 0), min(start + width, len(out))
        if low < high:
            out[low:high] = rows[index, low - start : high - start]
