"""Entries as stored into what a model computes with, on the device: moved as bytes, or fp8 decoded into bfloat16.

Input: addresses of entries, in device memory or in host memory that the device reads. Output: bytes, bit by bit, or
bfloat16 values, each computed in float32 and rounded once, half to even, as engram_adapter/codecs.py does it. Other
codecs are byte moves into a view of the caller's. Errors: `ValueError` for row sizes that are not their codec's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from . import launching

BYTES, FP8_SCALED, FP8 = "bytes", "fp8_e4m3_e8m0x32", "fp8_e4m3"
_KINDS = {BYTES: 0, FP8_SCALED: 1, FP8: 2}
_SCALE_BLOCK = 32  # values that share an e8m0 byte
_CHUNK_MAX = 2048  # words or values of an entry that a program holds at once. Not tuned yet: waits for a GPU
_WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
_VECTOR_BYTES = 16  # the widest load of a GPU's thread

_COPIED = tl.constexpr(0)
_SCALED = tl.constexpr(1)
_GROUP = tl.constexpr(_SCALE_BLOCK)


@dataclass(frozen=True)
class RowCodec:
    """How rows become values. Outputs are uint8 [n, entry_bytes] of "bytes",
    bfloat16 [n, rows_per_entry, dim] of the others.

    kind: "bytes", "fp8_e4m3_e8m0x32" (dim fp8 bytes, then dim / 32 exponents; row_bytes is their sum), or "fp8_e4m3"
    (dim bytes, times `scale` as a float32). dim: values of a row, not used of "bytes".
    Raises `ValueError` for sizes that do not fit.
    """

    kind: str
    rows_per_entry: int
    row_bytes: int
    dim: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        wanted = {
            BYTES: self.row_bytes,
            FP8_SCALED: self.dim + self.dim // _SCALE_BLOCK if self.dim % _SCALE_BLOCK == 0 else -1,
            FP8: self.dim,
        }
        if self.kind not in wanted:
            raise ValueError(f"codec {self.kind!r} is not one of {', '.join(wanted)}")
        if self.rows_per_entry < 1 or self.row_bytes < 1 or self.row_bytes != wanted[self.kind]:
            raise ValueError(
                f"codec {self.kind}: {self.rows_per_entry} rows of {self.row_bytes} bytes and {self.dim} values, which "
                f"take {'a multiple of 32 values' if wanted[self.kind] < 0 else f'{wanted[self.kind]} bytes'}"
            )

    @property
    def entry_bytes(self) -> int:
        return self.rows_per_entry * self.row_bytes

    def check(self, out: torch.Tensor, num_entries: int | None, device: torch.device) -> torch.Tensor:
        """Returns `out` as kernels take it. Raises `ValueError` unless it has room for `num_entries` (None:
        any number)."""
        if self.kind == BYTES:
            launching.check("out", out, torch.uint8, (num_entries, self.entry_bytes), device)
            return out
        launching.check("out", out, torch.bfloat16, (num_entries, self.rows_per_entry, self.dim), device)
        return out.view(torch.int16)

    def constants(self, alignment: int, out: torch.Tensor) -> dict[str, Any]:
        """Returns the compile-time arguments of `move_entries`; alignment: a divisor of every entry's address."""
        if self.kind == BYTES:
            word_bytes = math.gcd(8, alignment, self.entry_bytes, out.data_ptr())
            items, step = self.entry_bytes // word_bytes, _VECTOR_BYTES
        else:
            word_bytes = 1
            items, step = self.rows_per_entry * self.dim, math.gcd(self.row_bytes, self.dim)
        return {
            "KIND": _KINDS[self.kind],
            "ROWS": self.rows_per_entry,
            "ROW_BYTES": self.row_bytes,
            "DIM": self.dim,
            "WORD": _WORDS[word_bytes],
            "ALIGNMENT": math.gcd(_VECTOR_BYTES, alignment, step),
            "CHUNK": min(triton.next_power_of_2(items), _CHUNK_MAX),
        }


