"""Entries of quantized values with scales of their own into bfloat16, on the device, as FORMAT.md defines each codec.

Input: addresses of entries. Output: bfloat16 patterns, each computed in float32 and rounded once, half to even.
Errors: `ValueError` for formats that there are not.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .float_bits import bfloat16_pattern, e4m3_value, e8m0_value

VALUES = ("fp8_e4m3", "fp4_e2m1", "int8", "uint8b128", "uint4b8", "nf4")  # by their numbers below
GGUF = {"gguf_q8_0": (32, 34), "gguf_q4_0": (32, 18), "gguf_iq4_nl": (32, 18), "gguf_q4_k": (256, 144)}
SCALES = {"": 0, "e8m0": 1, "e4m3": 1, "bf16": 2, "fp16": 2, "fp32": 4}  # bytes of each
_HALF_BYTES = ("fp4_e2m1", "uint4b8", "nf4")

_FP8, _FP4, _INT8, _UINT8B128, _UINT4B8, _NF4 = (tl.constexpr(number) for number in range(6))
_Q8_0, _Q4_0, _IQ4_NL, _Q4_K = (tl.constexpr(number) for number in range(6, 10))
_E8M0, _E4M3, _BF16, _FP16, _FP32 = (tl.constexpr(number) for number in range(1, 6))


@dataclass(frozen=True)
class BlockFormat:
    """How values and scales lie in a row; the words are those of `kernels.decode_block_rows`.

    Raises `ValueError` for words that there are not.
    """

    values: str
    scale: str
    block: int
    divides: bool = False

    def __post_init__(self) -> None:
        fits = (self.values in VALUES) == bool(self.scale) and self.scale in SCALES and self.block > 0
        if not fits or (self.values in GGUF and self.block != GGUF[self.values][0]):
            raise ValueError(f"{self} is not a format: values are {', '.join((*VALUES, *GGUF))}, scales {list(SCALES)}")

    def row_bytes(self, dim: int) -> int:
        """Returns the bytes of a row, -1 if `dim` values are not whole blocks of whole bytes."""
        if dim < 1 or dim % self.block or (self.values in _HALF_BYTES and self.block % 2):
            return -1
        if self.values in GGUF:
            return dim // self.block * GGUF[self.values][1]
        return (dim // 2 if self.values in _HALF_BYTES else dim) + dim // self.block * SCALES[self.scale]

    @property
    def number(self) -> int:
        """All of it in one number, which kernels are compiled for."""
        values = (*VALUES, *GGUF).index(self.values)
        return ((self.block * 2 + self.divides) * 8 + list(SCALES).index(self.scale)) * 16 + values


@triton.jit
def decode_blocks(
    addresses: tl.tensor,
    found: tl.tensor,
    written: tl.tensor,
    out: tl.tensor,
    at: tl.tensor,
    factor: tl.tensor,
    blank: tl.tensor,
    ROWS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    DIM: tl.constexpr,
    FORMAT: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Writes entries as `move_entries` says. FORMAT: `BlockFormat.number`; factor: of all scales of type e4m3."""
    KIND: tl.constexpr = FORMAT % 16
    SCALE: tl.constexpr = FORMAT // 16 % 8
    DIVIDES: tl.constexpr = FORMAT // 128 % 2
    BLOCK: tl.constexpr = FORMAT // 256
    ALL: tl.constexpr = ROWS * DIM
    sources = addresses.to(tl.pointer_type(tl.uint8))[:, None]
    targets = out + (at * ALL)[:, None]
    for start in range(0, ALL, CHUNK):
        value = start + tl.arange(0, CHUNK)[None, :]
        there = value < ALL
        read = found[:, None] & there
        row, column = sources + value // DIM * ROW_BYTES, value % DIM
        if KIND == _Q4_K:
            decoded = _q4_k_values(row + column // 256 * 144, column % 256, read)
        elif KIND >= _Q8_0:
            block = row + column // 32 * (34 if KIND == _Q8_0 else 18)
            decoded = _gguf_codes(block + 2, column % 32, read, KIND) * _float16_at(block, read)
        else:
            HALVES: tl.constexpr = (KIND == _FP4) | (KIND == _UINT4B8) | (KIND == _NF4)
            scales = row + (DIM // 2 if HALVES else DIM)
            scale = _scale_values(scales, column // BLOCK, read, factor, SCALE, DIVIDES)
            decoded = _codes(row, column, read, KIND) * scale
        bits = tl.where(found[:, None], bfloat16_pattern(decoded), blank[:, None]).to(tl.int16)
        tl.store(targets + value, bits, mask=written[:, None] & there)


@triton.jit
def _codes(row: tl.tensor, column: tl.tensor, read: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """Returns the values of a row before their scale, float32."""
    if KIND == _FP8:
        codes = e4m3_value(tl.load(row + column, mask=read, other=0))
    elif KIND == _INT8:
        codes = tl.load(row + column, mask=read, other=0).to(tl.int8, bitcast=True).to(tl.float32)
    elif KIND == _UINT8B128:
        codes = tl.load(row + column, mask=read, other=0).to(tl.float32) - 128.0
    else:
        packed = tl.load(row + column // 2, mask=read, other=0).to(tl.int32)
        if KIND == _FP4:
            codes = _fp4_values(tl.where(column % 2 == 0, packed & 15, packed >> 4))
        elif KIND == _NF4:
            codes = _nf4_values(tl.where(column % 2 == 0, packed >> 4, packed & 15))
        else:
            codes = tl.where(column % 2 == 0, packed & 15, packed >> 4).to(tl.float32) - 8.0
    return codes


@triton.jit
def _gguf_codes(block: tl.tensor, column: tl.tensor, read: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """Returns the values of a block of 32 before their scale, float32: all low halves before all high ones."""
    if KIND == _Q8_0:
        codes = tl.load(block + column, mask=read, other=0).to(tl.int8, bitcast=True).to(tl.float32)
    else:
        packed = tl.load(block + column % 16, mask=read, other=0).to(tl.int32)
        code = tl.where(column < 16, packed & 15, packed >> 4)
        if KIND == _IQ4_NL:
            codes = _iq4_nl_values(code)
        else:
            codes = code.to(tl.float32) - 8.0
    return codes


@triton.jit
def _q4_k_values(block: tl.tensor, column: tl.tensor, read: tl.tensor) -> tl.tensor:
    """Returns the values of a block of 256. All products are exact, so that a fused sum rounds as two steps do."""
    group = column // 32
    packed = tl.load(block + 16 + group // 2 * 32 + column % 32, mask=read, other=0).to(tl.int32)
    code = tl.where(group % 2 == 0, packed & 15, packed >> 4).to(tl.float32)
    scales, within = block + 4, group % 4
    first = tl.load(scales + within, mask=read, other=0).to(tl.int32)
    second = tl.load(scales + 4 + within, mask=read, other=0).to(tl.int32)
    rest = tl.load(scales + 8 + within, mask=read, other=0).to(tl.int32)
    scale = tl.where(group < 4, first & 63, (rest & 15) | (first >> 6 << 4)).to(tl.float32)
    minimum = tl.where(group < 4, second & 63, (rest >> 4) | (second >> 6 << 4)).to(tl.float32)
    return _float16_at(block, read) * scale * code - _float16_at(block + 2, read) * minimum


@triton.jit
def _scale_values(
    scales: tl.tensor,
    index: tl.tensor,
    read: tl.tensor,
    factor: tl.tensor,
    SCALE: tl.constexpr,
    DIVIDES: tl.constexpr,
) -> tl.tensor:
    """Returns scales, float32, by the table's factor."""
    if SCALE == _E8M0:
        scale = e8m0_value(tl.load(scales + index, mask=read, other=0))
    elif SCALE == _E4M3:
        scale = e4m3_value(tl.load(scales + index, mask=read, other=0))
        if DIVIDES:
            scale = tl.div_rn(scale, tl.zeros_like(scale) + factor)
        else:
            scale = scale * factor
    elif SCALE == _FP16:
        scale = _float16_at(scales + 2 * index, read)
    elif SCALE == _BF16:
        scale = (_word_at(scales + 2 * index, read) << 16).to(tl.float32, bitcast=True)
    else:
        low, high = _word_at(scales + 4 * index, read), _word_at(scales + 4 * index + 2, read)
        scale = (low | (high << 16)).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def _word_at(at: tl.tensor, read: tl.tensor) -> tl.tensor:
    """Returns two bytes at any address, uint32."""
    low, high = tl.load(at, mask=read, other=0).to(tl.uint32), tl.load(at + 1, mask=read, other=0).to(tl.uint32)
    return low | (high << 8)


@triton.jit
def _float16_at(at: tl.tensor, read: tl.tensor) -> tl.tensor:
    return _word_at(at, read).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _fp4_values(code: tl.tensor) -> tl.tensor:
    magnitude = code & 7
    exponent = tl.maximum((magnitude >> 1) - 1, 0)
    doubled = tl.where(magnitude < 2, magnitude, (2 + (magnitude & 1)) << exponent).to(tl.float32)
    bits = doubled.to(tl.uint32, bitcast=True) | ((code & 8).to(tl.uint32) << 28)  # the sign of zero too
    return bits.to(tl.float32, bitcast=True) * 0.5


@triton.jit
def _nf4_values(code: tl.tensor) -> tl.tensor:
    """Returns bitsandbytes' 16 values, those of negative and of positive numbers from the lowest to the highest."""
    low = _one_of_8(
        code & 7,
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
    )
    high = _one_of_8(
        code & 7,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
    return tl.where(code < 8, low, high)


@triton.jit
def _iq4_nl_values(code: tl.tensor) -> tl.tensor:
    low = _one_of_8(code & 7, -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0)
    high = _one_of_8(code & 7, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
    return tl.where(code < 8, low, high)


@triton.jit
def _one_of_8(
    code: tl.tensor,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
) -> tl.tensor:
    """Returns the constant that each code, 0 to 7, stands for."""
    odd, second, fourth = (code & 1) != 0, (code & 2) != 0, (code & 4) != 0
    low = tl.where(second, tl.where(odd, D, C), tl.where(odd, B, A))
    high = tl.where(second, tl.where(odd, H, G), tl.where(odd, F, E))
    return tl.where(fourth, high, low)
