"""Puts a store under a transformers model of the qwen4_exp family, instead of its resident n-gram tables.

Input: a loaded model and an open store that was built from the same checkpoint. Output: the same model, each n-gram
`nn.Embedding` replaced by a `RowIdEmbedding`, the resident tables freed.
Errors: `ConfigError` and `FingerprintMismatchError`, before anything is changed, for tables of another shape, dtype or
hash. transformers itself is not imported: the model brings its own classes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from tierstore.errors import ConfigError, FingerprintMismatchError

from .codecs import codec_dtype
from .embedding import RowIdEmbedding, check_fingerprint
from .hash_spec import HashSpec
from .saved_tables import save_with_tables

if TYPE_CHECKING:
    from tierstore.store.store import Store

_HASH_MODULE = re.compile(r"(?:^|\.)layers\.(\d+)\.ple\.ple_embedding$")


def swap_embedding(model: torch.nn.Module, store: Store) -> list[str]:
    """Replaces every resident n-gram table of a qwen4_exp `model` by lookups in `store`; returns the modules' names.

    Works on `Qwen4ExpForCausalLM` and the models that contain it, on any device; rows come to where the table was.
    Either every table is swapped or, on an error, none. Raises `ConfigError` if the model holds no such table, or
    the store's has another number of rows, dim or dtype; `FingerprintMismatchError` if it was built with another
    hash.

    `save_pretrained` of a swapped model reads the tables from the store and writes them too, piece by piece, so that
    `from_pretrained` of that folder has the trained rows. `state_dict()` has none of them.
    """
    found = _resident_tables(model)
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no layers.*.ple.ple_embedding.ngram_embedding that is an nn.Embedding; "
            f"pass a qwen4_exp model of transformers with ple_layer_ids that was not swapped before"
        )
    spec = HashSpec.from_config(_text_config(model))
    swapped = {name: _checked(name, module, layer, store, spec) for name, layer, module in found}
    for name, _, module in found:
        device = module.ngram_embedding.weight.device
        module.ngram_embedding = swapped[name].to(device)
        swapped[name].stands_for_weight = True
    save_with_tables(type(model))
    return [f"{name}.ngram_embedding" for name in swapped]


def _resident_tables(model: torch.nn.Module) -> list[tuple[str, int, Any]]:
    """Returns name, 0-based layer and module of every n-gram hash whose table is still resident."""
    found = []
    for name, module in model.named_modules():
        match = _HASH_MODULE.search(name)
        if match and isinstance(getattr(module, "ngram_embedding", None), torch.nn.Embedding):
            found.append((name, int(match[1]), module))
    return found


def _text_config(model: Any) -> dict[str, Any]:
    """Returns the text part of a transformers configuration as a dict."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ConfigError(f"{type(model).__name__} carries no transformers configuration; pass the whole model")
    record: dict[str, Any] = config.get_text_config().to_dict()
    return record


def _checked(name: str, module: Any, layer: int, store: Store, spec: HashSpec) -> RowIdEmbedding:
    """Returns the replacement of one table after holding the store's against the resident one and the model's hash."""
    replacement = RowIdEmbedding(store, layer)
    table, resident = store.tables[f"layers.{layer}"], module.ngram_embedding
    check_fingerprint(table, spec, layer)
    stored = (table.spec.num_rows, table.spec.dim, codec_dtype(table.spec.codec))
    found = (resident.num_embeddings, resident.embedding_dim, resident.weight.dtype)
    if stored != found:
        raise ConfigError(
            f"{name}: the resident table is {found[0]} rows of {found[1]} {found[2]}, the store's {table.spec.name} is "
            f"{stored[0]} rows of "
            f"{stored[1]} {stored[2]}; build the store from this model's checkpoint, or load the model in the "
            f"table's dtype"
        )
    # The module hashes with its own buffers, which come from the checkpoint: they must be the configuration's hash too.
    buffers = (module.layer_multipliers, module.ngram_heads_vocab_sizes, module.ngram_heads_offsets)
    expected = (spec.multipliers(layer), spec.moduli(layer), spec.offsets(layer))
    for buffer, numbers in zip(buffers, expected, strict=True):
        if buffer.tolist() != list(numbers):
            raise FingerprintMismatchError(
                f"{name} hashes with {buffer.tolist()}, its configuration says {list(numbers)}; "
                f"every row would be a wrong one: load the model from the checkpoint that the store was built from"
            )
    return replacement
