"""Small stores for training, the values of their rows, and a trainer that shares no code with the one under test.

The oracle's values come from NumPy's views and the tables of kernels/reference_codec.py; its steps from
kernels/reference_training.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import tierstore
from tierstore import kernels
from tierstore.decisions.training_budget import TableMemory, TrainingPlan
from tierstore.formats.checkpoint import Checkpoint, Plane, TableSource
from tierstore.kernels.reference_codec import FP8, e8m0_values
from tierstore.kernels.reference_training import ReferenceTable
from tierstore.spec import TableSpec, codec_row_bytes, codec_scale
from tierstore.training import opening
from tierstore.training.opened import TableFiles, plan_memory
from tierstore.training.optimizers import Optimizer
from tierstore.training.ticket import TrainingTicket

from .stores import Model

CODECS = {"bf16": "bf16", "fp8": "fp8_e4m3_e8m0x32", "factor": "fp8_e4m3*0x1.8p-7", "fp32": "fp32", "fp16": "fp16"}


@dataclass
class Trainable:
    """A checkpoint of plain tables, and what their rows say, float32 [num_rows, dim] by table."""

    model: Model
    values: dict[str, np.ndarray]
    dim: int = field(default=32)

    def reference(self, optimizer: Optimizer) -> dict[str, ReferenceTable]:
        """A trainer of each table that has taken no step."""
        return {
            name: ReferenceTable(partial(_row, values), self.dim, optimizer.to_dict())
            for name, values in self.values.items()
        }


def _row(values: np.ndarray, row_id: int) -> np.ndarray:
    return values[row_id]


def make_trainable(
    folder: Path, num_rows: int = 500, dim: int = 32, seed: int = 0, codecs: dict[str, str] | None = None
) -> Trainable:
    """Writes a checkpoint with a plain table for each codec."""
    rng = np.random.default_rng(seed)
    tensors, sources, rows, values = {}, [], {}, {}
    folder.mkdir(parents=True, exist_ok=True)
    codecs = CODECS if codecs is None else codecs
    for name, codec in codecs.items():
        tensors[name] = rows[name] = _rows_of(codec, num_rows, dim, rng)
        if codec in CODECS.values():
            values[name] = values_of(rows[name], codec, dim)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    for name, codec in codecs.items():
        row_bytes = codec_row_bytes(codec, dim)
        assert row_bytes is not None
        spec = TableSpec.plain(name, num_rows, row_bytes, codec, dim)
        sources.append(TableSource(spec, (Plane(row_bytes, (checkpoint.tensors[name],)),)))
    return Trainable(Model(folder, checkpoint, tuple(sources), rows), values, dim)


def _rows_of(codec: str, num_rows: int, dim: int, rng: np.random.Generator) -> np.ndarray:
    floats = rng.standard_normal((num_rows, dim)).astype(np.float32)
    if codec == "fp32":
        return floats.view(np.uint8).reshape(num_rows, -1)
    if codec == "fp16":
        return floats.astype(np.float16).view(np.uint8).reshape(num_rows, -1)
    if codec == "bf16":
        return (floats.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(num_rows, -1)
    if not codec.startswith("fp8"):
        return rng.integers(0, 256, (num_rows, codec_row_bytes(codec, dim)), dtype=np.uint8)
    numbers = rng.integers(0, 256, (num_rows, dim), dtype=np.uint8)
    numbers[numbers & 0x7F == 0x7F] = 0x38
    if codec != "fp8_e4m3_e8m0x32":
        return numbers
    return np.concatenate([numbers, rng.integers(115, 128, (num_rows, dim // 32), dtype=np.uint8)], axis=1)


def values_of(rows: np.ndarray, codec: str, dim: int) -> np.ndarray:
    """The float32 values of rows, uint8 [R, row_bytes]."""
    rows = np.ascontiguousarray(rows)
    if codec == "fp32":
        return rows.view(np.float32)
    if codec == "fp16":
        return rows.view(np.float16).astype(np.float32)
    if codec == "bf16":
        return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if codec == "fp8_e4m3_e8m0x32":
        return FP8[rows[:, :dim]] * e8m0_values(rows[:, dim:]).repeat(32, axis=1)
    return FP8[rows[:, :dim]] * np.float32(codec_scale(codec))


def in_bits(values: np.ndarray) -> np.ndarray:
    """Float32 values as what must be equal: zeros of both signs differ."""
    return values.view(np.uint32)


def tiny_caches(monkeypatch: pytest.MonkeyPatch, num_slots: int, num_aside: int = 1) -> None:
    """Gives every table that is opened from now on a cache of a few slots, and buffers of a few records."""

    def plan(files: dict[str, TableFiles], *arguments: Any) -> TrainingPlan:
        tables = {}
        for name, of in files.items():
            layout = of.layout
            cache_bytes = kernels.row_cache_bytes(1 << 40, layout.dim, layout.record_bytes, num_slots, num_aside)
            tables[name] = TableMemory(1 << 30, cache_bytes, num_slots, num_aside, is_whole=False)
        return replace(plan_memory(files, *arguments), tables=tables, buffer_bytes=8192)

    monkeypatch.setattr(opening, "plan_memory", plan)


class Pair:
    """A training and the oracle's, which take the same random steps."""

    def __init__(self, trainable: Trainable, store: Path, optimizer: Optimizer, seed: int, **options: Any) -> None:
        self.trainable, self.store, self.options = trainable, store, options
        self.rng = np.random.default_rng(seed)
        self.reference = trainable.reference(optimizer)
        self.training = tierstore.open_training(store, optimizer, **{"dram": "16MiB"} | options)

    def row_ids(self, name: str, count: int) -> np.ndarray:
        return self.rng.integers(-1, self.training[name].spec.num_rows, count)

    def step(self, name: str, count: int = 60, groups: int = 3) -> None:
        row_ids = self.row_ids(name, count)
        gradients = self.rng.standard_normal((count, self.trainable.dim)).astype(np.float32)
        of = self.rng.integers(0, groups, count).astype(np.int32)
        lr = float(self.rng.random()) / 8
        self.training[name].apply(row_ids, gradients, of, lr=lr)
        self.reference[name].apply(row_ids, gradients, of, lr=lr)

    def steps(self, count: int, size: int = 60) -> None:
        for _ in range(count):
            for name in self.reference:
                self.step(name, size)

    def check(self, count: int = 100) -> None:
        for name, reference in self.reference.items():
            row_ids = self.row_ids(name, count)
            found, expected = self.training[name].gather(row_ids), reference.gather(row_ids)
            np.testing.assert_array_equal(in_bits(found), in_bits(expected), name)

    def check_all(self) -> None:
        for name, reference in self.reference.items():
            row_ids = np.arange(self.training[name].spec.num_rows)
            found, expected = self.training[name].gather(row_ids), reference.gather(row_ids)
            np.testing.assert_array_equal(in_bits(found), in_bits(expected), name)

    def commit(self, step: int) -> TrainingTicket:
        ticket = self.training.commit(step)
        for reference in self.reference.values():
            reference.commit(step)
        return ticket

    def reopen(self, step: int, **options: Any) -> None:
        """Closes it, and opens it again at the newest commit, which is of `step`."""
        self.training.close()
        self.training = tierstore.open_training(self.store, **{"dram": "16MiB"} | self.options | options)
        for reference in self.reference.values():
            reference.rollback(step)
