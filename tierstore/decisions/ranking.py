"""Which items come first: the order in which entries are placed, by the accesses expected of each.

Input: a `TableGroup`. Output: its `Ranking`: the accesses expected of any item by order and count, and which items of
the replay would be static if so many entries were. Errors: none. Pure.

Shapes: C classes, U items of the replay, M items.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from .choose import chosen_parts, is_chosen
from .item_statistics import TableGroup
from .values import NUM_CLASSES, class_of_counts, expected_accesses


@dataclass(frozen=True, eq=False)
class Ranking:
    """The ranking of a group's items. Immutable; any thread may use it."""

    group: TableGroup

    @functools.cached_property
    def histograms(self) -> np.ndarray:
        """Items and held-out accesses by order and class of counts, int64 [2, O, NUM_CLASSES]."""
        classes, num_orders = self.group.classes, len(self.group.orders)
        cells = classes.order_index * NUM_CLASSES + class_of_counts(classes.counts)
        sums = [
            np.bincount(cells, weights=column, minlength=num_orders * NUM_CLASSES)
            for column in (classes.num_items, classes.held_out)
        ]
        return np.stack(sums).astype(np.int64).reshape(2, num_orders, NUM_CLASSES)

    def values(self, order_index: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Returns how many accesses of held-out length items may expect, float [M], by order and count,
        int64 [M] each."""
        return expected_accesses(order_index, counts, self.histograms)

    @functools.cached_property
    def class_values(self) -> np.ndarray:
        """The value of each class, float [C]."""
        return self.values(self.group.classes.order_index, self.group.classes.counts)

    @property
    def num_valued(self) -> int:
        """Entries to place at most: counted items of which accesses are expected; those not sampled reckoned in."""
        return round(int(self.group.classes.num_items[self.class_values > 0].sum()) / self.group.counted_rate)

    def static(self, num_entries: int) -> np.ndarray:
        """Returns which items of the replay are among the num_entries first, bool [U]."""
        num_kept = round(num_entries * self.group.counted_rate)
        parts = chosen_parts(self.class_values, self.group.classes.num_items, num_kept)
        return is_chosen(parts, self.group.item_classes, self.group.item_hashes)
