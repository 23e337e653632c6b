"""How tables lie over servers, each of which holds a slice: which keys, heads and rows are whose. Pure.

Input: the tables of every server, by name. Output: `Divided`s, one a table. Errors: `ConfigError` if slices leave rows
out, or hold the same ones; `FingerprintMismatchError` if they are not of one table.

Shapes: N tokens, O orders of the whole table, P columns of a slice's own keys, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from ..errors import ConfigError, FingerprintMismatchError
from ..spec import TableSpec


@dataclass(frozen=True)
class Part:
    """What one server holds of a table: rows [row_start, row_end), and if they are whole heads which ones.

    columns: which columns of the table's keys its own are, int64 [P]; heads [head_start, head_end) are theirs.
    """

    row_start: int
    row_end: int
    columns: np.ndarray
    head_start: int
    head_end: int

    def find(self, row_ids: np.ndarray) -> np.ndarray:
        """Returns where row ids, int64 [R], are of this part: indices, int64 [n]."""
        return np.flatnonzero((row_ids >= self.row_start) & (row_ids < self.row_end))


@dataclass(frozen=True)
class Divided:
    """One table. parts: of each server, in the order of the addresses. has_heads: if a key's rows are found by heads;
    else each by its row id."""

    spec: TableSpec
    parts: tuple[Part, ...]
    has_heads: bool


def divide(tables: Mapping[str, Sequence[TableSpec]]) -> list[Divided]:
    """Returns the tables that servers have together; tables: by the server's name, in the same order at each."""
    names = list(tables)
    first = tables[names[0]]
    for name in names[1:]:
        there, expected = ([spec.name for spec in specs] for specs in (tables[name], first))
        if there != expected:
            raise ConfigError(
                f"{name} has tables {', '.join(there)}, {names[0]} has {', '.join(expected)}: they are slices of "
                "different stores; give addresses of one store's slices"
            )
    return [_divide_one({name: tables[name][index] for name in names}) for index in range(len(first))]


def _divide_one(slices: Mapping[str, TableSpec]) -> Divided:
    name, spec = next(iter(slices.items()))
    whole = spec.whole or spec
    for other_name, other in slices.items():
        _check_same(whole, other.whole or other, name, other_name)
    _check_tiles(whole, slices)
    parts = [_part_of(spec) for spec in slices.values()]
    return Divided(whole, tuple(part for part, _ in parts), not whole.is_plain and all(fits for _, fits in parts))


def _part_of(spec: TableSpec) -> tuple[Part, bool]:
    """Returns a slice's part, and whether all of its rows but padding are of heads that it holds whole, in a row."""
    whole, first, end = spec.whole or spec, spec.row_start, spec.row_end
    heads = [(offset, offset + modulus) for modulus, offset in zip(whole.moduli, whole.offsets, strict=True)]
    touched = [number for number, head in enumerate(heads) if head[0] < end and first < head[1]]
    fits = all(first <= heads[number][0] and heads[number][1] <= end for number in touched)
    if not touched or not fits:
        return Part(first, end, np.empty(0, dtype=np.int64), 0, 0), fits
    head_start, head_end = touched[0], touched[-1] + 1
    return Part(first, end, spec.columns(whole.orders), head_start, head_end), head_end - head_start == len(touched)


def _check_same(expected: TableSpec, found: TableSpec, name: str, other_name: str) -> None:
    if expected.fingerprint != found.fingerprint:
        raise FingerprintMismatchError(
            f"table {expected.name}: {other_name} has it with another hash ({found.fingerprint[:12]}) than {name} "
            f"({expected.fingerprint[:12]}): they are slices of different models; give addresses of one store's slices"
        )
    for field in fields(expected):
        here, there = getattr(expected, field.name), getattr(found, field.name)
        if here != there:
            raise ConfigError(
                f"table {expected.name}: {other_name} has {field.name} {_short(there)}, {name} has {_short(here)}: "
                "they are slices of different stores; give addresses of one store's slices"
            )


def _check_tiles(whole: TableSpec, slices: Mapping[str, TableSpec]) -> None:
    """Raises `ConfigError` unless every row is in one slice."""
    at, before = 0, ""
    for name, spec in sorted(slices.items(), key=lambda each: (each[1].row_start, each[1].row_end)):
        if spec.row_start > at:
            raise _missing(whole, at, spec.row_start)
        if spec.row_start < at:
            raise ConfigError(
                f"table {whole.name}: {before} and {name} both hold rows {spec.row_start} to {min(at, spec.row_end)} "
                f"of {whole.num_rows}; give one of them, or, if they are replicas, write '{before}|{name}'"
            )
        at, before = spec.row_end, name
    if at < whole.num_rows:
        raise _missing(whole, at, whole.num_rows)


def _missing(whole: TableSpec, start: int, end: int) -> ConfigError:
    return ConfigError(
        f"table {whole.name}: no address given holds rows {start} to {end} of {whole.num_rows}; add the one that does"
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
