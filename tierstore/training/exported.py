"""The rows of a commit, for an export: its runs as a stream of records, and what becomes of a record.

Input: a store's commit. Output: for each table a `RunStream`, and an `Encoder` that makes codec rows, and optimizer
state if it is asked for, of its records. Errors: `ConfigError` for a commit that is not kept, `CorruptPageError` for a
damaged run. Readers of commits need no lock.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import kernels
from ..errors import ConfigError
from ..formats.catalog import CatalogImage
from ..formats.rates import read_rates
from ..formats.run import Run, RunLayout
from ..formats.training_records import Commit, read_training
from ..layout import TableLayout
from ..offline.exporting.quantized import kernel_codec, quantized
from ..offline.exporting.record_streams import RecordPiece
from ..offline.exporting.row_readers import RowOrigin, read_rows_at
from ..offline.exporting.touched_rows import ROWS
from .optimizers import Optimizer, from_dict
from .runs import RunReader

READ_BYTES = 4 << 20  # of records at once
VALUES = "values"  # the output of `encode` that holds float32 values, beside the optimizer's own parts
FLOAT_BYTES = 4


@dataclass(frozen=True)
class CommitRows:
    """A commit, and how its tables' records are read.

    Attributes:
        store: The store's folder.
        commit: The commit.
        optimizer: That made it.
        tables: The layouts of the store's tables.
    """

    store: Path
    commit: Commit
    optimizer: Optimizer
    tables: Mapping[str, TableLayout]

    def layout(self, name: str) -> RunLayout:
        """Returns how a table's records look."""
        table = self.tables[name]
        return RunLayout(name, table.spec.dim, self.optimizer.state_floats(table.spec.dim), table.seed)

    def open_stream(self, name: str) -> RunStream:
        """Opens the runs of a table; returns their records, oldest first. Close it."""
        return RunStream(self.store, self.layout(name), self.commit.runs[name])

    @property
    def touched_tables(self) -> list[str]:
        """The tables that have records."""
        return [name for name in self.tables if self.commit.runs.get(name)]


def open_commit(image: CatalogImage, number: int | None) -> CommitRows | None:
    """Returns a commit of a store; number None: the newest, None if the store has none.

    Raises `ConfigError` if it is not kept, or the store was built anew since.
    """
    store = Path(image.path)
    records = read_training(store)
    if records is None or (number is None and records.current is None):
        if number is not None:
            raise ConfigError(f"{store} has no commit {number}: it was never trained")
        return None
    if records.training.get("build") != image.base_identity:
        raise ConfigError(f"{store} was built anew since its training began: its commits are of other rows")
    wanted = records.current if number is None else number
    assert wanted is not None
    commit = records.commit(wanted)
    return CommitRows(store, commit, from_dict(dict(commit.optimizer["optimizer"])), image.tables)


class RunStream:
    """The records of a table's runs; keeps the `RecordStream` contract.

    All runs stay open until it is closed, so that a training that goes on, and removes them, does no harm.
    """

    def __init__(self, store: Path, layout: RunLayout, runs: Sequence[Run]) -> None:
        """Opens the runs and checks their heads. Raises `FormatError`."""
        self._layout = layout
        self._reader = RunReader(store, layout, calls=1)
        try:
            self._ordinals = [self._reader.add(run) for run in runs]
        except BaseException:
            self._reader.close()
            raise

    @property
    def record_bytes(self) -> int:
        """See `RecordStream`."""
        return self._layout.record_bytes

    def row_ids(self) -> Iterator[np.ndarray]:
        """See `RecordStream`."""
        for ordinal in self._ordinals:
            yield self._reader.row_ids(ordinal)

    def pieces(self) -> Iterator[RecordPiece]:
        """See `RecordStream`. One piece is read at a time; other threads wait, or compute."""
        at_once = max(1, READ_BYTES // self._layout.record_bytes)
        for ordinal in self._ordinals:
            row_ids = self._reader.row_ids(ordinal)
            for start in range(0, len(row_ids), at_once):
                part = row_ids[start : start + at_once]
                yield RecordPiece(part, partial(self._read, part, ordinal, start))

    def _read(self, row_ids: np.ndarray, ordinal: int, start: int, out: np.ndarray) -> None:
        places = np.arange(start, start + len(row_ids), dtype=np.uint32)
        self._reader.read(row_ids, np.full(len(row_ids), ordinal, dtype=np.uint16), places, out)

    def close(self) -> None:
        """Closes the runs; twice is harmless."""
        self._reader.close()


@dataclass
class Encoder:
    """Makes codec rows, and optimizer state if it is asked for, of the records of one table.

    history: `history_of` the table. num_saturated, num_nan: of what was encoded so far; see `Quantized`.
    """

    rows: CommitRows
    name: str
    base: RowOrigin
    history: kernels.StepHistory
    with_states: bool
    num_saturated: int = 0
    num_nan: int = 0
    _counting: threading.Lock = field(default_factory=threading.Lock)  # guards the two numbers

    def __post_init__(self) -> None:
        kernel_codec(self.rows.tables[self.name].spec)

    @property
    def widths(self) -> Mapping[str, int]:
        """See `tierstore.offline.exporting.sorted_rows.Rounding`."""
        return widths_of(self.rows, self.name, with_states=self.with_states)

    def fill_before(self, row_ids: np.ndarray, rows: np.ndarray) -> None:
        """See `Rounding`."""
        with contextlib.closing(self.base.open()) as reader:
            read_rows_at(reader, row_ids, rows)

    def __call__(self, records: np.ndarray, before: np.ndarray) -> Mapping[str, np.ndarray]:
        """See `Rounding`. Changes `records`."""
        table, optimizer = self.rows.tables[self.name], self.rows.optimizer
        dim = table.spec.dim
        floats = records.view(np.float32)
        kernels.catch_up_rows(self.history, dim, floats)
        values = np.ascontiguousarray(floats[:, :dim])
        made = quantized(values, table.spec, before)
        with self._counting:
            self.num_saturated += made.num_saturated
            self.num_nan += made.num_nan
        if not self.with_states:
            return {ROWS: made.rows}
        state = floats[:, dim:]
        parts = {name: np.ascontiguousarray(state[:, at]) for name, at in optimizer.state_layout(dim).items()}
        return {ROWS: made.rows, VALUES: values} | parts


def widths_of(rows: CommitRows, name: str, *, with_states: bool) -> dict[str, int]:
    """Returns the bytes of a row of each output of an `Encoder`."""
    spec = rows.tables[name].spec
    if not with_states:
        return {ROWS: spec.row_bytes}
    parts = rows.optimizer.state_layout(spec.dim)
    states = {part: FLOAT_BYTES * len(range(*at.indices(at.stop))) for part, at in parts.items()}
    return {ROWS: spec.row_bytes, VALUES: FLOAT_BYTES * spec.dim} | states


def history_of(rows: CommitRows, name: str) -> kernels.StepHistory:
    """Returns the steps of a table up to the commit, with the learning rates that "dense_adam" replays."""
    history = kernels.StepHistory(kernels.Optimizer(**rows.optimizer.to_dict()))
    record = rows.commit.rates
    rates = None if record is None else read_rates(rows.store, record).get(name)
    history.restart(int(rows.commit.optimizer["steps"].get(name, 0)), rates)
    return history


def describe(rows: CommitRows) -> dict[str, Any]:
    """Returns what states say of themselves: commit, step, optimizer."""
    commit = rows.commit
    return {
        "commit": commit.number, "step": commit.step, "digest": commit.digest, "optimizer": rows.optimizer.to_dict(),
        "store": os.fspath(rows.store),
    }  # fmt: skip
