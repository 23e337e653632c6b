"""The .idx file beside a .bin file of Megatron-Core's IndexedDataset: the ids' type, and where documents end.

Input: the path of the .idx. Output: a `MegatronIndex`, checked against itself and the .bin's length. Read with `read`,
never mapped, since others may cut the file meanwhile.
Errors: `FormatError` for an index that is cut or contradicts itself or its .bin, `ConfigError` for what is not ids.

Layout, little-endian: "MMIDIDX\\0\\0", version u64 = 1, type code u8, sequences u64, document ends u64; then the length
of each sequence i32, its byte offset i64, and for each document the number of its first sequence,
with the end as one more, i64.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from tierstore.errors import ConfigError, FormatError

MAGIC, OLD_MAGIC = b"MMIDIDX\0\0", b"TNTIDX\0\0"
_HEAD = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_SEQUENCES_MAX = 1 << 33


@dataclass(frozen=True)
class MegatronIndex:
    """dtype: NumPy's name of the ids' type. lengths: int64 [documents], tokens of each document,
    in the .bin's order."""

    dtype: str
    lengths: np.ndarray


def index_beside(binary: Path) -> Path | None:
    """Returns the .idx beside a .bin file, if one of Megatron is there."""
    index = binary.with_suffix(".idx")
    if binary.suffix != ".bin" or not index.is_file():
        return None
    with index.open("rb") as file:
        return index if file.read(len(MAGIC)).startswith((MAGIC, OLD_MAGIC)) else None


def read_index(index: Path, binary: Path) -> MegatronIndex:
    """Returns what the index says of its .bin."""
    with index.open("rb") as file:
        head = file.read(_HEAD.size)
        if head.startswith(OLD_MAGIC):
            raise ConfigError(
                f"{index} is an index of Megatron's old format (TNTIDX); write the data set again with its "
                f"preprocess_data.py as an indexed data set of today, or take the ids out into a .npy file"
            )
        if len(head) < _HEAD.size:
            raise FormatError(f"{index}: {len(head)} bytes, its head has {_HEAD.size}: it was cut; copy it again")
        _, version, code, num_sequences, num_ends = _HEAD.unpack(head)
        dtype = _DTYPES.get(code)
        if version != 1 or dtype is None or max(num_sequences, num_ends) > _SEQUENCES_MAX:
            raise FormatError(
                f"{index}: version {version}, type code {code}, {num_sequences} sequences; this is not known"
            )
        if np.dtype(dtype).kind == "f":
            raise ConfigError(f"{binary} holds {np.dtype(dtype).name} by its index {index.name}, expected token ids")
        lengths = _array(file, index, "<i4", num_sequences).astype(np.int64)
        offsets = _array(file, index, "<i8", num_sequences)
        first_sequences = _array(file, index, "<i8", num_ends)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    item_bytes = np.dtype(dtype).itemsize
    if (lengths < 0).any() or not np.array_equal(offsets, starts[:-1] * item_bytes):
        raise FormatError(
            f"{index}: its sequences do not lie one behind the other in {binary.name}; "
            "take the ids out into a .npy file"
        )
    num_bytes = binary.stat().st_size
    if num_bytes != starts[-1] * item_bytes:
        raise FormatError(
            f"{binary} has {num_bytes} bytes, its index {index.name} says {int(starts[-1]) * item_bytes}; "
            "copy both again"
        )
    good = len(first_sequences) >= 1 and (np.diff(first_sequences) >= 0).all()
    if not good or first_sequences[0] != 0 or first_sequences[-1] != num_sequences:
        raise FormatError(f"{index}: its documents do not take up its {num_sequences} sequences; write the pair again")
    return MegatronIndex(np.dtype(dtype).str, np.diff(starts[first_sequences]))


def _array(file: IO[bytes], index: Path, dtype: str, count: int) -> np.ndarray:
    num_bytes = count * np.dtype(dtype).itemsize
    left = index.stat().st_size - file.tell()
    data = file.read(num_bytes) if num_bytes <= left else b""
    if len(data) != num_bytes:
        raise FormatError(f"{index}: {left} bytes follow, its header promises {num_bytes}: it was cut; copy it again")
    return np.frombuffer(data, dtype=dtype)
