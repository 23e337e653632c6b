"""Qwen4 (experimental): `ple_*` keys, tables in several tensors, hash buffers in the checkpoint, look-back ends at eos.

Input: config.json and tensors. Output: `FAMILY`. Errors: `ConfigError` for what contradicts itself, and for parts of a
table that carry scales of their own: a table has one codec.
"""

from __future__ import annotations

import math
import re
import struct
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tierstore import ConfigError
from tierstore.codec import parse_codec
from tierstore.formats.checkpoint import Checkpoint
from tierstore.kernels import ORDER_MAX
from tierstore.spec import ROW_BYTES_MAX

from ..family import Family, StoredTable, Synthetic
from ..hash_config import (
    BASE_MAX,
    HEADS_MAX,
    LAYER_MAX,
    LAYER_SEED_STEP,
    SEED_MAX,
    VOCABULARY_MAX,
    ConfigValues,
    HashParts,
    LayerHash,
)
from ..primes import primes_from, splitmix_multipliers
from ..synthetic import (
    FLOAT_DTYPES,
    HEADS,
    NVFP4_CODEC,
    PlannedTensor,
    SyntheticPlan,
    SyntheticShape,
    int64_values,
    nvfp4_factor,
    nvfp4_rows,
    random_floats,
    row_bytes_of,
)
from ..table_tensors import (
    check_buffer,
    check_width,
    configured_integer,
    planes_of,
    stacked_rows,
    table_tensor_name,
)

NAME = "qwen4_exp"
TABLE_PATTERN = r"layers\.{layer}\.ple\.ple_embedding\.ngram_embedding\.(?:weight|shards?[._]0\.weight)"
TABLE_WORDS = "layers.{layer}.ple.ple_embedding.ngram_embedding.weight or .shard_0.weight"
PUBLISHED_VOCAB_SIZE, PUBLISHED_EOS_ID = 248_320, 248_044
_EOS_TOKENS = ("<eos>", "<|endoftext|>", "<｜end▁of▁sentence｜>", "</s>")
SYNTHETIC_CODECS = {"bf16": "bf16", "fp8": "fp8_e4m3", "nvfp4": NVFP4_CODEC}  # of each dtype
SYNTHETIC_FACTOR_CODEC = f"fp8_e4m3*{(0.0123).hex()}"


