"""Classes of items are what dictionaries count, and the most valuable are chosen,
exactly as many as there is room for."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierstore.decisions.choose import LOW_COUNTS, ItemClasses, Part, chosen_parts, is_chosen, item_hash

Told = dict[tuple[int, int], tuple[int, int]]  # (order index, count): (items, held-out accesses)


def some_parts(seed: int, num_parts: int = 40, num_orders: int = 3) -> list[Part]:
    """Parts of random orders and lengths, none included; counts around LOW_COUNTS, far above it, and 0."""
    rng = np.random.default_rng(seed)
    parts: list[Part] = []
    for _ in range(num_parts):
        count = int(rng.integers(0, 50))
        pool = np.concatenate([np.arange(6), LOW_COUNTS + np.arange(-2, 3), [2**31, 2**40]])
        columns = rng.choice(pool, count), rng.integers(0, 2**33, count), rng.integers(1, 4, count)
        parts.append((int(rng.integers(0, num_orders)), *columns))
    return parts


def told_by_dictionary(parts: list[Part]) -> Told:
    items, held = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    for order_index, *columns in parts:
        for count, accesses, num_items in zip(*(column.tolist() for column in columns), strict=True):
            if count:
                items[order_index, count] += num_items
                held[order_index, count] += accesses
    return {key: (items[key], held[key]) for key in sorted(items)}


def told_by(classes: ItemClasses) -> Told:
    columns = (classes.order_index, classes.counts, classes.num_items, classes.held_out)
    assert all(column.dtype == np.int64 for column in columns)
    rows = np.stack(columns, axis=1).tolist()
    assert rows == sorted(rows)
    assert len({(order, count) for order, count, _, _ in rows}) == len(rows)
    return {(order, count): (num_items, held_out) for order, count, num_items, held_out in rows}


@pytest.mark.parametrize("seed", range(10))
def test_classes_are_what_a_dictionary_counts(seed: int) -> None:
    parts = some_parts(seed)
    assert told_by(ItemClasses.of_parts(iter(parts))) == told_by_dictionary(parts)


@pytest.mark.parametrize("every", [1, 2, 7, 39])
@pytest.mark.parametrize("seed", range(3))
def test_folding_on_the_way_changes_nothing(seed: int, every: int) -> None:
    parts, gathered = some_parts(seed), list[Part]()
    for place, part in enumerate(parts):
        gathered.append(part)
        if place % every == 0:
            gathered = ItemClasses.of_parts(gathered).as_parts()
    assert told_by(ItemClasses.of_parts(gathered)) == told_by_dictionary(parts)


def test_of_nothing_there_are_no_classes() -> None:
    empty = np.empty(0, dtype=np.int64)
    for parts in ([], [(0, empty, empty, empty)], [(2, np.array([0]), np.array([9]), np.array([5]))]):
        classes = ItemClasses.of_parts(parts)
        assert told_by(classes) == {}
        assert classes.as_parts() == []
        assert classes.class_of(np.array([0, 2]), np.array([0, 7])).tolist() == [-1, -1]
        assert classes.class_of(empty, empty).tolist() == []


@pytest.mark.parametrize("seed", range(5))
def test_items_find_the_class_of_their_order_and_count_or_none(seed: int) -> None:
    classes = ItemClasses.of_parts(some_parts(seed, num_parts=6))
    order_index = np.repeat(np.arange(4, dtype=np.uint8), 4200)
    near = np.concatenate([np.arange(4190), [2**31, 2**31 - 1, 2**31 + 1, 2**40, 2**40 + 1, 2**41, 2**50, 9, 0, 1]])
    counts = np.tile(near, 4)
    places = {key: place for place, key in enumerate(told_by(classes))}
    expected = [places.get(pair, -1) for pair in zip(order_index.tolist(), counts.tolist(), strict=True)]
    assert classes.class_of(order_index, counts).tolist() == expected


def chosen_by_hand(values: list[float], num_items: list[int], num_entries: int) -> list[float]:
    """Items one by one, the most valuable first; of equal classes the first."""
    taken = [0] * len(values)
    for place in sorted(range(len(values)), key=lambda place: (-values[place], place)):
        if values[place] > 0:
            taken[place] = max(0, min(num_items[place], num_entries - sum(taken)))
    return [count / of if of else 0.0 for count, of in zip(taken, num_items, strict=True)]


CLASSES = st.lists(st.tuples(st.sampled_from([-1.0, -0.0, 0.0, 1e-300, 0.5, 1.0, 7.0]), st.integers(0, 40)), max_size=8)


@settings(max_examples=300, deadline=None)
@given(CLASSES, st.integers(0, 200))
def test_the_most_valuable_are_chosen_and_exactly_as_many_as_there_is_room_for(
    classes: list[tuple[float, int]], num_entries: int
) -> None:
    values, num_items = [value for value, _ in classes], [count for _, count in classes]
    parts = chosen_parts(np.array(values, dtype=float), np.array(num_items, dtype=np.int64), num_entries)
    assert parts.tolist() == chosen_by_hand(values, num_items, num_entries)
    worth = sum(count for value, count in classes if value > 0)
    assert sum(parts * num_items) == pytest.approx(min(num_entries, worth), abs=1e-9)


def test_one_class_at_most_is_taken_in_part_and_of_equals_the_first() -> None:
    parts = chosen_parts(np.array([2.0, 3.0, 2.0, 0.0]), np.array([10, 4, 10, 5]), 9)
    assert parts.tolist() == [0.5, 1.0, 0.0, 0.0]
    assert chosen_parts(np.array([2.0, 3.0, 2.0, 0.0]), np.array([10, 4, 10, 5]), 10**9).tolist() == [1, 1, 1, 0]


def test_numbers_beyond_32_bits_are_counted_exactly() -> None:
    parts = chosen_parts(np.array([1.0, 2.0]), np.array([2**50, 2**50]), 2**50 + 2**49)
    assert parts.tolist() == [0.5, 1.0]


def hashes(count: int, kind: str) -> np.ndarray:
    """Hashes of items as they come: n-grams of small ids side by side, or keys anywhere."""
    rng = np.random.default_rng(0)
    if kind == "keys":
        items = np.stack([rng.integers(0, 3, count), rng.integers(0, 2**63, count)], axis=1).astype(np.uint64)
    elif kind == "pairs":
        items = np.stack([np.zeros(count), (np.arange(count) // 300 << 17) + np.arange(count) % 300], axis=1)
    else:
        items = np.stack([np.arange(count) // 300, (np.arange(count) % 300) << 47], axis=1)
    return item_hash(items.astype(np.uint64))


@pytest.mark.parametrize("kind", ["keys", "pairs", "four ids"])
@pytest.mark.parametrize("part", [0.01, 0.3, 0.5, 0.99])
def test_of_a_class_taken_in_part_as_many_are_chosen(kind: str, part: float) -> None:
    """Within five standard deviations of a fair draw, of all items and of every tenth part of them."""
    count = 200_000
    of_items = is_chosen(np.array([0.0, part, 1.0]), np.full(count, 1), hashes(count, kind))
    for chosen in (of_items, *of_items.reshape(10, -1)):
        assert abs(chosen.mean() - part) < 5 * (part * (1 - part) / len(chosen)) ** 0.5


def test_whole_classes_are_chosen_whole_and_items_of_none_never() -> None:
    of_items = hashes(3000, "keys")
    of_items[:3] = 0, 2**64 - 1, 2**11
    for classes_of_items, expected in ((0, False), (1, True), (-1, False)):
        chosen = is_chosen(np.array([0.0, 1.0]), np.full(3000, classes_of_items), of_items)
        assert (chosen == expected).all()
    assert not is_chosen(np.array([]), np.full(3000, -1), of_items).any()
    assert is_chosen(np.array([]), np.array([], dtype=np.int64), of_items[:0]).tolist() == []


@pytest.mark.parametrize("seed", range(3))
def test_room_for_more_entries_never_drops_an_item(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values, num_items = rng.random(12).round(1), rng.integers(1, 400, 12)
    of_items = np.repeat(np.arange(12), num_items)
    hashed = item_hash(rng.integers(0, 2**64, (len(of_items), 2), dtype=np.uint64))
    before = np.zeros(len(of_items), dtype=bool)
    for num_entries in range(0, int(num_items.sum()) + 50, 17):
        chosen = is_chosen(chosen_parts(values, num_items, num_entries), of_items, hashed)
        np.testing.assert_array_equal(
            chosen, is_chosen(chosen_parts(values, num_items, num_entries), of_items, hashed.copy())
        )
        assert not (before & ~chosen).any()
        before = chosen
    np.testing.assert_array_equal(before, values[of_items] > 0)


def test_the_hash_of_an_item_is_fixed() -> None:
    """Plans made by one version must choose the same items in another; computed in Python integers."""
    mix = 0x9E3779B97F4A7C15
    for high, low in ((0, 0), (0, 1), (1, 0), (2**64 - 1, 2**64 - 1), (5, 2**63 - 1)):
        mixed = (high ^ (low * mix % 2**64)) * mix % 2**64
        expected = (mixed ^ mixed >> 29) * mix % 2**64
        assert item_hash(np.array([[high, low]], dtype=np.uint64)).tolist() == [expected]
