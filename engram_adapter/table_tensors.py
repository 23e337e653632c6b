"""How the files of `families/` find a table's tensors in a checkpoint, and check them against its configuration.

Input: a `Checkpoint`, a tensor's name or pattern, what config.json makes of it. Output: tensors and planes. Errors:
`ConfigError` for tensors that are missing, there several times, packed, of another dtype or width, or that disagree
with config.json.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from tierstore import ConfigError
from tierstore.formats.checkpoint import Checkpoint, Plane
from tierstore.formats.stored_tensor import StoredTensor

from .family import text_values
from .packings import StoredRows
from .scales import refuse_packed_name


def table_tensor_name(checkpoint: Checkpoint, pattern: str, words: str, layer: int) -> str:
    """Returns the full name of the one tensor that fits a family's `table_pattern`; the error has its `table_words`."""
    matcher = re.compile(rf"(?:^|\.){pattern.format(layer=layer)}$")
    names = [name for name in checkpoint.names if matcher.search(name)]
    if len(names) != 1:
        found = f"are several such tensors: {', '.join(names)}" if names else "is no such tensor"
        raise ConfigError(f"{checkpoint.path}: there {found} ({words.format(layer=layer)}); {checkpoint.why_missing()}")
    return names[0]


def weight_tensor(checkpoint: Checkpoint, name: str, dtypes: list[str]) -> StoredTensor:
    """Returns a table's tensor; raises `ConfigError` if it is missing, packed, or of another dtype or rank."""
    refuse_packed_name(checkpoint, name)
    return checkpoint.tensor(name, dtypes, 2)


def planes_of(tensors: Sequence[StoredTensor], rows: Sequence[StoredRows]) -> tuple[Plane, ...]:
    """Returns the planes of a table whose tensors are stacked by rows: values, and scales if rows carry their own."""
    planes = [Plane(tensors[0].num_bytes // rows[0].num_rows, tuple(tensors))]
    scales = tuple(each.scales for each in rows if each.scales is not None)
    if scales:
        planes.append(Plane(scales[0].num_bytes // rows[0].num_rows, scales))
    return tuple(planes)


def configured_integer(checkpoint: Checkpoint, key: str) -> int | None:
    """Returns an integer of config.json, None if it gives none; `HashSpec` checks what the hash needs."""
    value = text_values(checkpoint.config).get(key)
    return value if type(value) is int else None


def check_width(checkpoint: Checkpoint, key: str, found: int) -> None:
    """Refuses columns that are not as many as config.json says under `key`."""
    expected = configured_integer(checkpoint, key)
    if expected not in (None, found):
        raise ConfigError(
            f"{checkpoint.path}: config.json says {key} {expected}, its tensors' columns make {found}; "
            f"config.json does not belong to these tensors"
        )


def check_buffer(checkpoint: Checkpoint, name: str, expected: tuple[int, ...]) -> None:
    """Compares a hash buffer that the checkpoint carries with ours: if they differ, its rows are not where we look."""
    if name not in checkpoint.tensors:
        return
    tensor = checkpoint.tensors[name]
    if tensor.dtype != "I64":
        raise ConfigError(f"{name} is {tensor.dtype}, expected I64; the checkpoint is damaged")
    found = tuple(np.frombuffer(tensor.read_bytes(), "<i8").tolist())
    if found != expected:
        unequal = (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b)
        differ = next(unequal, min(len(found), len(expected)))
        raise ConfigError(
            f"{name} has {len(found)} values, {found[differ : differ + 1]} at {differ}; config.json gives "
            f"{len(expected)}, {expected[differ : differ + 1]}: the model was trained with another hash than its "
            "config.json says"
        )
