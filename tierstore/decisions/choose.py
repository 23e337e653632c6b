"""Which entries are static: those from which the most accesses are expected, as many as there is room for.

Input: how many items of each class (order, how often counted) there are, and the value of each class. Output: the part
of each class that is chosen. The items of a class do not differ, so the last class chosen is taken in part, by a hash
of the item. Errors: none.

Shapes: C classes, U items, M items.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

Part = tuple[int, np.ndarray, np.ndarray, np.ndarray]

LOW_COUNTS = 1 << 12  # counts that nearly all items have
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: multiplicative hashing (Knuth, TAOCP 3, 6.4)


@dataclass(frozen=True, eq=False)
class ItemClasses:
    """Items by (order, count), ascending: order_index, counts, num_items and held_out accesses to them,
    each int64 [C]."""

    order_index: np.ndarray
    counts: np.ndarray
    num_items: np.ndarray
    held_out: np.ndarray

    @classmethod
    def of_parts(cls, parts: Iterable[Part]) -> ItemClasses:
        """Gathers (order index, counts, held-out accesses, number of items), int64 [M] each, part by part;
        leaves count 0 out."""
        low: dict[int, np.ndarray] = {}  # by order: items and accesses of each count below LOW_COUNTS
        high: dict[int, list[np.ndarray]] = {}  # (count, 1, accesses) of every item above
        for order_index, counts, held_out, num_items in parts:
            is_low = counts < LOW_COUNTS
            sums = low.setdefault(order_index, np.zeros((2, LOW_COUNTS)))
            sums[0] += np.bincount(counts[is_low], num_items[is_low], minlength=LOW_COUNTS)
            sums[1] += np.bincount(counts[is_low], held_out[is_low], minlength=LOW_COUNTS)
            high.setdefault(order_index, []).append(np.stack([counts, num_items, held_out])[:, ~is_low])
        columns = [np.empty((4, 0), dtype=np.int64)]
        for order_index in sorted(low):
            counts, num_items, held_out = np.concatenate(high[order_index], axis=1)
            distinct, place = np.unique(counts, return_inverse=True)
            counted = np.append(np.arange(LOW_COUNTS), distinct)
            num_items = np.append(low[order_index][0], np.bincount(place, num_items, minlength=len(distinct)))
            held_out = np.append(low[order_index][1], np.bincount(place, held_out, minlength=len(distinct)))
            there = (num_items > 0) & (counted > 0)
            column = np.stack([np.full(len(counted), order_index), counted, num_items, held_out])[:, there]
            columns.append(column.astype(np.int64))
        return cls(*np.concatenate(columns, axis=1))

    def as_parts(self) -> list[Part]:
        """Returns the classes as parts for `of_parts`: (order index, counts, held-out accesses, items of each)."""
        return [
            (
                int(order),
                *(column[self.order_index == order] for column in (self.counts, self.held_out, self.num_items)),
            )
            for order in np.unique(self.order_index)
        ]

    def class_of(self, order_index: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Returns the class of items by order and count, int64 [M]; -1 for items of none."""
        scale = np.int64(self.counts.max(initial=0) + 1)
        places = self.order_index * scale + self.counts
        wanted = order_index.astype(np.int64) * scale + counts
        found = np.minimum(np.searchsorted(places, wanted), len(places) - 1)
        if not len(places):
            return np.full(len(wanted), -1, dtype=np.int64)
        return np.where((places[found] == wanted) & (counts < scale), found, -1)


def chosen_parts(values: np.ndarray, num_items: np.ndarray, num_entries: int) -> np.ndarray:
    """Returns the part of each class, float [C], that the num_entries most valuable items make up: 1, 0,
    or one between.

    values: float [C]; num_items: int64 [C]. Classes without value are not chosen, so it may be fewer.
    """
    by_value = np.argsort(-values, kind="stable")
    ends = np.cumsum(num_items[by_value])
    room = np.clip(num_entries - (ends - num_items[by_value]), 0, num_items[by_value])
    parts = np.zeros(len(values))
    parts[by_value] = np.where(values[by_value] > 0, room / np.maximum(num_items[by_value], 1), 0.0)
    return parts


def is_chosen(parts: np.ndarray, classes_of_items: np.ndarray, item_hashes: np.ndarray) -> np.ndarray:
    """Returns which items are chosen, bool [M]: of a class taken in part those whose hash falls below the part.

    classes_of_items: int64 [M], -1 for none; item_hashes: uint64 [M], as `item_hash` gives them.
    """
    part = np.where(classes_of_items >= 0, parts[classes_of_items], 0.0) if len(parts) else np.zeros(len(item_hashes))
    return (item_hashes >> np.uint64(11)) * 2.0**-53 < part


def item_hash(items: np.ndarray) -> np.ndarray:
    """Returns a hash of each item, uint64 [M, 2] -> uint64 [M]."""
    mixed = (items[:, 0] ^ (items[:, 1] * _MIX)) * _MIX
    return (mixed ^ (mixed >> np.uint64(29))) * _MIX
