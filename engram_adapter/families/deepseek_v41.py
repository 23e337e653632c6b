"""DeepSeek V4.1: `engram_*` keys, fp8 rows with an e8m0 scale for each 32 values, the hash of arXiv 2601.07372.

Input: config.json and tensors. Output: `FAMILY`. Errors: `ConfigError` for what contradicts itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tierstore import ConfigError
from tierstore.formats.checkpoint import Checkpoint
from tierstore.kernels import ORDER_MAX
from tierstore.spec import ROW_BYTES_MAX

from ..family import Family, StoredTable, Synthetic
from ..hash_config import BASE_MAX, HEADS_MAX, ConfigValues, HashParts, paper_hash
from ..packings import StoredRows
from ..scales import SCALE_BLOCK, SCALE_NAMES
from ..synthetic import (
    FLOAT_DTYPES,
    HC_MULT,
    HEADS,
    NVFP4_CODEC,
    PAD_ID,
    PlannedTensor,
    SyntheticPlan,
    SyntheticShape,
    nvfp4_factor,
    nvfp4_rows,
    random_floats,
    row_bytes_of,
)
from ..table_tensors import check_width, cut_rows, planes_of, stacked_rows, table_tensor_name, weight_tensor
from ..token_map import build_token_map

NAME = "deepseek_v41"
CODEC = "fp8_e4m3_e8m0x32"
TABLE_PATTERN = r"layers\.{layer}\.engram\.embed\.weight"
TABLE_WORDS = "layers.{layer}.engram.embed.weight"
WKV_BLOCK = 128  # values of wkv that share a scale, on either axis
ROWS_MAX = 2**53
SYNTHETIC_CODECS = {"fp8": CODEC, "nvfp4": NVFP4_CODEC}  # of each dtype


def read_hash(values: ConfigValues, token_map: np.ndarray | None) -> HashParts:
    """Reads the hash; the seed is `engram_seed` alone, because a plain `seed` may be anything's."""
    layers = values.layers("engram_layer_ids")
    max_order = values.integer("engram_max_ngram_size", 2, ORDER_MAX)
    heads = values.integer("engram_n_heads", 1, HEADS_MAX)
    bases = [values.integer("engram_vocab_size", 2, BASE_MAX)] * (max_order - 1)
    pad_keys = ("engram_pad_token_id", "engram_pad_id")
    parts = paper_hash(values, token_map, layers, bases, heads, "engram_seed", *pad_keys)
    expected = values.integers("engram_num_embeddings", 1, ROWS_MAX, optional=True)
    found = [layer.num_rows for layer in parts.layers.values()]
    if expected and expected != found:
        raise values.refusal("engram_num_embeddings", f"is {expected}, the moduli add up to {found}")
    return parts


def read_table(checkpoint: Checkpoint, parts: HashParts, layer: int) -> StoredTable:
    """Finds a layer's weight and its scales, and checks that they fit each other.

    Tables are published in fp8. Conversions have them in NVFP4, MXFP4 and others that `packings.py` knows.
    """
    name = table_tensor_name(checkpoint, TABLE_PATTERN, TABLE_WORDS, layer)
    found = checkpoint.tensors.get(name)
    if found is None or found.dtype == "F8_E4M3":
        return _fp8_table(checkpoint, parts, layer, name.removesuffix("weight"))
    tensors, rows = stacked_rows(checkpoint, [name], parts.layers[layer].num_rows)
    check_width(checkpoint, "engram_head_dim", rows[0].dim)
    return StoredTable(planes_of(tensors, rows), rows[0].codec, rows[0].dim)


