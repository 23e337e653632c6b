"""Rows that no step has touched: the store's own, decoded to float32, with the optimizer's first state.

Input: row ids. Output: training records. Errors: `CorruptPageError` for rows that cannot be read as they were built;
`ConfigError` for a codec that training cannot publish again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from .. import kernels
from ..codec import parse_codec
from ..decisions.budget import divide_dram
from ..decisions.training_budget import BASE_BYTES_MAX, BASE_FRACTION
from ..errors import BudgetError, ConfigError
from ..formats.catalog import CatalogImage
from ..formats.initial import InitialLayout
from ..formats.run import RunLayout
from ..offline.exporting.quantized import quantized
from ..offline.exporting.row_readers import drawn_values
from ..spec import TableSpec, codec_scale
from ..store.arguments import table_ids
from ..store.embedded import open_store
from ..store.table import Table
from .optimizers import Optimizer
from .owned import Owned

BASE_BYTES_MIN = 512 << 10
READ_ROWS = 512  # ascending rows that are asked for together: while some are decoded, the others are read
CODECS = "fp32, fp16, bf16, fp8_e4m3[*FACTOR] and fp8_e4m3_e8m0x32"


def check_trainable(spec: TableSpec) -> None:
    """Raises `ConfigError` for a table with a codec in which trained rows cannot be written again."""
    codec = parse_codec(spec.codec)
    plain = codec.values in ("fp32", "fp16", "bf16") or (codec.values == "fp8_e4m3" and not codec.divides)
    if not plain or codec.scale not in ("", "e8m0"):
        raise ConfigError(
            f"table {spec.name}: rows of codec {spec.codec!r} cannot be trained; those of {CODECS} can: dequantize the "
            f"checkpoint, and build from that"
        )


def base_bytes_of(image: CatalogImage, budget_bytes: int) -> int:
    """Returns how much of the budget reading the store's own rows gets. Raises `BudgetError` if half is too little."""
    if image.is_initial:
        return 0
    num_bytes = max(BASE_BYTES_MIN, min(BASE_BYTES_MAX, int(budget_bytes * BASE_FRACTION)))
    while True:
        try:
            divide_dram(image.tables, num_bytes)
            return num_bytes
        except BudgetError:
            if num_bytes * 2 > budget_bytes:
                raise
            num_bytes *= 2


class BaseRows(Protocol):
    """The rows of one table before any step. Any thread may read."""

    def stored(self, row_ids: np.ndarray) -> np.ndarray:
        """Returns rows in the table's codec, uint8 [n, row_bytes]; -1: zeros, or any row. Blocks on the disk."""

    def read(self, row_ids: np.ndarray, out: np.ndarray) -> None:
        """Writes the records of rows, int64 [n], to out, uint8 [n, record_bytes], contiguous. Blocks on the disk."""


class StoredRows(BaseRows):
    """Rows as they were built."""

    def __init__(self, table: Table, layout: RunLayout, optimizer: kernels.Optimizer) -> None:
        self._table = table
        self._codec, self._factor = table.spec.codec.partition("*")[0], codec_scale(table.spec.codec)
        self._dim, self._state = layout.dim, optimizer.initial_state(layout.dim)

    def stored(self, row_ids: np.ndarray) -> np.ndarray:
        return self._table.rows(table_ids(self._table.spec, row_ids))

    def read(self, row_ids: np.ndarray, out: np.ndarray) -> None:
        rows = np.empty((len(row_ids), self._table.spec.row_bytes), dtype=np.uint8)
        # Only ascending rows: two parts of others would read the same page.
        step = READ_ROWS if (row_ids[1:] > row_ids[:-1]).all() else max(1, len(row_ids))
        parts = [slice(start, start + step) for start in range(0, len(row_ids), step)]
        ids = table_ids(self._table.spec, row_ids)
        reads = [self._table.submit_rows(ids[part], rows[part]) for part in parts]
        values = np.empty((min(step, len(row_ids)), self._dim), dtype=np.float32)
        for part, read in zip(parts, reads, strict=True):
            read.wait()
            decoded = values[: len(rows[part])]
            kernels.dequantize_rows(rows[part], self._dim, self._codec, self._factor, decoded)
            _fill(out[part], decoded, self._state)


class DrawnRows(BaseRows):
    """Rows of a store from scratch: drawn by a counter, and nowhere on a disk."""

    def __init__(self, table: InitialLayout, layout: RunLayout, optimizer: kernels.Optimizer) -> None:
        self._table, self._state = table, optimizer.initial_state(layout.dim)

    def stored(self, row_ids: np.ndarray) -> np.ndarray:
        return quantized(drawn_values(self._table, np.maximum(row_ids, 0)), self._table.spec, None).rows

    def read(self, row_ids: np.ndarray, out: np.ndarray) -> None:
        _fill(out, drawn_values(self._table, row_ids), self._state)


def open_base(
    image: CatalogImage,
    layouts: Mapping[str, RunLayout],
    optimizer: Optimizer,
    num_bytes: int,
    io: str,
    owned: Owned,
) -> dict[str, BaseRows]:
    """Opens a store's rows as they were built, without any version or placement; `owned` closes them."""
    native = kernels.Optimizer(**optimizer.to_dict())
    drawn = {name: table for name, table in image.tables.items() if isinstance(table, InitialLayout)}
    if drawn:
        return {name: DrawnRows(table, layouts[name], native) for name, table in drawn.items()}
    store = open_store(image.path, num_bytes, io, placement="none", threads=1, version=0)
    owned.add(store.close)
    return {name: StoredRows(store[name], layouts[name], native) for name in image.tables}


def _fill(out: np.ndarray, values: np.ndarray, state: np.ndarray) -> None:
    floats, dim = out.view(np.float32), values.shape[1]
    floats[:, :dim] = values
    floats[:, dim : dim + len(state)] = state
    floats[:, dim + len(state) :] = 0
