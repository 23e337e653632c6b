"""Qwen4-Exp's rows in NVFP4 in vLLM: compared as they are stored, and decoded as the engine wants them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4 import unpack_fp4_from_uint8
from support.tiny_store import DIM, NVFP4, build_tiny, decoded

from engram_adapter.engines.gate import EngineMismatchError
from engram_adapter.hash_spec import HashSpec
from tests.engines.conftest import row_ids, vllm_config
from tests.engines.test_vllm_qwen4 import QWEN, embedding, loaded_model, state_of

FACTOR = float.fromhex(NVFP4.partition("*")[2])
PACKED = {"embedding_method": "nvfp4"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HashSpec, np.ndarray]:
    spec = HashSpec.from_config(QWEN)
    path, rows = build_tiny(tmp_path_factory.mktemp("nvfp4"), spec, NVFP4, seed=5)
    return path, spec, rows["layers.1"]


def load(layer: Any, rows: np.ndarray) -> None:
    """Loads four parts, as the engine does: values, scales, and the factor of all."""
    part = len(rows) // 4
    for start in range(0, len(rows), part):
        of_part = torch.from_numpy(rows[start : start + part].copy())
        layer.weight_loader(layer.weight, of_part[:, : DIM // 2].contiguous(), checkpoint_start=start)
        scales = of_part[:, DIM // 2 :].contiguous().view(torch.float8_e4m3fn)
        layer.weight_loader(layer.weight_scale, scales, checkpoint_start=start)
    layer.weight_scale_2.data.fill_(FACTOR)


@pytest.mark.parametrize("staged", [True, False])
@pytest.mark.usefixtures("vllm")
def test_rows_come_decoded_at_one_address(packed: tuple[Path, HashSpec, np.ndarray], staged: bool) -> None:
    path, spec, rows = packed
    config = vllm_config(QWEN, path)
    layer = embedding(config, len(rows), **PACKED)
    load(layer, rows)
    assert (layer.weight.shape, layer.weight_scale.shape) == ((0, DIM // 2), (0, DIM // 16))
    state_of(config, loaded_model(layer, spec))
    values = unpack_fp4_from_uint8(torch.from_numpy(rows[:, : DIM // 2].copy()), len(rows), DIM, dtype=torch.float32)
    scales = torch.from_numpy(rows[:, DIM // 2 :].copy()).view(torch.float8_e4m3fn).float() * FACTOR
    expected = (values * scales.repeat_interleave(16, dim=1)).bfloat16()
    assert torch.equal(expected, decoded(rows, NVFP4))
    addresses = set()
    for seed, tokens in enumerate((1, 64, 5)):
        ids = row_ids(spec, 1, tokens, seed)
        ids[0, 0] = len(rows) + 99  # what a padded token may carry
        layer.rows.stage(ids) if staged else layer.start_prefetch(ids)
        found = layer.finalize_prefetch(tokens)
        wanted = expected[ids.clamp(max=len(rows) - 1)]
        wanted[0, 0] = 0
        assert torch.equal(found, wanted.flatten(1))
        addresses.add(found.data_ptr())
    assert len(addresses) == 1


@pytest.mark.usefixtures("vllm")
def test_values_and_scales_are_each_compared_with_the_stores(packed: tuple[Path, HashSpec, np.ndarray]) -> None:
    path, _, rows = packed
    for columns in (slice(0, DIM // 2), slice(DIM // 2, None)):
        other = rows.copy()
        other[:, columns] ^= 1
        with pytest.raises(EngineMismatchError, match="the weights are others"):
            load(embedding(vllm_config(QWEN, path), len(rows), **PACKED), other)


@pytest.mark.usefixtures("vllm")
def test_another_factor_is_refused(packed: tuple[Path, HashSpec, np.ndarray]) -> None:
    path, spec, rows = packed
    config = vllm_config(QWEN, path)
    layer = embedding(config, len(rows), **PACKED)
    load(layer, rows)
    layer.weight_scale_2.data.fill_(FACTOR * 2)
    with pytest.raises(EngineMismatchError, match=r"weight_scale_2 is 0\.0234375, the store's fp4_e2m1_e4m3x16\*"):
        state_of(config, loaded_model(layer, spec))


@pytest.mark.usefixtures("vllm")
def test_a_model_in_another_dtype_is_refused(packed: tuple[Path, HashSpec, np.ndarray]) -> None:
    path, _, rows = packed
    with pytest.raises(EngineMismatchError, match=r"NVFP4 for a model in torch\.float16: .*--dtype bfloat16"):
        embedding(vllm_config(QWEN, path), len(rows), params_dtype=torch.float16, **PACKED)


@pytest.mark.usefixtures("vllm")
def test_a_store_of_other_rows_is_refused(tmp_path: Path) -> None:
    spec = HashSpec.from_config(QWEN)
    path, rows = build_tiny(tmp_path, spec, "bf16", seed=3)
    with pytest.raises(EngineMismatchError, match=r"bytes a row of table layers\.1 .*: 128, the engine expects 36"):
        embedding(vllm_config(QWEN, path), len(rows["layers.1"]), **PACKED)
