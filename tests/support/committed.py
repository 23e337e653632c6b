"""Commits of made-up training records over a real store, and the rows that they must come out as, one by one.

The oracle is a dict of records by row, and torch's rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tierstore.codec import parse_codec
from tierstore.formats.catalog import read_catalog
from tierstore.formats.run import RunLayout
from tierstore.formats.training_records import Commit
from tierstore.spec import TableSpec
from tierstore.training.commits import create_training, publish_commit
from tierstore.training.optimizers import Optimizer
from tierstore.training.run_writer import RunWriter

from .training_runs import written

FLOAT_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Committed:
    """A store's training of which only the records on disk are there."""

    def __init__(self, store: Path, optimizer: Optimizer, seed: int = 0) -> None:
        self.store, self.optimizer = store, optimizer
        self.rng = np.random.default_rng(seed)
        self.image = read_catalog(store, may_be_initial=True)
        self.records: dict[str, dict[int, np.ndarray]] = {name: {} for name in self.image.tables}
        self._runs: dict[str, list] = {name: [] for name in self.image.tables}
        self._unnamed: list[RunWriter] = []
        self._number = 0
        layouts = {name: self._layout(name).to_dict() for name in self.image.tables}
        create_training(
            store, {"build": self.image.base_identity, "optimizer": optimizer.to_dict(), "layouts": layouts}
        )

    def write(self, name: str, num_rows: int, values: Callable[[np.ndarray], np.ndarray] | None = None) -> np.ndarray:
        """Writes a run of random rows: values of the rows are drawn, or what `values` makes of the row ids."""
        spec, layout = self.image.tables[name].spec, self._layout(name)
        row_ids = self.rng.permutation(spec.num_rows)[:num_rows].astype(np.int64)
        floats = self.rng.standard_normal((num_rows, layout.record_bytes // 4), dtype=np.float32)
        if values is not None:
            floats[:, : spec.dim] = values(row_ids)
        floats[:, spec.dim + layout.state_floats :] = 0
        self._number += 1
        writer, run = written(self.store, self._number, layout, row_ids, floats.view(np.uint8))
        self._runs[name].append(run)
        self._unnamed.append(writer)
        self.records[name] |= dict(zip(row_ids.tolist(), floats, strict=True))
        return row_ids

    def _layout(self, name: str) -> RunLayout:
        spec = self.image.tables[name].spec
        return RunLayout(name, spec.dim, self.optimizer.state_floats(spec.dim), self.image.tables[name].seed)

    def commit(self, step: int = 1, steps: int = 0, rates: np.ndarray | None = None) -> Commit:
        """Publishes all runs that were written so far."""
        runs = {name: list(of) for name, of in self._runs.items() if of}
        numbers = {"optimizer": self.optimizer.to_dict(), "steps": dict.fromkeys(runs, steps)}
        commit = publish_commit(
            self.store,
            step=step,
            payload=b"",
            runs=runs,
            unnamed=self._unnamed,
            optimizer=numbers,
            rates=None if rates is None else dict.fromkeys(runs, rates),
        )
        self._unnamed = []
        return commit


def rows_expected(spec: TableSpec, before: np.ndarray, records: dict[int, np.ndarray]) -> np.ndarray:
    """Returns all rows of a table: those before, uint8 [num_rows, row_bytes], and trained ones rounded by torch."""
    rows = before.copy()
    codec = parse_codec(spec.codec)
    for row_id, record in records.items():
        values = torch.from_numpy(record[: spec.dim].copy())
        if codec.values in FLOAT_DTYPES:
            rows[row_id] = values.to(FLOAT_DTYPES[codec.values]).view(torch.uint8).numpy()
        elif codec.scale:
            rows[row_id] = _block_scaled(values, before[row_id], spec.dim)
        else:
            rows[row_id] = _fp8(values / codec.factor)
    return rows


def _fp8(values: torch.Tensor) -> np.ndarray:
    return values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _block_scaled(values: torch.Tensor, before: np.ndarray, dim: int) -> np.ndarray:
    """One power of two for 32 values: the old one while the largest value is at most 448 times it, and above 112."""
    row = np.empty(dim + dim // 32, dtype=np.uint8)
    for block in range(dim // 32):
        part = values[32 * block : 32 * block + 32]
        largest, byte = float(part.abs().max()), int(before[dim + block])
        if not 112 * 2.0 ** (byte - 127) < largest <= 448 * 2.0 ** (byte - 127):
            byte = next(b for b in range(255) if largest <= 448 * 2.0 ** (b - 127))
        row[32 * block : 32 * block + 32] = _fp8(part / 2.0 ** (byte - 127))
        row[dim + block] = byte
    return row
