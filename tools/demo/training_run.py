"""One training of the demo, as a process of its own: a small transformer with two Engram layers, and their tables.

Input: a folder with token ids, a store and the name of a run, by command line; a checkpoint of the run if it was
killed before. Output: a line a step on stdout, checkpoints of the dense weights beside commits of the tables, and at
the end a line of JSON. Errors: what the store raises.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import tierstore
from engram_adapter import EngramLayer, HashSpec, TableOptimizer, TieredEmbedding, TrainableEmbedding, dense_parameters

HIDDEN_SIZE, NUM_HEADS = 96, 4
SEQUENCES, TOKENS = 8, 64  # of a batch
HELD_OUT_BATCHES = 16
NUM_STEPS, STEPS_A_COMMIT = 120, 20
TABLE_RATE, DENSE_RATE = 0.05, 2e-3
DRAM = "64MiB"
ROWS_HASHED = 1 << 16  # at a time


class Block(torch.nn.Module):
    """An Engram layer, causal attention and a feed-forward layer, each added to the hidden states."""

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        size = HIDDEN_SIZE
        self.engram = EngramLayer(embedding, embedding.features, size, hc_mult=1)
        self.attention_norm, self.norm = torch.nn.LayerNorm(size), torch.nn.LayerNorm(size)
        self.query_key_value, self.attended = torch.nn.Linear(size, 3 * size), torch.nn.Linear(size, size)
        self.up, self.down = torch.nn.Linear(size, 4 * size), torch.nn.Linear(4 * size, size)

    def forward(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Returns hidden states [B, T, size] after the layer."""
        hidden = hidden + self.engram(hidden.unsqueeze(2), token_ids).squeeze(2)
        parts = self.query_key_value(self.attention_norm(hidden)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attended(attended.transpose(1, 2).flatten(2))
        added: torch.Tensor = self.down(F.gelu(self.up(self.norm(hidden))))
        return hidden + added


class Model(torch.nn.Module):
    """A language model of two blocks. The same seed gives the same weights."""

    def __init__(self, embeddings: list[Any], vocab_size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = torch.nn.Embedding(vocab_size, HIDDEN_SIZE)
        self.places = torch.nn.Parameter(0.02 * torch.randn(TOKENS, HIDDEN_SIZE))
        torch.nn.init.normal_(self.tokens.weight, std=0.02)
        self.blocks = torch.nn.ModuleList([Block(each) for each in embeddings])
        self.norm, self.out = torch.nn.LayerNorm(HIDDEN_SIZE), torch.nn.Linear(HIDDEN_SIZE, vocab_size)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Returns the mean loss of the next token, in nats, of ids [B, TOKENS + 1]."""
        seen = token_ids[:, :-1]
        hidden = self.tokens(seen) + self.places
        for block in self.blocks:
            hidden = block(hidden, seen)
        return F.cross_entropy(self.out(self.norm(hidden)).flatten(0, 1), token_ids[:, 1:].flatten())


def batch_of(text: np.ndarray, number: int) -> torch.Tensor:
    """Returns batch `number` of a text: the same for the same number, so that a resumed run needs no other state."""
    starts = np.random.default_rng(number).integers(0, len(text) - TOKENS - 1, SEQUENCES)
    return torch.from_numpy(np.stack([text[start : start + TOKENS + 1] for start in starts]).astype(np.int64))


def held_out_loss(model: Model, text: np.ndarray) -> float:
    """Returns the mean loss of fixed batches."""
    with torch.no_grad():
        return float(np.mean([float(model(batch_of(text, number))) for number in range(HELD_OUT_BATCHES)]))


def train(folder: Path, name: str, frozen: bool) -> dict[str, Any]:
    """Trains from the run's checkpoint, or from the start, to the end; returns losses and a digest of all weights."""
    text, held_out = np.load(folder / "text" / "training.npy"), np.load(folder / "text" / "held_out.npy")
    saved = folder / name / "dense.pt"
    with tierstore.open_training(folder / name / "store", tierstore.RowWiseAdagrad(TABLE_RATE), dram=DRAM) as training:
        spec = spec_of(folder / name / "store")
        embeddings = [TrainableEmbedding(training, layer, spec) for layer in spec.layers]
        model = Model(embeddings, spec.vocab_size)
        tables, dense = TableOptimizer(embeddings), torch.optim.AdamW(dense_parameters(model), lr=DENSE_RATE)
        if frozen:
            for each in embeddings:
                each.requires_grad_(False)
        before = None
        if saved.exists():
            state = torch.load(saved, weights_only=True)
            model.load_state_dict(state["model"])
            dense.load_state_dict(state["dense"])
            tables.load_state_dict(state["tables"])  # goes back to the commit of that step
        else:
            before = held_out_loss(model, held_out)
        for step in range(tables.num_steps + 1, NUM_STEPS + 1):
            loss = model(batch_of(text, step))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in (tables, dense):
                optimizer.step()
                optimizer.zero_grad()
            if step % STEPS_A_COMMIT == 0:
                save(saved, {"model": model.state_dict(), "dense": dense.state_dict(), "tables": tables.state_dict()})
            print(f"step {step} loss {loss.item():.3f}", flush=True)
        after = held_out_loss(model, held_out)
        touched = sum(table.stats()["touched_rows"] for table in training.tables.values())
        version = 0 if frozen else training.publish()
        digest = digest_of(model, training)
    served = served_loss(folder / name / "store", model, held_out)
    return {"before": before, "after": after, "served": served, "version": version, "touched": touched} | digest


def spec_of(store_path: Path) -> HashSpec:
    """Returns the hash that a store was built with."""
    with tierstore.open(store_path, dram="4MiB") as store:
        return HashSpec.from_store(store)


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint that is whole whenever the process is killed."""
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def served_loss(store_path: Path, model: Model, held_out: np.ndarray) -> float:
    """Returns the loss with rows as readers of the store get them: of the published version, in the table's codec."""
    with tierstore.open(store_path, dram=DRAM) as store:
        spec = HashSpec.from_store(store)
        for block, layer in zip(model.blocks, spec.layers, strict=True):
            block.engram.embedding = TieredEmbedding(store, layer, spec)  # type: ignore[union-attr]
        return held_out_loss(model, held_out)


def digest_of(model: Model, training: tierstore.Training) -> dict[str, str]:
    """Returns SHA-256 of the dense weights and of the values of every row, hex."""
    dense, rows = hashlib.sha256(), hashlib.sha256()
    for weight in model.state_dict().values():
        dense.update(weight.numpy().tobytes())
    for table in training.tables.values():
        for start in range(0, table.spec.num_rows, ROWS_HASHED):
            ids = np.arange(start, min(start + ROWS_HASHED, table.spec.num_rows), dtype=np.int64)
            rows.update(table.gather(ids).tobytes())
    return {"dense": dense.hexdigest(), "rows": rows.hexdigest()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    print(json.dumps(train(Path(sys.argv[1]), sys.argv[2], frozen=sys.argv[2] == "frozen")), flush=True)
