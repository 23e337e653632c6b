"""The items of a finished profile in the order in which a ranking places them.

Input: a profile's file and the `Ranking` of one of its table groups. Output: the items expected to be accessed most.
Errors: `FormatError` if the file is damaged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from ..decisions.choose import ItemClasses, chosen_parts, is_chosen, item_hash
from ..decisions.item_statistics import OrderSplit
from ..decisions.ranking import Ranking
from ..formats.profile import ProfileReader


class ItemRanking:
    """The items of a finished profile in the order in which a ranking places them, by all that was counted of them."""

    def __init__(self, profile: ProfileReader, ranking: Ranking, held: np.ndarray | None = None) -> None:
        """ranking: of a group of the profile's tables. held: indexes of the orders that count; None: all."""
        self._held = held
        self._profile, self._ranking = profile, ranking
        counts = profile.counts
        # What the ranking says of counts holds for as much text as was counted without the held-out documents.
        self._scale = (counts["tokens"] - counts["held_out_tokens"]) / max(counts["tokens"], 1)
        names = [name for name, _, _ in profile.header.tables]
        self._table_index = names.index(ranking.group.tables[0])

    def first(self, num_entries: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the order index, uint8 [n], and the items, uint64 [n, 2], of the num_entries first, hottest first.

        Of a sample of keys, that share of them. Reads the profile twice; blocks.
        """
        classes = ItemClasses.of_parts(
            (order_index, totals, np.zeros_like(totals), np.ones_like(totals))
            for order_index, _, totals in self._of_orders()
        )
        values = self._values(classes.order_index, classes.counts)
        parts = chosen_parts(values, classes.num_items, round(num_entries * self._ranking.group.counted_rate))
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for order_index, items, totals in self._of_orders():
            orders = np.full(len(items), order_index, dtype=np.uint8)
            chosen = is_chosen(parts, classes.class_of(orders, totals), item_hash(items))
            found.append((orders[chosen], items[chosen], totals[chosen]))
        orders, items, totals = (np.concatenate(columns) for columns in zip(*found, strict=True))
        hottest = np.argsort(-self._values(orders, totals), kind="stable")
        hottest = hottest[:num_entries]  # of a class taken in part, hashes give about as many as were asked for
        return orders[hottest], items[hottest]

    def _values(self, order_index: np.ndarray, totals: np.ndarray) -> np.ndarray:
        return self._ranking.values(order_index, totals * self._scale)

    def _of_orders(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yields (order index, items, counts in all) of the group's items, block by block; never nothing at all."""
        split = OrderSplit(self._profile.header)
        yield 0, np.empty((0, 2), dtype=np.uint64), np.empty(0, dtype=np.int64)
        for parts in itertools.chain((split.add(*block) for block in self._profile.items()), [None]):
            for table_index, order_index, items, sums in split.end() if parts is None else parts:
                if table_index == self._table_index and (self._held is None or order_index in self._held):
                    yield order_index, items, sums.sum(axis=1)
