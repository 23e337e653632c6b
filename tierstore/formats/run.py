"""A run: one immutable file with the training records of one table that were written together, and their row ids.

Input: a table's `RunLayout` and a run's number. Output: where everything lies in the file, the sealed head, and the
`Run` that a commit lists. Records lie in the order in which the training last touched them; behind them lie their row
ids in the same order, so that opening a store reads these alone.
Errors: `FormatError` for foreign, truncated, damaged and newer files.

A record is `dim` float32 values, then the optimizer's state as float32s, zeros up to a multiple of 16 bytes, and 16
bytes that seal it: row id, the run's number, and a CRC32C of all before it, seeded with the table's seed. So a record
of another row, run or table is never taken for the one that was asked for. FORMAT.md draws the file.
"""

from __future__ import annotations

import json
import os
import re
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import kernels
from ..durable import read_exactly
from ..errors import CorruptPageError, FormatError
from ..layout import SEED_MAX, UNIT_BYTES, checked_path, record_bytes, round_up

RUN_FORMAT_VERSION = 1
TRAINING_FOLDER = "training"
RUN_SUFFIX = ".run"
RUN_NUMBER_MAX = 2**31 - 1
RUN_RECORDS_MAX = 2**32 - 2  # a place is a uint32, and one value of it says that there is no place
RECORD_UNIT_BYTES = 16
FLOATS_MAX = 1 << 20  # of a record
ROW_IDS_OF_STRETCH = (UNIT_BYTES - kernels.TRAILER.itemsize) // 8  # 510 in 4 KiB
READ_STRETCHES = 256  # of row ids at once
REMEDY = "copy it back, or go back to a commit without it: 'tierstore commits' lists them"

_MAGIC = b"TIERRUN\0"
_PREAMBLE = struct.Struct("<8sII")  # magic, format version, bytes of the JSON that follows
_CHECKSUM = struct.Struct("<I")
_NAME_MAX = 80


@dataclass(frozen=True)
class RunLayout:
    """How the training records of a table look.

    Attributes:
        table: The table's name.
        dim: Values of a row.
        state_floats: Numbers that the optimizer keeps for a row.
        seed: Of the checksums: the table's.
    """

    table: str
    dim: int
    state_floats: int
    seed: int

    @property
    def float_bytes(self) -> int:
        """Bytes of values and state."""
        return 4 * (self.dim + self.state_floats)

    @property
    def record_bytes(self) -> int:
        """Bytes of a record in memory: values and state, up to a multiple of 16."""
        return round_up(self.float_bytes, RECORD_UNIT_BYTES)

    @property
    def stored_bytes(self) -> int:
        """Bytes of a record in a run: those in memory and the seal."""
        return record_bytes(self.record_bytes)

    @property
    def read_bytes_max(self) -> int:
        """Bytes of the largest read that one record takes."""
        return round_up(self.stored_bytes + UNIT_BYTES - RECORD_UNIT_BYTES, UNIT_BYTES)

    def row_ids_start(self, num_records: int) -> int:
        """Returns the byte of a run at which its row ids begin."""
        return round_up(UNIT_BYTES + num_records * self.stored_bytes, UNIT_BYTES)

    def run_bytes(self, num_records: int) -> int:
        """Returns the length of a run of so many records."""
        return self.row_ids_start(num_records) + num_stretches(num_records) * UNIT_BYTES

    def to_dict(self) -> dict[str, Any]:
        """Returns the layout as a JSON-able dict."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> RunLayout:
        """Reads what `to_dict` wrote; raises `FormatError`."""
        numbers = [record.get(name) for name in ("dim", "state_floats", "seed")]
        good = isinstance(record.get("table"), str) and all(type(n) is int and n >= 0 for n in numbers)
        if not good or not 1 <= record["dim"] + record["state_floats"] <= FLOATS_MAX or record["seed"] > SEED_MAX:
            raise FormatError(f"the layout of training records {record!r:.200} is damaged; restore the catalog")
        return cls(record["table"], record["dim"], record["state_floats"], record["seed"])


@dataclass(frozen=True)
class Run:
    """A finished run, as a commit lists it.

    Attributes:
        number: Never given twice in a store.
        file: Relative to the store.
        num_bytes: Of the file.
        num_records: In it.
        digest: SHA-256, hex, of the seals of all records in order.
    """

    number: int
    file: str
    num_bytes: int
    num_records: int
    digest: str

    def to_dict(self) -> dict[str, Any]:
        """Returns it as a JSON-able dict."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Run:
        """Reads what `to_dict` wrote; raises `FormatError`."""
        numbers = [record.get(name) for name in ("number", "num_bytes", "num_records")]
        if not all(type(n) is int and n >= 0 for n in numbers) or not isinstance(record.get("digest"), str):
            raise FormatError(f"the catalog's record of run {record!r:.200} is damaged; restore the catalog")
        if record["number"] > RUN_NUMBER_MAX or not 1 <= record["num_records"] <= RUN_RECORDS_MAX:
            raise FormatError(f"the catalog's record of run {record['number']} is damaged; restore the catalog")
        file = checked_path(record.get("file"), f"run {record['number']}")
        return cls(record["number"], file, record["num_bytes"], record["num_records"], record["digest"])


def run_file(number: int, table: str) -> str:
    """Returns a run's path, relative to the store."""
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", table)[:_NAME_MAX]
    return f"{TRAINING_FOLDER}/{number:08d}-{readable}{RUN_SUFFIX}"


