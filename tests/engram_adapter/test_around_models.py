"""What people put around a model goes around one with a store's rows too: device maps, adapters, DDP, FSDP2."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.repository import SUPPORT

import tierstore
from engram_adapter import RowIdEmbedding, build_checkpoint, load_pretrained, swap_embedding
from tests.engram_adapter.test_saved_tables import same_tensors
from tests.engram_adapter.test_swap_qwen4 import made_model, prompts, transformers

RANKS = 2
RANKS_S = 240


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("around")
    made_model(torch.bfloat16, 1).save_pretrained(folder / "checkpoint")
    build_checkpoint(folder / "checkpoint", folder / "store", jobs=1)
    return folder / "checkpoint"


@pytest.fixture
def store(checkpoint: Path) -> Iterator[tierstore.Store]:
    with tierstore.open(checkpoint.parent / "store", dram="192KiB") as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> torch.Tensor:
    """The resident model's logits of `prompts(2, 9, seed=1)`."""
    model = transformers.Qwen4ExpForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        logits: torch.Tensor = model(prompts(2, 9, seed=1)).logits
    return logits


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(prompts(2, 9, seed=1)).logits
    return logits


@pytest.mark.parametrize("way", ["auto", "one device", "disk"])
@pytest.mark.parametrize("how", ["loaded", "swapped"])
def test_a_model_with_a_device_map_gives_equal_logits(
    tmp_path: Path, checkpoint: Path, store: tierstore.Store, expected: torch.Tensor, how: str, way: str
) -> None:
    pytest.importorskip("accelerate", reason="requirements.txt installs it")
    maps: dict[str, Any] = {"auto": "auto", "one device": {"": "cpu"}}
    layers = {f"model.layers.{layer}": "cpu" if layer < 2 else "disk" for layer in range(4)}
    rest = ("model.embed_tokens", "model.rotary_emb", "model.hyper_connection_mixer", "lm_head")
    options: dict[str, Any] = {"device_map": maps.get(way, layers | dict.fromkeys(rest, "cpu"))}
    if way == "disk":
        options |= {"offload_folder": tmp_path / "offload"}
    if how == "loaded":
        model = load_pretrained(checkpoint, store, **options)
    else:
        model = transformers.Qwen4ExpForCausalLM.from_pretrained(checkpoint, **options)
        swap_embedding(model, store)
    assert sum(isinstance(module, RowIdEmbedding) for module in model.modules()) == 1
    if way == "disk":
        assert model.model.layers[3].mlp.gate.weight.is_meta
    before = store.stats()["keys"]
    assert torch.equal(logits_of(model), expected)
    assert store.stats()["keys"] > before


def test_an_adapter_of_peft_is_trained_merged_and_saved_beside_the_rows(
    tmp_path: Path, checkpoint: Path, store: tierstore.Store, expected: torch.Tensor
) -> None:
    peft = pytest.importorskip("peft", reason="requirements.txt installs it")
    model = load_pretrained(checkpoint, store)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["value_proj", "q_proj"], r=4, task_type="CAUSAL_LM")
    )
    assert torch.equal(logits_of(adapted), expected), "an adapter starts as nothing"
    optimizer = torch.optim.SGD([each for each in adapted.parameters() if each.requires_grad], lr=1.0)
    adapted.train()
    token_ids = prompts(2, 9, seed=2)
    for _ in range(2):
        loss = adapted(token_ids, labels=token_ids).loss
        loss.backward()
        optimizer.step()
    adapted.eval()
    tuned = logits_of(adapted)
    assert not torch.equal(tuned, expected)
    adapted.save_pretrained(tmp_path / "adapter")
    assert not any("ngram_embedding" in name for name in peft.load_peft_weights(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(load_pretrained(checkpoint, store), tmp_path / "adapter")
    assert torch.equal(logits_of(again), tuned)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    whole = transformers.Qwen4ExpForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(whole), logits_of(merged))
    assert not same_tensors(tmp_path / "merged", checkpoint)


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_ranks_train_a_model_as_one_process_would(tmp_path: Path, checkpoint: Path, way: str) -> None:
    command = [sys.executable, str(SUPPORT / "ranks_client.py"), way]
    paths = [str(checkpoint), str(checkpoint.parent / "store"), str(tmp_path / "meet")]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(RANKS), *paths], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(RANKS)
    ]
    try:
        said = [rank.communicate(timeout=RANKS_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * RANKS, "\n".join(said)