@triton.jit
def move_entries(
    addresses: tl.tensor,
    found: tl.tensor,
    written: tl.tensor,
    out: tl.tensor,
    at: tl.tensor,
    scale: tl.tensor,
    blank: tl.tensor,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    DIM: tl.constexpr,
    WORD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Writes the entries at `addresses`, int64 [P], as the `at`-th ones, int64 [P], of `out`, decoded.

    Only those `written` are, and only those `found` are read; `found` must be within `written`. What is written and not
    found gets its `blank`, int32 [P], in every word: 0, or -1, which is NaN of a bfloat16 and 0xff of a byte.
    """
    if KIND == _COPIED:
        _copy(addresses, found, written, out, at, blank, ROWS * ROW_BYTES, WORD, ALIGNMENT, CHUNK)
    elif KIND == _SCALED:
        _decode_scaled(addresses, found, written, out, at, blank, ROWS, ROW_BYTES, DIM, ALIGNMENT, CHUNK)
    else:
        _decode(addresses, found, written, out, at, scale, blank, ROWS, DIM, ALIGNMENT, CHUNK)


@triton.jit
def _copy(
    addresses: tl.tensor,
    found: tl.tensor,
    written: tl.tensor,
    out: tl.tensor,
    at: tl.tensor,
    blank: tl.tensor,
    ENTRY_BYTES: tl.constexpr,
    WORD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    WORDS: tl.constexpr = ENTRY_BYTES * 8 // WORD.primitive_bitwidth
    sources = addresses.to(tl.pointer_type(WORD))[:, None]
    targets = out.to(tl.pointer_type(WORD), bitcast=True) + (at * WORDS)[:, None]
    for start in range(0, WORDS, CHUNK):
        word = start + tl.arange(0, CHUNK)[None, :]
        there = word < WORDS
        source = tl.multiple_of(sources + word, [1, ALIGNMENT])
        words = tl.load(source, mask=found[:, None] & there, other=0)
        words = tl.where(found[:, None], words, blank[:, None].to(WORD))
        tl.store(targets + word, words, mask=written[:, None] & there)


@triton.jit
def _decode_scaled(
    addresses: tl.tensor,
    found: tl.tensor,
    written: tl.tensor,
    out: tl.tensor,
    at: tl.tensor,
    blank: tl.tensor,
    ROWS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    DIM: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    ROW_GROUPS: tl.constexpr = DIM // _GROUP
    GROUPS: tl.constexpr = ROWS * ROW_GROUPS
    rows = addresses.to(tl.pointer_type(tl.uint8))[:, None, None]
    targets = out + (at * (GROUPS * _GROUP))[:, None, None]
    lane = tl.arange(0, _GROUP)[None, None, :]
    for start in range(0, GROUPS, CHUNK // _GROUP):
        group = start + tl.arange(0, CHUNK // _GROUP)[None, :, None]
        there = group < GROUPS
        row = rows + group // ROW_GROUPS * ROW_BYTES
        within = group % ROW_GROUPS
        exponent = tl.load(row + DIM + within, mask=found[:, None, None] & there, other=0).to(tl.uint32)
        # The exponent of a float32 has the same bias; only 2^-127, which is subnormal,
        # and NaN are not `exponent << 23`.
        bits = tl.where(exponent == 0, 0x00400000, tl.where(exponent == 255, 0x7FC00000, exponent << 23))
        source = tl.multiple_of(row + within * _GROUP + lane, [1, 1, ALIGNMENT])
        code = tl.load(source, mask=found[:, None, None] & there, other=0)
        values = _bfloat16_bits(code, bits.to(tl.uint32).to(tl.float32, bitcast=True))
        values = tl.where(found[:, None, None], values, blank[:, None, None]).to(tl.int16)
        tl.store(targets + group * _GROUP + lane, values, mask=written[:, None, None] & there)


@triton.jit
def _decode(
    addresses: tl.tensor,
    found: tl.tensor,
    written: tl.tensor,
    out: tl.tensor,
    at: tl.tensor,
    scale: tl.tensor,
    blank: tl.tensor,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    VALUES: tl.constexpr = ROWS * DIM
    sources = addresses.to(tl.pointer_type(tl.uint8))[:, None]
    targets = out + (at * VALUES)[:, None]
    for start in range(0, VALUES, CHUNK):
        value = start + tl.arange(0, CHUNK)[None, :]
        there = value < VALUES
        source = tl.multiple_of(sources + value, [1, ALIGNMENT])
        code = tl.load(source, mask=found[:, None] & there, other=0)
        values = tl.where(found[:, None], _bfloat16_bits(code, scale), blank[:, None]).to(tl.int16)
        tl.store(targets + value, values, mask=written[:, None] & there)


@triton.jit
def _bfloat16_bits(code: tl.tensor, factor: tl.tensor) -> tl.tensor:
    """Returns the bfloat16 patterns of e4m3 bytes times a float32,
    by arithmetic that a GPU and the interpreter agree in.

    Sign, exponent and mantissa of an e4m3 byte, put into a float16, are its value times 2^-8 exactly, subnormal ones
    too: 0x7e = 1.75 * 2^8 becomes 0x3f00 = 1.75. The 2^8 is not put into the factor, which may be as large as 2^127.
    """
    bits = code.to(tl.uint32)
    half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.uint16).to(tl.float16, bitcast=True)
    product = half.to(tl.float32) * 256.0 * factor
    pattern = product.to(tl.uint32, bitcast=True)
    rounded = (
        pattern + 0x7FFF + ((pattern >> 16) & 1)
    ) >> 16  # half to even; the carry makes infinity of what is too large
    no_number = ((bits & 0x7F) == 0x7F) | ((pattern & 0x7FFFFFFF) > 0x7F800000)
    return tl.where(no_number, 0x7FC0, rounded).to(tl.int32)
