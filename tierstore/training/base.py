"""Rows that no step has touched: the store's own, decoded to float32, with the optimizer's first state.

Input: row ids. Output: training records. Errors: `CorruptPageError` for rows that cannot be read as they were built;
`ConfigError` for a codec that training cannot publish again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from .. import kernels
from ..codec import parse_codec
from ..decisions.budget import divide_dram
from ..decisions.training_budget import BASE_BYTES_MAX, BASE_FRACTION
from ..errors import BudgetError, ConfigError
from ..formats.run import RunLayout
from ..layout import TableLayout
from ..spec import TableSpec, codec_scale
from ..store.embedded import open_store
from ..store.store import Store
from ..store.table import Table

BASE_BYTES_MIN = 512 << 10
CODECS = "fp32, fp16, bf16, fp8_e4m3[*FACTOR] and fp8_e4m3_e8m0x32"


def check_trainable(spec: TableSpec) -> None:
    """Raises `ConfigError` for a table whose codec is none that trained rows can be written in again."""
    codec = parse_codec(spec.codec)
    plain = codec.values in ("fp32", "fp16", "bf16") or (codec.values == "fp8_e4m3" and not codec.divides)
    if not plain or codec.scale not in ("", "e8m0"):
        raise ConfigError(
            f"table {spec.name}: rows of codec {spec.codec!r} cannot be trained; those of {CODECS} can: dequantize the "
            f"checkpoint, and build from that"
        )


def base_bytes_of(tables: Mapping[str, TableLayout], budget_bytes: int) -> int:
    """Returns how much of the budget reading the store's own rows gets. Raises `BudgetError` if half is too little."""
    num_bytes = max(BASE_BYTES_MIN, min(BASE_BYTES_MAX, int(budget_bytes * BASE_FRACTION)))
    while True:
        try:
            divide_dram(tables, num_bytes)
            return num_bytes
        except BudgetError:
            if num_bytes * 2 > budget_bytes:
                raise
            num_bytes *= 2


def open_base(path: str | os.PathLike[str], num_bytes: int, io: str) -> Store:
    """Opens the store's own rows, as they were built: no placement, and no version."""
    return open_store(path, num_bytes, io, placement="none", threads=1, version=0)


class BaseRows:
    """The rows of one table as they were built. Any thread may read."""

    def __init__(self, table: Table, layout: RunLayout, optimizer: kernels.Optimizer) -> None:
        self._table = table
        self._layout = layout
        self._codec, self._factor = table.spec.codec.partition("*")[0], codec_scale(table.spec.codec)
        self._state = optimizer.initial_state(layout.dim)

    def read(self, row_ids: np.ndarray, out: np.ndarray) -> None:
        """Writes the records of rows, int64 [n], to out, uint8 [n, record_bytes], contiguous. Blocks on the disk."""
        dim = self._layout.dim
        rows = self._table.rows(row_ids)
        floats = out.view(np.float32)
        values = np.empty((len(row_ids), dim), dtype=np.float32)
        kernels.dequantize_rows(rows, dim, self._codec, self._factor, values)
        floats[:, :dim] = values
        floats[:, dim : dim + len(self._state)] = self._state
        floats[:, dim + len(self._state) :] = 0
