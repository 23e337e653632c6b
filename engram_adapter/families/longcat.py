"""LongCat: n-gram tables of the input embedding, one for each head, found by a polynomial of the token ids.

Input: config.json and tensors. Output: `FAMILY`. Errors: `ConfigError` for what contradicts itself, and for models in
which some token ids count as none.

LongCat-Flash-Lite spells its keys `ngram_vocab_size_ratio`, `emb_neighbor_num`, `emb_split_num`; its sparse variant and
LongCat-2.0 `oe_vocab_size_ratio`, `oe_neighbor_num`, `oe_split_num`. Head i has m + 2 i + 1 rows, m the ratio times the
vocabulary, cut to a whole number. Its row is the n-gram, read as a number whose digits are token ids, modulo that.
No 63 bits hold such a number of four ids, so heads share no key: every head is an order of its own with one row a key,
and the key is the row's place in the head. All heads are one table, `layers.0`: the rows are added to the input of the
first layer.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tierstore import ConfigError
from tierstore.formats.checkpoint import Checkpoint
from tierstore.kernels import ORDER_MAX, ORDERS_MAX
from tierstore.spec import KEY_MAX, ROW_BYTES_MAX

from ..family import Family, StoredTable, Synthetic
from ..hash_config import BASE_MAX, POLYNOMIAL, VOCABULARY_MAX, ConfigValues, HashParts, LayerHash
from ..synthetic import FLOAT_DTYPES, PlannedTensor, SyntheticPlan, SyntheticShape, random_floats, row_bytes_of
from ..table_tensors import check_width, cut_rows, planes_of, stacked_rows, table_tensor_name

NAME = "longcat"
LAYER = 0  # the table's: its rows go into the input of the first layer
TABLE_PATTERN = r"(?:ngram_embeddings\.embedders\.0|oe_embed_tokens0)\.weight"
TABLE_WORDS = "ngram_embeddings.embedders.0.weight or oe_embed_tokens0.weight"
PREFIX = "model.ngram_embeddings."
RATIO_MAX = 100_000
PUBLISHED_VOCAB_SIZE, PUBLISHED_EOS_ID = 131_072, 2
SYNTHETIC_CODECS = {"bf16": "bf16", "fp16": "fp16", "fp32": "fp32"}  # of each dtype


def read_hash(values: ConfigValues, _token_map: np.ndarray | None) -> HashParts:
    """Reads the hash; every head is an order of its own."""
    vocab_size = values.integer("vocab_size", 2, VOCABULARY_MAX)
    ratio = values.number("ngram_vocab_size_ratio", 0, RATIO_MAX, "oe_vocab_size_ratio")
    order_max = values.integer("emb_neighbor_num", 2, ORDER_MAX, "oe_neighbor_num")
    splits = values.integer("emb_split_num", 1, ORDERS_MAX, "oe_split_num")
    eos_id = values.integer("eos_token_id", 0, vocab_size - 1)
    num_heads = (order_max - 1) * splits
    if num_heads > ORDERS_MAX:
        raise values.refusal(
            "emb_split_num", f"is {splits}, which makes {num_heads} heads, expected at most {ORDERS_MAX}"
        )
    text_vocab_size = values.integer("text_vocab_size", 2, VOCABULARY_MAX, default=vocab_size)
    if text_vocab_size != vocab_size or values.has("ignored_token_ids"):
        raise values.refusal(
            "text_vocab_size" if text_vocab_size != vocab_size else "ignored_token_ids",
            f"is there beside a vocabulary of {vocab_size}: ids that are no text count as none in this model's n-grams,"
            f" which this version cannot hash",
        )
    base = int(ratio * vocab_size)
    if not 1 <= base <= BASE_MAX - 2 * num_heads:
        raise values.refusal("ngram_vocab_size_ratio", f"is {ratio}, which makes {base} rows a head")
    moduli = tuple(base + 2 * head + 1 for head in range(num_heads))
    orders = tuple(2 + head // splits for head in range(num_heads))
    weights = tuple(
        pow(vocab_size, back, modulus) if back < order else 0
        for modulus, order in zip(moduli, orders, strict=True)
        for back in range(order_max)
    )
    largest = max(sum(weights[at : at + order_max]) for at in range(0, len(weights), order_max)) * vocab_size
    if largest > KEY_MAX:
        raise values.refusal("vocab_size", f"is {vocab_size}, whose n-grams add up to {largest}, more than {KEY_MAX}")
    layer = LayerHash(weights, moduli, sum(moduli))
    return HashParts(orders, 1, vocab_size, 0, eos_id, {LAYER: layer}, POLYNOMIAL)


def read_table(checkpoint: Checkpoint, parts: HashParts, layer: int) -> StoredTable:
    """Finds the heads' tensors and stacks them. One that was padded to more rows is cut to those that are looked up."""
    first = table_tensor_name(checkpoint, TABLE_PATTERN, TABLE_WORDS, layer)
    moduli = parts.layers[layer].moduli
    names = [re.sub(r"0\.weight$", f"{head}.weight", first) for head in range(len(moduli))]
    beyond = re.sub(r"0\.weight$", f"{len(moduli)}.weight", first)
    if beyond in checkpoint.names:
        raise ConfigError(
            f"{checkpoint.path}: there is a tensor {beyond}, config.json makes {len(moduli)} heads; config.json does "
            f"not belong to these tensors"
        )
    tensors, rows = stacked_rows(checkpoint, names, None)
    check_width(checkpoint, "hidden_size", rows[0].dim * len(moduli))
    cut = list(map(cut_rows, tensors, rows, moduli))
    planes = planes_of([tensor for tensor, _ in cut], [each for _, each in cut])
    return StoredTable(planes, rows[0].codec, rows[0].dim)


