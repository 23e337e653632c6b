"""DeepSeek-V4.1's layers in vLLM: no row of a table loads, and a step's rows are the checkpoint's bytes."""

from __future__ import annotations

import logging
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_store import DIM, build_tiny, decoded, tiny_hash

from engram_adapter.engines.gate import EngineMismatchError
from engram_adapter.hash_spec import HashSpec
from tests.engines.conftest import of_ids, row_ids, vllm_config, with_rows
from tests.engines.test_vllm_start import start

ENGRAM = {
    "model_type": "deepseek_v41", "engram_layer_ids": [1, 4], "engram_vocab_size": 300, "engram_max_ngram_size": 3,
    "engram_n_heads": 4, "engram_head_dim": DIM, "engram_compressed_vocab_size": 40, "engram_pad_token_id": 2,
    "vocab_size": 61,
}  # fmt: skip


@pytest.fixture(scope="module")
def engram(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HashSpec, dict[str, np.ndarray]]:
    spec = tiny_hash()
    path, rows = build_tiny(tmp_path_factory.mktemp("engram"), spec, "fp8_e4m3_e8m0x32", seed=4)
    return path, spec, rows


def engram_layers(config: Any, spec: HashSpec) -> Any:
    """The Engram layers and the hash of a model whose checkpoint is loaded, as the engine builds them."""
    start(config)
    import_module("vllm.config").current[0] = config
    common = import_module("vllm.models.deepseek_v41.common.engram")
    heads = spec.heads
    layout = SimpleNamespace(
        layer_ids=spec.layers, num_embeddings=[spec.num_rows(layer) for layer in spec.layers], head_dim=DIM,
        primes=[[spec.moduli(n)[i : i + heads] for i in (0, heads)] for n in spec.layers], offsets=None,
    )  # fmt: skip
    layers = [common.Engram(None, None, layout, index, False, f"layers.{n}") for index, n in enumerate(spec.layers)]
    for layer in layers:
        layer.embed_tokens._rows_compared = 1
    hashing = common.NgramHashState()
    hashing.is_bound = True
    hashing.multipliers = torch.tensor([spec.multipliers(layer) for layer in spec.layers])
    hashing.offsets = torch.tensor([spec.offsets(layer) for layer in spec.layers])
    hashing.pad_id = spec.pad_id
    hashing.token_map = torch.from_numpy(spec.token_map.copy())
    return torch.nn.ModuleList([*layers, hashing])


def engram_state(config: Any, model: Any) -> Any:
    state_class = import_module("vllm.models.deepseek_v41.nvidia.model_state").DeepseekV41ModelState
    return state_class(config, model, None, torch.device("cpu"))


