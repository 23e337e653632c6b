"""How the files of `families/` find a table's tensors in a checkpoint, and check them against its configuration.

Input: a `Checkpoint`, a tensor's name or pattern, what config.json makes of it. Output: tensors and planes. Errors:
`ConfigError` for tensors that are missing, there several times, packed, of another dtype or width, or that disagree
with config.json.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tierstore import ConfigError
from tierstore.formats.checkpoint import Checkpoint, Plane
from tierstore.formats.stored_tensor import StoredTensor

from .family import text_values
from .hash_config import PADDING_MAX
from .packings import StoredRows
from .scales import VALUE_CODECS, refuse_packed_name, rows_of_weight


def table_tensor_name(checkpoint: Checkpoint, pattern: str, words: str, layer: int) -> str:
    """Returns the full name of the one tensor that fits a family's `table_pattern`; the error has its `table_words`."""
    matcher = re.compile(rf"(?:^|\.){pattern.format(layer=layer)}$")
    names = [name for name in checkpoint.names if matcher.search(name)]
    if len(names) != 1:
        found = f"are several such tensors: {', '.join(names)}" if names else "is no such tensor"
        raise ConfigError(f"{checkpoint.path}: there {found} ({words.format(layer=layer)}); {checkpoint.why_missing()}")
    return names[0]


def stored_rows(checkpoint: Checkpoint, name: str) -> tuple[StoredTensor, StoredRows]:
    """Returns a table's tensor and how its rows are stored, in whatever packing `packings.py` knows.

    Raises `ConfigError` if the tensor is missing, has no rows, or is packed in a way that no codec holds.
    """
    dtypes = list(VALUE_CODECS)
    found = checkpoint.tensors.get(name)
    weight = checkpoint.tensor(name, [*dtypes, found.dtype] if found else dtypes, 2)
    rows = rows_of_weight(checkpoint, weight)
    if rows.codec == "raw":
        weight = checkpoint.tensor(name, dtypes, 2)
    return weight, rows


def stacked_rows(
    checkpoint: Checkpoint, names: Sequence[str], num_rows: int | None
) -> tuple[list[StoredTensor], list[StoredRows]]:
    """Returns the tensors that hold a table, one part of its rows after another, all stored alike.

    Rows beyond `num_rows`, with which some tools fill up the last part, are cut off, unless it is None.

    Raises `ConfigError` if parts are of other types or widths, or carry scales of their own where a table has one.
    """
    parts = [stored_rows(checkpoint, name) for name in names]
    (first, first_rows), *_ = parts
    for tensor, rows in parts:
        if (tensor.dtype, rows.dim) != (first.dtype, first_rows.dim):
            raise ConfigError(
                f"{tensor.name} is {tensor.dtype} of {rows.dim} columns, {first.name} is {first.dtype} of "
                f"{first_rows.dim}; the parts of one table must agree: a file of another checkpoint is among them"
            )
        if rows.codec != first_rows.codec:
            raise ConfigError(
                f"{checkpoint.path}: {tensor.name} is stored as {rows.codec}, {first.name} as {first_rows.codec}: "
                f"parts with scales of their own, and a table can carry one; dequantize it to BF16 first"
            )
    beyond = 0 if num_rows is None else sum(rows.num_rows for _, rows in parts) - num_rows
    if 0 < beyond <= PADDING_MAX:
        parts[-1] = cut_rows(*parts[-1], parts[-1][1].num_rows - beyond)
    return [tensor for tensor, _ in parts], [rows for _, rows in parts]


def cut_rows(weight: StoredTensor, rows: StoredRows, num_rows: int) -> tuple[StoredTensor, StoredRows]:
    """Returns the first rows of a padded tensor; raises `ConfigError` for too few, or more than anyone pads."""
    planes = [weight] if rows.scales is None else [weight, rows.scales]
    fits = 0 < num_rows <= rows.num_rows <= num_rows + PADDING_MAX
    if not fits or any(plane.shape[0] != rows.num_rows for plane in planes):
        raise ConfigError(
            f"{weight.name} has {rows.num_rows} rows, config.json makes {num_rows} of them; config.json does not "
            f"belong to these tensors"
        )
    cut = [plane.first_rows(num_rows) for plane in planes]
    return cut[0], replace(rows, num_rows=num_rows, scales=cut[1] if len(cut) > 1 else None)


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
