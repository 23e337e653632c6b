"""Columns: the one container of traces and profiles, integers column by column, compressed with zstd.

Input: blocks of named columns, each block under a section, between a header and a footer. Output: the same, one block
at a time, so that memory is bounded by a block. A file has its name only once it is finished.
Errors: `FormatError` for what `column_layout` refuses, and for columns that are not what the directory says, before any
memory is allocated for them.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from .. import kernels
from ..causes import NEW_SUFFIX, naming
from ..durable import read_exactly, sync_folder, write_all
from ..errors import ConfigError, FormatError, TierStoreError
from .column_layout import (
    BLOCK_BYTES_MAX,
    COLUMNS_MAX,
    DTYPES,
    FILTERS,
    Column,
    is_kind,
    is_name,
    pack_directory,
    pack_head,
    pack_json,
    read_directory,
    read_head,
)

COMPRESSION_LEVEL = 3
SAMPLE_VALUES = 1 << 14  # of a column, on which filters are compared
WRITEBACK_BYTES = 4 << 20  # written, which the disk begins with then: little is left when the file is finished


@dataclass(frozen=True)
class PackedBlock:
    """A block as it is written: its section, and for each column its bytes and its record in the directory."""

    section: str
    columns: list[tuple[bytes, list[Any]]]


def pack_block(section: str, columns: Mapping[str, np.ndarray], level: int = COMPRESSION_LEVEL) -> PackedBlock:
    """Returns a block of 1-D integer columns, of any lengths, ready to be written. Pure; any thread.

    Each column is filtered in the way that a sample of it compresses best, compressed alone, and checksummed. level: of
    zstd. Raises `TypeError` for columns that are not 1-D integers, `ValueError` for more than COLUMNS_MAX or
    BLOCK_BYTES_MAX.
    """
    num_bytes = sum(values.nbytes for values in columns.values())
    if not 1 <= len(columns) <= COLUMNS_MAX or num_bytes > BLOCK_BYTES_MAX:
        raise ValueError(
            f"a block of {len(columns)} columns and {num_bytes} bytes; at most {COLUMNS_MAX} and {BLOCK_BYTES_MAX} "
            f"go into one: write more blocks"
        )
    for name in (section, *columns):
        assert is_name(name), name
    compressor = zstandard.ZstdCompressor(level=level, write_content_size=True)
    return PackedBlock(section, [_pack_column(name, values, compressor) for name, values in columns.items()])


def _pack_column(name: str, values: np.ndarray, compressor: zstandard.ZstdCompressor) -> tuple[bytes, list[Any]]:
    dtype_name = values.dtype.str[1:]
    if values.ndim != 1 or dtype_name not in DTYPES:
        raise TypeError(f"column {name} is {values.dtype} {list(values.shape)}, expected 1-D integers")
    values = np.ascontiguousarray(values, dtype=DTYPES[dtype_name])
    middle = max(0, (len(values) - SAMPLE_VALUES) // 2)
    sample = values[middle : middle + SAMPLE_VALUES]
    best = min(FILTERS, key=lambda filter_: len(compressor.compress(_filtered(sample, filter_))))
    data = compressor.compress(_filtered(values, best))
    return data, [name, dtype_name, best, len(values), len(data), kernels.crc32c(data)]


class ColumnWriter:
    """Writes one file of columns; use it with `with`. One thread at a time. Unfinished, it leaves nothing behind.

    Whatever writes raises `BudgetError` if the disk is full, `ConfigError` if the system refuses otherwise.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str, header: Mapping[str, Any]) -> None:
        """Starts the file at `path`, under a temporary name beside it until `finish`.

        kind: 1 to 16 letters a-z; what the file is, for readers to insist on. header: what JSON can say. Raises
        `ConfigError` if `path` is there and not a regular file, or if the folder cannot be written.
        """
        assert is_kind(kind), kind
        self.path = Path(path)
        self._kind, self._header = kind, pack_json(header)
        if self.path.exists() and not self.path.is_file():
            raise ConfigError(f"{self.path} is there and not a regular file; give the name of a file to write")
        self._new_path = self.path.with_name(self.path.name + NEW_SUFFIX)
        self._blocks: list[tuple[str, list[list[Any]]]] = []
        self._num_bytes = self._begun_bytes = 0  # written, and of them those that the disk has begun with
        self._pid = os.getpid()
        self._file: io.FileIO | None = None
        try:
            with self._named():
                self._new_path.unlink(missing_ok=True)  # what a killed writer left
                self._file = io.FileIO(self._new_path, "x")  # an object: dropped on its way here, it closes itself
            self._write(pack_head(self._kind, self._header, file_bytes=0))
        except (OSError, TierStoreError):  # the file is another writer's, or `abandon` removes it
            self.abandon()
            raise
        except BaseException:
            if self._file is None:  # an interrupt came when the file was there and not noted yet
                self._new_path.unlink(missing_ok=True)
            self.abandon()
            raise

    def write_block(self, section: str, columns: Mapping[str, np.ndarray]) -> None:
        """Appends a block to `section`: 1-D integer columns, of any lengths. Blocks on the disk.

        Raises what `pack_block` raises.
        """
        self.write_packed(pack_block(section, columns))

    def write_packed(self, block: PackedBlock) -> None:
        """Appends a block that is packed. Blocks on the disk."""
        for data, _ in block.columns:
            self._write(data)
        self._blocks.append((block.section, [record for _, record in block.columns]))

    def finish(self, footer: Mapping[str, Any]) -> None:
        """Writes directory and footer, makes the file durable and gives it its name. Blocks on the disk.

        Raises `ConfigError` if another process has begun to write the same file meanwhile.
        """
        self._write(pack_directory(self._blocks, footer))
        with self._named():
            write_all(self._open_file().fileno(), pack_head(self._kind, self._header, self._num_bytes), 0)
            os.fsync(self._open_file().fileno())
        if not self._is_ours():
            raise ConfigError(f"{self._new_path} was taken by another writer; give each its own file")
        with self._named():
            os.rename(self._new_path, self.path)
            self._open_file().close()
            sync_folder(self.path.parent)

    def abandon(self) -> None:
        """Removes what was written, unless it is finished. A forked child leaves its parent's file."""
        if self._file is not None and not self._file.closed:
            if os.getpid() == self._pid and self._is_ours():
                self._new_path.unlink(missing_ok=True)
            self._file.close()

    def __del__(self) -> None:
        # Its maker was interrupted before it could keep it.
        if getattr(self, "_file", None) is not None:
            self.abandon()

    def _open_file(self) -> io.FileIO:
        assert self._file is not None
        return self._file

    def _is_ours(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._open_file().fileno()), os.stat(self._new_path))
        return False

    def _write(self, data: bytes) -> None:
        # Not through a buffered file: a forked child would flush its copy of the buffer into this file.
        with self._named():
            write_all(self._open_file().fileno(), data)
            self._num_bytes += len(data)
            if (new_bytes := self._num_bytes - self._begun_bytes) >= WRITEBACK_BYTES:
                # Linux begins to write such pages, and drops none that are not written.
                os.posix_fadvise(self._open_file().fileno(), self._begun_bytes, new_bytes, os.POSIX_FADV_DONTNEED)
                self._begun_bytes = self._num_bytes

    def _named(self) -> contextlib.AbstractContextManager[None]:
        so_far = f", after {self._num_bytes} bytes of it" if self._num_bytes else ""
        return naming(f"{self.path}{so_far}", self.path, writing=True)

    def __enter__(self) -> ColumnWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()


