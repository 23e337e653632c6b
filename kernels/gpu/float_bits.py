"""Bits into float32 and float32 into bfloat16, by arithmetic that a GPU and the interpreter agree in.

Input: bytes, unsigned. Output: float32 values, exact; bfloat16 patterns, rounded once, half to even, NaN as 0x7fc0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def e4m3_value(code: tl.tensor) -> tl.tensor:
    """Returns the values of fp8 bytes.

    Sign, exponent and mantissa of an e4m3 byte, put into a float16, are its value times 2^-8 exactly, subnormal ones
    too: 0x7e = 1.75 * 2^8 becomes 0x3f00 = 1.75. The 2^8 is not put into the factor, which may be as large as 2^127.
    """
    bits = code.to(tl.uint32)
    half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.uint16).to(tl.float16, bitcast=True)
    no_number = (bits & 0x7F) == 0x7F
    value = (half.to(tl.float32) * 256.0).to(tl.uint32, bitcast=True)
    return tl.where(no_number, 0x7FC00000, value).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_value(code: tl.tensor) -> tl.tensor:
    """Returns 2^(byte - 127).

    The exponent of a float32 has the same bias; only 2^-127, which is subnormal, and NaN are not `exponent << 23`.
    """
    exponent = code.to(tl.uint32)
    bits = tl.where(exponent == 0, 0x00400000, tl.where(exponent == 255, 0x7FC00000, exponent << 23))
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def bfloat16_pattern(value: tl.tensor) -> tl.tensor:
    """Returns float32s as bfloat16 patterns, int32; the carry makes infinity of what is too large."""
    pattern = value.to(tl.uint32, bitcast=True)
    rounded = (pattern + 0x7FFF + ((pattern >> 16) & 1)) >> 16
    return tl.where((pattern & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.int32)
