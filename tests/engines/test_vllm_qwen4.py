"""Qwen4-Exp's layer in vLLM: no row of the table loads, and a step's rows are the checkpoint's bytes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_store import DIM, build_tiny

from engram_adapter.engines.gate import EngineMismatchError
from engram_adapter.hash_spec import HashSpec
from tests.engines.conftest import of_ids, row_ids, vllm_config, with_rows
from tests.engines.test_vllm_start import start

QWEN = {
    "model_type": "qwen4_exp_text", "vocab_size": 61, "eos_token_id": 3, "hidden_size": 64, "ple_layer_ids": [2],
    "ple_embed_dim": 4 * DIM, "ngram_size": 3, "heads_per_ngram": 2, "ngram_vocab_size_base": 300,
    "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 4,
}  # fmt: skip
PREFIX = "model.layers.1.ple.ple_embedding.ngram_embedding"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HashSpec, np.ndarray]:
    spec = HashSpec.from_config(QWEN)
    path, rows = build_tiny(tmp_path_factory.mktemp("qwen"), spec, "bf16", seed=3)
    return path, spec, rows["layers.1"]


def embedding(config: Any, num_rows: int, **changes: Any) -> Any:
    """What the engine has after it built its embedding."""
    start(config)
    import_module("vllm.config").current[0] = config
    common = import_module("vllm.models.qwen4_exp.common.ngram_embedding")
    arguments: dict[str, Any] = {
        "params_dtype": torch.bfloat16, "padding_size": 8, "prefix": PREFIX, "embedding_method": None,
        "num_ngram_heads": 4, "max_total_tokens": 64,
    }  # fmt: skip
    return common.Qwen4ExpPLEPinnedHostEmbedding(num_rows, DIM, **arguments | changes)


def as_checkpoint(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rows.copy()).view(torch.bfloat16)


@pytest.mark.usefixtures("vllm")
def test_the_weight_has_no_rows_and_loading_copies_none(qwen: tuple[Path, HashSpec, np.ndarray]) -> None:
    path, _, rows = qwen
    layer = embedding(vllm_config(QWEN, path), len(rows))
    assert layer.weight.shape == (0, DIM)
    part = len(rows) // 4
    for start_row in range(0, len(rows), part):
        layer.weight_loader(layer.weight, as_checkpoint(rows[start_row : start_row + part]), checkpoint_start=start_row)
    layer.weight_loader(layer.weight, as_checkpoint(rows))  # a checkpoint in one piece
    assert layer.weight.shape == (0, DIM)


@pytest.mark.usefixtures("vllm")
def test_loading_refuses_rows_that_are_not_the_stores(qwen: tuple[Path, HashSpec, np.ndarray]) -> None:
    path, _, rows = qwen
    layer = embedding(vllm_config(QWEN, path), len(rows))
    part = len(rows) // 4
    with pytest.raises(EngineMismatchError, match=rf"{PREFIX}: row \d+ of table layers\.1 in the store is not row"):
        layer.weight_loader(layer.weight, as_checkpoint(rows[:part]), checkpoint_start=part)
    with pytest.raises(EngineMismatchError, match=r"rows are torch\.float32, the engine's torch\.bfloat16"):
        layer.weight_loader(layer.weight, torch.zeros(part, DIM), checkpoint_start=0)


@pytest.mark.usefixtures("vllm")
def test_scales_load_as_the_engine_loads_them(qwen: tuple[Path, HashSpec, np.ndarray]) -> None:
    path, _, rows = qwen
    layer = embedding(vllm_config(QWEN, path), len(rows))
    scale = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    layer.weight_loader(scale, torch.tensor([0.5]))
    assert scale.item() == 0.5


@pytest.mark.parametrize("staged", [True, False])
@pytest.mark.usefixtures("vllm")
def test_a_steps_rows_are_the_checkpoints_bytes_at_one_address(
    qwen: tuple[Path, HashSpec, np.ndarray], staged: bool
) -> None:
    path, spec, rows = qwen
    layer = embedding(vllm_config(QWEN, path), len(rows))
    addresses = set()
    for seed, tokens in enumerate((1, 64, 5)):
        ids = row_ids(spec, 1, tokens, seed)
        ids[0, 0] = len(rows) + 99  # what a padded token may carry
        layer.rows.rows.fill_(7)
        if staged:
            layer.rows.stage(ids)
            layer.start_prefetch(torch.zeros_like(ids))  # the engine's own call then changes nothing
        else:
            layer.start_prefetch(ids)
        found = layer.finalize_prefetch(tokens)
        assert found.dtype == torch.bfloat16
        assert found.shape == (tokens, 4 * DIM)
        assert np.array_equal(found.view(torch.uint8).numpy().reshape(tokens, 4, -1), of_ids(rows, ids))
        addresses.add(found.data_ptr())
    assert len(addresses) == 1
    assert layer.rows.stats()["tokens"] == 70


@pytest.mark.usefixtures("vllm")
def test_ranks_whose_rows_are_added_up_give_zeros_for_the_others(qwen: tuple[Path, HashSpec, np.ndarray]) -> None:
    path, spec, rows = qwen
    layer = embedding(vllm_config(QWEN, path), len(rows), reduce_results=False)
    ids = row_ids(spec, 1, 20, 5)
    layer.start_prefetch(ids)
    found = layer.finalize_prefetch(20).view(torch.uint8).numpy().reshape(20, 4, -1)
    assert np.array_equal(found, of_ids(rows[: len(rows) // 2], ids))
    assert not found.any(axis=2).all()
    assert found.any()


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ({}, {"num_ngram_heads": 6}, "6 rows a token, table layers.1 has 4"),
        ({}, {"params_dtype": torch.float16}, "holds bf16, the engine expects fp16"),
        ({}, {"params_dtype": torch.uint8}, "packed rows are not served"),
        ({}, {"prefix": "model.ple"}, "without its number"),
        ({"seed": 99}, {}, "hash fingerprint"),
        (
            {},
            {"prefix": PREFIX.replace("1", "7")},
            "a table of layer 7, the configuration's ple_layer_ids give layers 1",
        ),
        ({"ple_layer_ids": [3]}, {"prefix": PREFIX.replace("1", "2")}, "has no table layers.2; it has layers.1"),
    ],
)
@pytest.mark.usefixtures("vllm")
def test_a_table_that_is_not_the_engines_is_refused(
    qwen: tuple[Path, HashSpec, np.ndarray], text: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    path, _, rows = qwen
    with pytest.raises(EngineMismatchError) as error:
        embedding(vllm_config(QWEN | text, path), len(rows), **changes)
    assert message in str(error.value)


@pytest.mark.usefixtures("vllm")
def test_another_number_of_rows_is_refused(qwen: tuple[Path, HashSpec, np.ndarray]) -> None:
    path, _, rows = qwen
    with pytest.raises(EngineMismatchError, match=f"{len(rows)}, the engine expects {len(rows) + 8}"):
        embedding(vllm_config(QWEN, path), len(rows) + 8)


def loaded_model(layer: Any, spec: HashSpec) -> Any:
    """A model that holds the layer, as the engine's state gets it, after a checkpoint was loaded."""
    layer._rows_compared = max(layer._rows_compared, 1)
    hashing = import_module("vllm.models.qwen4_exp.nvidia.ngram_embedding").Qwen4ExpNGramEmbedding()
    hashing.ngram_embedding = layer
    hashing.layer_multipliers = torch.tensor(spec.multipliers(1))
    hashing.ngram_heads_vocab_sizes = torch.tensor(spec.moduli(1))
    hashing.ngram_heads_offsets = torch.tensor(spec.offsets(1))
    return torch.nn.ModuleList([hashing])


