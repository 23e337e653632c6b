"""LongCat: a checkpoint that synth writes becomes a store whose lookups are its heads' rows; what cannot be is named.

Hashes are in test_hash_spec.py, which has the oracle.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import plain_hash_oracle as oracle
from support.device import DEVICE
from tokenizers import Tokenizer

import tierstore
from engram_adapter import HashSpec, TieredEmbedding, build_checkpoint, replan
from engram_adapter.families import read_model
from tierstore.errors import ConfigError
from tierstore.formats.checkpoint import Checkpoint
from tierstore.formats.trace import TokenTraceWriter
from tierstore.tools.corpus import train_tokenizer
from tierstore.tools.synth import write_checkpoint

ROWS, DIM, SPLITS, EOS = 900, 8, 4, 2
HEADS = 3 * SPLITS


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([Path(__file__)], 300)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("longcat") / "model"
    write_checkpoint(folder, "longcat", rows_per_head=ROWS, dim=DIM, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def store_path(model: Path) -> Path:
    build_checkpoint(model, model.with_name("store"))
    return model.with_name("store")


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def expected_values(model: Path, tokens: np.ndarray) -> torch.Tensor:
    """The rows of each head's own tensor, [B, T, H, dim], found in plain Python."""
    config = json.loads((model / "config.json").read_text())
    tensors = loaded(model)
    heads = [tensors[f"model.ngram_embeddings.embedders.{head}.weight"] for head in range(HEADS)]
    moduli = [len(head) for head in heads]
    keys = [oracle.longcat_keys_of(each, moduli, config["vocab_size"], SPLITS, EOS) for each in tokens.tolist()]
    return torch.stack(
        [torch.stack([torch.stack([heads[h][k] for h, k in enumerate(of)]) for of in seq]) for seq in keys]
    )


def some_tokens(model: Path, shape: tuple[int, int]) -> np.ndarray:
    rng = np.random.default_rng(7)
    tokens = rng.integers(3, json.loads((model / "config.json").read_text())["vocab_size"], shape)
    tokens[rng.random(shape) < 0.1] = EOS
    return tokens


def test_lookups_are_the_heads_rows_however_they_come(model: Path, store_path: Path) -> None:
    tokens = some_tokens(model, (3, 17))
    wanted = expected_values(model, tokens)
    with tierstore.open(store_path, dram="8MiB") as store:
        spec = HashSpec.from_store(store)
        table = store["layers.0"]
        assert (table.spec.orders, table.spec.rows_per_key) == ((2,) * 4 + (3,) * 4 + (4,) * 4, 1)
        embedding = TieredEmbedding(store, 0, spec)
        ids = torch.from_numpy(tokens)
        assert torch.equal(embedding(ids), wanted)
        embedding.prefetch(ids[:, 5:], history=ids[:, :5])
        assert torch.equal(embedding(ids[:, 5:], history=ids[:, :5]), wanted[:, 5:])
        by_row = table.rows(spec.row_ids(tokens, 0))
        assert torch.equal(torch.from_numpy(by_row).view(torch.bfloat16), wanted)


def test_row_ids_give_the_keys_that_the_cache_knows(model: Path, store_path: Path) -> None:
    """An engine has row ids: what it looks up and what tokens look up must be one entry of the cache."""
    tokens = some_tokens(model, (1, 40))
    with tierstore.open(store_path, dram="8MiB") as store:
        spec, table = HashSpec.from_store(store), store["layers.0"]
        keys, is_consistent = table.spec.keys_of_row_ids(spec.row_ids(tokens, 0)[0])
        assert is_consistent.all()
        np.testing.assert_array_equal(keys, spec.keys(tokens, 0)[0])
        beyond = spec.row_ids(tokens, 0)[0]
        beyond[3, 5] = spec.offsets(0)[6]  # of the head behind
        assert table.spec.keys_of_row_ids(beyond)[1].tolist() == [row != 3 for row in range(40)]


def test_a_profile_of_tokens_makes_a_placement_that_is_used(model: Path, store_path: Path, tmp_path: Path) -> None:
    tokens = some_tokens(model, (1, 4000))[0] % 40 + 3  # n-grams that come again
    with TokenTraceWriter(tmp_path / "text.trace", vocab_size=300, source="test") as writer:
        for document in tokens.reshape(40, 100):
            writer.add(document, [len(document)])
        writer.finish()
    epoch = replan(store_path, tmp_path / "text.trace", dram="96KiB")
    assert epoch == 1
    probe = tokens[None, :100]
    with tierstore.open(store_path, dram="4MiB") as store:
        embedding = TieredEmbedding(store, 0, HashSpec.from_store(store))
        assert torch.equal(embedding(torch.from_numpy(probe)), expected_values(model, probe))


