"""Rows of float32 values into a codec's bytes and back, in NumPy: the oracle of kernels/cpu/quantize.h.

Input: float32 values, and the rows before. Output: uint8 rows, and how many values were beyond the codec's largest or
not a number. Errors: `ValueError` for codecs that training does not know.

Rounding looks the value up: every code's value is in a sorted table, and the nearest one is taken, of two equally near
ones the even code. The kernel computes on bits instead.
"""

from __future__ import annotations

import functools

import numpy as np

from .reference_codec import FP8, SCALE_BLOCK, e8m0_values

F4 = np.float32
E8M0 = "fp8_e4m3_e8m0x32"
FP8_MAX = F4(448)


def _fp16_values() -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(F4)


def _bf16_values() -> np.ndarray:
    return (np.arange(1 << 16, dtype=np.uint32) << 16).view(F4)


@functools.cache
def values_of(codec: str) -> np.ndarray:
    """Returns the value of each code, float32 [256] or [65536], without factor or scale; every fp8 NaN is the same."""
    if codec in ("fp8_e4m3", E8M0):
        return np.where(np.isnan(FP8), F4(np.nan), FP8)
    return {"fp16": _fp16_values, "bf16": _bf16_values}[codec]()


def _encode(codec: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns codes, where a value was beyond the largest, and where it is not a number."""
    table = values_of(codec)
    half = len(table) // 2  # codes from here on are negative
    finite = table[:half][np.isfinite(table[:half])].astype(np.float64)
    largest = len(finite) - 1
    edge = finite[-1] + (finite[-1] - finite[-2]) / 2  # what is beyond would round to a number that does not exist
    magnitude = np.abs(values).astype(np.float64)
    nan = np.isnan(values)
    beyond = ~nan & (magnitude > edge if largest % 2 == 0 else magnitude >= edge)
    magnitude = np.where(nan | beyond, finite[-1], magnitude)
    above = np.searchsorted(finite, magnitude).clip(0, largest)
    below = (above - 1).clip(0)
    down, up = magnitude - finite[below], finite[above] - magnitude
    codes = np.where((down < up) | ((down == up) & (below % 2 == 0)), below, above)
    quiet = {256: 0x7F, 1 << 16: 0x7E00 if codec == "fp16" else 0x7FC0}[len(table)]
    codes = np.where(nan, quiet, codes) + np.where(np.signbit(values), half, 0)
    return codes.astype(np.uint8 if half == 128 else np.uint16), beyond, nan


def _same(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(left).view(np.uint32) == np.ascontiguousarray(right).view(np.uint32)


def _scales_of(largest: np.ndarray) -> np.ndarray:
    """Returns the byte of the least power of two of which 448 times are at least `largest`."""
    powers = np.ldexp(1.0, np.arange(255) - 127)
    return np.searchsorted(448 * powers, largest.astype(np.float64)).astype(np.uint8)


def dequantize_rows(rows: np.ndarray, dim: int, codec: str, factor: float, out: np.ndarray) -> None:
    """Writes exact values, float32 [R, dim]."""
    with np.errstate(over="ignore", invalid="ignore"):
        if codec == "fp32":
            out[:] = np.ascontiguousarray(rows[:, : 4 * dim]).view("<f4")
        elif codec in ("fp16", "bf16"):
            out[:] = values_of(codec)[np.ascontiguousarray(rows[:, : 2 * dim]).view("<u2")]
        elif codec == "fp8_e4m3":
            out[:] = values_of(codec)[rows[:, :dim]] * F4(factor)
        elif codec == E8M0:
            scales = e8m0_values(rows[:, dim : dim + dim // SCALE_BLOCK]).repeat(SCALE_BLOCK, axis=1)
            out[:] = values_of(codec)[rows[:, :dim]] * scales
        else:
            raise ValueError(f"codec {codec!r} is not one that training knows")
    out[np.isnan(out) & (codec not in ("fp32", "bf16"))] = np.nan


def _quantize_blocks(values: np.ndarray, old: np.ndarray | None, out: np.ndarray) -> tuple[int, int]:
    dim, blocks = values.shape[1], values.shape[1] // SCALE_BLOCK
    magnitude = np.where(np.isfinite(values), np.abs(values), 0)
    largest = magnitude.reshape(len(values), blocks, SCALE_BLOCK).max(axis=2)
    scale_bytes = _scales_of(largest)
    kept = np.zeros(values.shape, np.bool_)
    if old is not None:
        before = np.empty_like(values)
        dequantize_rows(old, dim, E8M0, 1.0, before)
        same = _same(values, before)
        whole = same.reshape(len(values), blocks, SCALE_BLOCK).all(axis=2)
        with np.errstate(over="ignore", invalid="ignore"):
            most = FP8_MAX * e8m0_values(old[:, dim:])
        fits = whole | ((largest <= most) & (largest > most / 4))
        scale_bytes = np.where(fits, old[:, dim:], scale_bytes)
        kept = same & fits.repeat(SCALE_BLOCK, axis=1)
    inverse = np.ldexp(1.0, 127 - scale_bytes.astype(np.int32)).repeat(SCALE_BLOCK, axis=1)
    with np.errstate(under="ignore"):
        codes, beyond, nan = _encode(E8M0, values.astype(np.float64) * inverse)
    out[:, :dim] = np.where(kept, old[:, :dim], codes) if old is not None else codes
    out[:, dim:] = scale_bytes
    return int((beyond & ~kept).sum()), int((nan & ~kept).sum())


def quantize_rows(
    values: np.ndarray, codec: str, factor: float, old: np.ndarray | None, out: np.ndarray
) -> tuple[int, int]:
    """Writes what `kernels.quantize_rows` says."""
    if codec == "fp32":
        out[:] = np.ascontiguousarray(values, dtype="<f4").view(np.uint8)
        return 0, 0
    if codec == E8M0:
        return _quantize_blocks(values, old, out)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        codes, beyond, nan = _encode(codec, values / F4(factor) if codec == "fp8_e4m3" else values)
    kept = np.zeros(values.shape, np.bool_)
    if old is not None:
        before = np.empty_like(values)
        dequantize_rows(old, values.shape[1], codec, factor, before)
        kept = _same(values, before)
        codes = np.where(kept, np.ascontiguousarray(old).view(codes.dtype), codes)
    out[:] = np.ascontiguousarray(codes).view(np.uint8).reshape(out.shape)
    return int((beyond & ~kept).sum()), int((nan & ~kept).sum())
