"""What a synthetic checkpoint of a family consists of: a list of tensors and a config.json. Nothing is written here.

Input: a `SyntheticShape`. Output: a `SyntheticPlan`, which `tierstore synth` fills with random values and writes.
Errors: none of its own.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tierstore.formats.tensor_files import DTYPE_BYTES
from tierstore.spec import codec_row_bytes

from .hash_config import HashParts

HEADS = 8  # of each order, in most published models
HC_MULT = 4
PAD_ID = 2  # of the published models, and of the tokenizer that synth trains
# Each float dtype: an integer of its width, bits of its mantissa, and the first of the 8 exponents that values get.
FLOATS = {"F32": ("<u4", 23, 112), "BF16": ("<u2", 7, 112), "F16": ("<u2", 10, 4)}
DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "fp8": "F8_E4M3", "nvfp4": "U8"}  # of rows, as users name them
FLOAT_DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}  # of codecs that are a float type
NVFP4_BLOCK = 16  # values that share a scale
_NVFP4_FACTOR = 0.01171875  # of all values of a table
NVFP4_CODEC = f"fp4_e2m1_e4m3x16*{_NVFP4_FACTOR.hex()}"


@dataclass(frozen=True)
class SyntheticShape:
    """The sizes of a checkpoint: 0-based layers, n-gram lengths up to order_max, where moduli start, values a row."""

    layers: tuple[int, ...]
    order_max: int
    rows_per_head: int
    dim: int
    hidden: int
    dtype: str
    parts: int = 1
    heads: int = HEADS

    @property
    def num_heads(self) -> int:
        """Rows that a token reads in one layer."""
        return (self.order_max - 1) * self.heads


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write: `values`, or random finite ones, whose exponents start at `exponent`.

    Of e8m0 it is the smallest byte, of e4m3 too if it is not 0: scales are positive.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    exponent: int = 0
    values: bytes | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class SyntheticPlan:
    """A checkpoint to write: config.json, the hash that it gives, all tensors, and the bytes of a table's row."""

    config: dict[str, Any]
    hash_parts: HashParts
    tensors: list[PlannedTensor]
    row_bytes: int

    @property
    def num_rows(self) -> int:
        """Rows of all tables."""
        return sum(layer.num_rows for layer in self.hash_parts.layers.values())

    @property
    def table_bytes(self) -> int:
        """Bytes of all tables."""
        return self.num_rows * self.row_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)


def row_bytes_of(codec: str, dim: int) -> int:
    """Returns the bytes of a row of `dim` values in a codec that has a float type."""
    row_bytes = codec_row_bytes(codec, dim)
    assert row_bytes is not None, codec
    return row_bytes


def random_floats(name: str, dtype: str, shape: tuple[int, ...]) -> PlannedTensor:
    """Returns a tensor of random values, `dtype` as safetensors names it."""
    return PlannedTensor(name, dtype, shape, exponent=FLOATS[dtype][2] if dtype in FLOATS else 0)


def nvfp4_rows(name: str, shape: tuple[int, int]) -> list[PlannedTensor]:
    """Returns the tensors of rows [R, dim] in NVFP4 as ModelOpt names them: two values a byte, and their scales."""
    num_rows, dim = shape
    return [
        PlannedTensor(name, "U8", (num_rows, dim // 2)),
        PlannedTensor(f"{name}_scale", "F8_E4M3", (num_rows, dim // NVFP4_BLOCK), exponent=0x30),
    ]


def nvfp4_factor(name: str) -> PlannedTensor:
    """Returns the one factor of a table in NVFP4."""
    return PlannedTensor(name, "F32", (), values=struct.pack("<f", _NVFP4_FACTOR))


def int64_values(name: str, numbers: Sequence[int]) -> PlannedTensor:
    """Returns a tensor of these numbers."""
    return PlannedTensor(name, "I64", (len(numbers),), values=np.array(numbers, dtype="<i8").tobytes())