def number_of_file(name: str) -> int | None:
    """Returns the number that begins a file's name in the training folder; None if none does."""
    found = re.match(r"([0-9]{8,10})[-.]", name)
    return int(found[1]) if found else None


def num_stretches(num_records: int) -> int:
    """Returns how many stretches of 4 KiB hold so many row ids."""
    return -(-num_records // ROW_IDS_OF_STRETCH)


def head_bytes(layout: RunLayout, number: int, num_records: int) -> bytes:
    """Returns a run's head, UNIT_BYTES long and sealed."""
    body = json.dumps(layout.to_dict() | {"number": number, "num_records": num_records}, sort_keys=True).encode()
    size = UNIT_BYTES - _CHECKSUM.size
    if _PREAMBLE.size + len(body) > size:
        raise FormatError(f"table {layout.table:.80}...: its name is too long for the head of a run")
    head = (_PREAMBLE.pack(_MAGIC, RUN_FORMAT_VERSION, len(body)) + body).ljust(size, b"\0")
    return head + _CHECKSUM.pack(kernels.crc32c(head))


def seal_row_ids(row_ids: np.ndarray, number: int, seed: int, out: np.ndarray, stretch_start: int = 0) -> None:
    """Writes stretches of row ids, int64 [n], to out, uint8 [num_stretches(n), UNIT_BYTES].

    stretch_start: the number of the first; all but the last stretch of a run are full.
    """
    rows = np.ascontiguousarray(row_ids).view(np.uint8).reshape(-1, 8)
    kernels.seal_pages([rows], out, ROW_IDS_OF_STRETCH, number << 32 | stretch_start, RUN_FORMAT_VERSION, seed)


def check_head(file: Path, fd: int, layout: RunLayout, run: Run) -> None:
    """Checks length and head of an open run against the catalog's record. Blocks on the disk. Raises `FormatError`."""
    found_bytes = os.fstat(fd).st_size
    if found_bytes != run.num_bytes or run.num_bytes != layout.run_bytes(run.num_records):
        raise _refused(
            file, f"{found_bytes} bytes on disk, {run.num_records} records take {layout.run_bytes(run.num_records)}"
        )
    head = np.empty(UNIT_BYTES, dtype=np.uint8)
    read_exactly(fd, head, 0, str(file))
    found = head.tobytes()
    magic, version, body_bytes = _PREAMBLE.unpack_from(found)
    if magic != _MAGIC:
        raise _refused(file, "it is not a run")
    if version != RUN_FORMAT_VERSION:
        raise _refused(file, f"run format {version}, this tierstore reads {RUN_FORMAT_VERSION}")
    if kernels.crc32c(found[:-4]) != _CHECKSUM.unpack_from(found, UNIT_BYTES - 4)[0]:
        raise _refused(file, "its head has a wrong checksum: it is damaged")
    if found != head_bytes(layout, run.number, run.num_records):
        body = found[_PREAMBLE.size : _PREAMBLE.size + body_bytes]
        raise _refused(file, f"its head says {body!r:.300}, the catalog says run {run.number} of {layout.to_dict()}")


def read_row_ids(file: Path, fd: int, layout: RunLayout, run: Run, start: int, out: np.ndarray) -> None:
    """Reads row ids of an open run into out, int64 [n]: those of records `start` .. `start + n - 1`.

    start: a multiple of ROW_IDS_OF_STRETCH. Blocks on the disk. Raises `CorruptPageError`, naming file and stretch.
    """
    assert start % ROW_IDS_OF_STRETCH == 0
    first = start // ROW_IDS_OF_STRETCH
    at = layout.row_ids_start(run.num_records)
    stretches = np.empty((READ_STRETCHES, UNIT_BYTES), dtype=np.uint8)
    for begin in range(0, len(out), READ_STRETCHES * ROW_IDS_OF_STRETCH):
        part = out[begin : begin + READ_STRETCHES * ROW_IDS_OF_STRETCH]
        numbers = np.arange(num_stretches(len(part)), dtype=np.int64) + first + begin // ROW_IDS_OF_STRETCH
        found = stretches[: len(numbers)]
        try:
            read_exactly(fd, found, at + int(numbers[0]) * UNIT_BYTES, str(file))
        except OSError as error:
            raise CorruptPageError(f"{file}: its row ids cannot be read: {error}; check the disk; {REMEDY}") from error
        check_row_ids(file, found, numbers, run.number, layout.seed)
        ids = found[:, : 8 * ROW_IDS_OF_STRETCH].reshape(-1).view(np.int64)
        part[:] = ids[: len(part)]


def check_row_ids(file: Path, stretches: np.ndarray, numbers: np.ndarray, run_number: int, seed: int) -> None:
    """Checks stretches of row ids, uint8 [n, UNIT_BYTES], that should have `numbers`. Raises `CorruptPageError`."""
    wanted = numbers | np.int64(run_number << 32)
    status = kernels.check_pages(stretches, wanted, RUN_FORMAT_VERSION, seed)
    if status.any():
        raise CorruptPageError(
            f"{file}: stretch {numbers[int(np.flatnonzero(status)[0])]} of its row ids has a wrong checksum, or is "
            f"another's; {REMEDY}"
        )


def _refused(file: Path, what: str) -> FormatError:
    return FormatError(f"{file}: {what}; {REMEDY}")
