"""Engram as published with arXiv 2601.07372: float rows, a base for each order, the hash's offsets beside the table.

Input: config.json and tensors. Output: `FAMILY`. Errors: `ConfigError` for what contradicts itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tierstore.formats.checkpoint import Checkpoint, Plane
from tierstore.kernels import ORDER_MAX
from tierstore.spec import ROW_BYTES_MAX

from ..family import Family, StoredTable, Synthetic
from ..hash_config import BASE_MAX, HEADS_MAX, ConfigValues, HashParts, paper_hash
from ..scales import VALUE_CODECS
from ..synthetic import (
    FLOAT_DTYPES,
    HC_MULT,
    HEADS,
    PAD_ID,
    PlannedTensor,
    SyntheticPlan,
    SyntheticShape,
    int64_values,
    random_floats,
    row_bytes_of,
)
from ..table_tensors import check_buffer, check_width, table_tensor_name, weight_tensor
from ..token_map import build_token_map

NAME = "engram"
TABLE_PATTERN = r"layers\.{layer}\.(?:.*\.)?multi_head_embedding\.embedding\.weight"
TABLE_WORDS = "layers.{layer}.[...].multi_head_embedding.embedding.weight"
SYNTHETIC_CODECS = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}  # of each dtype


def read_hash(values: ConfigValues, token_map: np.ndarray | None) -> HashParts:
    """Reads the hash, which has a base of its own for each order."""
    layers = values.layers("layer_ids")
    max_order = values.integer("max_ngram_size", 2, ORDER_MAX)
    heads = values.integer("n_head_per_ngram", 1, HEADS_MAX)
    bases = values.integers("engram_vocab_size", 2, BASE_MAX)
    if len(bases) != max_order - 1:
        raise values.refusal(
            "engram_vocab_size", f"has {len(bases)} bases, max_ngram_size {max_order} needs {max_order - 1}"
        )
    return paper_hash(values, token_map, layers, bases, heads, "seed", "pad_id")


def read_table(checkpoint: Checkpoint, parts: HashParts, layer: int) -> StoredTable:
    """Finds a layer's weight, and checks the offsets beside it."""
    prefix = table_tensor_name(checkpoint, TABLE_PATTERN, TABLE_WORDS, layer).removesuffix("embedding.weight")
    weight = weight_tensor(checkpoint, f"{prefix}embedding.weight", ["F32", "F16", "BF16"])
    check_buffer(checkpoint, f"{prefix}offsets", parts.layers[layer].offsets)
    codec, value_bytes = VALUE_CODECS[weight.dtype]
    dim = weight.shape[1]
    check_width(checkpoint, "n_embed_per_ngram", dim * parts.heads)
    return StoredTable((Plane(dim * value_bytes, (weight,)),), codec, dim)


def plan_checkpoint(shape: SyntheticShape, tokenizer: Tokenizer, _full: bool) -> SyntheticPlan:
    """Returns a checkpoint of this shape: the tables and their offsets."""
    token_map = build_token_map(tokenizer)
    config: dict[str, Any] = {
        "model_type": NAME,
        "vocab_size": len(token_map),
        "hidden_size": shape.hidden,
        "hc_mult": HC_MULT,
        "layer_ids": list(shape.layers),
        "engram_vocab_size": [shape.rows_per_head] * (shape.order_max - 1),
        "max_ngram_size": shape.order_max,
        "n_embed_per_ngram": shape.dim * HEADS,
        "n_head_per_ngram": HEADS,
        "pad_id": PAD_ID,
        "seed": 0,
        "kernel_size": 4,
    }
    parts = read_hash(ConfigValues(config, NAME), token_map)
    tensors: list[PlannedTensor] = []
    for layer in parts.layers:
        tensors += table_tensors(parts, layer, SYNTHETIC_CODECS[shape.dtype], shape.dim)
    return SyntheticPlan(config, parts, tensors, row_bytes_of(SYNTHETIC_CODECS[shape.dtype], shape.dim))


def read_dim(values: ConfigValues, parts: HashParts) -> int:
    """Reads how many values a row has: those of an order, divided by its heads."""
    width = values.integer("n_embed_per_ngram", parts.heads, ROW_BYTES_MAX * parts.heads)
    if width % parts.heads:
        raise values.refusal("n_embed_per_ngram", f"is {width}, not a multiple of {parts.heads} heads")
    return width // parts.heads


def table_tensors(parts: HashParts, layer: int, codec: str, dim: int) -> list[PlannedTensor]:
    """Returns a layer's table under its published names; see `Family`."""
    layer_hash, prefix = parts.layers[layer], f"layers.{layer}.engram.multi_head_embedding."
    return [
        random_floats(f"{prefix}embedding.weight", FLOAT_DTYPES[codec], (layer_hash.num_rows, dim)),
        int64_values(f"{prefix}offsets", layer_hash.offsets),
    ]


FAMILY = Family(
    name=NAME,
    mark="max_ngram_size",
    needs_token_map=True,
    table_pattern=TABLE_PATTERN,
    table_words=TABLE_WORDS,
    read_hash=read_hash,
    read_table=read_table,
    read_dim=read_dim,
    table_tensors=table_tensors,
    synthetic=Synthetic(
        SyntheticShape((1, 15), 3, 646_400, 64, 1024, "fp32"),  # of the published demonstration
        SYNTHETIC_CODECS,
        plan_checkpoint,
    ),
)
