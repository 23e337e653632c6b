"""The tensors of a store's tables, under the names that their models give them, when no checkpoint is there to copy.

Input: table specs, and the hash that a store keeps. Output: for each tensor its name, type, shape, and which bytes of
which rows it holds. Errors: `ConfigError` for tables whose names or types nobody can know.

Tables of a family have the names that the family publishes; a plain table's tensor is called as the table is. FORMAT.md
lists all of them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tierstore.codec import parse_codec
from tierstore.errors import ConfigError
from tierstore.spec import TableSpec

from .family import family_named
from .hash_config import HashParts
from .hash_spec import HashSpec
from .scales import SCALE_BLOCK
from .synthetic import FLOAT_DTYPES, PlannedTensor


@dataclass(frozen=True)
class NamedTensor:
    """A tensor to write.

    Attributes:
        name: In the checkpoint.
        dtype: As safetensors names it.
        shape: Its sizes.
        num_bytes: Of its data.
        values: Its bytes, if they are known; else it holds rows of `table`.
        table: Name of the table.
        row_start: The first row that it holds.
        column_start: The first byte of a row that it holds.
        width_bytes: Bytes that it holds of each row.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    values: bytes | None = None
    table: str = ""
    row_start: int = 0
    column_start: int = 0
    width_bytes: int = 0


def tensors_of_tables(specs: Sequence[TableSpec], hash_spec: HashSpec | None) -> list[NamedTensor]:
    """Returns the tensors of all tables. hash_spec: of those that are not plain.

    Raises `ConfigError` for a codec that names no types of tensors ("raw"), or a family that names no tensors.
    """
    tensors: list[NamedTensor] = []
    for spec in specs:
        if spec.is_plain:
            planned = _plain_tensors(spec)
        else:
            assert hash_spec is not None
            planned = _family_tensors(spec, hash_spec)
        tensors += _placed(spec, planned)
    return tensors


def _family_tensors(spec: TableSpec, hash_spec: HashSpec) -> list[PlannedTensor]:
    family = family_named(hash_spec.family)
    if family.table_tensors is None:
        raise ConfigError(
            f"table {spec.name}: family {family.name} does not name its tensors; give --source CHECKPOINT"
        )
    _check_codec(spec)
    parts = HashParts(
        hash_spec.orders, hash_spec.heads, hash_spec.vocab_size, hash_spec.pad_id, hash_spec.barrier_id,
        dict(hash_spec.layer_hashes), hash_spec.kind,
    )  # fmt: skip
    layer = next(number for number in hash_spec.layers if hash_spec.table_name(number) == spec.name)
    try:
        return family.table_tensors(parts, layer, spec.codec, spec.dim)
    except KeyError:
        raise ConfigError(
            f"table {spec.name}: tables of {family.name} are not published as {spec.codec}; give --source CHECKPOINT"
        ) from None


def _plain_tensors(spec: TableSpec) -> list[PlannedTensor]:
    codec = _check_codec(spec)
    module, dot, leaf = spec.name.rpartition(".")
    beside = f"{module}{dot}weight_scale" if leaf == "weight" else f"{spec.name}_scale"
    shape = (spec.num_rows, spec.dim)
    if codec in FLOAT_DTYPES:
        return [PlannedTensor(spec.name, FLOAT_DTYPES[codec], shape)]
    rows = PlannedTensor(spec.name, "F8_E4M3", shape)
    if parse_codec(codec).scale:
        return [rows, PlannedTensor(beside, "F8_E8M0", (spec.num_rows, spec.dim // SCALE_BLOCK))]
    factor = parse_codec(codec).factor
    return [rows] if factor == 1.0 else [rows, PlannedTensor(beside, "F32", (), values=struct.pack("<f", factor))]


def _check_codec(spec: TableSpec) -> str:
    codec = parse_codec(spec.codec)
    is_fp8 = codec.values == "fp8_e4m3" and codec.scale in ("", "e8m0")
    if spec.codec not in FLOAT_DTYPES and not is_fp8:
        raise ConfigError(
            f"table {spec.name}: rows of codec {spec.codec!r} do not say which tensors they were; give --source "
            f"CHECKPOINT, whose names and types are taken"
        )
    return spec.codec


def _placed(spec: TableSpec, planned: Sequence[PlannedTensor]) -> Iterator[NamedTensor]:
    """Yields the tensors with the rows and columns that they hold: plane after plane, stacked in the order of rows."""
    row, column = 0, 0
    for each in planned:
        if each.values is not None:
            yield NamedTensor(each.name, each.dtype, each.shape, each.num_bytes, each.values)
            continue
        width = each.num_bytes // each.shape[0]
        yield NamedTensor(each.name, each.dtype, each.shape, each.num_bytes, None, spec.name, row, column, width)
        row += each.shape[0]
        if row == spec.num_rows:
            row, column = 0, column + width
    assert (row, column) == (0, spec.row_bytes), spec.name
