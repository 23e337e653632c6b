"""A swapped model that is saved: its tables are written too, from the store, so that it loads with the trained rows.

Input: a class of transformers models, one of which was swapped. Output: the same class, whose `save_pretrained` adds
the tables of swapped modules to what it writes. Errors: `ConfigError` for ways of saving that would leave them out,
because transformers fills what a checkpoint lacks with random rows. transformers itself is not imported.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from tierstore.causes import named
from tierstore.errors import ConfigError
from tierstore.units import format_bytes

from ...row_id_embedding import RowIdEmbedding

logger = logging.getLogger("tierstore")

PIECE_BYTES = 16 << 20  # of rows that are read at once


def save_with_tables(model_class: type) -> None:
    """Has `save_pretrained` of a model's class, and of those that it derives from, write swapped tables. Twice is once.

    The class is changed and not the model: a model that contains this one, or a copy of it, is saved by its own class.
    """
    for each in model_class.__mro__:
        original = vars(each).get("save_pretrained")
        if callable(original) and not hasattr(original, "saves_swapped_tables"):
            each.save_pretrained = _with_tables(original)  # type: ignore[attr-defined]


def _with_tables(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, *arguments: Any, **options: Any) -> Any:
        tables = _swapped_tables(self)
        only_adapters = getattr(self, "_hf_peft_config_loaded", False)
        if not tables or only_adapters:
            return original(self, *arguments, **options)
        call = signature.bind(self, *arguments, **options)
        if not call.arguments.get("is_main_process", True):
            return original(self, *arguments, **options)
        _check_way(self, call.arguments, tables)
        folder = call.arguments["save_directory"]
        state = call.arguments.get("state_dict")
        state = dict(self.state_dict() if state is None else state)
        with contextlib.ExitStack() as files:
            for key, table in tables.items():
                if key not in state:
                    state[key] = files.enter_context(_written(folder, key, table))
            call.arguments["state_dict"] = state
            return original(*call.args, **call.kwargs)

    save_pretrained.saves_swapped_tables = True  # type: ignore[attr-defined]
    return save_pretrained


def _swapped_tables(model: torch.nn.Module) -> dict[str, RowIdEmbedding]:
    """Returns the swapped modules by the names of the weights that they stand for."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, RowIdEmbedding) and module.stands_for_weight
    }


def _check_way(model: Any, arguments: dict[str, Any], tables: dict[str, RowIdEmbedding]) -> None:
    """Raises `ConfigError` for ways of saving that take no state_dict, and so would leave the tables out."""
    quantizer = getattr(model, "hf_quantizer", None)
    way = "distributed_checkpoint=True" if arguments.get("distributed_checkpoint") else None
    way = f"a model with {type(quantizer).__name__}" if quantizer is not None else way
    if way is not None:
        raise ConfigError(
            f"save_pretrained of {way} would leave out {', '.join(tables)}, whose rows are in the store: whoever loads "
            "the folder would get random rows; save without it, "
            "or save model.state_dict() and swap again after loading"
        )


@contextlib.contextmanager
def _written(folder: str | os.PathLike[str], key: str, table: RowIdEmbedding) -> Iterator[torch.Tensor]:
    """Yields a table's rows, [num_rows, dim], in a file of `folder` that has no name and goes with them.
    Blocks on the disk.

    So a table that is larger than memory can be saved. Raises `BudgetError` if the disk has no room,
    and what lookups raise.
    """
    num_bytes = table.num_embeddings * table.embedding_dim * table.weight.element_size()
    logger.warning("%s: %s of rows are read from the store and saved with the model", key, format_bytes(num_bytes))
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # a map of a file that cannot grow would end the process
        except OSError as error:
            note = f"{key} lies here while the model is saved, and takes as much again in its file"
            raise named(error, os.fspath(folder), folder, writing=True, needed_bytes=num_bytes, note=note) from error
        memory: np.ndarray = np.memmap(file, dtype=np.uint8, mode="r+", shape=(num_bytes,))
        values = torch.from_numpy(memory).view(table.weight.dtype).view(table.num_embeddings, table.embedding_dim)
        table.copy_rows_to(values, PIECE_BYTES)
        yield values
