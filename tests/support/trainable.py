"""Small stores for training, the values of their rows, and a trainer that shares no code with the one under test.

The oracle's values come from NumPy's views and the tables of kernels/reference_codec.py; its steps from
kernels/reference_training.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.numpy

from tierstore.formats.checkpoint import Checkpoint, Plane, TableSource
from tierstore.kernels.reference_codec import FP8, e8m0_values
from tierstore.kernels.reference_training import ReferenceTable
from tierstore.spec import TableSpec, codec_row_bytes, codec_scale
from tierstore.training.optimizers import Optimizer

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
        tensors[name] = _rows_of(codec, num_rows, dim, rng)
        rows[name], values[name] = tensors[name], values_of(tensors[name], codec, dim)
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
