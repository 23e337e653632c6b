"""Tables as conversions publish them: NVFP4, MLX's names, scales under other names, rows filled up to round numbers.

Values are held against compressed-tensors' own dequantization, or against the rows before the conversion.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from compressed_tensors.compressors.nvfp4 import unpack_fp4_from_uint8
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import tierstore
from engram_adapter import HashSpec, TieredEmbedding, build_checkpoint
from engram_adapter.families import read_model
from tierstore.errors import ConfigError
from tierstore.formats.checkpoint import Checkpoint
from tierstore.tools.corpus import train_tokenizer
from tierstore.tools.synth import write_checkpoint

SMALL: dict[str, dict[str, Any]] = {
    "deepseek_v41": {"rows_per_head": 50, "dim": 64, "hidden": 40, "layers": (1,)},
    "qwen4_exp": {"rows_per_head": 70, "dim": 32, "parts": 4},
    "longcat": {"rows_per_head": 300, "dim": 16},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([Path(__file__)], 300)


class Draft:
    """A synthetic checkpoint, to be written again with other tensors."""

    def __init__(self, folder: Path, family: str, tokenizer: Tokenizer, **options: Any) -> None:
        write_checkpoint(folder, family, tokenizer=tokenizer, **(SMALL[family] | options))
        self.config = json.loads((folder / "config.json").read_text())
        self.tokenizer = (folder / "tokenizer.json").read_text()
        self.tensors: dict[str, torch.Tensor] = {}
        for file in folder.glob("*.safetensors"):
            self.tensors |= load_file(file)

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.config))
        (folder / "tokenizer.json").write_text(self.tokenizer)
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, folder / "model.safetensors")
        return folder

    def rename(self, old: str, new: str) -> None:
        self.tensors = {name.replace(old, new): tensor for name, tensor in self.tensors.items()}


def rows_in(folder: Path, store: Path) -> np.ndarray:
    """All stored rows of the first table."""
    build_checkpoint(folder, store)
    with tierstore.open(store, dram="8MiB") as opened:
        table = opened[sorted(opened.tables)[0]]
        rows: np.ndarray = table.rows(np.arange(table.spec.num_rows))
    return rows


def dequantized(packed: torch.Tensor, scales: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """NVFP4 as its publishers define it: bf16 [rows, dim]."""
    values = unpack_fp4_from_uint8(packed, *(packed.shape[0], 2 * packed.shape[1]), dtype=torch.float32)
    by_value = (scales.float() * factor).repeat_interleave(16, dim=1)
    return (values * by_value).bfloat16()


@pytest.mark.parametrize("family", ["deepseek_v41", "qwen4_exp"])
def test_nvfp4_rows_come_out_as_their_library_decodes_them(family: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    draft = Draft(tmp_path / "model", family, tokenizer, dtype="nvfp4")
    build_checkpoint(tmp_path / "model", tmp_path / "store")
    parts = sorted(name for name, tensor in draft.tensors.items() if tensor.dtype == torch.uint8)
    factor = next(tensor for name, tensor in draft.tensors.items() if name.endswith("weight_scale_2"))
    wanted = torch.cat([dequantized(draft.tensors[p], draft.tensors[f"{p}_scale"], factor) for p in parts])
    with tierstore.open(tmp_path / "store", dram="8MiB") as store:
        spec = HashSpec.from_store(store)
        layer = spec.layers[0]
        table = store[spec.table_name(layer)]
        dim = SMALL[family]["dim"]
        assert table.spec.codec == "fp4_e2m1_e4m3x16*0x1.8000000000000p-7"
        assert table.spec.row_bytes == dim // 2 + dim // 16
        tokens = np.random.default_rng(0).integers(0, spec.vocab_size, (2, 15))
        found = TieredEmbedding(store, layer, spec)(torch.from_numpy(tokens))
        assert torch.equal(found, wanted[spec.row_ids(tokens, layer)])


def test_nvfp4_parts_with_factors_of_their_own_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    draft = Draft(tmp_path / "model", "qwen4_exp", tokenizer, dtype="nvfp4")
    name = next(name for name in draft.tensors if name.endswith("weight_scale_2"))
    factor = draft.tensors.pop(name)
    for part in range(4):
        draft.tensors[name.replace("weight_scale_2", f"shard_{part}.weight_scale_2")] = factor * (part + 1)
    with pytest.raises(ConfigError, match=r"shard_1\.weight is stored as .*parts with scales of their own"):
        read_model(Checkpoint.open(draft.write(tmp_path / "other")))


@pytest.mark.parametrize(("family", "leaf"), [("deepseek_v41", "weight_scale"), ("qwen4_exp", "shard_2.weight_scale")])
def test_nvfp4_without_its_scales_is_refused(family: str, leaf: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    draft = Draft(tmp_path / "model", family, tokenizer, dtype="nvfp4")
    del draft.tensors[next(name for name in draft.tensors if name.endswith(f".{leaf}"))]
    with pytest.raises(ConfigError, match=r"packed as NVFP4"):
        read_model(Checkpoint.open(draft.write(tmp_path / "other")))


NAMES = [
    ("deepseek_v41", "embed.scale", "embed.weight_scale_inv"),
    ("deepseek_v41", "embed.scale", "embed.weight_scale"),
    ("qwen4_exp", "ngram_embedding.shard_", "ngram_embedding.shards."),
]


@pytest.mark.parametrize(("family", "old", "new"), NAMES)
def test_other_names_are_the_same_table(family: str, old: str, new: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    draft = Draft(tmp_path / "model", family, tokenizer)
    draft.rename(old, new)
    other = draft.write(tmp_path / "other")
    np.testing.assert_array_equal(rows_in(other, tmp_path / "there"), rows_in(tmp_path / "model", tmp_path / "here"))


def test_a_scale_named_inverse_multiplies_like_any_other(tmp_path: Path, tokenizer: Tokenizer) -> None:
    draft = Draft(tmp_path / "model", "qwen4_exp", tokenizer, dtype="fp8")
    draft.rename("ngram_embedding.weight_scale", "ngram_embedding.weight_scale_inv")
    here, there = (read_model(Checkpoint.open(f)) for f in (tmp_path / "model", draft.write(tmp_path / "other")))
    assert here.sources[0].spec == there.sources[0].spec
    assert "*" in here.sources[0].spec.codec


@pytest.mark.parametrize(
    ("family", "dtype"), [("deepseek_v41", "fp8"), ("deepseek_v41", "nvfp4"), ("qwen4_exp", "nvfp4")]
)
def test_rows_that_fill_a_table_up_are_not_rows_of_the_store(
    family: str, dtype: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Engines fill tables up so that ranks get equal parts; the hash never gives such a row."""
    draft = Draft(tmp_path / "model", family, tokenizer, dtype=dtype)
    last = "shard_3." if family == "qwen4_exp" else "embed."
    for name in [name for name in draft.tensors if f"{last}weight" in name or name.endswith("embed.scale")]:
        if draft.tensors[name].ndim == 2:
            more = draft.tensors[name][:7].clone()
            draft.tensors[name] = torch.cat([draft.tensors[name].view(torch.uint8), more.view(torch.uint8)]).view(
                more.dtype
            )
    other = draft.write(tmp_path / "other")
    np.testing.assert_array_equal(rows_in(other, tmp_path / "there"), rows_in(tmp_path / "model", tmp_path / "here"))


