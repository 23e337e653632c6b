"""The rows of a version: one immutable file a table, with pages as in shards, and the ids of its rows.

Input: the ids and the bytes of rows, as a publish makes them. Output: a file, and its parts read back and checked.
Errors: `FormatError` for foreign, truncated, damaged and newer files.

    head (4,096 bytes) | pages of rows, as in a shard | pages of row ids, 510 to each

Rows lie in the order in which they are written: row i of the file is that of id i. Pages of both kinds are numbered
from 0, and sealed with seeds of the file's own, so that no page of another file, version or store passes for one.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import kernels
from ..durable import read_exactly, write_all
from ..errors import CorruptPageError, FormatError
from ..layout import UNIT_BYTES, PageShape
from .page import page_faults, seal_pages

ROWS_FORMAT_VERSION = 1
VERSIONS_FOLDER = "versions"
ROWS_SUFFIX = ".rows"
ID_BYTES = 8
ID_SHAPE = PageShape(UNIT_BYTES, (UNIT_BYTES - 16) // ID_BYTES, ID_BYTES)
ROWS_MAX = 2**32 - 2  # in all files of a table together: places are 32 bits, and one of them means none
FILES_MAX = kernels.VERSION_FILES_MAX  # of a table
CHUNK_BYTES = 4 << 20  # of pages that are written or read at once
_MAGIC = b"TIERROWS"
_PREAMBLE = struct.Struct("<8sII")  # magic, format version, bytes of the JSON that follows
_CHECKSUM = struct.Struct("<I")


@dataclass(frozen=True)
class RowsFile:
    """What is in the head of a version's file of rows, which also says where everything lies.

    Attributes:
        version: The number of the version.
        table: The table's name.
        row_bytes: Of a row.
        num_rows: Rows in the file.
        identity: Of the store as it was before this version: a file of another store, or of another history, is
            refused.
        table_seed: The seed of the table's own pages.
    """

    version: int
    table: str
    row_bytes: int
    num_rows: int
    identity: str
    table_seed: int

    @property
    def shape(self) -> PageShape:
        """How rows lie in pages."""
        return PageShape.of_rows(self.row_bytes)

    @property
    def num_pages(self) -> int:
        """Pages of rows."""
        return self.shape.num_pages(self.num_rows)

    @property
    def pages_start(self) -> int:
        """The byte at which the pages of rows begin."""
        return UNIT_BYTES

    @property
    def ids_start(self) -> int:
        """The byte at which the pages of row ids begin."""
        return self.pages_start + self.num_pages * self.shape.page_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of the file."""
        return self.ids_start + ID_SHAPE.num_pages(self.num_rows) * ID_SHAPE.page_bytes

    @property
    def seed(self) -> int:
        """The seed of the checksums of its pages of rows."""
        return self._seed_of("rows")

    @property
    def ids_seed(self) -> int:
        """The seed of the checksums of its pages of row ids."""
        return self._seed_of("ids")

    def _seed_of(self, what: str) -> int:
        text = json.dumps([what, self.version, self.table, self.identity])
        return kernels.crc32c(text.encode(), self.table_seed)

    def head_bytes(self) -> bytes:
        """Returns the head, sealed."""
        body = json.dumps(asdict(self), sort_keys=True).encode()
        if _PREAMBLE.size + len(body) + _CHECKSUM.size > UNIT_BYTES:
            raise FormatError(f"the head of a version's rows takes more than {UNIT_BYTES} bytes: shorten {self.table}")
        head = _PREAMBLE.pack(_MAGIC, ROWS_FORMAT_VERSION, len(body)) + body
        head = head.ljust(UNIT_BYTES - _CHECKSUM.size, b"\0")
        return head + _CHECKSUM.pack(kernels.crc32c(head))


