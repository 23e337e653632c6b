"""Rows of a training as they will be served: rounded to the table's codec, for a quantized forward.

Input: a table of a training, row ids. Output: float32 values. Errors: those of `TrainingTable.gather`, and of reading
the rows as they were built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tierstore import kernels
from tierstore.offline.exporting.quantized import kernel_codec

if TYPE_CHECKING:
    from tierstore.training.table import TrainingTable


def rounded_values(table: TrainingTable, row_ids: np.ndarray) -> np.ndarray:
    """Returns the values of rows, int64 [n], as `publish` and `export` round them, float32 [n, dim].

    Blocks on the disk: a codec with scales in each row keeps them while the values fit, so rows as built are read.
    """
    values = table.gather(row_ids)
    codec, factor = kernel_codec(table.spec)
    built = table.rows.base.stored(table.local_rows(row_ids)) if codec == "fp8_e4m3_e8m0x32" else None
    rows = np.empty((len(row_ids), table.spec.row_bytes), dtype=np.uint8)
    kernels.quantize_rows(values, codec, factor, built, rows)
    kernels.dequantize_rows(rows, table.spec.dim, codec, factor, values)
    values[row_ids == -1] = 0
    return values
