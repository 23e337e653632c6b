"""Stand-ins for vLLM and SGLang, fresh for each test, and configurations of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import fake_sglang
from support.tiny_store import build_tiny, tiny_hash

FAKES = Path(__file__).resolve().parent / "fakes"
PLUGIN = "engram_adapter.engines.vllm.worker"


def _forget() -> None:
    for name in [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]:
        del sys.modules[name]
    sys.modules.pop(PLUGIN, None)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in, imported anew."""
    _forget()
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.delenv("TIERSTORE_STORE", raising=False)
    yield importlib.import_module("vllm")
    _forget()


def vllm_config(text: dict[str, Any], store: Path | None, **changes: Any) -> Any:
    """A `VllmConfig` of a model whose configuration is `text`; changes: by the field's name, nested as "a__b"."""
    modes = importlib.import_module("vllm.config").CUDAGraphMode
    made = SimpleNamespace(
        additional_config={} if store is None else {"tierstore": {"store": str(store), "dram": "4MiB"}},
        instance_id="abc12",
        use_v2_model_runner=True,
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace(**text, to_dict=lambda: dict(text)), model="tiny"),
        load_config=SimpleNamespace(load_format="auto", safetensors_load_strategy=None, model_loader_extra_config={}),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1, data_parallel_size=1, data_parallel_rank=0, world_size=1, rank=0, enable_dbo=False
        ),
        engram_config=SimpleNamespace(embedding_across_dp=False, dp_shared_memory=None, cpu_offload=True),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64),
        compilation_config=SimpleNamespace(cudagraph_mode=modes.NONE, max_cudagraph_capture_size=0),
    )
    for name, value in changes.items():
        *path, field = name.split("__")
        target: Any = made
        for each in path:
            target = getattr(target, each)
        setattr(target, field, value)
    return made


def row_ids(spec: Any, layer: int, tokens: int, seed: int) -> Any:
    """Row ids of a random text of a vocabulary of 61, int64 [tokens, heads]."""
    import torch  # here: a run of other files needs none

    ids = np.random.default_rng(seed).integers(4, 61, (1, tokens))
    return torch.from_numpy(spec.row_ids(ids, layer)[0])


def of_ids(rows: np.ndarray, ids: Any) -> np.ndarray:
    """Rows by their ids, one by one; zeros outside of the table."""
    out = np.zeros((*ids.shape, rows.shape[1]), dtype=np.uint8)
    for place, row_id in np.ndenumerate(ids.numpy()):
        if 0 <= row_id < len(rows):
            out[place] = rows[row_id]
    return out


def with_rows(layer: Any) -> None:
    """Gives a layer a weight that has rows, as the engine's own would."""
    import torch

    layer.weight = torch.nn.Parameter(torch.zeros(5, layer.weight.shape[1]))


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A fake SGLang; the modules of ours that import it are of this test alone."""
    yield from fake_sglang.fresh(monkeypatch)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of V4.1's kind, which the environment names."""
    path, _ = build_tiny(tmp_path, tiny_hash(), "fp8_e4m3_e8m0x32", seed=7)
    monkeypatch.setenv("TIERSTORE_STORE", str(path))
    monkeypatch.setenv("TIERSTORE_DRAM", "16MiB")