def read_hash(values: ConfigValues, _token_map: np.ndarray | None) -> HashParts:
    """Reads the hash; token ids hash as they are, and no head of any layer shares a prime."""
    layers = sorted({layer - 1 for layer in values.integers("ple_layer_ids", 1, LAYER_MAX)})  # as transformers does
    max_order = values.integer("ngram_size", 2, ORDER_MAX, default=3)
    heads = values.integer("heads_per_ngram", 1, HEADS_MAX, default=8)
    base = values.integer("ngram_vocab_size_base", 2, BASE_MAX, default=20_000_000)
    multiple = values.integer("make_ngram_vocab_size_divisible_by", 1, BASE_MAX, default=128)
    vocab_size = values.integer("vocab_size", 1, VOCABULARY_MAX)
    seed = values.integer("seed", 0, SEED_MAX, default=1234)
    eos_id = values.integer("eos_token_id", 0, vocab_size - 1)
    values.check_heads(len(layers) * (max_order - 1) * heads)
    primes = primes_from(base)
    layer_hashes = {}
    for index, layer in enumerate(layers):
        moduli = tuple(next(primes) for _ in range((max_order - 1) * heads))
        multipliers = splitmix_multipliers(vocab_size, seed + LAYER_SEED_STEP * index, max_order)
        layer_hashes[layer] = LayerHash(multipliers, moduli, -(-sum(moduli) // multiple) * multiple)
    return HashParts(tuple(range(2, max_order + 1)), heads, vocab_size, eos_id, eos_id, layer_hashes)


def read_table(checkpoint: Checkpoint, parts: HashParts, layer: int) -> StoredTable:
    """Finds a layer's tensors, in the order of their rows, and checks the hash's buffers beside them."""
    name = table_tensor_name(checkpoint, TABLE_PATTERN, TABLE_WORDS, layer)
    prefix = name.rpartition("ngram_embedding.")[0]
    layer_hash = parts.layers[layer]
    check_buffer(checkpoint, f"{prefix}layer_multipliers", layer_hash.multipliers)
    check_buffer(checkpoint, f"{prefix}ngram_heads_vocab_sizes", layer_hash.moduli)
    check_buffer(checkpoint, f"{prefix}ngram_heads_offsets", layer_hash.offsets)
    names = _table_parts(checkpoint, f"{prefix}ngram_embedding.")
    tensors, rows = stacked_rows(checkpoint, names, layer_hash.num_rows)
    dim = rows[0].dim
    check_width(checkpoint, "ple_embed_dim", dim * len(layer_hash.moduli))
    if rows[0].codec == "fp8_e4m3":
        raise ConfigError(
            f"{checkpoint.path}: {prefix}ngram_embedding.weight_scale is missing, and fp8 rows need it; "
            f"download the checkpoint again"
        )
    return StoredTable(planes_of(tensors, rows), rows[0].codec, dim)


def _table_parts(checkpoint: Checkpoint, prefix: str) -> tuple[str, ...]:
    """Returns a table's tensors by name, in the order of their rows: `weight`, or `shard_0.weight`, ...

    Conversions to MLX write `shards.0.weight` for `shard_0.weight`.
    """
    if f"{prefix}weight" in checkpoint.names:
        return (f"{prefix}weight",)
    matches = (re.fullmatch(rf"{re.escape(prefix)}(shards?[._])\d+\.weight", name) for name in checkpoint.names)
    spelled = [match[1] for match in matches if match]
    expected = configured_integer(checkpoint, "split_ngram_parts")
    if expected not in (None, len(spelled)) or len(set(spelled)) != 1:
        raise ConfigError(
            f"{checkpoint.path}: {len(spelled)} tensors {prefix}{'* and '.join(sorted(set(spelled)))}*.weight, "
            f"config.json says split_ngram_parts {expected}; {checkpoint.why_missing()}"
        )
    return tuple(f"{prefix}{spelled[0]}{index}.weight" for index in range(len(spelled)))


def plan_checkpoint(shape: SyntheticShape, tokenizer: Tokenizer, full: bool) -> SyntheticPlan:
    """Returns a checkpoint of this shape: the tables and the hash's buffers; full: vocabulary and eos as published."""
    vocab_size = PUBLISHED_VOCAB_SIZE if full else tokenizer.get_vocab_size(with_added_tokens=True)
    found = [tokenizer.token_to_id(token) for token in _EOS_TOKENS if tokenizer.token_to_id(token) is not None]
    text: dict[str, Any] = {
        "model_type": "qwen4_exp_text",
        "vocab_size": vocab_size,
        "eos_token_id": PUBLISHED_EOS_ID if full else [*found, vocab_size - 1][0],
        "hidden_size": shape.hidden,
        "num_hidden_layers": max(shape.layers) + 1,
        "ple_layer_ids": [layer + 1 for layer in shape.layers],  # counted from 1
        "ple_embed_dim": shape.dim * shape.num_heads,
        "ple_conv_kernel_size": 4,
        "ngram_size": shape.order_max,
        "heads_per_ngram": HEADS,
        "ngram_vocab_size_base": shape.rows_per_head,
        "make_ngram_vocab_size_divisible_by": math.lcm(128, shape.parts),
        "split_ngram_parts": shape.parts,
        "seed": 1234,
    }
    if shape.dtype == "fp8":
        text["ple_embedding_dtype"] = "float8_e4m3fn"
    if shape.dtype == "nvfp4":
        text["ple_embedding_dtype"] = "nvfp4"
    parts = read_hash(ConfigValues(text, NAME), None)
    codec = SYNTHETIC_FACTOR_CODEC if shape.dtype == "fp8" else SYNTHETIC_CODECS[shape.dtype]
    tensors = [
        tensor for layer in shape.layers for tensor in table_tensors(parts, layer, codec, shape.dim, shape.parts)
    ]
    return SyntheticPlan(
        {"model_type": NAME, "text_config": text},
        parts,
        tensors,
        row_bytes_of(SYNTHETIC_CODECS[shape.dtype], shape.dim),
    )


def read_dim(values: ConfigValues, parts: HashParts) -> int:
    """Reads how many values a row has: the token's, divided by its heads."""
    num_heads = len(parts.orders) * parts.heads
    width = values.integer("ple_embed_dim", num_heads, ROW_BYTES_MAX * num_heads)
    if width % num_heads:
        raise values.refusal("ple_embed_dim", f"is {width}, not a multiple of {num_heads} heads")
    return width // num_heads


def table_tensors(parts: HashParts, layer: int, codec: str, dim: int, num_parts: int = 1) -> list[PlannedTensor]:
    """Returns a layer's table under its published names, in `num_parts` tensors; see `Family`."""
    layer_hash, prefix = parts.layers[layer], f"model.language_model.layers.{layer}.ple.ple_embedding."
    names = [f"shard_{part}.weight" for part in range(num_parts)] if num_parts > 1 else ["weight"]
    part_shape = (layer_hash.num_rows // num_parts, dim)
    tensors = []
    for name in names:
        if codec == NVFP4_CODEC:
            tensors += nvfp4_rows(f"{prefix}ngram_embedding.{name}", part_shape)
        else:
            dtype = FLOAT_DTYPES.get(codec, "F8_E4M3")
            tensors.append(random_floats(f"{prefix}ngram_embedding.{name}", dtype, part_shape))
    if codec == NVFP4_CODEC:
        tensors.append(nvfp4_factor(f"{prefix}ngram_embedding.weight_scale_2"))
    elif codec not in FLOAT_DTYPES:
        scale = struct.pack("<f", parse_codec(codec).factor)
        tensors.append(PlannedTensor(f"{prefix}ngram_embedding.weight_scale", "F32", (), values=scale))
    return [
        *tensors,
        int64_values(f"{prefix}layer_multipliers", layer_hash.multipliers),
        int64_values(f"{prefix}ngram_heads_vocab_sizes", layer_hash.moduli),
        int64_values(f"{prefix}ngram_heads_offsets", layer_hash.offsets),
    ]


FAMILY = Family(
    name=NAME,
    mark="ple_layer_ids",
    needs_token_map=False,
    table_pattern=TABLE_PATTERN,
    table_words=TABLE_WORDS,
    read_hash=read_hash,
    read_table=read_table,
    read_dim=read_dim,
    table_tensors=table_tensors,
    synthetic=Synthetic(
        SyntheticShape((1,), 3, 20_000_000, 160, 2048, "bf16", parts=128),
        SYNTHETIC_CODECS,
        plan_checkpoint,
        dim_multiple=16,
        splits_tables=True,
    ),
)
