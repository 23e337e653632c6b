"""A placement: one immutable file with the chosen entries of every table, hottest first, and indexes that find them.

Input: numbers and indexes as `tierstore.offline.place` makes them. Output: a `Placement`, read from the file's head and
checked against the store's tables; where each table's index and records lie. A record is an entry with its key, its
order and a CRC32C bound to both and to the table. Records are numbered from 0, the hottest first.
Errors: `FormatError` for foreign, truncated, damaged and newer files.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import kernels
from ..errors import FormatError
from ..layout import BUCKET_KEYS, UNIT_BYTES, PlacementRecord, TableLayout, record_bytes, round_up

PLACEMENT_FORMAT_VERSION = 1
PLACEMENT_FOLDER = "placements"
HEAD_BYTES_MAX = 64 << 10
RECORDS_MAX = 2**32 - 2
GROUP_RECORDS = UNIT_BYTES // 8  # records begin at multiples of 8: so many of any size fill whole units
_MAGIC = b"TIERPLAC"
_PREAMBLE = struct.Struct("<8sII")  # magic, format version, bytes of the JSON that follows
_CHECKSUM = struct.Struct("<I")


@dataclass(frozen=True)
class PlacedIndex:
    """Where the index of one order lies: uint8 [num_buckets, 64] at byte_start, and its CRC32C."""

    byte_start: int
    num_buckets: int
    checksum: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the index."""
        return self.num_buckets * kernels.INDEX_BUCKET.itemsize


@dataclass(frozen=True)
class PlacedTable:
    """The part of one table: `num_entries` records of `record_bytes` from byte_start on, the hottest first.

    Attributes:
        static_fraction: How much of the table's share of DRAM, without the indexes, its static set takes.
        hbm_entries: How many of the first entries were meant for HBM.
        indexes: One an order.
    """

    name: str
    entry_bytes: int
    record_bytes: int
    byte_start: int
    num_entries: int
    static_fraction: float
    hbm_entries: int
    indexes: tuple[PlacedIndex, ...]

    @property
    def index_bytes(self) -> int:
        """Bytes of all indexes."""
        return sum(index.num_bytes for index in self.indexes)

    @property
    def records_bytes(self) -> int:
        """Bytes of all records."""
        return self.num_entries * self.record_bytes

    @property
    def read_bytes_max(self) -> int:
        """Bytes of the largest read that one record takes."""
        return round_up(self.record_bytes + UNIT_BYTES - 8, UNIT_BYTES)


@dataclass(frozen=True)
class Placement:
    """What is in a placement file's head. details: what the plan expected and where it came from, for people."""

    epoch: int
    num_bytes: int
    tables: dict[str, PlacedTable]
    details: dict[str, Any]


def group_start(num_entries: int) -> int:
    """Returns the last record number, at most num_entries, at which a unit begins: reading may begin there."""
    return num_entries // GROUP_RECORDS * GROUP_RECORDS


@dataclass(frozen=True)
class TableShape:
    """What is to be placed of a table: how many entries of each order, and fields as of `PlacedTable`."""

    entries_of_order: tuple[int, ...]
    static_fraction: float
    hbm_entries: int = 0