def spelled_oe(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], padding: int = 0) -> Path:
    """Writes the model as LongCat-2.0 is spelled, perhaps with rows beyond each head's."""
    folder.mkdir()
    names = {"ngram_vocab_size_ratio": "oe_vocab_size_ratio", "emb_neighbor_num": "oe_neighbor_num"}
    names["emb_split_num"] = "oe_split_num"
    (folder / "config.json").write_text(json.dumps({names.get(key, key): value for key, value in config.items()}))
    heads = {
        f"model.oe_embed_tokens{head}.weight": torch.cat(
            [tensors[f"model.ngram_embeddings.embedders.{head}.weight"], torch.ones(padding, DIM, dtype=torch.bfloat16)]
        )
        for head in range(HEADS)
    }
    save_file(heads, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("padding", [0, 13])
def test_the_other_spelling_and_padded_heads_are_the_same_table(model: Path, tmp_path: Path, padding: int) -> None:
    config = json.loads((model / "config.json").read_text())
    other = spelled_oe(tmp_path / "other", config, loaded(model), padding)
    here, there = read_model(Checkpoint.open(model)), read_model(Checkpoint.open(other))
    assert here.hash_spec.fingerprint(0) == there.hash_spec.fingerprint(0)
    assert here.sources[0].spec == there.sources[0].spec
    build_checkpoint(other, tmp_path / "store")
    tokens = some_tokens(model, (2, 9))
    with tierstore.open(tmp_path / "store", dram="8MiB") as store:
        found = TieredEmbedding(store, 0, HashSpec.from_store(store))(torch.from_numpy(tokens))
    assert torch.equal(found, expected_values(model, tokens))


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"ngram_vocab_size_ratio": 9.0}, "rows, config.json makes"),
    ({"emb_split_num": 3}, "tensor model.ngram_embeddings.embedders.9.weight, config.json makes 9 heads"),
    ({"emb_split_num": 5}, "embedders.12.weight is missing"),
    ({"emb_neighbor_num": 9}, "makes 32 heads, expected at most 16"),
    ({"hidden_size": 100}, "hidden_size 100, its tensors' columns make 96"),
    ({"text_vocab_size": 250}, "text_vocab_size is there beside a vocabulary"),
    ({"ignored_token_ids": "0:4"}, "ignored_token_ids is there"),
    ({"ngram_vocab_size_ratio": "78"}, "ngram_vocab_size_ratio is '78', expected a number"),
    ({"eos_token_id": None}, "eos_token_id is missing"),
    (
        {"vocab_size": 2**31 - 1, "ngram_vocab_size_ratio": 0.9, "emb_neighbor_num": 9, "emb_split_num": 2},
        "vocab_size is 2147483647, whose n-grams add up to",
    ),
]


@pytest.mark.parametrize(
    ("change", "message"), CHANGES, ids=[next(iter(c)) + str(i) for i, (c, _) in enumerate(CHANGES)]
)
def test_a_configuration_that_is_not_the_tensors_is_refused(
    model: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = json.loads((model / "config.json").read_text()) | change
    save_file(loaded(model), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        read_model(Checkpoint.open(tmp_path))


def test_a_head_of_another_type_is_refused(model: Path, tmp_path: Path) -> None:
    tensors = loaded(model)
    name = "model.ngram_embeddings.embedders.4.weight"
    tensors[name] = tensors[name].float()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"embedders\.4\.weight is F32 .* the parts of one table must agree"):
        read_model(Checkpoint.open(tmp_path))


@pytest.mark.gpu
def test_a_gpus_lookups_are_the_heads_rows(model: Path, store_path: Path) -> None:
    tokens = some_tokens(model, (2, 11))
    ids = torch.from_numpy(tokens).to(DEVICE)
    with tierstore.open(store_path, dram="8MiB", hbm="1MiB", device=DEVICE) as store:
        embedding = TieredEmbedding(store, 0, HashSpec.from_store(store))
        found = torch.cat([embedding(ids[:, :4]), embedding(ids[:, 4:], history=ids[:, :4])], dim=1)
        embedding.synchronize()
    assert torch.equal(found.cpu(), expected_values(model, tokens))