def state_of(config: Any, model: Any) -> Any:
    state_class = import_module("vllm.models.qwen4_exp.nvidia.model_state").Qwen4ExpModelState
    return state_class(config, model, None, torch.device("cpu"))


@pytest.mark.usefixtures("vllm")
def test_a_loaded_layer_says_that_it_is_served_and_steps_are_staged_before_the_forward(
    qwen: tuple[Path, HashSpec, np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    path, spec, rows = qwen
    config = vllm_config(QWEN, path)
    layer = embedding(config, len(rows))
    layer.weight_loader(layer.weight, as_checkpoint(rows))
    model = loaded_model(layer, spec)
    with caplog.at_level(logging.INFO, "vllm.tierstore"):
        state = state_of(config, model)
    line = next(each for each in caplog.messages if PREFIX in each)
    assert "table layers.1" in line
    assert f"{len(rows)} rows of {2 * DIM} bytes, mode host" in line
    ids = model[0].ids_of_test = row_ids(spec, 1, 9, 6)
    batch = SimpleNamespace(num_tokens=7, input_ids=torch.arange(9), query_start_loc=torch.tensor([0, 7]))
    state.prepare_inputs(batch, None)
    assert layer.rows.is_started
    layer.start_prefetch(ids)
    found = layer.finalize_prefetch(9).view(torch.uint8).numpy().reshape(9, 4, -1)
    assert np.array_equal(found[:7], of_ids(rows, ids[:7]))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda hashing: setattr(hashing, "ngram_embedding", torch.nn.Embedding(3, 2)), "has a Embedding, not the"),
        (
            lambda hashing: with_rows(hashing.ngram_embedding),
            "weight has 5 rows, expected none",
        ),
        (lambda hashing: setattr(hashing.ngram_embedding, "_rows_compared", 0), "has no row of table layers.1 to"),
        (lambda hashing: hashing.layer_multipliers.add_(2), "engine's layer_multipliers are"),
        (lambda hashing: hashing.ngram_heads_offsets.add_(1), "engine's ngram_heads_offsets are"),
        (lambda hashing: hashing.ngram_heads_vocab_sizes.add_(1), "engine's ngram_heads_vocab_sizes are"),
    ],
)
@pytest.mark.usefixtures("vllm")
def test_a_loaded_model_that_does_not_use_the_layer_as_it_must_is_refused(
    qwen: tuple[Path, HashSpec, np.ndarray], broken: Any, message: str
) -> None:
    path, spec, rows = qwen
    config = vllm_config(QWEN, path)
    model = loaded_model(embedding(config, len(rows)), spec)
    broken(model[0])
    with pytest.raises(EngineMismatchError) as error:
        state_of(config, model)
    assert message in str(error.value)


