"""Small stores for the adapter's tests: random tables under a V4.1-like hash,
and a store that says what it was asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from engram_adapter.codecs import decode_rows
from engram_adapter.hash_spec import HashSpec
from tierstore.formats.checkpoint import Checkpoint, Plane, TableSource
from tierstore.offline.build import build_store
from tierstore.spec import TableSpec

LAYERS = (1, 4)
VOCAB_SIZE = 61
DIM = 64
NVFP4 = "fp4_e2m1_e4m3x16*0x1.8p-7"
PLANE_BYTES = {
    "fp8_e4m3_e8m0x32": (DIM, DIM // 32),
    "bf16": (2 * DIM,),
    "fp32": (4 * DIM,),
    "fp16": (2 * DIM,),
    NVFP4: (DIM // 2, DIM // 16),
}


def tiny_hash(max_order: int = 3, compressed: int = 40, heads: int = 4) -> HashSpec:
    """A hash of V4.1's kind over two layers, some 300 rows a head; only of 8 heads give row ids their keys back."""
    token_map = np.arange(VOCAB_SIZE, dtype=np.int32) % compressed
    config = {
        "model_type": "deepseek_v41",
        "engram_layer_ids": list(LAYERS),
        "engram_vocab_size": 300,
        "engram_max_ngram_size": max_order,
        "engram_n_heads": heads,
        "engram_head_dim": DIM,
        "engram_compressed_vocab_size": compressed,
        "engram_pad_token_id": 2,
        "vocab_size": VOCAB_SIZE,
    }
    return HashSpec.from_config(config, token_map)


def build_tiny(folder: Path, spec: HashSpec, codec: str, seed: int) -> tuple[Path, dict[str, np.ndarray]]:
    """Builds a store of random rows for every layer of `spec`; returns its path and each table's rows, by name."""
    rng = np.random.default_rng(seed)
    planes: dict[str, np.ndarray] = {}
    for layer in spec.layers:
        num_rows = spec.num_rows(layer)
        planes |= {f"{layer}.{i}": plane for i, plane in enumerate(random_planes(rng, codec, num_rows))}
    file = folder / "tables.safetensors"
    save_file(planes, file)
    checkpoint = Checkpoint.open(file)
    sources, rows = [], {}
    for layer in spec.layers:
        name, widths = spec.table_name(layer), PLANE_BYTES[codec]
        parts = [planes[f"{layer}.{i}"] for i in range(len(widths))]
        rows[name] = np.concatenate(parts, axis=1)
        table = TableSpec(
            name, len(rows[name]), sum(widths), tuple(spec.orders), spec.heads, tuple(spec.moduli(layer)),
            tuple(spec.offsets(layer)), codec, DIM, spec.fingerprint(layer),
        )  # fmt: skip
        stored = [Plane(width, (checkpoint.tensors[f"{layer}.{i}"],)) for i, width in enumerate(widths)]
        sources.append(TableSource(table, tuple(stored)))
    path = folder / "store"
    build_store(path, sources, origin=checkpoint.to_dict(), attachments=spec.attachments(), jobs=1)
    return path, rows


def random_planes(rng: np.random.Generator, codec: str, num_rows: int) -> list[np.ndarray]:
    """Random finite values as bytes: no NaN, so that results compare with torch.equal."""
    if codec == "fp8_e4m3_e8m0x32":
        values = rng.integers(0, 0x7F, (num_rows, DIM), dtype=np.uint8)
        values |= rng.integers(0, 2, (num_rows, DIM), dtype=np.uint8) << 7
        return [values, rng.integers(115, 125, (num_rows, DIM // 32), dtype=np.uint8)]
    if codec == NVFP4:
        values = rng.integers(0, 256, (num_rows, DIM // 2), dtype=np.uint8)
        return [values, rng.integers(1, 0x7F, (num_rows, DIM // 16), dtype=np.uint8)]
    values32 = torch.from_numpy(rng.normal(size=(num_rows, DIM)).astype(np.float32))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[codec]
    return [values32.to(dtype).view(torch.uint8).numpy()]


def decoded(rows: np.ndarray, codec: str) -> torch.Tensor:
    """A table's rows as a resident weight, [num_rows, DIM]; test_codecs.py holds the decoding to its own oracle."""
    return decode_rows(torch.from_numpy(rows), codec, DIM)


class WatchedStore:
    """Passes everything on to a store and notes each request; `fail_next` makes the next one that waits raise it."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.requests: list[tuple[str, ...]] = []  # the tables of each submit and lookup
        self.timeouts_s: list[float | None] = []
        self.fail_next: BaseException | None = None

    @property
    def tables(self) -> dict[str, WatchedTable]:
        return {name: WatchedTable(self, table) for name, table in self.store.tables.items()}

    def submit(self, requests: dict[str, Any]) -> WatchedTicket:
        self.requests.append(tuple(requests))
        return WatchedTicket(self, self.store.submit(requests))

    def end_wait(self, timeout_s: float | None) -> None:
        self.timeouts_s.append(timeout_s)
        error, self.fail_next = self.fail_next, None
        if error is not None:
            raise error


class WatchedTable:
    """Passes everything on to a table and notes each lookup."""

    def __init__(self, watched: WatchedStore, table: Any) -> None:
        self.watched, self.table = watched, table

    def __getattr__(self, name: str) -> Any:
        return getattr(self.table, name)

    def lookup(self, keys: np.ndarray, out: np.ndarray, *, timeout_s: float | None = None) -> np.ndarray:
        self.watched.requests.append((self.table.spec.name,))
        rows = self.table.lookup(keys, out, timeout_s=timeout_s)
        self.watched.end_wait(timeout_s)
        return rows


class WatchedTicket:
    """Notes how long a wait may take, and raises what its store was told to raise."""

    def __init__(self, watched: WatchedStore, ticket: Any) -> None:
        self.watched, self.ticket = watched, ticket

    def wait(self, timeout_s: float | None = None) -> None:
        self.ticket.wait(timeout_s=timeout_s)
        self.watched.end_wait(timeout_s)
