"""Values into a table's codec, by the one function that publishing and exporting share.

Input: float32 values, the table's spec, perhaps the rows before. Output: rows, and how many values did not fit.
Errors: `ConfigError` for a codec in which no rows are written.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ... import kernels
from ...codec import FLOAT_BYTES, parse_codec
from ...errors import ConfigError
from ...spec import TableSpec


@dataclass(frozen=True)
class Quantized:
    """Rows, uint8 [n, row_bytes]; changed values that were beyond the codec's largest, and those that are NaN."""

    rows: np.ndarray
    num_saturated: int
    num_nan: int


def kernel_codec(spec: TableSpec) -> tuple[str, float]:
    """Returns a codec as the kernels name it, and its factor. Raises `ConfigError` for one that they do not write."""
    codec = parse_codec(spec.codec)
    if codec.values in FLOAT_BYTES:
        return codec.values, 1.0
    if codec.values == "fp8_e4m3" and codec.scale in ("", "e8m0") and codec.factor != 0:
        return ("fp8_e4m3_e8m0x32", 1.0) if codec.scale else ("fp8_e4m3", codec.factor)
    raise ConfigError(
        f"table {spec.name}: rows of codec {spec.codec!r} cannot be written, those of fp32, fp16, bf16, "
        f"fp8_e4m3[*FACTOR] and fp8_e4m3_e8m0x32 can; dequantize the checkpoint, and build from that"
    )


def quantized(values: np.ndarray, spec: TableSpec, old: np.ndarray | None, threads: int = 1) -> Quantized:
    """Rounds values, float32 [n, dim], into a table's rows. Only computes.

    old: the rows before, uint8 [n, row_bytes]: what has not changed keeps its bytes, and a scale stays while it fits.
    """
    name, factor = kernel_codec(spec)
    rows = np.empty((len(values), spec.row_bytes), dtype=np.uint8)
    saturated, not_numbers = kernels.quantize_rows(values, name, factor, old, rows, threads)
    return Quantized(rows, saturated, not_numbers)
