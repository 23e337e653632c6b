"""Sets of one table's entries, by (order index, key), as arrays.

Input: two sets. Output: which entries of the one are in the other. Errors: none. Pure. What is known of each entry, a
count or a place, is a subclass's third array.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class EntrySet:
    """order_index, keys: of any integer type, [n] each; a pair does not come twice."""

    order_index: np.ndarray
    keys: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def are_in(self, others: EntrySet) -> np.ndarray:
        """Returns which of these entries are among the others, bool [n]."""
        found = np.zeros(len(self), dtype=bool)
        for order in np.unique(self.order_index):
            here = np.flatnonzero(self.order_index == order)
            found[here] = np.isin(self.keys[here], others.keys[others.order_index == order])
        return found
