"""Puts a training under a transformers model of the qwen4_exp family: its n-gram tables are trained where they lie.

Input: a model whose tables are resident, or swapped for a store's, and an open training of the same checkpoint. Output:
the model's new embeddings, for a `TableOptimizer`. Errors: as of `swap_embedding`, before anything is changed.
transformers itself is not imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tierstore.errors import ConfigError

from ...row_id_embedding import RowIdEmbedding
from ...store_module import check_fingerprint, named_table
from ...trainable import TrainableRows, trained_tables
from ...trainable_module import Groups, TrainableModule
from .swap import check_hash, hash_modules, hash_of, without_values

if TYPE_CHECKING:
    from tierstore import Training


def swap_trainable(
    model: torch.nn.Module, training: Training, *, quantized: bool = False, groups: Groups = "sequence"
) -> list[TrainableModule]:
    """Replaces every n-gram table of a qwen4_exp `model` by rows of `training`; returns the new embeddings.

    The model may have its tables in memory, or be one of `load_pretrained` or `swap_embedding`. Rows come out in the
    model's own dtype, as the training has them. `state_dict()` and `save_pretrained` have none of them: they are in
    the training's commits, and `tierstore export` writes them.

    Args:
        model: On the CPU or a device, not the meta device.
        training: Of a store that was built from the model's checkpoint.
        quantized: As of `TrainableEmbedding`.
        groups: As of `TrainableEmbedding`.

    Raises:
        ConfigError: The model has no such table, or the training's has another number of rows or dim.
        FingerprintMismatchError: The store was built with another hash.
    """
    for name, _, module in hash_modules(model):
        if without_values(module):
            raise ConfigError(f"{name} is on the meta device: load the model's weights first, or use load_trainable")
    put_trainable(model, training, quantized, groups)
    return trained_tables(model)


def put_trainable(model: torch.nn.Module, training: Training, quantized: bool, groups: Groups) -> list[str]:
    """Does what `swap_trainable` says, all tables or none, and returns the names of the modules that hash.

    On the meta device hash buffers are not checked: `check_hash` does it once they have their values.
    """
    spec = hash_of(model)
    found = [each for each in hash_modules(model) if isinstance(each[2].ngram_embedding, _REPLACED)]
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no layers.*.ple.ple_embedding.ngram_embedding to train; pass a qwen4_exp "
            "model of transformers with ple_layer_ids whose tables are not trained already"
        )
    swapped = []
    for name, layer, module in found:
        check_fingerprint(named_table(training, f"layers.{layer}"), spec, layer)
        swapped.append(_checked(name, module.ngram_embedding, layer, training, quantized, groups))
        if not without_values(module):
            check_hash(name, module, spec)
    for (_, _, module), replacement in zip(found, swapped, strict=True):
        device = module.ngram_embedding.weight.device
        module.ngram_embedding = replacement if device.type == "meta" else replacement.to(device)
    return [name for name, _, _ in found]


_REPLACED = (torch.nn.Embedding, RowIdEmbedding)


def _checked(
    name: str, replaced: Any, layer: int, training: Training, quantized: bool, groups: Groups
) -> TrainableRows:
    """Returns the replacement of one table, after holding the training's against the model's."""
    made = TrainableRows(training, layer, replaced.weight.dtype, quantized, groups)
    expected, found = (replaced.num_embeddings, replaced.embedding_dim), (made.num_embeddings, made.embedding_dim)
    if found != expected:
        raise ConfigError(
            f"{name}: the model's table is {expected[0]} rows of {expected[1]} values, the training's "
            f"{made.table_spec.name} {found[0]} of {found[1]}: open the store that was built from this checkpoint"
        )
    return made
