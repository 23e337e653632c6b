"""Mode "device": the layers launch their lookups in the forward; on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.device import DEVICE
from support.tiny_store import DIM, NVFP4, VOCAB_SIZE, build_tiny, decoded

from engram_adapter.engines.device_rows import DeviceEngineRows
from engram_adapter.engines.gate import EngineMismatchError
from engram_adapter.engines.settings import EngineSettings
from engram_adapter.hash_spec import HashSpec
from tests.engines.conftest import of_ids, row_ids, vllm_config
from tests.engines.test_vllm_engram import ENGRAM, engram_layers
from tests.engines.test_vllm_longcat import embedding as longcat_embedding
from tests.engines.test_vllm_qwen4 import QWEN, embedding, loaded_model, state_of
from tierstore.errors import ConfigError

pytestmark = pytest.mark.gpu
# 8 heads an order, as published: their moduli multiply to more than 2^63, so that row ids give keys.
QWEN8 = QWEN | {"heads_per_ngram": 8, "ple_embed_dim": 16 * DIM}
ENGRAM8 = ENGRAM | {"engram_n_heads": 8}
LONGCAT = {"model_type": "longcat_flash_ngram", "emb_neighbor_num": 4, "emb_split_num": 4, "eos_token_id": 2}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HashSpec, np.ndarray]:
    spec = HashSpec.from_config(QWEN8)
    path, rows = build_tiny(tmp_path_factory.mktemp("qwen"), spec, "bf16", seed=3)
    return path, spec, rows["layers.1"]


@pytest.fixture(scope="module")
def engram(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HashSpec, dict[str, np.ndarray]]:
    spec = HashSpec.from_config(ENGRAM8, np.arange(VOCAB_SIZE, dtype=np.int32) % 40)
    path, rows = build_tiny(tmp_path_factory.mktemp("engram"), spec, "fp8_e4m3_e8m0x32", seed=4)
    return path, spec, rows


def device_config(text: dict[str, Any], path: Path) -> Any:
    config = vllm_config(text, path)
    config.additional_config["tierstore"] |= {"mode": "device", "hbm": "1MiB"}
    return config


@pytest.fixture(autouse=True)
def on_device() -> Any:
    with torch.device(DEVICE):
        yield


@pytest.mark.usefixtures("vllm")
def test_a_steps_rows_are_launched_in_the_forward(qwen: tuple[Path, HashSpec, np.ndarray]) -> None:
    path, spec, rows = qwen
    layer = embedding(device_config(QWEN8, path), len(rows), num_ngram_heads=16)
    assert isinstance(layer.rows, DeviceEngineRows)
    for tokens in (5, 1):
        ids = row_ids(spec, 1, tokens, tokens)
        ids[0, 0] = len(rows) + 99  # what a padded token may carry
        layer.start_prefetch(ids.to(DEVICE))
        found = layer.finalize_prefetch(tokens)
        layer.rows.check()
        assert found.dtype == torch.bfloat16
        assert np.array_equal(found.cpu().view(torch.uint8).numpy().reshape(tokens, 16, -1), of_ids(rows, ids))
    assert layer.rows.stats()["tokens"] == 6


@pytest.mark.usefixtures("vllm")
def test_nothing_is_staged_and_what_went_wrong_comes_out_before_the_next_step(
    qwen: tuple[Path, HashSpec, np.ndarray],
) -> None:
    path, spec, rows = qwen
    config = device_config(QWEN8, path)
    layer = embedding(config, len(rows), num_ngram_heads=16)
    state = state_of(config, loaded_model(layer, spec))
    batch = SimpleNamespace(num_tokens=7, input_ids=torch.arange(9), query_start_loc=torch.tensor([0, 7]))
    state.prepare_inputs(batch, None)
    assert not layer.rows.is_started
    layer.rows.check = lambda: (_ for _ in ()).throw(TimeoutError("the host did not answer"))
    with pytest.raises(TimeoutError, match="the host did not answer"):
        state.prepare_inputs(batch, None)


@pytest.mark.usefixtures("vllm")
def test_engram_rows_are_launched_in_the_forward(engram: tuple[Path, HashSpec, dict[str, np.ndarray]]) -> None:
    path, spec, rows = engram
    table = engram_layers(device_config(ENGRAM8, path), spec)[0].embed_tokens
    ids = row_ids(spec, 1, 6, 3)
    out = torch.full((6, 16, DIM + DIM // 32), 9, dtype=torch.uint8)
    table.lookup(ids.to(DEVICE, torch.int32), out)
    table.rows.check()
    assert np.array_equal(out.cpu().numpy(), of_ids(rows["layers.1"], ids))


def test_device_mode_without_gpu_memory_or_on_another_device_is_refused(
    qwen: tuple[Path, HashSpec, np.ndarray],
) -> None:
    with pytest.raises(ConfigError, match="without hbm"):
        EngineSettings(str(qwen[0]), mode="device")
    store = EngineSettings(str(qwen[0]), "4MiB", "1MiB", "device").open_tables(DEVICE)
    with pytest.raises(EngineMismatchError, match="hbm tier is on"):
        DeviceEngineRows(store, "layers.1", 8, torch.device("cuda:7"))


@pytest.mark.usefixtures("vllm")
def test_nvfp4_rows_are_decoded_where_they_are_launched(tmp_path: Path) -> None:
    spec = HashSpec.from_config(QWEN8)
    path, tables = build_tiny(tmp_path, spec, NVFP4, seed=6)
    rows = tables["layers.1"]
    layer = embedding(device_config(QWEN8, path), len(rows), num_ngram_heads=16, embedding_method="nvfp4")
    ids = row_ids(spec, 1, 6, 2)
    layer.start_prefetch(ids.to(DEVICE))
    found = layer.finalize_prefetch(6)
    layer.rows.check()
    assert torch.equal(found.cpu(), decoded(rows, NVFP4)[ids].flatten(1))


@pytest.mark.usefixtures("vllm")
def test_longcats_rows_are_launched_before_the_forward(tmp_path: Path) -> None:
    """Its heads share no key: each row id alone gives the key of its entry."""
    config = LONGCAT | {"ngram_vocab_size_ratio": 8, "vocab_size": 61, "hidden_size": 12 * DIM}
    spec = HashSpec.from_config(config)
    path, tables = build_tiny(tmp_path, spec, "bf16", seed=6)
    hashing = longcat_embedding(device_config(config, path), config)
    assert isinstance(hashing.oe_embedder.rows, DeviceEngineRows)
    ids = row_ids(spec, 0, 6, 2)
    found = hashing.embed_batched(torch.zeros(6, dtype=torch.int64), ids.to(DEVICE))
    hashing.oe_embedder.rows.check()
    wanted = torch.from_numpy(tables["layers.0"]).view(torch.bfloat16)[ids]
    assert torch.equal(found.cpu(), wanted.transpose(0, 1))
