"""The way back from row ids to keys: what the Chinese remainder theorem needs to know of a table's heads.

Input: moduli. Output: how many residues of an order give its key, and their inverses, as the kernel takes them.
Errors: None for heads that do not determine keys.

Shapes: O orders, F residues at most.
"""

from __future__ import annotations

import math

import numpy as np

KEY_MAX = 2**63 - 1


def residues_of(num_orders: int, rows_per_key: int, moduli: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns how many residues of each order give its key, int64 [O], and their inverses, int64 [O, F].

    None if the heads of some order do not determine its keys.
    """
    if rows_per_key == 1:  # a row's place in its head is the key that its cache knows
        return np.ones(num_orders, dtype=np.int64), np.zeros((num_orders, 1), dtype=np.int64)
    inverses: list[list[int]] = []
    for order_index in range(num_orders):
        product = 1
        of_order = []
        for modulus in moduli[order_index * rows_per_key : (order_index + 1) * rows_per_key]:
            if modulus >= 2**31 or math.gcd(product, modulus) != 1:  # 2^31: a product of residues is below 2^62
                return None
            of_order.append(pow(product, -1, modulus))
            product *= modulus
            if product > KEY_MAX:
                break
        if product <= KEY_MAX:
            return None
        inverses.append(of_order)
    heads_max = max(map(len, inverses))
    padded = [of_order + [0] * (heads_max - len(of_order)) for of_order in inverses]
    return np.array(list(map(len, inverses)), dtype=np.int64), np.array(padded, dtype=np.int64)


def is_outside_of(row_ids: np.ndarray, within: tuple[int, int]) -> np.ndarray:
    """Returns which row ids, int64 [...], are not in a range, bool [...]."""
    start, end = within
    return (row_ids < start) | (row_ids >= end)