def lay_out_placement(
    epoch: int, layouts: Mapping[str, TableLayout], shapes: Mapping[str, TableShape], details: dict[str, Any]
) -> Placement:
    """Returns where everything will lie, indexes' checksums still 0."""
    at = HEAD_BYTES_MAX
    tables = {}
    for name, shape in shapes.items():
        indexes = []
        for count in shape.entries_of_order:
            index = PlacedIndex(at, int(count // BUCKET_KEYS) + 1 if count else 0, 0)
            indexes.append(index)
            at += round_up(index.num_bytes, UNIT_BYTES)
        entry_bytes = layouts[name].spec.entry_bytes
        num_entries, size = sum(shape.entries_of_order), record_bytes(entry_bytes)
        table = PlacedTable(
            name, entry_bytes, size, at, num_entries, shape.static_fraction, shape.hbm_entries, tuple(indexes)
        )
        tables[name] = table
        at += round_up(table.records_bytes, UNIT_BYTES)
    return Placement(epoch, at, tables, details)


def head_bytes(placement: Placement) -> bytes:
    """Returns the file's head, HEAD_BYTES_MAX long or less, padded to whole units and sealed."""
    body = json.dumps(asdict(placement), sort_keys=True).encode()
    size = round_up(_PREAMBLE.size + len(body) + _CHECKSUM.size, UNIT_BYTES)
    if size > HEAD_BYTES_MAX:
        raise FormatError(f"a placement's head of {size} bytes, at most {HEAD_BYTES_MAX} fit; shorten its details")
    head = (_PREAMBLE.pack(_MAGIC, PLACEMENT_FORMAT_VERSION, len(body)) + body).ljust(size - _CHECKSUM.size, b"\0")
    return head + _CHECKSUM.pack(kernels.crc32c(head))


def read_head(
    file: Path, fd: int, record: PlacementRecord, layouts: Mapping[str, TableLayout], *, whole: bool = True
) -> Placement:
    """Reads and checks the head of an open placement file. Blocks on the disk.

    Args:
        file: The file's name, for errors.
        fd: A descriptor open for reading.
        record: What the catalog says of the placement.
        layouts: The store's tables.
        whole: Whether the file must have its full length; a repair also reads the head of a file that was cut.

    Raises:
        FormatError: The head is damaged, or is not the catalog's.
    """
    found_bytes = os.fstat(fd).st_size
    if whole and found_bytes != record.num_bytes:
        raise _refused(file, f"{found_bytes} bytes on disk, the catalog says {record.num_bytes}: it was cut short")
    head = os.pread(fd, HEAD_BYTES_MAX, 0)
    if len(head) < UNIT_BYTES:
        raise _refused(file, f"{len(head)} bytes, a head takes {UNIT_BYTES} at least")
    magic, version, body_bytes = _PREAMBLE.unpack_from(head)
    if magic != _MAGIC:
        raise _refused(file, "it is not a placement")
    if version != PLACEMENT_FORMAT_VERSION:
        raise _refused(file, f"placement format {version}, this tierstore reads {PLACEMENT_FORMAT_VERSION}")
    size = round_up(_PREAMBLE.size + body_bytes + _CHECKSUM.size, UNIT_BYTES)
    if size > len(head) or kernels.crc32c(head[: size - 4]) != _CHECKSUM.unpack_from(head, size - 4)[0]:
        raise _refused(file, "its head has a wrong checksum: it is damaged")
    try:
        placement = _placement(json.loads(head[_PREAMBLE.size : _PREAMBLE.size + body_bytes]))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise _refused(file, f"its head is damaged ({error!r:.200})") from error
    _check_against(file, placement, record, layouts)
    return placement


def _placement(body: dict[str, Any]) -> Placement:
    tables = {}
    for name, part in body["tables"].items():
        indexes = tuple(PlacedIndex(**index) for index in part.pop("indexes"))
        tables[name] = PlacedTable(**part, indexes=indexes)
    return Placement(**(body | {"tables": tables}))


def _check_against(
    file: Path, placement: Placement, record: PlacementRecord, layouts: Mapping[str, TableLayout]
) -> None:
    """Checks every number that a reader computes with, before it does."""
    if placement.epoch != record.epoch or placement.num_bytes != record.num_bytes:
        raise _refused(file, f"it is epoch {placement.epoch}, the catalog says {record.epoch}: it was moved")
    for name, table in placement.tables.items():
        spec = layouts[name].spec if name in layouts else None
        if spec is None or table.name != name or table.entry_bytes != spec.entry_bytes:
            raise _refused(file, f"its table {name} is not one of this store's")
        numbers = [table.record_bytes, table.byte_start, table.num_entries, table.hbm_entries]
        numbers += [
            number for index in table.indexes for number in (index.byte_start, index.num_buckets, index.checksum)
        ]
        good = all(type(number) is int and number >= 0 for number in numbers)
        regions = [(table.byte_start, table.records_bytes)] if good else []
        regions += [(index.byte_start, index.num_bytes) for index in table.indexes] if good else []
        if (
            not good
            or any(start % UNIT_BYTES or start + size > placement.num_bytes for start, size in regions)
            or table.record_bytes != record_bytes(table.entry_bytes)
            or len(table.indexes) != len(spec.orders)
            or not table.hbm_entries <= table.num_entries <= RECORDS_MAX
            or type(table.static_fraction) not in (int, float)
            or not 0 <= table.static_fraction <= 1
        ):
            raise _refused(file, f"the numbers of its table {name} contradict each other")


def _refused(file: Path, what: str) -> FormatError:
    return FormatError(f"{file}: {what}; plan again, or open the store with placement='none'")
