"""A checkpoint's n-gram tables, as a build streams them: found by family, or one tensor taken as a plain table.

Input: a `Checkpoint`, perhaps the name of a family or of a tensor. Output: a `Model`, its hash and a `TableSource` for
each table. Errors: `ConfigError` for checkpoints whose tensors, scales or hash buffers disagree with their
configuration: their rows would be wrong.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tierstore import ConfigError, TableSpec
from tierstore.formats.checkpoint import Checkpoint, TableSource

from .family import FAMILIES, Family, StoredTable, family_named, family_of_config, refuse_unread
from .hash_spec import HashSpec, spec_of_parts
from .scales import rows_of_weight
from .table_tensors import planes_of
from .token_map import build_token_map


@dataclass(frozen=True)
class Model:
    """A checkpoint's n-gram tables: family, hash, and the table of each layer."""

    family: str
    hash_spec: HashSpec
    sources: tuple[TableSource, ...]


def read_model(checkpoint: Checkpoint, family: str | None = None) -> Model:
    """Finds the tables of a checkpoint. Reads headers and small tensors, no rows; a token map takes a second or two.

    Args:
        checkpoint: An open checkpoint; its tokenizer.json is read if the family's hash has a token map.
        family: The name of a family; by default it is found from the tensors' names and config.json.

    Raises:
        ConfigError: Something is missing or contradicts itself; the message has both numbers.
        FormatError: tokenizer.json is not a tokenizer.
    """
    if not checkpoint.config:
        raise ConfigError(
            f"{checkpoint.path} has no config.json, which says how rows are hashed; give the checkpoint's whole "
            f"folder, or take one tensor as a plain table with --tensor"
        )
    found = family_named(family) if family else _family_of(checkpoint)
    token_map = build_token_map(checkpoint.path / "tokenizer.json") if found.needs_token_map else None
    parts = found.hash_of(checkpoint.config, token_map)
    spec = spec_of_parts(found, parts, token_map)
    sources = (_source(spec, layer, found.read_table(checkpoint, parts, layer)) for layer in spec.layers)
    return Model(found.name, spec, tuple(sources))


def plain_source(checkpoint: Checkpoint, tensor_name: str) -> TableSource:
    """Returns any 2-D tensor of a checkpoint as a plain table of its name: row id = key.

    Scales that belong to the tensor (`scales.py`) become part of the rows or of the codec. Raises `ConfigError` for a
    tensor that is not there, is not 2-D, or whose bytes are not its values one row after another.
    """
    name = checkpoint.full_name(tensor_name)
    tensor = checkpoint.tensors.get(name)
    if tensor is None and name in checkpoint.unusable:
        raise ConfigError(f"{checkpoint.path}: tensor {tensor_name!r} {checkpoint.unusable[name]}")
    if tensor is None or len(tensor.shape) != 2:
        if tensor is None and checkpoint.absent_files:
            raise ConfigError(f"{checkpoint.path}: tensor {tensor_name!r} is missing; {checkpoint.why_missing()}")
        found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
        names = [name for name, other in checkpoint.tensors.items() if len(other.shape) == 2]
        raise ConfigError(
            f"{checkpoint.path}: tensor {tensor_name!r} is {found}; 2-D tensors are: "
            f"{', '.join(sorted(names)[:10]) or 'none'}"
        )
    if 0 in tensor.shape:
        raise ConfigError(
            f"{checkpoint.path}: tensor {tensor_name!r} is empty, {tensor.shape[0]} x {tensor.shape[1]}; there is no "
            "row to store"
        )
    rows = rows_of_weight(checkpoint, tensor)
    planes = planes_of([tensor], [rows])
    row_bytes = sum(plane.width_bytes for plane in planes)
    return TableSource(TableSpec.plain(tensor_name, rows.num_rows, row_bytes, rows.codec, rows.dim), planes)


def _family_of(checkpoint: Checkpoint) -> Family:
    """Returns the one family whose tables the checkpoint has; if names fit none or several, config.json decides."""
    refuse_unread(checkpoint.config)
    fitting = [family for family in FAMILIES.values() if _has_tables_of(checkpoint, family)]
    return fitting[0] if len(fitting) == 1 else family_of_config(checkpoint.config)


def _has_tables_of(checkpoint: Checkpoint, family: Family) -> bool:
    matcher = re.compile(rf"(?:^|\.){family.table_pattern.format(layer='[0-9]+')}$")
    return any(matcher.search(name) for name in checkpoint.names)


def _source(spec: HashSpec, layer: int, stored: StoredTable) -> TableSource:
    """Puts table and planes together; `TableSource` refuses row counts that disagree."""
    table = TableSpec(
        name=spec.table_name(layer),
        num_rows=spec.num_rows(layer),
        row_bytes=sum(plane.width_bytes for plane in stored.planes),
        orders=spec.orders,
        rows_per_key=spec.heads,
        moduli=spec.moduli(layer),
        offsets=spec.offsets(layer),
        codec=stored.codec,
        dim=stored.dim,
        fingerprint=spec.fingerprint(layer),
    )
    return TableSource(table, stored.planes)