def write_rows_file(fd: int, head: RowsFile, chunks: Iterable[tuple[np.ndarray, np.ndarray]], work: Path) -> RowsFile:
    """Writes an empty file whole: head, rows and ids; `durable.replacing` makes it durable.

    Args:
        fd: Of the file, open for writing.
        head: What the file holds; its `num_rows` is not used.
        chunks: (row ids int64 [n], rows uint8 [n, row_bytes]) one after the other; ids all differ. Of any length.
        work: A folder in which ids lie meanwhile, in a file without a name.

    Returns:
        The head with the number of rows that came. Without any, nothing is written.
    """
    pages = _PageWriter(fd, head.shape, head.pages_start, head.seed)
    num_rows = 0
    with tempfile.TemporaryFile(dir=work, buffering=0) as spool:
        for row_ids, rows in chunks:
            pages.add(rows)
            write_all(spool.fileno(), np.ascontiguousarray(row_ids, dtype="<i8"), ID_BYTES * num_rows)
            num_rows += len(rows)
        pages.finish()
        head = replace(head, num_rows=num_rows)
        ids = _PageWriter(fd, ID_SHAPE, head.ids_start, head.ids_seed)
        for start in range(0, num_rows, CHUNK_BYTES // ID_BYTES):
            part = np.empty((min(CHUNK_BYTES // ID_BYTES, num_rows - start), ID_BYTES), dtype=np.uint8)
            read_exactly(spool.fileno(), part, ID_BYTES * start, "row ids")
            ids.add(part)
        ids.finish()
    if num_rows:
        write_all(fd, head.head_bytes(), 0)
    return head


class _PageWriter:
    """Seals rows into pages and writes them, one page after the other, whatever the lengths they come in."""

    def __init__(self, fd: int, shape: PageShape, byte_start: int, seed: int) -> None:
        self._fd, self._shape, self._seed, self._start = fd, shape, seed, byte_start
        self._page = 0
        self._rest = np.empty((0, shape.row_bytes), dtype=np.uint8)

    def add(self, rows: np.ndarray) -> None:
        """Takes rows, uint8 [n, row_bytes]."""
        rows = np.concatenate([self._rest, rows]) if len(self._rest) else rows
        whole = len(rows) // self._shape.rows_per_page * self._shape.rows_per_page
        self._write(rows[:whole])
        self._rest = rows[whole:].copy()

    def finish(self) -> None:
        """Writes the last page, which may be a part of one."""
        self._write(self._rest)

    def _write(self, rows: np.ndarray) -> None:
        step = max(1, CHUNK_BYTES // self._shape.page_bytes) * self._shape.rows_per_page
        for start in range(0, len(rows), step):
            part = np.ascontiguousarray(rows[start : start + step])
            pages = np.empty((self._shape.num_pages(len(part)), self._shape.page_bytes), dtype=np.uint8)
            seal_pages([part], self._shape, self._page, self._seed, pages)
            write_all(self._fd, pages, self._start + self._page * self._shape.page_bytes)
            self._page += len(pages)


def read_rows_head(file: Path, fd: int) -> RowsFile:
    """Reads and checks the head of an open file; raises `FormatError` if it is not one, or not of that length."""
    head = os.pread(fd, UNIT_BYTES, 0)
    if len(head) < UNIT_BYTES:
        raise _refused(file, f"{len(head)} bytes, a head takes {UNIT_BYTES}")
    magic, version, body_bytes = _PREAMBLE.unpack_from(head)
    if magic != _MAGIC:
        raise _refused(file, "it does not hold a version's rows")
    if version != ROWS_FORMAT_VERSION:
        raise _refused(file, f"its format is {version}, this tierstore reads {ROWS_FORMAT_VERSION}")
    if kernels.crc32c(head[:-4]) != _CHECKSUM.unpack_from(head, UNIT_BYTES - 4)[0]:
        raise _refused(file, "its head has a wrong checksum: it is damaged")
    try:
        found = RowsFile(**json.loads(head[_PREAMBLE.size : _PREAMBLE.size + body_bytes]))
    except (TypeError, ValueError, RecursionError) as error:
        raise _refused(file, f"its head is damaged ({error!r:.200})") from error
    numbers: list[Any] = [found.version, found.row_bytes, found.num_rows, found.table_seed]
    if not all(type(number) is int and number >= 0 for number in numbers) or not 1 <= found.num_rows <= ROWS_MAX:
        raise _refused(file, f"the numbers {numbers} of its head are no version's")
    found_bytes = os.fstat(fd).st_size
    if found_bytes != found.num_bytes:
        raise _refused(file, f"{found_bytes} bytes on disk, its rows take {found.num_bytes}: it was cut short")
    return found


def read_row_ids(file: Path, fd: int, head: RowsFile, table_rows: int) -> Iterator[np.ndarray]:
    """Yields the ids of a file's rows, int64, in the order of its rows, some MiB at once. Blocks on the disk.

    table_rows: rows of the table. Raises `FormatError` if a page of ids is damaged, or an id is not the table's: which
    rows the version has is not known then.
    """
    step = CHUNK_BYTES // ID_SHAPE.page_bytes
    num_pages = ID_SHAPE.num_pages(head.num_rows)
    for start in range(0, num_pages, step):
        numbers = np.arange(start, min(start + step, num_pages))
        pages = np.empty((len(numbers), ID_SHAPE.page_bytes), dtype=np.uint8)
        read_exactly(fd, pages, head.ids_start + start * ID_SHAPE.page_bytes, str(file))
        bad = page_faults(pages, numbers, head.ids_seed)
        if bad:
            raise _refused(file, f"page {bad[0][0]} of its row ids: {bad[0][1]}")
        ids = ID_SHAPE.rows_of(pages).reshape(-1, ID_BYTES)
        ids = np.ascontiguousarray(ids[: head.num_rows - start * ID_SHAPE.rows_per_page])
        found = ids.view("<i8").reshape(-1).astype(np.int64, copy=False)
        if len(found) and not 0 <= int(found.min()) <= int(found.max()) < table_rows:
            raise _refused(file, f"it has row {found.max()} of a table of {table_rows}")
        yield found


def read_version_pages(file: Path, fd: int, head: RowsFile, page_numbers: np.ndarray) -> np.ndarray:
    """Reads pages of rows, int64 [P] ascending without repeats; returns their rows, uint8 [P * rows_per_page,
    row_bytes].

    Blocks. Raises `CorruptPageError`, naming the first page that is bad.
    """
    shape = head.shape
    pages = np.empty((len(page_numbers), shape.page_bytes), dtype=np.uint8)
    ends = [0, *(np.flatnonzero(np.diff(page_numbers) != 1) + 1).tolist(), len(page_numbers)]
    runs = [
        (i, j, head.pages_start + int(page_numbers[i]) * shape.page_bytes) for i, j in itertools.pairwise(ends) if j > i
    ]
    try:
        for i, j, byte_start in runs if len(runs) > 1 else ():
            os.posix_fadvise(fd, byte_start, (j - i) * shape.page_bytes, os.POSIX_FADV_WILLNEED)
        for i, j, byte_start in runs:
            read_exactly(fd, pages[i:j], byte_start, str(file))
    except (OSError, FormatError) as error:
        raise CorruptPageError(f"{file}: its rows cannot be read: {error}; check the disk") from error
    bad = page_faults(pages, page_numbers, head.seed)
    if bad:
        raise CorruptPageError(version_page_fault(file, *bad[0]))
    return shape.rows_of(pages).reshape(-1, shape.row_bytes)


def version_page_fault(file: Path, page_number: int, what: str) -> str:
    """Returns the message of a page of rows that is not what it was."""
    return f"page {page_number} of {file}: {what}; {REMEDY}"


REMEDY = "copy the file from another host that has this version, or open the version before it (version=N)"


def _refused(file: Path, what: str) -> FormatError:
    return FormatError(f"{file}: {what}; {REMEDY}")
