"""The frame around columns: the head of the file, the directory of its blocks with the footer, and the tail.

Input: header, blocks' records and footer, or an open file. Output: bytes to write, or the same, every number checked
before it is used. Errors: `FormatError` for files that are foreign, newer, truncated, damaged or of another kind, and
for records that a column cannot have.
"""

from __future__ import annotations

import json
import os
import re
import stat
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeGuard

import numpy as np

from .. import kernels
from ..durable import read_exactly
from ..errors import FormatError

COLUMNS_VERSION = 1
HEADER_BYTES_MAX = 1 << 24
DIRECTORY_BYTES_MAX = 1 << 26
COLUMNS_MAX = 64  # of one block
BLOCK_BYTES_MAX = 1 << 28  # of one block's columns, uncompressed
DTYPES = {name: np.dtype(f"<{name}") for name in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8")}
FILTERS = ("plain", "delta", "planes", "delta_planes")

_MAGIC, _TAIL_MAGIC = b"TIERCOLS", b"COLS.END"
_HEAD = struct.Struct("<8sIIQ16s")  # magic, version, header bytes, file bytes, kind; a CRC32C follows
_TAIL = struct.Struct("<QII8s")  # directory bytes, its CRC32C, CRC32C of the 12 bytes before, magic
_TAIL_CHECKED_BYTES = 12
_CHECKSUM = struct.Struct("<I")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_KIND = re.compile(r"[a-z]{1,16}")


class Column(NamedTuple):
    """One column of one block: its values, filtered and compressed, at byte_start."""

    dtype: np.dtype
    filter: str
    num_values: int
    byte_start: int
    num_bytes: int
    checksum: int


def pack_head(kind: str, header: bytes, file_bytes: int) -> bytes:
    """Returns the head of a file: kind and length, then the header, all under one checksum."""
    if len(header) > HEADER_BYTES_MAX:
        raise ValueError(f"the header takes {len(header)} bytes, at most {HEADER_BYTES_MAX} are read; say less in it")
    head = _HEAD.pack(_MAGIC, COLUMNS_VERSION, len(header), file_bytes, kind.encode())
    return head + _CHECKSUM.pack(kernels.crc32c(header, kernels.crc32c(head))) + header


def pack_directory(blocks: Sequence[tuple[str, list[list[Any]]]], footer: Mapping[str, Any]) -> bytes:
    """Returns the end of a file: the directory with the footer, then the tail that says where they start."""
    directory = pack_json({"blocks": blocks, "footer": footer})
    if len(directory) > DIRECTORY_BYTES_MAX:
        raise ValueError(
            f"the directory of {len(blocks)} blocks takes {len(directory)} bytes, at most {DIRECTORY_BYTES_MAX} are "
            f"read; write larger blocks"
        )
    lengths = struct.pack("<QI", len(directory), kernels.crc32c(directory))
    return directory + lengths + _CHECKSUM.pack(kernels.crc32c(lengths)) + _TAIL_MAGIC


def read_head(path: Path, fd: int, kind: str) -> tuple[dict[str, Any], int, int]:
    """Returns (header, bytes of the file, where its blocks start), checked."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"{path} is not a regular file; give a {kind} that tierstore wrote")
    file_bytes = status.st_size
    least_bytes = _HEAD.size + _CHECKSUM.size + _TAIL.size
    head = _read(path, fd, 0, min(file_bytes, _HEAD.size))
    if not head or not _MAGIC.startswith(head[: len(_MAGIC)]):
        found = f"it starts with {head[:8]!r}, expected {_MAGIC!r}"
        raise FormatError(f"{path} is not a {kind}: {found}; {_making(kind)}")
    if file_bytes < least_bytes:
        raise FormatError(f"{path}: {file_bytes} bytes on disk, expected {least_bytes} or more; copy it again")
    _, version, header_bytes, expected_bytes, found_kind = _HEAD.unpack(head)
    if version != COLUMNS_VERSION:
        raise FormatError(
            f"{path}: its format is version {version}, this tierstore reads {COLUMNS_VERSION}; write it again, "
            "or upgrade"
        )
    if file_bytes != expected_bytes:
        raise FormatError(f"{path}: {file_bytes} bytes on disk, its head says {expected_bytes}; copy it again")
    if header_bytes > min(HEADER_BYTES_MAX, file_bytes - least_bytes):
        raise FormatError(f"{path}: a header of {header_bytes} bytes in a file of {file_bytes}; copy it again")
    rest = _read(path, fd, _HEAD.size, _CHECKSUM.size + header_bytes)
    header = rest[_CHECKSUM.size :]
    _check(kernels.crc32c(header, kernels.crc32c(head)), _CHECKSUM.unpack_from(rest)[0], f"{path}: its header")
    if found_kind.rstrip(b"\0") != kind.encode():
        found = found_kind.rstrip(b"\0").decode("ascii", "backslashreplace")
        raise FormatError(f"{path} is a {found}, expected a {kind}; {_making(kind)}")
    return _from_json(header, f"{path}: its header"), file_bytes, _HEAD.size + len(rest)


def _making(kind: str) -> str:
    """What to do for a file of a kind; a file's kind is the name of the command that makes it."""
    return f"give a {kind}, which `tierstore {kind}` makes"


def read_directory(
    path: Path, fd: int, file_bytes: int, data_start: int
) -> tuple[dict[str, Any], list[tuple[str, dict[str, Column]]]]:
    """Returns (footer, blocks), checked: the blocks' columns fill the file up to the directory, without gaps."""
    tail = _read(path, fd, file_bytes - _TAIL.size, _TAIL.size)
    directory_bytes, checksum, tail_checksum, magic = _TAIL.unpack(tail)
    _check(kernels.crc32c(tail[:_TAIL_CHECKED_BYTES]), tail_checksum, f"{path}: its last {_TAIL.size} bytes")
    directory_start = file_bytes - _TAIL.size - directory_bytes
    if magic != _TAIL_MAGIC or directory_bytes > DIRECTORY_BYTES_MAX or directory_start < data_start:
        raise FormatError(f"{path}: it ends in {magic!r} and a directory of {directory_bytes} bytes; copy it again")
    directory = _read(path, fd, directory_start, directory_bytes)
    _check(kernels.crc32c(directory), checksum, f"{path}: its directory")
    record = _from_json(directory, f"{path}: its directory")
    if record.keys() != {"blocks", "footer"} or not isinstance(record["footer"], dict):
        raise FormatError(f"{path}: its directory does not have blocks and a footer; write it again")
    blocks, byte_end = _checked_blocks(path, record["blocks"], data_start)
    if byte_end != directory_start:
        raise FormatError(
            f"{path}: its blocks end at byte {byte_end}, its directory starts at {directory_start}; write it again"
        )
    return record["footer"], blocks


def _checked_blocks(path: Path, records: Any, byte_start: int) -> tuple[list[tuple[str, dict[str, Column]]], int]:
    """Returns the blocks that a directory lists, with where their columns lie, and where the last one ends."""
    blocks: list[tuple[str, dict[str, Column]]] = []
    for record in records if isinstance(records, list) else [None]:
        where = f"{path}: block {len(blocks)}"
        section, listed = record if isinstance(record, list) and len(record) == 2 else (None, None)
        if not is_name(section) or not isinstance(listed, list) or not 1 <= len(listed) <= COLUMNS_MAX:
            raise FormatError(f"{where} is not a section with 1 to {COLUMNS_MAX} columns; write the file again")
        columns: dict[str, Column] = {}
        for entry in listed:
            name, column = _checked_column(where, entry, byte_start)
            columns[name] = column
            byte_start += column.num_bytes
        raw_bytes = sum(column.num_values * column.dtype.itemsize for column in columns.values())
        if len(columns) != len(listed) or raw_bytes > BLOCK_BYTES_MAX:
            raise FormatError(
                f"{where}: {len(listed)} columns of {raw_bytes} bytes under {len(columns)} names, at most "
                f"{BLOCK_BYTES_MAX} bytes; write the file again"
            )
        blocks.append((section, columns))
    return blocks, byte_start


def _checked_column(where: str, entry: Any, byte_start: int) -> tuple[str, Column]:
    """Checks one column's record on its own, before any of its numbers is used."""
    if isinstance(entry, list) and len(entry) == 6:
        name, dtype, filter_, *numbers = entry
        known = is_name(name) and isinstance(dtype, str) and dtype in DTYPES and filter_ in FILTERS
        if known and all(type(number) is int and 0 <= number < 1 << 32 for number in numbers):
            num_values, num_bytes, checksum = numbers
            # zstd adds at most a 256th and a few bytes to what it cannot compress
            if num_bytes <= (raw_bytes := num_values * DTYPES[dtype].itemsize) + raw_bytes // 128 + 512:
                return name, Column(DTYPES[dtype], filter_, num_values, byte_start, num_bytes, checksum)
    raise FormatError(f"{where}: a column is recorded as {entry!r:.200}, which none can be; write the file again")


def is_name(value: Any) -> TypeGuard[str]:
    """Whether a value can be the name of a section or a column."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def is_kind(value: Any) -> bool:
    """Whether a value can be the kind of a file."""
    return isinstance(value, str) and _KIND.fullmatch(value) is not None


def _read(path: Path, fd: int, byte_start: int, num_bytes: int) -> bytes:
    data = np.empty(num_bytes, dtype=np.uint8)
    read_exactly(fd, data, byte_start, str(path))
    return data.tobytes()


def _check(checksum: int, expected: int, what: str) -> None:
    if checksum != expected:
        raise FormatError(f"{what}: checksum {checksum:08x}, recorded {expected:08x}: it was damaged; copy it again")


def pack_json(value: Any) -> bytes:
    """Returns a value as JSON; raises `ValueError` or `TypeError` for what JSON cannot say."""
    return json.dumps(value, allow_nan=False).encode()


def _from_json(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(data.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} is no JSON ({error}); write the file again") from error
    if not isinstance(value, dict):
        raise FormatError(f"{what} is no JSON object; write the file again")
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")
