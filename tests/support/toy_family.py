"""A model family in one file, as somebody would add one: bigrams, one head, a hash that can be done by hand.

Input: config.json and tensors. Output: `FAMILY`. Errors: `ConfigError` for what is missing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import Tokenizer

from engram_adapter.family import Family, StoredTable, Synthetic
from engram_adapter.hash_config import ConfigValues, HashParts, LayerHash
from engram_adapter.synthetic import SyntheticPlan, SyntheticShape, random_floats, row_bytes_of
from engram_adapter.table_tensors import table_tensor_name, weight_tensor
from tierstore.formats.checkpoint import Checkpoint, Plane

NAME = "toy"
MULTIPLIERS = (3, 5)
PATTERN, WORDS = r"toy\.{layer}\.rows", "toy.{layer}.rows"


def read_hash(values: ConfigValues, _token_map: np.ndarray | None) -> HashParts:
    modulus = values.integer("toy_rows", 2, 1 << 20)
    layers = {layer: LayerHash(MULTIPLIERS, (modulus,), modulus) for layer in values.layers("toy_layers")}
    return HashParts((2,), 1, values.integer("vocab_size", 1, 1 << 20), 0, None, layers)


def read_table(checkpoint: Checkpoint, _parts: HashParts, layer: int) -> StoredTable:
    weight = weight_tensor(checkpoint, table_tensor_name(checkpoint, PATTERN, WORDS, layer), ["F32"])
    return StoredTable((Plane(4 * weight.shape[1], (weight,)),), "fp32", weight.shape[1])


def plan_checkpoint(shape: SyntheticShape, tokenizer: Tokenizer, _full: bool) -> SyntheticPlan:
    config: dict[str, Any] = {
        "toy_layers": list(shape.layers),
        "toy_rows": shape.rows_per_head,
        "vocab_size": tokenizer.get_vocab_size(),
    }
    parts = read_hash(ConfigValues(config, NAME), None)
    tensors = [random_floats(f"toy.{layer}.rows", "F32", (shape.rows_per_head, shape.dim)) for layer in parts.layers]
    return SyntheticPlan(config, parts, tensors, row_bytes_of("fp32", shape.dim))


FAMILY = Family(
    name=NAME,
    mark="toy_layers",
    needs_token_map=False,
    table_pattern=PATTERN,
    table_words=WORDS,
    read_hash=read_hash,
    read_table=read_table,
    synthetic=Synthetic(SyntheticShape((0, 2), 2, 1000, 4, 8, "fp32"), {"fp32": "fp32"}, plan_checkpoint),
)
