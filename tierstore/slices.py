"""Slices: a table cut into contiguous ranges of rows, which lie in stores of their own.

Input: a table's heads, and a range of its rows or how many slices to make. Output: where slices begin, and which heads
a range holds whole. Pure. Errors: `ConfigError` for a slice that does not exist, or has no row.

Shapes: O orders, H rows per key (heads of an order).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from .errors import ConfigError
from .kernels import ORDERS_MAX

SLICES_MAX = 1 << 16


class Heads(Protocol):
    """What `slice_bounds` needs of a `TableSpec`."""

    @property
    def name(self) -> str: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def orders(self) -> tuple[int, ...]: ...
    @property
    def rows_per_key(self) -> int: ...
    @property
    def moduli(self) -> tuple[int, ...]: ...
    @property
    def offsets(self) -> tuple[int, ...]: ...


class HeldHeads(NamedTuple):
    """The heads that a range of rows holds whole, as a table's own numbers. `columns`: see `TableSpec.columns`."""

    orders: tuple[int, ...]
    rows_per_key: int
    moduli: tuple[int, ...]
    offsets: tuple[int, ...]
    columns: tuple[int, ...]


NO_HEADS = HeldHeads((), 1, (), (), ())


def slice_bounds(spec: Heads, num_slices: int) -> list[int]:
    """Returns the first row of each slice of a table, ascending; the first is 0.

    If there are at least as many heads as slices, slices begin at heads, each at the one that is nearest to an even
    cut of the rows, leaves every slice a head, and leaves none with more than ORDERS_MAX groups of heads (`held_heads`)
    if that can be. Otherwise rows are cut evenly, whatever heads are cut by it.

    Raises:
        ConfigError: num_slices is not 1 to the table's rows (or to SLICES_MAX).
    """
    most = min(spec.num_rows, SLICES_MAX)
    if type(num_slices) is not int or not 1 <= num_slices <= most:
        raise ConfigError(
            f"table {spec.name}: {num_slices} slices of {spec.num_rows} rows, must be 1 to {most}; make fewer slices"
        )
    even = [index * spec.num_rows // num_slices for index in range(num_slices)]
    heads = sorted({0, *spec.offsets})
    if num_slices > len(heads):
        return even
    bounds, at = [0], 0
    for index in range(1, num_slices):
        candidates = heads[at + 1 : len(heads) - (num_slices - index) + 1]
        is_last = index == num_slices - 1
        candidates = [row for row in candidates if _has_keys(spec, bounds[-1], row, is_last)] or candidates
        bounds.append(min(candidates, key=lambda row: (abs(row - even[index]), row)))
        at = heads.index(bounds[-1])
    return bounds


def _has_keys(spec: Heads, start: int, row: int, is_last: bool) -> bool:
    """Whether keys can be looked up in a slice that ends at `row`, and, if it is the last but one, in the last."""
    parts = [(start, row), (row, spec.num_rows)] if is_last else [(start, row)]
    address_map = spec.orders, spec.rows_per_key, spec.moduli, spec.offsets
    return all(held_heads(*address_map, *part).orders for part in parts)


def slice_range(spec: Heads, index: int, num_slices: int) -> tuple[int, int]:
    """Returns the rows of slice `index` of `num_slices`, half open. Raises `ConfigError` as `slice_bounds`."""
    ends = [*slice_bounds(spec, num_slices), spec.num_rows]
    if not 0 <= index < num_slices:
        raise ConfigError(f"slice {index} of {num_slices}: slices are 0/{num_slices} to {num_slices - 1}/{num_slices}")
    return ends[index], ends[index + 1]


def parse_slice(text: str) -> tuple[int, int]:
    """Reads "I/N", slice I of N, I from 0 on. Raises `ConfigError` for anything else."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
    if not found or not int(found[1]) < int(found[2]) <= SLICES_MAX:
        raise ConfigError(f"slice {text!r}: expected I/N, slice I of N, as 0/4, 1/4, 2/4, 3/4; N at most {SLICES_MAX}")
    return int(found[1]), int(found[2])


def held_heads(
    orders: Sequence[int],
    rows_per_key: int,
    moduli: Sequence[int],
    offsets: Sequence[int],
    row_start: int,
    row_end: int,
) -> HeldHeads:
    """Returns the heads within rows [row_start, row_end); none if the range begins or ends inside a head.

    Heads of one order stand together in groups of equal size, the greatest that divides the count of every order. A
    group is an order of the slice, so that its keys are int64 [N, groups]; a large order is several groups, one after
    another. If there are more than ORDERS_MAX groups, no engine can have them, and there are no heads either. Rows that
    belong to no head (padding) may be cut anywhere.
    """
    held = []
    for place, (modulus, offset) in enumerate(zip(moduli, offsets, strict=True)):
        if row_start <= offset and offset + modulus <= row_end:
            held.append(place)
        elif offset < row_end and row_start < offset + modulus:
            return NO_HEADS
    if not held:
        return NO_HEADS
    counts = [sum(place // rows_per_key == column for place in held) for column in range(len(orders))]
    group = math.gcd(*counts)
    if len(held) > group * ORDERS_MAX:
        return NO_HEADS
    columns = tuple(place // rows_per_key for place in held[::group])
    return HeldHeads(
        tuple(orders[column] for column in columns),
        group,
        tuple(moduli[place] for place in held),
        tuple(offsets[place] for place in held),
        columns,
    )
