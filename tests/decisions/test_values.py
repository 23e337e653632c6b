"""What an item is worth: from what was held out, by class, monotone, and for a shift in scale right on average."""

from __future__ import annotations

import numpy as np
import pytest

from tierstore.decisions.values import (
    CLASS_STARTS,
    NUM_CLASSES,
    class_histograms,
    class_of_counts,
    expected_accesses,
)


def test_counts_to_sixteen_are_classes_of_their_own_and_classes_grow_beyond() -> None:
    assert class_of_counts(np.arange(17)).tolist() == list(range(17))
    assert CLASS_STARTS[17:21].tolist() == [17, 25, 34, 49]
    assert class_of_counts(np.array([17, 24, 25, 33, 34])).tolist() == [17, 17, 18, 18, 19]
    assert class_of_counts(np.array([2**40]))[0] < NUM_CLASSES
    assert np.all(np.diff(CLASS_STARTS) > 0)


def test_histograms_of_parts_add_up_to_those_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    order_index, counts = rng.integers(0, 3, 1000).astype(np.uint8), rng.integers(0, 50, 1000)
    held_out = rng.integers(0, 9, 1000)
    whole = class_histograms(order_index, counts, held_out, 3)
    parts = [
        class_histograms(order_index[part], counts[part], held_out[part], 3) for part in (slice(300), slice(300, None))
    ]
    assert np.array_equal(whole, parts[0] + parts[1])
    some = (order_index == 1) & (counts == 7)
    assert whole[:, 1, 7].tolist() == [some.sum(), held_out[some].sum()]


def test_an_item_is_worth_the_mean_of_its_class() -> None:
    order_index = np.array([0, 0, 0, 0, 1, 1], dtype=np.uint8)
    counts = np.array([1, 1, 2, 2, 1, 0])
    values = expected_accesses(
        order_index, counts, class_histograms(order_index, counts, np.array([0, 1, 1, 3, 0, 5]), 2)
    )
    assert values == pytest.approx([0.5, 0.5, 2, 2, 0, 0])


def test_more_counts_are_never_worth_less() -> None:
    """Classes whose means descend by chance are pooled; between middles of classes worth goes on growing."""
    rng = np.random.default_rng(1)
    counts = np.sort((rng.pareto(0.8, 5000) + 1).astype(np.int64))
    order_index = np.zeros(5000, dtype=np.uint8)
    held_out = rng.poisson(np.minimum(counts, 10**6) * 0.05)
    values = expected_accesses(order_index, counts, class_histograms(order_index, counts, held_out, 1))
    assert np.all(np.diff(values) >= 0)
    assert values[-1] > values[-100] > values[-1000]
    assert values.sum() == pytest.approx(held_out.sum(), rel=0.2)  # middles of the widest classes are no means


def test_unseen_mass_makes_items_counted_once_worth_less_than_their_share() -> None:
    """Half of the training text and half of the held-out are from the same Zipf law:
    what was seen once is mostly luck."""
    rng = np.random.default_rng(2)
    drawn = rng.zipf(1.3, (2, 50_000)) % 100_000
    counts, held_out = (np.bincount(each, minlength=100_000) for each in drawn)
    order_index = np.zeros(100_000, dtype=np.uint8)
    values = expected_accesses(order_index, counts, class_histograms(order_index, counts, held_out, 1))
    assert 0 < values[counts == 1][0] < 0.7
    assert values[counts == 16][0] == pytest.approx(16, rel=0.2)


def test_an_order_without_items_and_an_empty_profile_are_worth_nothing() -> None:
    histograms = np.zeros((2, 2, NUM_CLASSES), dtype=np.int64)
    assert expected_accesses(np.array([0, 1]), np.array([3, 4]), histograms).tolist() == [0, 0]
    assert len(expected_accesses(np.zeros(0), np.zeros(0), histograms)) == 0


def test_histograms_of_other_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="histograms of shape"):
        expected_accesses(np.array([0]), np.array([1]), np.zeros((2, 1, 5)))