def test_a_table_of_many_more_rows_is_another_models(tmp_path: Path, tokenizer: Tokenizer) -> None:
    draft = Draft(tmp_path / "model", "longcat", tokenizer)
    name = "model.ngram_embeddings.embedders.3.weight"
    draft.tensors[name] = torch.zeros(len(draft.tensors[name]) + 4097, 16, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"embedders\.3\.weight has 440\d rows, config\.json makes 30\d of them"):
        read_model(Checkpoint.open(draft.write(tmp_path / "other")))


def test_heads_in_nvfp4_with_factors_of_their_own_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    draft = Draft(tmp_path / "model", "longcat", tokenizer)
    for head in range(12):
        name = f"model.ngram_embeddings.embedders.{head}.weight"
        rows = len(draft.tensors[name])
        draft.tensors[name] = torch.zeros(rows, 8, dtype=torch.uint8)
        draft.tensors[f"{name}_scale"] = torch.ones(rows, 1).to(torch.float8_e4m3fn)
        draft.tensors[f"{name}_scale_2"] = torch.tensor(0.5 + head)
    with pytest.raises(ConfigError, match=r"embedders\.1\.weight is stored as .*parts with scales of their own"):
        read_model(Checkpoint.open(draft.write(tmp_path / "other")))


def test_a_table_in_bf16_is_taken_where_fp8_was_published(tmp_path: Path, tokenizer: Tokenizer) -> None:
    draft = Draft(tmp_path / "model", "deepseek_v41", tokenizer)
    name = "layers.1.engram.embed.weight"
    del draft.tensors["layers.1.engram.embed.scale"]
    draft.tensors[name] = draft.tensors[name].to(torch.bfloat16)
    other = draft.write(tmp_path / "other")
    assert read_model(Checkpoint.open(other)).sources[0].spec.codec == "bf16"
    found = rows_in(other, tmp_path / "store")
    assert found.tobytes() == draft.tensors[name].view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("family", SMALL)
def test_a_training_checkpoint_with_a_configuration_is_the_same_table(
    family: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """torch.distributed.checkpoint's folder, to which a config.json and a tokenizer were copied."""
    draft = Draft(tmp_path / "model", family, tokenizer)
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"model": draft.tensors, "step": 3}, checkpoint_id=tmp_path / "step-3", no_dist=True)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "step-3" / name).write_text((tmp_path / "model" / name).read_text())
    here, there = rows_in(tmp_path / "model", tmp_path / "here"), rows_in(tmp_path / "step-3", tmp_path / "there")
    np.testing.assert_array_equal(here, there)
