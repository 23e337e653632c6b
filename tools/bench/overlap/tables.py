"""What `tierstore bench overlap` looks up: two tables of one store in V4.1's shape, and the same rows held by a model
itself.

Input: a folder, bytes of both tables, text. Output: the store with a placement planned from one part of the text, the
tokens of the other part, and every row decoded, as a model without a store would hold them. Rows repeat one block
(stores.py) whose values are finite, since a model computes with them. Errors: those of building and planning.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import tierstore
from engram_adapter import HashSpec, token_profile
from engram_adapter.codecs import decode_rows
from engram_adapter.resident_embedding import HashedEmbedding
from tierstore.formats.catalog import read_catalog
from tierstore.offline.build import build_store
from tierstore.spec import TableSpec
from tierstore.units import format_bytes

from ...cli import Progress
from .. import stores
from ..real_text import RealText

BLOCK_FILE = "finite-block.bin"
# Entries packed on NVMe, one read each instead of one a row, take so often the tables' bytes once more.
PACKED_FACTOR = 1
# e8m0, half open: values of fp8 times 2^-13 to 2^-10, so that rows are of the size of activations.
SCALE_BYTES = (114, 118)
FP8_NAN = 0x7F


@dataclass(frozen=True)
class Tables:
    """A store of one table a layer, the hash that it was built with, and the block that its rows repeat,
    uint8 [N, R]."""

    path: Path
    spec: HashSpec
    block: np.ndarray

    @property
    def files(self) -> list[Path]:
        """The shards' files."""
        shards = read_catalog(self.path).shards
        return [self.path / record.file for of_table in shards.values() for record in of_table.values()]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tables' rows, as stored."""
        return sum(self.spec.num_rows(layer) for layer in self.spec.layers) * stores.ROW_BYTES

    def resident(self, device: str) -> list[HashedEmbedding]:
        """Returns each layer's whole table as a model holds it, decoded to bfloat16, on `device`.
        Twice the tables' bytes."""
        decoded = decode_rows(torch.from_numpy(np.array(self.block)), stores.CODEC, stores.DIM).to(device)
        embeddings = []
        for layer in self.spec.layers:
            weight = torch.empty((self.spec.num_rows(layer), stores.DIM), dtype=decoded.dtype, device=device)
            for part in weight.split(len(decoded)):
                part.copy_(decoded[: len(part)])
            embeddings.append(HashedEmbedding(self.spec, layer, weight))
        return embeddings


def make_tables(folder: Path, table_bytes: int, layers: tuple[int, ...], token_map: np.ndarray) -> Tables:
    """Makes, or finds, the store of tables of about `table_bytes` together under `folder`. Blocks:
    some 300 MiB a second."""
    heads = stores.v41_hash(stores.rows_per_head(table_bytes // len(layers)), token_map, layers)
    specs = [_table_spec(heads, layer) for layer in layers]
    digest = hashlib.sha256(json.dumps([spec.fingerprint for spec in specs]).encode()).hexdigest()
    path = folder / stores.FOLDER / f"overlap-{heads.num_rows(layers[0])}-{digest[:8]}"
    block_file = folder / stores.FOLDER / BLOCK_FILE
    block = _finite_block(block_file)
    with Progress(f"making tables of {format_bytes(sum(spec.table_bytes for spec in specs))}") as progress:
        origin = {"digest": digest, "seed": 0, "made_by": "tierstore bench overlap", "files": []}
        sources = [stores.block_source(spec, block_file) for spec in specs]
        build_store(path, sources, origin=origin, attachments=heads.attachments(), on_progress=progress)
    return Tables(path, heads, block)


def place(
    tables: Tables, text: RealText, dram_bytes: int, hbm_bytes: int | None, batch_tokens: int
) -> dict[str, float]:
    """Profiles `text` and publishes the placement for both budgets, with packed entries on NVMe beyond them.

    Returns the hit rates that it promises. Blocks, a minute.
    """
    with tempfile.TemporaryDirectory(dir=tables.path.parent, prefix="profile-") as name:
        work = Path(name)
        profile = token_profile(tables.path, text.write_trace(work / "text.trace"), output=work / "text.profile")
        packed_bytes = tables.num_bytes * PACKED_FACTOR
        plan = tierstore.plan(tables.path, profile, dram_bytes, hbm_bytes or 0, packed_bytes, batch_tokens=batch_tokens)
        tierstore.place(tables.path, plan)
    return plan.groups[0].hit_rate


def _table_spec(heads: HashSpec, layer: int) -> TableSpec:
    return TableSpec(
        heads.table_name(layer), heads.num_rows(layer), stores.ROW_BYTES, stores.ORDERS, stores.HEADS,
        heads.moduli(layer), heads.offsets(layer), stores.CODEC, stores.DIM, heads.fingerprint(layer),
    )  # fmt: skip


def _finite_block(file: Path) -> np.ndarray:
    """Makes, or finds, the block: fp8 values without NaN, scales of a few powers of two; returns it mapped."""
    shape = (stores.BLOCK_ROWS, stores.ROW_BYTES)
    if not file.exists() or file.stat().st_size != stores.BLOCK_ROWS * stores.ROW_BYTES:
        file.parent.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(0)
        rows = generator.integers(0, 256, shape, dtype=np.uint8)
        values = rows[:, : stores.DIM]
        values -= (values & FP8_NAN) == FP8_NAN  # to the largest finite value of the same sign
        rows[:, stores.DIM :] = generator.integers(*SCALE_BYTES, (stores.BLOCK_ROWS, stores.ROW_BYTES - stores.DIM))
        rows.tofile(file.with_suffix(".new"))
        file.with_suffix(".new").rename(file)
    return np.memmap(file, dtype=np.uint8, mode="r", shape=shape)