@pytest.mark.usefixtures("vllm")
def test_a_model_without_a_checkpoint_has_nothing_to_compare(qwen: tuple[Path, HashSpec, np.ndarray]) -> None:
    path, spec, rows = qwen
    config = vllm_config(QWEN, path, load_config__load_format="dummy")
    model = loaded_model(embedding(config, len(rows)), spec)
    model[0].ngram_embedding._rows_compared = 0
    model[0].ngram_embedding.weight_scale = torch.nn.Parameter(torch.tensor(0.25), requires_grad=False)
    state_of(config, model)


@pytest.mark.usefixtures("vllm")
def test_a_store_of_another_scale_is_refused(qwen: tuple[Path, HashSpec, np.ndarray]) -> None:
    path, spec, rows = qwen
    config = vllm_config(QWEN, path)
    layer = embedding(config, len(rows))
    layer.weight_scale = torch.nn.Parameter(torch.tensor(0.25), requires_grad=False)
    table = layer.rows.table
    layer.rows.table = SimpleNamespace(spec=SimpleNamespace(codec="fp8_e4m3*0x1.0p-3", **_parts(table.spec)))
    with pytest.raises(EngineMismatchError, match=r"weight_scale is 0\.25, the store's fp8_e4m3\*0x1\.0p-3"):
        state_of(config, loaded_model(layer, spec))


def _parts(spec: Any) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in ("name", "num_rows", "row_bytes", "moduli", "offsets")}


@pytest.mark.usefixtures("vllm")
def test_the_store_is_quiet_while_graphs_are_captured(
    qwen: tuple[Path, HashSpec, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, spec, rows = qwen
    config = vllm_config(QWEN, path)
    layer = embedding(config, len(rows))
    runner_class = import_module("vllm.v1.worker.gpu.model_runner").GPUModelRunner
    runner = runner_class(state_of(config, loaded_model(layer, spec)))
    quiet = []

    @contextlib.contextmanager
    def noted() -> Iterator[None]:
        quiet.append(layer.rows.store)
        yield
        quiet.clear()

    monkeypatch.setattr(layer.rows.store, "quiet", noted)
    runner.during_capture = lambda: list(quiet)
    assert runner.capture_model(profile_only=True) == 5
    assert runner.captured == [layer.rows.store]
    assert quiet == []
    runner.model_state = SimpleNamespace()  # of a model without such layers
    assert runner.capture_model() == 7
    assert runner.captured == []
