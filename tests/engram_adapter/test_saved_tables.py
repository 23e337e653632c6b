"""A swapped model that is saved has its tables: whoever loads the folder gets the trained rows, never random ones."""

from __future__ import annotations

import copy
import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tierstore
from engram_adapter.engines.transformers import saved_tables
from engram_adapter.engines.transformers.swap import swap_embedding
from tests.engram_adapter.test_swap_qwen4 import built, made_model, prompts, transformers
from tierstore.errors import BudgetError, ConfigError, CorruptPageError


def loaded(folder: Path) -> Any:
    return transformers.Qwen4ExpForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_tensors(folder: Path, other: Path) -> bool:
    these, those = tensors_of(folder), tensors_of(other)
    return these.keys() == those.keys() and all(torch.equal(tensor, those[name]) for name, tensor in these.items())


@pytest.mark.parametrize(("dram", "shard"), [("64MiB", "50GB"), ("192KiB", "20KB")])
def test_a_swapped_model_is_saved_with_the_trained_tables(
    tmp_path: Path, dram: str, shard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_tables, "PIECE_BYTES", 10_000)  # several pieces, the last one shorter
    model = made_model(torch.bfloat16, 1, ple_layer_ids=[2, 3])
    with tierstore.open(built(model, tmp_path), dram=dram) as store, torch.no_grad():
        swap_embedding(model, store)
        model.save_pretrained(tmp_path / "tuned", max_shard_size=shard)
        assert not any("ngram_embedding" in name for name in model.state_dict())
    assert same_tensors(tmp_path / "tuned", tmp_path / "checkpoint")
    token_ids = prompts(2, 12, 1)
    with torch.no_grad():
        trained, tuned = (loaded(tmp_path / name)(token_ids).logits for name in ("checkpoint", "tuned"))
    assert torch.equal(tuned, trained)
    assert {path.suffix for path in (tmp_path / "tuned").iterdir()} <= {".json", ".safetensors"}


def test_what_was_tuned_is_saved_beside_the_tables_also_if_the_caller_brings_the_state(tmp_path: Path) -> None:
    model = made_model(torch.bfloat16, 2)
    with tierstore.open(built(model, tmp_path), dram="64MiB") as store, torch.no_grad():
        swap_embedding(model, store)
        model.lm_head.weight.add_(1)
        model.save_pretrained(tmp_path / "tuned", True, model.state_dict())
    before, after = tensors_of(tmp_path / "checkpoint"), tensors_of(tmp_path / "tuned")
    assert before.keys() == after.keys()
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == ["lm_head.weight"]


def test_a_copy_of_a_swapped_model_and_one_that_contains_it_are_saved_with_the_tables(tmp_path: Path) -> None:
    model = made_model(torch.bfloat16, 3)
    with tierstore.open(built(model, tmp_path), dram="64MiB") as store:
        swap_embedding(model.model, store)  # the part of it that has layers
        copy.deepcopy(model).save_pretrained(tmp_path / "copy")
        model.save_pretrained(tmp_path / "outer")
    for name in ("copy", "outer"):
        assert same_tensors(tmp_path / name, tmp_path / "checkpoint")


def test_a_model_that_was_not_swapped_is_saved_as_ever(tmp_path: Path) -> None:
    model, other = made_model(torch.bfloat16, 4), made_model(torch.bfloat16, 5)
    with tierstore.open(built(model, tmp_path), dram="64MiB") as store:
        swap_embedding(model, store)
    other.save_pretrained(tmp_path / "other")
    assert torch.equal(tensors_of(tmp_path / "other")["lm_head.weight"], other.lm_head.weight)
    saved_tables.save_with_tables(type(model))
    assert not hasattr(type(model).save_pretrained.__wrapped__, "__wrapped__"), "wrapped once"


@pytest.mark.parametrize("way", ["distributed", "quantized"])
def test_ways_of_saving_that_would_leave_the_tables_out_are_refused_by_name(tmp_path: Path, way: str) -> None:
    model = made_model(torch.bfloat16, 6)
    with tierstore.open(built(model, tmp_path), dram="64MiB") as store:
        swap_embedding(model, store)
        options = {"distributed_checkpoint": True} if way == "distributed" else {}
        if way == "quantized":
            model.hf_quantizer = SimpleNamespace()
        with pytest.raises(ConfigError, match=r"ngram_embedding\.weight.* random rows; save without it"):
            model.save_pretrained(tmp_path / "tuned", **options)
    assert not (tmp_path / "tuned").exists()


def test_a_disk_without_room_is_named_with_what_it_takes_and_nothing_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made_model(torch.bfloat16, 7)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with tierstore.open(built(model, tmp_path), dram="64MiB") as store:
        swap_embedding(model, store)
        monkeypatch.setattr(saved_tables.os, "posix_fallocate", full)
        with pytest.raises(
            BudgetError, match=r"No space left .* bytes\) are needed, .* lies here while the model is saved"
        ):
            model.save_pretrained(tmp_path / "tuned")
    assert list((tmp_path / "tuned").iterdir()) == []


def test_a_damaged_row_keeps_a_model_from_being_saved(tmp_path: Path) -> None:
    model = made_model(torch.bfloat16, 8)
    with tierstore.open(built(model, tmp_path), dram="192KiB") as store:
        swap_embedding(model, store)
        store._engine._engine.inject("corrupt", 3, 1)
        with pytest.raises(CorruptPageError):
            model.save_pretrained(tmp_path / "tuned")
    assert not list((tmp_path / "tuned").glob("*.safetensors"))
