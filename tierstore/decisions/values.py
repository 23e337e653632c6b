"""Expected accesses: how often a stream that was not counted will access an item, by its order and its count.

Input: for each class of items (order, and count or range of counts) how many there are and how often held-out documents
accessed them. Output: expected accesses of single items. That is the held-out estimate of Jelinek and Mercer (1985): of
an item counted once far fewer accesses are expected than its share of the text, and of one of two tokens more than of
one of four. Errors: histograms that do not fit the classes.

Shapes: U items, O orders, C classes of counts.
"""

from __future__ import annotations

import numpy as np

EXACT_COUNTS = 16  # up to it each count is a class of its own, beyond it classes grow by the square root of 2
# The least count of each class: 0, 1, .. 16, 17, 25, 35, ..
CLASS_STARTS = np.unique(
    np.concatenate([np.arange(EXACT_COUNTS + 1), np.ceil(17 * 2 ** (np.arange(80) / 2))]).astype(np.int64)
)
NUM_CLASSES = len(CLASS_STARTS)


def class_of_counts(counts: np.ndarray) -> np.ndarray:
    """Returns the class, 0 .. C - 1, of each count, int64 [U], all at least 0."""
    return np.searchsorted(CLASS_STARTS, counts, side="right") - 1


def class_histograms(order_index: np.ndarray, counts: np.ndarray, held_out: np.ndarray, num_orders: int) -> np.ndarray:
    """Returns items and held-out accesses by class, int64 [2, O, C]; those of the parts of a profile add up.

    order_index: [U]; counts, held_out: int64 [U], accesses in counted and in held-out documents.
    """
    cells = order_index.astype(np.int64) * NUM_CLASSES + class_of_counts(counts)
    num_cells = num_orders * NUM_CLASSES
    items = np.bincount(cells, minlength=num_cells)
    accesses = np.bincount(cells, weights=held_out, minlength=num_cells)
    return np.stack([items, accesses.astype(np.int64)]).reshape(2, num_orders, NUM_CLASSES)


def expected_accesses(order_index: np.ndarray, counts: np.ndarray, histograms: np.ndarray) -> np.ndarray:
    """Returns how many accesses of held-out length each item may expect, float [U]; 0 for one never counted.

    order_index, counts: [U]. histograms: [2, O, C] of `class_histograms`. Within an order an item counted more often
    never has fewer, and within wide classes they grow with the count, so that the order of items is that of their
    counts.
    """
    num_orders = histograms.shape[1]
    if histograms.shape != (2, num_orders, NUM_CLASSES):
        raise ValueError(f"histograms of shape {histograms.shape} must be (2, orders, {NUM_CLASSES})")
    values = np.zeros(len(counts))
    for order in range(num_orders):
        here = np.flatnonzero((order_index == order) & (counts > 0))
        values[here] = _interpolated(counts[here], *_accesses_of_classes(*histograms[:, order]))
    return values


def _accesses_of_classes(items: np.ndarray, accesses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Middle counts of the classes that have items, and the accesses expected of their items, not descending."""
    filled = np.flatnonzero(items[1:] > 0) + 1
    ends = np.append(CLASS_STARTS[1:], 2 * CLASS_STARTS[-1])
    middles = np.sqrt(CLASS_STARTS[filled] * (ends[filled] - 1.0))
    return middles, _not_descending(accesses[filled] / items[filled], items[filled])


def _not_descending(means: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The nearest sequence that does not descend: neighbours that do are pooled (Ayer et al. 1955)."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, classes
    for mean, weight in zip(means.tolist(), weights.tolist(), strict=True):
        pool = mean, weight, 1
        while pools and pools[-1][0] >= pool[0]:
            before = pools.pop()
            both = before[1] + pool[1]
            pool = (before[0] * before[1] + pool[0] * pool[1]) / both, both, before[2] + pool[2]
        pools.append(pool)
    return np.repeat([pool[0] for pool in pools], [pool[2] for pool in pools])


def _interpolated(counts: np.ndarray, middles: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Expected accesses between the classes' middles, along the logarithm of the count; beyond the last in proportion
    to it."""
    if not len(middles):
        return np.zeros(len(counts))
    inside = np.interp(np.log(counts), np.log(middles), expected)
    return np.asarray(np.where(counts > middles[-1], expected[-1] * counts / middles[-1], inside))
