"""End to end with the real transformers package: save, build, swap, and every logit is the same bit for bit."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from support.marks import slow_but

import tierstore
from engram_adapter import RowIdEmbedding
from engram_adapter.engines.transformers.swap import swap_embedding
from engram_adapter.families import read_model
from tierstore.errors import ConfigError, FingerprintMismatchError
from tierstore.formats.checkpoint import Checkpoint
from tierstore.offline.build import build_store

transformers = pytest.importorskip("transformers", reason="the swap is tested on transformers' own model")
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 19):  # not hasattr: it loads the model, for seconds
    pytest.skip(f"transformers {transformers.__version__} has no qwen4_exp; 5.19 has", allow_module_level=True)

EOS, PAD, VOCAB_SIZE = 3, 0, 97
NAME = "layers.1.ple.ple_embedding"


def made_model(dtype: torch.dtype, weights_seed: int = 0, **changes: Any) -> Any:
    """A tiny random model with n-gram tables; the convolution of its PLE, zero when new, is random too."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16, "num_experts_per_tok": 2, "num_experts": 4, "hc_count": 2,
        "hc_lowrank": 8, "ple_layer_ids": [2], "ple_embed_dim": 64, "ngram_size": 3, "heads_per_ngram": 4,
        "ngram_vocab_size_base": 2000, "split_ngram_parts": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 16, "indexer_budget": 64, "indexer_compress_ratio": 4, "max_position_embeddings": 256,
        "eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(weights_seed)
    model = transformers.Qwen4ExpForCausalLM(transformers.Qwen4ExpTextConfig(**(values | changes)))
    with torch.no_grad():
        for layer in model.config.ple_layer_ids:
            ple = model.model.layers[layer - 1].ple
            ple.conv1d.weight.normal_(std=0.5)
            ple.ple_embedding.ngram_embedding.weight.normal_()
    return model.to(dtype).eval()


def built(model: Any, folder: Path) -> Path:
    """Saves the model as transformers does, and builds a store of it as `tierstore build` does."""
    model.save_pretrained(folder / "checkpoint")
    checkpoint = Checkpoint.open(folder / "checkpoint")
    found = read_model(checkpoint)
    assert found.family == "qwen4_exp"
    store = folder / "store"
    build_store(store, found.sources, origin=checkpoint.to_dict(), attachments=found.hash_spec.attachments(), jobs=1)
    return store


