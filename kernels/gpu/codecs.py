"""Entries as stored into what a model computes with, on the device: moved as bytes, or decoded into bfloat16.

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
from .block_codecs import BlockFormat, decode_blocks
from .float_bits import bfloat16_pattern, e4m3_value, e8m0_value

BYTES, FP8_SCALED, FP8, BLOCKS = "bytes", "fp8_e4m3_e8m0x32", "fp8_e4m3", "blocks"
_KINDS = {BYTES: 0, FP8_SCALED: 1, FP8: 2, BLOCKS: 3}
_SCALE_BLOCK = 32  # values that share an e8m0 byte
_CHUNK_MAX = 2048  # words or values of an entry that a program holds at once. Not tuned yet: waits for a GPU
_WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
_VECTOR_BYTES = 16  # the widest load of a GPU's thread

_COPIED = tl.constexpr(0)
_SCALED = tl.constexpr(1)
_FP8 = tl.constexpr(2)
_GROUP = tl.constexpr(_SCALE_BLOCK)


@dataclass(frozen=True)
class RowCodec:
    """How rows become values. Outputs are uint8 [n, entry_bytes] of "bytes",
    bfloat16 [n, rows_per_entry, dim] of the others.

    kind: "bytes", "fp8_e4m3_e8m0x32" (dim fp8 bytes, then dim / 32 exponents; row_bytes is their sum), "fp8_e4m3" (dim
    bytes, times `scale` as a float32), or "blocks", which lie as `blocks` says, whose e4m3 scales are multiplied or
    divided by `scale`. dim: values of a row, not used of "bytes".
    Raises `ValueError` for sizes that do not fit.
    """

    kind: str
    rows_per_entry: int
    row_bytes: int
    dim: int
    scale: float = 1.0
    blocks: BlockFormat | None = None

    def __post_init__(self) -> None:
        wanted = {
            BYTES: self.row_bytes,
            FP8_SCALED: self.dim + self.dim // _SCALE_BLOCK if self.dim % _SCALE_BLOCK == 0 else -1,
            FP8: self.dim,
            BLOCKS: self.blocks.row_bytes(self.dim) if self.blocks else -1,
        }
        if self.kind not in wanted:
            raise ValueError(f"codec {self.kind!r} is not one of {', '.join(wanted)}")
        if self.rows_per_entry < 1 or self.row_bytes < 1 or self.row_bytes != wanted[self.kind]:
            raise ValueError(
                f"codec {self.kind}: {self.rows_per_entry} rows of {self.row_bytes} bytes and {self.dim} values, which "
                f"take {'whole blocks of values' if wanted[self.kind] < 0 else f'{wanted[self.kind]} bytes'}"
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
        more = self.blocks.number if self.kind == BLOCKS and self.blocks else 0
        return {
            "KIND": _KINDS[self.kind] + len(_KINDS) * more,
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
    elif KIND == _FP8:
        _decode(addresses, found, written, out, at, scale, blank, ROWS, DIM, ALIGNMENT, CHUNK)
    else:
        decode_blocks(addresses, found, written, out, at, scale, blank, ROWS, ROW_BYTES, DIM, KIND // 4, CHUNK)


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
        exponent = tl.load(row + DIM + within, mask=found[:, None, None] & there, other=0)
        source = tl.multiple_of(row + within * _GROUP + lane, [1, 1, ALIGNMENT])
        code = tl.load(source, mask=found[:, None, None] & there, other=0)
        values = bfloat16_pattern(e4m3_value(code) * e8m0_value(exponent))
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
        values = tl.where(found[:, None], bfloat16_pattern(e4m3_value(code) * scale), blank[:, None]).to(tl.int16)
        tl.store(targets + value, values, mask=written[:, None] & there)
