"""The client's own static set: entries of the hottest keys, which a store over several servers answers by itself.

Input: the servers' placements, the hottest key first, and rows by ordinary lookups, all of one version. Output: rows of
the keys that it has, copied to the caller's buffer. Errors: `BudgetError` for a budget that holds nothing. It never
changes: of another version, another set is made.

Shapes: N tokens, O orders, H rows per key, E entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .. import kernels
from ..errors import BudgetError
from ..layout import BUCKET_KEYS
from ..spec import TableSpec
from ..units import format_bytes

FILL_BYTES = 4 << 20  # of rows of one lookup that fills it
BUCKET_BYTES = kernels.INDEX_BUCKET.itemsize

Keys = Sequence[np.ndarray]  # of each order: int64 [n]
LookUp = Callable[[int, np.ndarray, np.ndarray], object]  # index, keys [N, O], out [N, O * H, row_bytes]


@dataclass(frozen=True)
class SetTable:
    """One table's entries, uint8 [E, H * row_bytes], and an index of each order, uint8 [buckets, 64]."""

    indexes: tuple[np.ndarray, ...]
    entries: np.ndarray


class ClientSet:
    """Any thread may call `take`. common_build: of the version that its rows are of."""

    def __init__(self, tables: Sequence[SetTable | None], common_build: str) -> None:
        """tables: None for those without an entry."""
        self._tables, self.common_build = tables, common_build
        self.num_entries = [0 if table is None else len(table.entries) for table in tables]
        self.num_bytes = sum(
            table.entries.nbytes + sum(index.nbytes for index in table.indexes) for table in tables if table
        )

    def take(self, index: int, keys: np.ndarray, out: np.ndarray | None) -> np.ndarray | None:
        """Copies the rows of keys, int64 [N, O], which it has to out, uint8 [N, O * H, row_bytes], contiguous.

        Returns which those are, bool [N, O]; None if it is none of them. out: None to copy nothing.
        """
        table = self._tables[index]
        if table is None:
            return None
        places = np.stack(
            [
                kernels.find_entries(buckets, np.ascontiguousarray(column))
                for buckets, column in zip(table.indexes, keys.T, strict=True)
            ],
            axis=1,
        )
        places[keys < 0] = -1
        has = places >= 0
        if not has.any():
            return None
        if out is not None:
            out.reshape(*keys.shape, -1)[has] = table.entries[places[has]]
        return has


def entry_bytes_of(spec: TableSpec) -> float:
    """Returns the bytes that one entry of a table takes in a set, its share of the index included."""
    return spec.entry_bytes + BUCKET_BYTES / BUCKET_KEYS


def hottest(ranked: Sequence[tuple[np.ndarray, np.ndarray]], num_orders: int, count: int) -> Keys:
    """Returns the `count` hottest keys of one table, by order, or a few less.

    ranked: of each server: orders' indices, uint8 [n], and keys, int64 [n], the hottest first. Equal ranks are equally
    hot, since servers place what lookups of one stream need.
    """
    found = []  # of each order: ranks and keys, each key once
    none = np.empty(0, dtype=np.int64)
    for order in range(num_orders):
        ranks = np.concatenate([none, *(np.flatnonzero(order_index == order) for order_index, _ in ranked)])
        keys = np.concatenate([none, *(keys[order_index == order] for order_index, keys in ranked)])
        by_rank = np.argsort(ranks, kind="stable")
        first = by_rank[np.unique(keys[by_rank], return_index=True)[1]]
        found.append((ranks[first], keys[first]))
    all_ranks = np.sort(np.concatenate([ranks for ranks, _ in found]))
    rank_end = np.inf if count >= len(all_ranks) else all_ranks[count]
    return [keys[ranks < rank_end] for ranks, keys in found]


def fill(spec: TableSpec, index: int, keys: Keys, look_up: LookUp) -> SetTable | None:
    """Returns a table's part of a set, whose rows are looked up; blocks on that. None if there are no keys."""
    counts = [len(of_order) for of_order in keys]
    starts = np.cumsum([0, *counts])
    if not starts[-1]:
        return None
    entries = np.empty((int(starts[-1]), spec.entry_bytes), dtype=np.uint8)
    step = max(1, FILL_BYTES // (spec.num_heads * spec.row_bytes))
    for start in range(0, max(counts), step):
        wanted = np.full((min(step, max(counts) - start), len(spec.orders)), -1, dtype=np.int64)
        for order, of_order in enumerate(keys):
            part = of_order[start : start + step]
            wanted[: len(part), order] = part
        out = np.empty((len(wanted), spec.num_heads, spec.row_bytes), dtype=np.uint8)
        look_up(index, wanted, out)
        by_order = out.reshape(len(wanted), len(spec.orders), spec.entry_bytes)
        for order, of_order in enumerate(keys):
            num = len(of_order[start : start + step])
            entries[starts[order] + start : starts[order] + start + num] = by_order[:num, order]
    indexes = [
        _index(of_order, np.arange(first, first + len(of_order), dtype=np.uint32))
        for of_order, first in zip(keys, starts[:-1], strict=True)
    ]
    return SetTable(tuple(indexes), entries)


def _index(keys: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Returns the index of one order's keys, int64 [n], all different, uint8 [buckets, 64]."""
    num_buckets = int(len(keys) / BUCKET_KEYS) + 1
    while True:
        buckets = np.empty((num_buckets, BUCKET_BYTES), dtype=np.uint8)
        if kernels.index_entries(keys, numbers, buckets):
            return buckets
        num_buckets += num_buckets // 4 + 1


def check_budget(specs: Sequence[TableSpec], budget_bytes: int) -> None:
    """Raises `BudgetError` if a budget above 0 does not hold an entry of each table."""
    needed = int(max(entry_bytes_of(spec) for spec in specs) + 4 * BUCKET_BYTES) * len(specs)
    if 0 < budget_bytes < needed:
        raise BudgetError(
            f"dram: {format_bytes(budget_bytes)} ({budget_bytes} bytes) holds no entry of each of {len(specs)} tables, "
            f"at least {needed} bytes are needed; give more, or leave it out"
        )