def _fp8_table(checkpoint: Checkpoint, parts: HashParts, layer: int, prefix: str) -> StoredTable:
    weight = weight_tensor(checkpoint, f"{prefix}weight", ["F8_E4M3"])
    names = [f"{prefix}{name}" for name in SCALE_NAMES if f"{prefix}{name}" in checkpoint.names] or [f"{prefix}scale"]
    if len(names) > 1:
        raise ConfigError(f"{checkpoint.path}: {weight.name} has several scales ({', '.join(names)}), expected one")
    scale = checkpoint.tensor(names[0], ["F8_E8M0", "U8"], 2)
    num_rows, dim = weight.shape
    if dim % SCALE_BLOCK or scale.shape != (num_rows, dim // SCALE_BLOCK):
        raise ConfigError(
            f"{scale.name} is {list(scale.shape)}, {weight.name} of {list(weight.shape)} needs "
            f"{[num_rows, dim // SCALE_BLOCK]}: one scale for {SCALE_BLOCK} columns; the checkpoint is damaged"
        )
    check_width(checkpoint, "engram_head_dim", dim)
    rows = StoredRows(CODEC, num_rows, dim, scale)
    if num_rows > parts.layers[layer].num_rows:
        weight, rows = cut_rows(weight, rows, parts.layers[layer].num_rows)
    return StoredTable(planes_of([weight], [rows]), CODEC, dim)


def plan_checkpoint(shape: SyntheticShape, tokenizer: Tokenizer, _full: bool) -> SyntheticPlan:
    """Returns a checkpoint of this shape: the tables, and beside them the small tensors of an Engram layer."""
    token_map = build_token_map(tokenizer)
    text: dict[str, Any] = {
        "model_type": NAME,
        "vocab_size": len(token_map),
        "hidden_size": shape.hidden,
        "num_hidden_layers": max(shape.layers) + 1,
        "hc_mult": HC_MULT,
        "engram_layer_ids": list(shape.layers),
        "engram_vocab_size": shape.rows_per_head,
        "engram_max_ngram_size": shape.order_max,
        "engram_n_heads": HEADS,
        "engram_head_dim": shape.dim,
        "engram_compressed_vocab_size": len(np.unique(token_map)),
        "engram_pad_token_id": PAD_ID,
    }
    parts = read_hash(ConfigValues(text, NAME), token_map)
    text["engram_num_embeddings"] = [layer.num_rows for layer in parts.layers.values()]
    tensors = []
    outputs, inputs = (HC_MULT + 1) * shape.hidden, shape.num_heads * shape.dim
    wkv_scale_shape = (-(-outputs // WKV_BLOCK), -(-inputs // WKV_BLOCK))
    for layer in parts.layers:
        prefix = f"layers.{layer}.engram."
        tensors += table_tensors(parts, layer, SYNTHETIC_CODECS[shape.dtype], shape.dim)
        tensors += [
            PlannedTensor(f"{prefix}wkv.weight", "F8_E4M3", (outputs, inputs)),
            PlannedTensor(f"{prefix}wkv.scale", "F8_E8M0", wkv_scale_shape, exponent=110),
            PlannedTensor(f"{prefix}q_weight", "BF16", (HC_MULT, shape.hidden), exponent=120),
            PlannedTensor(f"{prefix}k_weight", "BF16", (HC_MULT, shape.hidden), exponent=120),
        ]
    return SyntheticPlan(
        {"model_type": NAME, "text_config": text},
        parts,
        tensors,
        row_bytes_of(SYNTHETIC_CODECS[shape.dtype], shape.dim),
    )


def read_dim(values: ConfigValues, _parts: HashParts) -> int:
    """Reads how many values a row has."""
    return values.integer("engram_head_dim", 1, ROW_BYTES_MAX)


def table_tensors(parts: HashParts, layer: int, codec: str, dim: int) -> list[PlannedTensor]:
    """Returns a layer's table under its published names; see `Family`."""
    prefix, shape = f"layers.{layer}.engram.embed.", (parts.layers[layer].num_rows, dim)
    if codec == NVFP4_CODEC:
        return [*nvfp4_rows(f"{prefix}weight", shape), nvfp4_factor(f"{prefix}weight_scale_2")]
    if codec in FLOAT_DTYPES:
        return [random_floats(f"{prefix}weight", FLOAT_DTYPES[codec], shape)]
    return [
        PlannedTensor(f"{prefix}weight", "F8_E4M3", shape),
        PlannedTensor(f"{prefix}scale", "F8_E8M0", (shape[0], dim // SCALE_BLOCK), exponent=110),
    ]


FAMILY = Family(
    name=NAME,
    mark="engram_layer_ids",
    needs_token_map=True,
    table_pattern=TABLE_PATTERN,
    table_words=TABLE_WORDS,
    read_hash=read_hash,
    read_table=read_table,
    read_dim=read_dim,
    table_tensors=table_tensors,
    synthetic=Synthetic(
        SyntheticShape((1, 14), 4, 16_000_000, 256, 5120, "fp8"),
        SYNTHETIC_CODECS,
        plan_checkpoint,
        dim_multiple=SCALE_BLOCK,
    ),
)
