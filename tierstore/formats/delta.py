"""A delta: the files of some versions of a store in one file, to be applied to the same store on another host.

Input: versions' records and their files. Output: a file, or what its head says. Errors: `FormatError` for files that
are foreign, damaged or newer.

    head (whole units of 4,096 bytes) | the versions' files, each from a unit's boundary on

The head is sealed by a CRC32C; the files, by the SHA-256 that their records name.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import kernels
from ..errors import FormatError
from ..layout import UNIT_BYTES, TableLayout, round_up
from .versions import VersionRecord

DELTA_FORMAT_VERSION = 1
HEAD_BYTES_MAX = 64 << 20
_MAGIC = b"TIERDELT"
_PREAMBLE = struct.Struct("<8sII")  # magic, format version, bytes of the JSON that follows
_CHECKSUM = struct.Struct("<I")


@dataclass(frozen=True)
class DeltaHead:
    """What is in the head.

    Attributes:
        base: The digest of the store's base.
        since: The digest of the store at the version that the delta begins behind.
        until: The same, of the last version that it has.
        versions: Their records, oldest first.
    """

    base: str
    since: str
    until: str
    versions: tuple[VersionRecord, ...]

    @property
    def files(self) -> list[tuple[str, int, str]]:
        """Every file that the delta holds, by version and then by table: path in the store, bytes, SHA-256."""
        tables = [table for version in self.versions for _, table in sorted(version.tables.items())]
        return [(table.file, table.num_bytes, table.sha256) for table in tables]

    def file_starts(self, head_bytes: int) -> list[int]:
        """Returns the byte at which each file begins, and where the last one ends, up to a whole unit."""
        starts = [head_bytes]
        for _, num_bytes, _ in self.files:
            starts.append(starts[-1] + round_up(num_bytes, UNIT_BYTES))
        return starts

    def to_bytes(self) -> bytes:
        """Returns the head, sealed."""
        body = json.dumps(
            {
                "base": self.base, "since": self.since, "until": self.until,
                "versions": [version.to_dict() for version in self.versions],
            },
            sort_keys=True,
        ).encode()  # fmt: skip
        size = round_up(_PREAMBLE.size + len(body) + _CHECKSUM.size, UNIT_BYTES)
        if size > HEAD_BYTES_MAX:
            raise FormatError(f"a delta's head of {size} bytes, at most {HEAD_BYTES_MAX}: make one of fewer versions")
        head = (_PREAMBLE.pack(_MAGIC, DELTA_FORMAT_VERSION, len(body)) + body).ljust(size - _CHECKSUM.size, b"\0")
        return head + _CHECKSUM.pack(kernels.crc32c(head))


def read_delta_head(file: Path, fd: int, layouts: dict[str, TableLayout]) -> tuple[DeltaHead, int]:
    """Reads the head of an open delta; returns it and its bytes. layouts: of the store that it is for.

    Raises `FormatError` if it is damaged, not a delta, or not of that store's tables.
    """
    start = os.pread(fd, UNIT_BYTES, 0)
    if len(start) < UNIT_BYTES or start[:8] != _MAGIC:
        raise _refused(file, "it is not a delta of versions")
    _, version, body_bytes = _PREAMBLE.unpack_from(start)
    if version != DELTA_FORMAT_VERSION:
        raise _refused(file, f"delta format {version}, this tierstore reads {DELTA_FORMAT_VERSION}")
    size = round_up(_PREAMBLE.size + body_bytes + _CHECKSUM.size, UNIT_BYTES)
    head = os.pread(fd, size, 0) if size <= HEAD_BYTES_MAX else b""
    if len(head) < size or kernels.crc32c(head[:-4]) != _CHECKSUM.unpack_from(head, size - 4)[0]:
        raise _refused(file, "its head has a wrong checksum: it is damaged")
    try:
        record: dict[str, Any] = json.loads(head[_PREAMBLE.size : _PREAMBLE.size + body_bytes])
        versions = [VersionRecord.from_dict(each, layouts, f"{file}: version {n}") for n, each in _numbered(record)]
        found = DeltaHead(str(record["base"]), str(record["since"]), str(record["until"]), tuple(versions))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise _refused(file, f"its head is damaged ({error!r:.200})") from error
    numbers = [version.number for version in versions]
    if not numbers or numbers != list(range(numbers[0], numbers[0] + len(numbers))) or numbers[0] < 1:
        raise _refused(file, f"it has versions {numbers}, with a gap")
    if any(version.folded is not None for version in versions):
        raise _refused(file, "a version in it was folded")
    wanted = found.file_starts(size)[-1]
    if os.fstat(fd).st_size != wanted:
        raise _refused(file, f"{os.fstat(fd).st_size} bytes on disk, its files take {wanted}: it was cut short")
    return found, size


def _numbered(record: dict[str, Any]) -> list[tuple[Any, Any]]:
    return [(each.get("number"), each) for each in record["versions"]]


def _refused(file: Path, what: str) -> FormatError:
    return FormatError(f"{file}: {what}; copy it again, or make another: tierstore delta STORE A..B -o NEW_FILE")
