"""Puts a store under a transformers model of the qwen4_exp family, instead of its resident n-gram tables.

Input: a loaded model, or one on the meta device, and an open store that was built from the same checkpoint. Output: the
same model, each n-gram `nn.Embedding` replaced by a `RowIdEmbedding`, the resident tables freed.
Errors: `ConfigError` and `FingerprintMismatchError`, before anything is changed, for tables of another shape, dtype or
hash. transformers itself is not imported: the model brings its own classes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from tierstore.errors import ConfigError, FingerprintMismatchError

from ...codecs import codec_dtype
from ...hash_spec import HashSpec
from ...row_id_embedding import RowIdEmbedding
from ...store_module import check_fingerprint
from .prefetch import ReadAhead
from .saved_tables import save_with_tables

if TYPE_CHECKING:
    from tierstore.store.store import Store

_HASH_MODULE = re.compile(r"(?:^|\.)layers\.(\d+)\.ple\.ple_embedding$")


def swap_embedding(model: torch.nn.Module, store: Store) -> list[str]:
    """Replaces every resident n-gram table of a qwen4_exp `model` by lookups in `store`; returns the modules' names.

    Works on `Qwen4ExpForCausalLM` and the models that contain it, on any device; rows come to where the table was. A
    model on the meta device, whose other weights are loaded afterwards, has its hash checked in its first forward.
    Either every table is swapped or, on an error, none. Raises `ConfigError` if the model holds no such table, or
    the store's has another number of rows, dim or dtype; `FingerprintMismatchError` if it was built with another
    hash.

    The reads of all tables start with the model's forward, so that earlier layers hide them.
    `save_pretrained` of a swapped model reads the tables from the store and writes them too, piece by piece, so that
    `from_pretrained` of that folder has the trained rows. `state_dict()` has none of them.
    """
    spec, names = put_in_place(model, store)
    for name in names:
        module = model.get_submodule(name)
        if without_values(module):
            module.register_forward_pre_hook(_HashCheck(name, spec))
    save_with_tables(type(model))
    return [f"{name}.ngram_embedding" for name in names]


def put_in_place(model: torch.nn.Module, store: Store) -> tuple[HashSpec, list[str]]:
    """Replaces every table of `model`, all or none, and returns its hash and the names of the modules that have one.

    Hash buffers on the meta device are not checked: `check_hash` does it once they have their values. Raises as
    `swap_embedding` does.
    """
    found = [each for each in hash_modules(model) if isinstance(each[2].ngram_embedding, torch.nn.Embedding)]
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no layers.*.ple.ple_embedding.ngram_embedding that is an nn.Embedding; "
            f"pass a qwen4_exp model of transformers with ple_layer_ids that was not swapped before"
        )
    spec = hash_of(model)
    swapped = {name: _checked(name, module, layer, store, spec) for name, layer, module in found}
    for name, _, module in found:
        if not without_values(module):
            check_hash(name, module, spec)
    for name, _, module in found:
        device = module.ngram_embedding.weight.device
        module.ngram_embedding = swapped[name] if device.type == "meta" else swapped[name].to(device)
        swapped[name].stands_for_weight = True
    for owner in dict.fromkeys(name.rpartition("layers.")[0] for name in swapped):
        below = [name.removeprefix(owner) for name in swapped if name.rpartition("layers.")[0] == owner]
        text_model = model.get_submodule(owner.removesuffix("."))
        text_model.register_forward_pre_hook(ReadAhead(below, spec), with_kwargs=True)
    return spec, list(swapped)


def hash_of(model: Any) -> HashSpec:
    """Returns the hash that the text part of a model's configuration describes."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ConfigError(f"{type(model).__name__} carries no transformers configuration; pass the whole model")
    return HashSpec.from_config(config.get_text_config().to_dict())


def check_hash(name: str, module: Any, spec: HashSpec) -> None:
    """Raises `FingerprintMismatchError` unless a module's own buffers, which come from the checkpoint, are `spec`'s."""
    layer = _layer_of(name)
    buffers = (module.layer_multipliers, module.ngram_heads_vocab_sizes, module.ngram_heads_offsets)
    expected = (spec.multipliers(layer), spec.moduli(layer), spec.offsets(layer))
    for buffer, numbers in zip(buffers, expected, strict=True):
        if buffer.tolist() != list(numbers):
            raise FingerprintMismatchError(
                f"{name} hashes with {buffer.tolist()}, its configuration says {list(numbers)}; "
                f"every row would be a wrong one: load the model from the checkpoint that the store was built from"
            )


class _HashCheck:
    """A forward pre-hook of a hash module that had no values when it was swapped: checks them once they are there."""

    def __init__(self, name: str, spec: HashSpec) -> None:
        self._name, self._spec, self._done = name, spec, False

    def __call__(self, module: torch.nn.Module, _arguments: Any) -> None:
        if not self._done and not torch.compiler.is_compiling() and not without_values(module):
            check_hash(self._name, module, self._spec)
            self._done = True


def without_values(module: Any) -> bool:
    """Whether a hash module's buffers are on the meta device."""
    is_meta: bool = module.layer_multipliers.is_meta
    return is_meta


def hash_modules(model: torch.nn.Module) -> list[tuple[str, int, Any]]:
    """Returns name, 0-based layer and module of every n-gram hash that has a table."""
    return [
        (name, _layer_of(name), module)
        for name, module in model.named_modules()
        if _HASH_MODULE.search(name) and hasattr(module, "ngram_embedding")
    ]


def _layer_of(name: str) -> int:
    """Returns the 0-based layer of a hash module."""
    match = _HASH_MODULE.search(name)
    assert match is not None
    return int(match[1])


def _checked(name: str, module: Any, layer: int, store: Store, spec: HashSpec) -> RowIdEmbedding:
    """Returns the replacement of one table after holding the store's against the resident one and the model's hash."""
    replacement = RowIdEmbedding(store, layer)
    table, resident = store.tables[f"layers.{layer}"], module.ngram_embedding
    check_fingerprint(table, spec, layer)
    stored = (table.spec.num_rows, table.spec.dim, codec_dtype(table.spec.codec))
    found = (resident.num_embeddings, resident.embedding_dim, resident.weight.dtype)
    if stored != found:
        raise ConfigError(
            f"{name}: the model's table is {found[0]} rows of {found[1]} {found[2]}, the store's {table.spec.name} is "
            f"{stored[0]} rows of {stored[1]} {stored[2]}; build the store from this model's checkpoint, or load the "
            f"model in the table's dtype"
        )
    return replacement