class ColumnReader:
    """A finished file of columns: header, footer, and blocks on demand. Any number of threads may read."""

    def __init__(self, path: Path, file: io.FileIO, kind: str) -> None:
        """Reads and checks all but the blocks; `open` is the way in. Takes over the file."""
        self.path = path
        self._file = file
        self.header, self.num_bytes, data_start = read_head(path, file.fileno(), kind)
        self.footer, self._blocks = read_directory(path, file.fileno(), self.num_bytes, data_start)

    @classmethod
    def open(cls, path: str | os.PathLike[str], kind: str) -> ColumnReader:
        """Opens a file of the given kind; use it with `with`. Blocks on the disk.

        Raises `FormatError` if it is not a whole file of that kind and of a version we know, `ConfigError` if it cannot
        be opened.
        """
        with naming(os.fspath(path), path):
            file = io.FileIO(path, opener=_open_without_waiting)
        try:
            return cls(Path(path), file, kind)
        except BaseException:
            file.close()
            raise

    def sections(self) -> list[str]:
        """Returns the sections that have blocks, in the order of their first ones."""
        return list(dict.fromkeys(section for section, _ in self._blocks))

    def num_values(self, section: str, column: str) -> int:
        """Returns how many values a column has in all blocks of a section, 0 or more."""
        return sum(
            columns[column].num_values for name, columns in self._blocks if name == section and column in columns
        )

    def count(self, name: str) -> int:
        """Returns a count that the footer holds, 0 to 2^63 - 1; raises `FormatError` if it holds none."""
        value = self.footer.get(name)
        if type(value) is int and 0 <= value < 1 << 63:
            return value
        raise FormatError(f"{self.path}: its footer says {name}: {value!r:.100}, expected a count; write it again")

    def require(self, section: str, columns: Mapping[str, str]) -> None:
        """Raises `FormatError` if a block of `section` has other columns than {name: NumPy's name of its dtype}."""
        for name, found in self._blocks:
            dtypes = {column: record.dtype.name for column, record in found.items()}
            if name == section and dtypes != dict(columns):
                raise FormatError(
                    f"{self.path}: a block of {section} has columns {dtypes}, expected {dict(columns)}; write it again"
                )

    def blocks(self, section: str) -> Iterator[dict[str, np.ndarray]]:
        """Yields the blocks of a section in order, {column: 1-D array, read-only}. Blocks on the disk.

        Raises `FormatError` if a column is damaged. No more than one block is in memory.
        """
        decompressor = zstandard.ZstdDecompressor()
        for index, (name, columns) in enumerate(self._blocks):
            if name == section:
                where = f"{self.path}: block {index}, section {section}, column"
                yield {
                    column: self._read_column(record, decompressor, f"{where} {column}")
                    for column, record in columns.items()
                }

    def _read_column(self, record: Column, decompressor: zstandard.ZstdDecompressor, where: str) -> np.ndarray:
        data = np.empty(record.num_bytes, dtype=np.uint8)
        read_exactly(self._file.fileno(), data, record.byte_start, where)
        if (checksum := kernels.crc32c(data)) != record.checksum:
            raise FormatError(
                f"{where}: checksum {checksum:08x}, the directory says {record.checksum:08x}; copy the file again"
            )
        raw_bytes = record.num_values * record.dtype.itemsize
        try:
            # The frame's own claim comes first: the decompressor allocates by it.
            claimed = zstandard.frame_content_size(data.data)
            if claimed != raw_bytes:
                raise FormatError(f"{where}: {claimed} bytes of values, the directory says {raw_bytes}; write it again")
            raw = decompressor.decompress(data.data, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise FormatError(f"{where}: no zstd frame ({error}); write the file again") from error
        if len(raw) != raw_bytes:
            raise FormatError(f"{where}: {len(raw)} bytes of values, the directory says {raw_bytes}; write it again")
        return _unfiltered(raw, record.dtype, record.filter)

    def close(self) -> None:
        """Closes the file. Closing twice is harmless."""
        self._file.close()

    def __del__(self) -> None:
        # Its maker was interrupted before it could keep it.
        if hasattr(self, "_file"):
            self._file.close()

    def __enter__(self) -> ColumnReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for its writer


def _filtered(values: np.ndarray, filter_: str) -> memoryview:
    """Returns values, little-endian, as bytes in the order that the filter says: see FORMAT.md."""
    if filter_.startswith("delta"):
        values = values.view(f"<u{values.itemsize}")
        values = np.concatenate([values[:1], values[1:] - values[:-1]])  # differences wrap round, as sums do later
    raw = values.view(np.uint8)
    if filter_.endswith("planes"):
        raw = np.ascontiguousarray(raw.reshape(len(values), values.itemsize).T).reshape(-1)
    return raw.data


def _unfiltered(raw: bytes, dtype: np.dtype, filter_: str) -> np.ndarray:
    """Undoes `_filtered`."""
    values: np.ndarray = np.frombuffer(raw, dtype=f"<u{dtype.itemsize}")
    if filter_.endswith("planes"):
        planes = np.frombuffer(raw, dtype=np.uint8).reshape(dtype.itemsize, len(values))
        values = np.ascontiguousarray(planes.T).reshape(-1).view(values.dtype)
    if filter_.startswith("delta"):
        values = np.cumsum(values, dtype=values.dtype)
    values = values.view(dtype)
    values.flags.writeable = False
    return values