@pytest.mark.usefixtures("vllm")
def test_engram_rows_come_as_stored_and_as_the_engine_decodes_them(
    engram: tuple[Path, HashSpec, dict[str, np.ndarray]],
) -> None:
    path, spec, rows = engram
    model = engram_layers(vllm_config(ENGRAM, path), spec)
    for layer, number in zip(model, spec.layers, strict=False):
        table, ids = layer.embed_tokens, row_ids(spec, number, 30, number)
        assert table.weight.shape == (0, DIM)
        assert table.weight_scale_inv.shape == (0, DIM // 32)
        of_table = rows[f"layers.{number}"]
        ids[3], ids[4, 1] = -1, len(of_table) + 5
        packed = torch.full((30, 8, DIM + DIM // 32), 9, dtype=torch.uint8)
        table.lookup(ids.to(torch.int32), packed)
        assert np.array_equal(packed.numpy(), of_ids(of_table, ids))
        values = torch.full((30, 8, DIM), 9, dtype=torch.bfloat16)
        table.lookup(ids, values, background=True)
        inside = ((ids >= 0) & (ids < len(of_table))).unsqueeze(-1)
        expected = decoded(of_table, "fp8_e4m3_e8m0x32")[ids.clamp(0, len(of_table) - 1)]
        assert torch.equal(values, torch.where(inside, expected, torch.zeros(())))
        assert torch.equal(table(ids), values)
        table.collapse_huge_pages()


@pytest.mark.usefixtures("vllm")
def test_a_tensor_parallel_rank_has_its_heads_and_zeros_for_heads_that_fill_up(
    engram: tuple[Path, HashSpec, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, spec, rows = engram
    monkeypatch.setitem(import_module("vllm.distributed").ranks, "size", 3)
    monkeypatch.setitem(import_module("vllm.distributed").ranks, "rank", 2)
    table = engram_layers(vllm_config(ENGRAM, path), spec)[0].embed_tokens
    assert (table.part_n_hash_cols, table.head_start) == (3, 6)  # 8 heads over 3 ranks: 3, 3, 2
    ids = row_ids(spec, 1, 10, 8)
    out = torch.full((10, 3, DIM + DIM // 32), 9, dtype=torch.uint8)
    table.lookup(ids, out)
    assert np.array_equal(out[:, :2].numpy(), of_ids(rows["layers.1"], ids[:, 6:]))
    assert not out[:, 2].any()


@pytest.mark.usefixtures("vllm")
def test_engram_loading_compares_values_and_scales_and_copies_neither(
    engram: tuple[Path, HashSpec, dict[str, np.ndarray]],
) -> None:
    path, spec, rows = engram
    table = engram_layers(vllm_config(ENGRAM, path), spec)[0].embed_tokens
    values, scales = (torch.from_numpy(each.copy()) for each in np.split(rows["layers.1"], [DIM], axis=1))
    table.weight.weight_loader(table.weight, values.view(torch.float8_e4m3fn))
    table.weight_scale_inv.weight_loader(table.weight_scale_inv, scales)
    assert not len(table.weight)
    with pytest.raises(EngineMismatchError, match="compared rows differ"):
        table.weight.weight_loader(table.weight, values.roll(1, 0).view(torch.float8_e4m3fn))
    with pytest.raises(EngineMismatchError, match="compared rows differ"):
        table.weight_scale_inv.weight_loader(table.weight_scale_inv, scales + 1)
    with pytest.raises(EngineMismatchError, match="the checkpoint has"):
        table.weight.weight_loader(table.weight, values[:7].view(torch.float8_e4m3fn))


@pytest.mark.usefixtures("vllm")
def test_engram_steps_are_staged_before_the_forward(
    engram: tuple[Path, HashSpec, dict[str, np.ndarray]], caplog: pytest.LogCaptureFixture
) -> None:
    path, spec, rows = engram
    config = vllm_config(ENGRAM, path)
    model = engram_layers(config, spec)
    model[0].engram_dp_shared_memory = False  # the engine's model has it; data-parallel ranks then gather row ids
    with caplog.at_level(logging.INFO, "vllm.tierstore"):
        state = engram_state(config, model)
    assert [each for each in caplog.messages if "tierstore serves layers.1.engram" in each]
    assert [each for each in caplog.messages if "tierstore serves layers.4.engram" in each]
    assert model[0].engram_dp_shared_memory
    ids = torch.stack([row_ids(spec, layer, 12, 9) for layer in spec.layers], dim=1)
    model[2].ids_of_test = ids
    batch = SimpleNamespace(
        num_tokens=11, input_ids=torch.arange(12), positions=torch.arange(12), query_start_loc=torch.tensor([0, 11]),
        lookback=torch.zeros(1, 2),
    )  # fmt: skip
    model[2].is_bound = False  # the profile run: the model looks nothing up
    state.prepare_inputs(batch, None)
    assert not model[0].embed_tokens.rows.is_started
    model[2].is_bound = True
    state.prepare_inputs(batch, None)
    for index, layer in enumerate(spec.layers):
        table = model[index].embed_tokens
        assert table.rows.is_started
        out = torch.zeros(11, 8, DIM + DIM // 32, dtype=torch.uint8)
        table.lookup(torch.zeros_like(ids[:11, index]), out)  # what was staged counts
        assert np.array_equal(out.numpy(), of_ids(rows[f"layers.{layer}"], ids[:11, index]))
        assert not table.rows.is_staged


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda model: model[2].multipliers.add_(2), "multipliers of the engine's hash are"),
        (lambda model: model[2].offsets.add_(1), "offsets of the engine's hash are"),
        (lambda model: setattr(model[2], "pad_id", 9), "pad id of the engine's hash are 9"),
        (lambda model: setattr(model[2], "token_map", model[2].token_map.flip(0)), "token map of the engine's hash"),
        (
            lambda model: with_rows(model[0].embed_tokens),
            "TieredEngramEmbedding of 5 rows",
        ),
        (lambda model: setattr(model[0], "embed_tokens", torch.nn.Embedding(3, 2)), "a Embedding of 3 rows"),
        (lambda model: setattr(model[0].embed_tokens, "_rows_compared", 0), "has no row of table layers.1 to compare"),
    ],
)
@pytest.mark.usefixtures("vllm")
def test_a_loaded_engram_that_is_not_as_it_must_be_is_refused(
    engram: tuple[Path, HashSpec, dict[str, np.ndarray]], broken: Any, message: str
) -> None:
    path, spec, _ = engram
    config = vllm_config(ENGRAM, path)
    model = engram_layers(config, spec)
    broken(model)
    with pytest.raises(EngineMismatchError) as error:
        engram_state(config, model)
    assert message in str(error.value)


@pytest.mark.usefixtures("vllm")
def test_heads_of_other_sizes_are_refused(engram: tuple[Path, HashSpec, dict[str, np.ndarray]]) -> None:
    path, spec, _ = engram
    config = vllm_config(ENGRAM | {"engram_vocab_size": 400}, path)
    with pytest.raises(EngineMismatchError, match="the engine expects"):
        engram_layers(config, spec)
