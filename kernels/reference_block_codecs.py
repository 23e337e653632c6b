"""Rows of quantized values with scales of their own into bfloat16, in NumPy: the oracle of the compiled kernel.

Input: uint8 rows. Output: the bits of bfloat16 values, uint16. Errors: `ValueError` for shapes and names that do not
fit. FORMAT.md says what each codec's bytes mean.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .reference_codec import FP8, bfloat16_bits, e8m0_values

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # e2m1, by its bits
NF4 = np.array(  # bitsandbytes' quantiles of a normal distribution
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
IQ4_NL = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
SCALE_BYTES = {"e8m0": 1, "e4m3": 1, "bf16": 2, "fp16": 2, "fp32": 4}


def _low_first(packed: np.ndarray) -> np.ndarray:
    """Returns both halves of each byte [..., n] as [..., 2 * n], the low one before the high one."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def _high_first(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed >> 4, packed & 15], axis=-1).reshape(*packed.shape[:-1], -1)


def _halves(packed: np.ndarray) -> np.ndarray:
    """Returns the low halves of all bytes, then the high halves, as the blocks of GGUF have them."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


VALUES: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {  # bits of a value, and bytes into float32
    "fp8_e4m3": (8, lambda packed: FP8[packed]),
    "fp4_e2m1": (4, lambda packed: FP4[_low_first(packed)]),
    "int8": (8, lambda packed: packed.view(np.int8).astype(np.float32)),
    "uint8b128": (8, lambda packed: packed.astype(np.float32) - 128),
    "uint4b8": (4, lambda packed: _low_first(packed).astype(np.float32) - 8),
    "nf4": (4, lambda packed: NF4[_high_first(packed)]),
}


def _scales(kind: str, scale_bytes: np.ndarray) -> np.ndarray:
    """Returns scales, uint8 [R, S * bytes of each], as float32 [R, S]."""
    scale_bytes = np.ascontiguousarray(scale_bytes)
    if kind == "e8m0":
        return e8m0_values(scale_bytes)
    if kind == "e4m3":
        return FP8[scale_bytes]
    if kind == "bf16":
        return (scale_bytes.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return scale_bytes.view("<f2" if kind == "fp16" else "<f4").astype(np.float32)


def _float16(block_bytes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(block_bytes).view("<f2").astype(np.float32)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    """8 groups of 32 values: d * scale * q - dmin * minimum, scales and minima of 6 bits in 12 bytes."""
    packed = blocks[..., 4:16].astype(np.uint8)
    first, second, rest = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([first & 63, rest & 15 | first >> 6 << 4], axis=-1).astype(np.float32)
    minima = np.concatenate([second & 63, rest >> 4 | second >> 6 << 4], axis=-1).astype(np.float32)
    values = _halves(blocks[..., 16:].reshape(*blocks.shape[:-1], 4, 32)).reshape(*blocks.shape[:-1], 8, 32)
    scales, minima = _float16(blocks[..., :2]) * scales, _float16(blocks[..., 2:4]) * minima
    return (scales[..., None] * values - minima[..., None]).reshape(*blocks.shape[:-1], 256)


BLOCKS: dict[str, tuple[int, int, Callable[[np.ndarray], np.ndarray]]] = {  # values and bytes of a block, into float32
    "gguf_q8_0": (32, 34, lambda b: _float16(b[..., :2]) * b[..., 2:].view(np.int8).astype(np.float32)),
    "gguf_q4_0": (32, 18, lambda b: _float16(b[..., :2]) * (_halves(b[..., 2:]).astype(np.float32) - 8)),
    "gguf_iq4_nl": (32, 18, lambda b: _float16(b[..., :2]) * IQ4_NL[_halves(b[..., 2:])]),
    "gguf_q4_k": (256, 144, _q4_k),
}


def block_row_bytes(dim: int, values: str, scale: str, block: int) -> int:
    """Returns the bytes of a row. Raises `ValueError` for names and sizes that do not fit each other."""
    if values in BLOCKS and not scale and block == BLOCKS[values][0] and dim > 0 and dim % block == 0:
        return dim // block * BLOCKS[values][1]
    if values in VALUES and scale in SCALE_BYTES and dim > 0 and block > 0 and dim % block == 0:
        bits = VALUES[values][0]
        if block * bits % 8 == 0:
            return dim * bits // 8 + dim // block * SCALE_BYTES[scale]
    raise ValueError(f"{dim} values as {values} with scales {scale!r}, one for {block}, are no rows")


def decode_block_rows(
    rows: np.ndarray,
    dim: int,
    values: str,
    scale: str,
    block: int,
    factor: float,
    divides: bool,
    out: np.ndarray,
    threads: int = 1,
) -> None:
    """Writes what `kernels.decode_block_rows` says, on one thread."""
    del threads
    needed = block_row_bytes(dim, values, scale, block)
    if rows.ndim != 2 or rows.shape[1] < needed:
        raise ValueError(f"rows of shape {list(rows.shape)} hold no {dim} values and their scales, {needed} bytes")
    if out.shape != (len(rows), dim) or out.dtype != np.uint16:
        raise ValueError(f"out is {out.dtype} {list(out.shape)}, must be uint16 {[len(rows), dim]}")
    with np.errstate(over="ignore", invalid="ignore"):
        if values in BLOCKS:
            _, block_bytes, decode = BLOCKS[values]
            blocks = np.ascontiguousarray(rows[:, :needed]).reshape(len(rows), dim // block, block_bytes)
            found = decode(blocks).reshape(len(rows), dim)
        else:
            bits, unpack = VALUES[values]
            scales = _scales(scale, rows[:, dim * bits // 8 : needed])
            scales = scales / np.float32(factor) if divides else scales * np.float32(factor)
            found = unpack(np.ascontiguousarray(rows[:, : dim * bits // 8])) * scales.repeat(block, axis=1)
        out[...] = bfloat16_bits(np.ascontiguousarray(found, dtype=np.float32))
