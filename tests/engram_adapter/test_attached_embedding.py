"""The embedding module over a store that a daemon serves: the same values as from the rows that it was built from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from support.served import KIB, request, serving
from support.tiny_store import DIM, VOCAB_SIZE, build_tiny, decoded, tiny_hash
from support.waiting import eventually

import tierstore
from engram_adapter.embedding import TieredEmbedding


def test_an_embedding_runs_over_an_attached_store_and_through_a_swap(tmp_path: Path) -> None:
    path, rows = build_tiny(tmp_path, tiny_hash(), "bf16", seed=3)
    (tmp_path / "other").mkdir()
    other, other_rows = build_tiny(tmp_path / "other", tiny_hash(), "bf16", seed=4)
    token_ids = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, 9)))
    row_ids = tiny_hash().row_ids(token_ids.numpy(), 4)
    with serving(path, tmp_path / "s", 400 * KIB), tierstore.connect(tmp_path / "s") as store:
        embedding = TieredEmbedding(store, 4, tiny_hash())
        for _ in range(2):
            found = embedding(token_ids)
            assert found.shape == (2, 9, 8, DIM)
            assert torch.equal(found, decoded(rows["layers.4"][row_ids], "bf16"))
        request(tmp_path / "s", "swap", store=str(other))
        eventually(lambda: store.stats()["attached"]["version"] == 2)
        assert torch.equal(embedding(token_ids), decoded(other_rows["layers.4"][row_ids], "bf16"))