def plan_checkpoint(shape: SyntheticShape, tokenizer: Tokenizer, full: bool) -> SyntheticPlan:
    """Returns a checkpoint of this shape: the heads' tables and their projections; full: vocabulary as published."""
    if shape.layers != (LAYER,):
        raise ValueError(f"layers {', '.join(map(str, shape.layers))}: {NAME} has one table, of layer {LAYER}")
    vocab_size = PUBLISHED_VOCAB_SIZE if full else tokenizer.get_vocab_size(with_added_tokens=True)
    hidden = shape.dim * shape.num_heads
    ratio = shape.rows_per_head / vocab_size
    config: dict[str, Any] = {
        "model_type": "longcat_flash_ngram",
        "architectures": ["LongcatFlashNgramForCausalLM"],
        "vocab_size": vocab_size,
        "eos_token_id": min(PUBLISHED_EOS_ID, vocab_size - 1),
        "hidden_size": hidden,
        "num_layers": 1,
        "ngram_vocab_size_ratio": int(ratio) if ratio.is_integer() else ratio,
        "emb_neighbor_num": shape.order_max,
        "emb_split_num": shape.heads,
    }
    parts = read_hash(ConfigValues(config, NAME), None)
    codec, tensors = SYNTHETIC_CODECS[shape.dtype], []
    for head, table in enumerate(table_tensors(parts, LAYER, codec, shape.dim)):
        name = f"{PREFIX}post_projs.{head}.weight"
        tensors += [table, random_floats(name, table.dtype, (hidden, shape.dim))]
    return SyntheticPlan(config, parts, tensors, row_bytes_of(codec, shape.dim))


def read_dim(values: ConfigValues, parts: HashParts) -> int:
    """Reads how many values a row has: the model's hidden size, divided by the heads."""
    num_heads = len(parts.orders)
    width = values.integer("hidden_size", num_heads, ROW_BYTES_MAX * num_heads)
    if width % num_heads:
        raise values.refusal("hidden_size", f"is {width}, not a multiple of {num_heads} heads")
    return width // num_heads


def table_tensors(parts: HashParts, layer: int, codec: str, dim: int) -> list[PlannedTensor]:
    """Returns the heads' tensors under the names of LongCat-Flash-Lite; see `Family`."""
    return [
        random_floats(f"{PREFIX}embedders.{head}.weight", FLOAT_DTYPES[codec], (num_rows, dim))
        for head, num_rows in enumerate(parts.layers[layer].moduli)
    ]


FAMILY = Family(
    name=NAME,
    mark="ngram_vocab_size_ratio",
    other_marks=("oe_vocab_size_ratio",),
    needs_token_map=False,
    table_pattern=TABLE_PATTERN,
    table_words=TABLE_WORDS,
    read_hash=read_hash,
    read_table=read_table,
    read_dim=read_dim,
    table_tensors=table_tensors,
    synthetic=Synthetic(
        SyntheticShape((LAYER,), 4, 78 * PUBLISHED_VOCAB_SIZE, 256, 3072, "bf16", heads=4),
        SYNTHETIC_CODECS,
        plan_checkpoint,
    ),
)