def prompts(batch: int, length: int, seed: int) -> torch.Tensor:
    """Random prompts in which an EOS stands, across which n-grams do not look back."""
    token_ids = torch.randint(4, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))
    token_ids[:, length // 2] = EOS
    return token_ids


def generated(model: Any, token_ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    out = model.generate(
        token_ids, attention_mask=options.pop("attention_mask", torch.ones_like(token_ids)), max_new_tokens=12,
        do_sample=False, eos_token_id=None, pad_token_id=PAD, output_logits=True, return_dict_in_generate=True,
        **options,
    )  # fmt: skip
    return out.sequences, out.logits


CASES = [
    (dtype, changes, seed, dram)
    for dtype in (torch.float32, torch.bfloat16)
    for changes in ({}, {"ple_layer_ids": [2, 3], "ngram_size": 4, "ple_embed_dim": 96})
    for seed, dram in ((1, "64MiB"), (2, "192KiB"))
]


@pytest.mark.parametrize(
    ("dtype", "changes", "seed", "dram"), slow_but([CASES[0], CASES[3], CASES[6]], CASES, several=True)
)
def test_swapped_model_gives_equal_logits_in_prefill_and_generate(
    tmp_path: Path, dtype: torch.dtype, changes: dict[str, Any], seed: int, dram: str
) -> None:
    model = made_model(dtype, seed, **changes)
    names = [f"model.layers.{layer - 1}.ple.ple_embedding.ngram_embedding" for layer in model.config.ple_layer_ids]
    token_ids = prompts(2, 15, seed)
    padded = torch.ones_like(token_ids)
    padded[0, :4] = 0
    with torch.no_grad():
        prefill = model(token_ids).logits
        masked = model(token_ids, attention_mask=padded).logits
    with_cache = generated(model, token_ids)
    without_cache = generated(model, token_ids, use_cache=False)
    with_padding = generated(model, token_ids, attention_mask=padded)
    with tierstore.open(built(model, tmp_path), dram=dram) as store:
        assert len(store.stats()["memory"]["resident_tables"]) == (len(names) if dram == "64MiB" else 0)
        assert swap_embedding(model, store) == names
        assert all(isinstance(model.get_submodule(name), RowIdEmbedding) for name in names)
        with torch.no_grad():
            assert torch.equal(model(token_ids).logits, prefill)
            assert torch.equal(model(token_ids, attention_mask=padded).logits, masked)
        for expected, options in (
            (with_cache, {}),
            (without_cache, {"use_cache": False}),
            (with_padding, {"attention_mask": padded}),
        ):
            sequences, logits = generated(model, token_ids, **options)
            assert torch.equal(sequences, expected[0])
            assert len(logits) == len(expected[1]) == 12
            assert all(torch.equal(step, other) for step, other in zip(logits, expected[1], strict=True))


def test_the_logits_hang_on_the_rows(tmp_path: Path) -> None:
    """Guards the test above: with a store of other rows under the same hash, the logits differ."""
    model, other = made_model(torch.float32, weights_seed=1), made_model(torch.float32, weights_seed=2)
    token_ids = prompts(2, 15, seed=1)
    with torch.no_grad(), tierstore.open(built(other, tmp_path), dram="64MiB") as store:
        before = model(token_ids).logits
        swap_embedding(model, store)
        assert (model(token_ids).logits - before).abs().max() > 1e-4


def test_a_model_loaded_by_transformers_swaps_too(tmp_path: Path) -> None:
    path = built(made_model(torch.bfloat16, weights_seed=3), tmp_path)
    model = transformers.Qwen4ExpForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.bfloat16).eval()
    token_ids = prompts(1, 9, seed=3)
    with torch.no_grad(), tierstore.open(path, dram="64MiB") as store:
        before = model(token_ids).logits
        swap_embedding(model, store)
        assert torch.equal(model(token_ids).logits, before)


def test_the_resident_table_is_freed(tmp_path: Path) -> None:
    model = made_model(torch.float32)
    resident = weakref.ref(model.get_submodule(f"model.{NAME}.ngram_embedding").weight)
    with tierstore.open(built(model, tmp_path), dram="64MiB") as store:
        swap_embedding(model, store)
        gc.collect()
        assert resident() is None
        assert not any("ngram_embedding" in name for name in model.state_dict())


def test_a_model_without_resident_tables_is_refused(tmp_path: Path) -> None:
    model = made_model(torch.float32)
    with tierstore.open(built(model, tmp_path), dram="64MiB") as store:
        swap_embedding(model, store)
        with pytest.raises(ConfigError, match="was not swapped before"):
            swap_embedding(model, store)
        with pytest.raises(ConfigError, match="Linear has no"):
            swap_embedding(torch.nn.Linear(2, 2), store)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seed": 1235}, FingerprintMismatchError, r"layers\.1"),
        ({"ngram_vocab_size_base": 2100}, FingerprintMismatchError, r"layers\.1"),
        ({"ple_layer_ids": [3]}, ConfigError, r"no table layers\.2"),
        ({"ple_embed_dim": 32}, ConfigError, "of 4 torch.float32"),
    ],
)
def test_a_store_of_another_model_is_refused_and_nothing_is_swapped(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    path = built(made_model(torch.float32), tmp_path)
    model = made_model(torch.float32, **changes)
    with tierstore.open(path, dram="64MiB") as store, pytest.raises(error, match=message):
        swap_embedding(model, store)
    assert not any(isinstance(module, RowIdEmbedding) for module in model.modules())


def test_a_model_in_another_dtype_is_refused(tmp_path: Path) -> None:
    path = built(made_model(torch.bfloat16), tmp_path)
    with (
        tierstore.open(path, dram="64MiB") as store,
        pytest.raises(ConfigError, match=r"torch\.float32.*torch\.bfloat16"),
    ):
        swap_embedding(made_model(torch.float32), store)


def test_a_model_whose_hash_is_not_its_configurations_is_refused(tmp_path: Path) -> None:
    model = made_model(torch.float32)
    with tierstore.open(built(model, tmp_path), dram="64MiB") as store:
        model.get_submodule(f"model.{NAME}").layer_multipliers[1] += 2
        with pytest.raises(FingerprintMismatchError, match="hashes with"):
            swap_embedding(model, store)


def test_either_all_tables_are_swapped_or_none(tmp_path: Path) -> None:
    path = built(made_model(torch.float32), tmp_path)
    model = made_model(torch.float32, ple_layer_ids=[2, 3])
    with tierstore.open(path, dram="64MiB") as store, pytest.raises(ConfigError, match=r"no table layers\.2"):
        swap_embedding(model, store)
    assert not any(isinstance(module, RowIdEmbedding) for module in model.modules())
