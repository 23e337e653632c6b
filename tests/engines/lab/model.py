"""A tiny random Qwen4-Exp checkpoint, saved by transformers as the release is; run in the lab's environment.

Input: a folder, "bf16", "fp8" or "nvfp4", rows a head. Output: config.json, safetensors. Errors: those of transformers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen4ExpForCausalLM, Qwen4ExpTextConfig

EOS, VOCAB_SIZE = 3, 512
TABLE_FILE = "model-00002-of-00002.safetensors"
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64, "num_experts_per_tok": 2, "num_experts": 4, "hc_count": 2, "hc_lowrank": 32,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "ple_layer_ids": [2], "ple_embed_dim": 128, "ngram_size": 3, "heads_per_ngram": 2,
    "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 4, "output_gate_type": "silu",
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_budget": 64,
    "indexer_compress_ratio": 4, "max_position_embeddings": 2048, "eos_token_id": EOS, "pad_token_id": 0,
    "bos_token_id": 1,
}  # fmt: skip


def write(folder: Path, dtype: str, rows_per_head: int) -> None:
    torch.manual_seed(7)
    model = Qwen4ExpForCausalLM(Qwen4ExpTextConfig(**SHAPE, ngram_vocab_size_base=rows_per_head))
    with torch.no_grad():
        for layer in model.config.ple_layer_ids:
            ple = model.model.layers[layer - 1].ple
            ple.conv1d.weight.normal_(std=0.5)
            ple.ple_embedding.ngram_embedding.weight.normal_()
    model.to(torch.bfloat16).save_pretrained(folder)
    _without_indexer(folder)
    if dtype == "fp8":
        _with_fp8_rows(folder)
    if dtype == "nvfp4":
        _with_nvfp4_rows(folder)
    with_a_file_of_its_own(folder)


def _without_indexer(folder: Path) -> None:
    """Drops the indexer of sparse attention, whose kernels are CUDA's: the engine then attends to all tokens."""
    config = json.loads((folder / "config.json").read_text())
    for key in [key for key in config if key.startswith("indexer_")]:
        config[key] = None
    config["architectures"] = ["Qwen4ExpForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    _rewrite(folder, lambda name, tensor: {} if ".indexer" in name else {name: tensor})


def _with_fp8_rows(folder: Path) -> None:
    """Stores the table's parts as e4m3 under one scale, as the published FP8 checkpoint does."""
    config = json.loads((folder / "config.json").read_text())
    config["ple_embedding_dtype"] = "float8_e4m3fn"
    (folder / "config.json").write_text(json.dumps(config))
    scale = torch.tensor(0.0123, dtype=torch.float32)

    def scaled(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if ".ngram_embedding." not in name:
            return {name: tensor}
        return {
            name: (tensor.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn),
            f"{name.rpartition('.shard_')[0]}.weight_scale": scale.clone(),
        }

    _rewrite(folder, scaled)


def _with_nvfp4_rows(folder: Path) -> None:
    """Stores the table's parts as pairs of e2m1 in a byte, an e4m3 scale for 16 values and one factor; at random."""
    config = json.loads((folder / "config.json").read_text())
    config["ple_embedding_dtype"] = "nvfp4"
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(8)

    def packed(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if ".ngram_embedding." not in name:
            return {name: tensor}
        rows, dim = tensor.shape
        scales = torch.randint(0x28, 0x40, (rows, dim // 16), generator=generator, dtype=torch.uint8)
        return {
            name: torch.randint(0, 256, (rows, dim // 2), generator=generator, dtype=torch.uint8),
            f"{name}_scale": scales.view(torch.float8_e4m3fn),
            f"{name.rpartition('.shard_')[0]}.weight_scale_2": torch.tensor(0.37),
        }

    _rewrite(folder, packed)


def with_a_file_of_its_own(folder: Path) -> None:
    """Moves the table's tensors to a file that has nothing else, as published checkpoints have it."""
    names = ("model-00001-of-00002.safetensors", TABLE_FILE)
    whole = folder / "model.safetensors"
    parts: tuple[dict[str, torch.Tensor], ...] = ({}, {})
    for name, tensor in load_file(whole).items():
        parts[".ngram_embedding." in name][name] = tensor
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    whole.unlink()


def _rewrite(folder: Path, change: Any) -> None:
    for file in folder.glob("*.safetensors"):
        changed: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(file).items():
            changed |= change(name, tensor)
        save_file(changed, file, metadata={"format": "pt"})


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
