"""Rows of fp8 values into bfloat16, in NumPy: the oracle of the compiled kernel.

Input: uint8 rows. Output: the bits of bfloat16 values, uint16. Errors: `ValueError` for shapes that do not fit.
"""

from __future__ import annotations

import numpy as np

SCALE_BLOCK = 32


def _fp8_values() -> np.ndarray:
    """Returns the value of each e4m3 byte, float32 [256]; exponent 0 is subnormal, and only 0x7f and 0xff are NaN."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    values = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10))
    values[byte & 0x7F == 0x7F] = np.nan
    return np.where(byte & 0x80, -values, values).astype(np.float32)


FP8 = _fp8_values()


def e8m0_values(scale_bytes: np.ndarray) -> np.ndarray:
    """Returns 2^(byte - 127), float32; 255 is NaN."""
    exponent = np.where(scale_bytes == 255, 0, scale_bytes.astype(np.int32) - 127)
    return np.where(scale_bytes == 255, np.nan, np.ldexp(1.0, exponent)).astype(np.float32)


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Rounds float32s, half to even; every NaN becomes the same one."""
    bits = values.view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(values), 0x7FC0, bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)


def decode_fp8_rows(rows: np.ndarray, dim: int, scale: float | None, out: np.ndarray, threads: int = 1) -> None:
    """Writes what `kernels.decode_fp8_rows` says, on one thread."""
    del threads
    needed = dim if scale is not None else dim + dim // SCALE_BLOCK
    if rows.ndim != 2 or dim < 1 or rows.shape[1] < needed or (scale is None and dim % SCALE_BLOCK):
        raise ValueError(f"rows of shape {list(rows.shape)} hold no {dim} values and their scales, {needed} bytes")
    if out.shape != (len(rows), dim) or out.dtype != np.uint16:
        raise ValueError(f"out is {out.dtype} {list(out.shape)}, must be uint16 {[len(rows), dim]}")
    if scale is None:
        factor: np.ndarray | np.float32 = e8m0_values(rows[:, dim:needed].repeat(SCALE_BLOCK, axis=1))
    else:
        factor = np.float32(scale)
    with np.errstate(over="ignore", invalid="ignore"):
        out[...] = bfloat16_bits(FP8[rows[:, :dim]] * factor)
