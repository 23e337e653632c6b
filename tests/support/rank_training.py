"""A training that W ranks share, of a tiny store: its slices, the batches of each rank, and steps with given gradients.

Every number of ranks gets the same global batches: micro-batch after micro-batch, sequences are dealt to ranks in their
order, unevenly, and to some rank none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.tiny_store import DIM, LAYERS, build_tiny, tiny_hash

import tierstore
from engram_adapter import HashSpec, TableOptimizer, TrainableEmbedding
from tierstore.training.optimizers import Optimizer

SEQUENCES, TOKENS = 9, 5
TOKEN_IDS = 4  # few, so that sequences share rows, and the order of sums shows in the bits
SHARES = {1: [9], 2: [3, 6], 3: [2, 5, 2], 4: [4, 0, 2, 3]}


@dataclass(frozen=True)
class Sliced:
    """A store, and where its slices go."""

    folder: Path
    spec: HashSpec

    @property
    def whole(self) -> Path:
        return self.folder / "store"

    def slices(self, size: int, name: str = "slices") -> list[Path]:
        """The slices of `size` ranks, made anew for a name that is not there yet."""
        folder = self.folder / name
        if not folder.exists():
            folder.mkdir()
            tierstore.reslice([self.whole], folder / "{}", size)
        return [folder / str(rank) for rank in range(size)]


def make_sliced(folder: Path, codec: str = "bf16") -> Sliced:
    spec = tiny_hash()
    build_tiny(folder, spec, codec, seed=0)
    return Sliced(folder, spec)


def tokens_of(step: int, micro: int, size: int, rank: int) -> torch.Tensor:
    """A rank's part of a global micro-batch, [sequences, TOKENS]."""
    generator = torch.Generator().manual_seed(100 * step + micro)
    whole = torch.randint(0, TOKEN_IDS, (SEQUENCES, TOKENS), generator=generator)
    return whole.split(SHARES[size])[rank]


def gradients_of(step: int, micro: int, layer: int, num_heads: int, size: int, rank: int) -> torch.Tensor:
    """What comes from above for a rank's part, [sequences, TOKENS, heads, DIM]."""
    generator = torch.Generator().manual_seed(1_000_000 + 100 * step + 10 * micro + layer)
    whole = torch.randn((SEQUENCES, TOKENS, num_heads, DIM), generator=generator)
    return whole.split(SHARES[size])[rank]


class RankTrainer:
    """One rank's training: two tables, an optimizer."""

    def __init__(
        self, path: Path, spec: HashSpec, rule: Optimizer | None, rank: int, size: int, group: Any, **options: Any
    ) -> None:
        self.rank, self.size = rank, size
        self.training = tierstore.open_training(path, rule, dram="8MiB", threads=1)
        self.embeddings = [
            TrainableEmbedding(self.training, layer, spec, process_group=group, reduction="sum", **options)
            for layer in LAYERS
        ]
        self.optimizer = TableOptimizer(self.embeddings)

    def backward(self, step: int, micro: int) -> np.ndarray:
        """Returns the loss of each sequence of this rank."""
        ids = tokens_of(step, micro, self.size, self.rank)
        losses = torch.zeros(len(ids))
        for layer, embedding in zip(LAYERS, self.embeddings, strict=True):
            above = gradients_of(step, micro, layer, embedding.num_heads, self.size, self.rank)
            losses = losses + (embedding(ids) * above).sum(dim=(1, 2, 3))
        losses.sum().backward()
        return losses.detach().numpy()

    def step(self, step: int, micros: int = 2, clip: float | None = 20.0) -> list[np.ndarray]:
        losses = [self.backward(step, micro) for micro in range(micros)]
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([each.gradient_norms for each in self.embeddings], clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses

    def rows(self) -> dict[str, np.ndarray]:
        """Its slice of every table, in float32."""
        tables = self.training.tables.values()
        return {
            table.spec.name: table.gather(np.arange(table.spec.row_start, table.spec.row_end)).copy()
            for table in tables
        }


def joined(of_ranks: list[dict[str, np.ndarray]]) -> dict[str, bytes]:
    """The whole tables' bytes, of all ranks' slices."""
    return {name: np.concatenate([rows[name] for rows in of_ranks]).tobytes() for name in of_ranks[0]}
