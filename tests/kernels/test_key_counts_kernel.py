"""Counts of keys: the compiled ones against plain Python's, byte for byte, and what both promise:
never more than there was."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.shapes import POISON

from tierstore import kernels
from tierstore.kernels import REPORT, reference_counts

IMPLEMENTATIONS: dict[str, Any] = {"reference": reference_counts.KeyCounts, "compiled": kernels.KeyCounts}
EACH = pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)

KEY_MAX = 2**63 - 1
Name = tuple[int, int, int]  # table, order, key


def lines(num_sets: int) -> np.ndarray:
    """Memory for so many sets, at a multiple of 64 bytes, full of what must not be read."""
    whole = np.full(64 * (num_sets + 1), POISON, dtype=np.uint8)
    start = -whole.ctypes.data % 64
    return whole[start : start + 64 * num_sets]


def reports_of(names: list[Name], exponents: list[int] | None = None, source: int = 3) -> np.ndarray:
    reports = np.zeros(len(names), dtype=REPORT)
    for report, (table, order, key), exponent in zip(reports, names, exponents or [0] * len(names), strict=True):
        report["key"], report["table"], report["order"] = key, table, order
        report["source_and_weight"] = exponent << 3 | source
    return reports


def zipf_reports(seed: int, count: int, num_keys: int) -> np.ndarray:
    """Reports of 3 tables and 3 orders that share keys, with keys 0, the largest and -1, some of large weight."""
    rng = np.random.default_rng(seed)
    pool = rng.integers(0, KEY_MAX, num_keys)
    pool[[1, 2, 5]] = 0, KEY_MAX, -1
    weights = 1 / np.arange(1, num_keys + 1)
    reports = np.zeros(count, dtype=REPORT)
    reports["key"] = pool[rng.choice(num_keys, count, p=weights / weights.sum())]
    reports["table"], reports["order"] = rng.choice([0, 1, 65535], count), rng.choice([0, 2, 255], count)
    reports["source_and_weight"] = rng.integers(0, 8, count) | rng.choice([0, 0, 0, 3, 9], count) << 3
    return reports


def true_counts(reports: np.ndarray) -> Counter[Name]:
    counted: Counter[Name] = Counter()
    for key, table, order, source_and_weight in reports.tolist():
        if key >= 0:
            counted[table, order, key] += 2 ** (source_and_weight >> 3)
    return counted


def all_counts(counts: Any, tables: tuple[int, ...] = (0, 1, 65535)) -> dict[Name, int]:
    found = {}
    for table in tables:
        for order, key, count in zip(*(column.tolist() for column in counts.above(table, 1)), strict=True):
            assert (table, order, key) not in found
            found[table, order, key] = count
    return found


@pytest.mark.parametrize("num_sets", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_both_hold_the_same_bytes_after_the_same_reports(num_sets: int, seed: int) -> None:
    memories = {name: lines(num_sets) for name in IMPLEMENTATIONS}
    each = {name: made(memories[name]) for name, made in IMPLEMENTATIONS.items()}
    reports = zipf_reports(seed, 5000, 12 * num_sets + 6)
    for part in np.array_split(reports, 7):
        added = {counts.add(part) for counts in each.values()}
        assert added == {int((part["key"] >= 0).sum())}
        np.testing.assert_array_equal(memories["compiled"], memories["reference"])
        assert each["compiled"].num_used == each["reference"].num_used <= 4 * num_sets == 4 * each["compiled"].num_sets
        if seed == 2:
            for counts in each.values():
                counts.age()
            np.testing.assert_array_equal(memories["compiled"], memories["reference"])
    for table in (0, 1, 65535, 7):
        for minimum in (1, 2, 40, 2**32 - 1):
            found = [counts.above(table, minimum) for counts in each.values()]
            for first, second in zip(*found, strict=True):
                np.testing.assert_array_equal(first, second)
                assert first.dtype == second.dtype
            for counts in each.values():  # piece by piece it is the same
                pieces = [counts.above(table, minimum, start, start + 3) for start in range(0, num_sets + 3, 3)]
                for column, parts in zip(found[0], zip(*pieces, strict=True), strict=True):
                    np.testing.assert_array_equal(np.concatenate(parts), column)
        looked_up = [counts.counts(table, reports["order"], reports["key"]) for counts in each.values()]
        np.testing.assert_array_equal(*looked_up)


@EACH
@pytest.mark.parametrize("seed", range(3))
def test_with_room_enough_counts_are_exact(implementation: Any, seed: int) -> None:
    reports = zipf_reports(seed, 3000, 50)
    counts = implementation(lines(4096))
    counts.add(reports)
    expected = true_counts(reports)
    assert all_counts(counts) == expected
    assert counts.num_used == len(expected)
    for table, order in {(table, order) for table, order, _ in expected}:
        keys = np.array([key for other, another, key in expected if (other, another) == (table, order)] + [4, -1])
        wanted = [expected[table, order, key] for key in keys.tolist()]
        assert counts.counts(table, order, keys).tolist() == wanted
        assert counts.counts(table, np.full(len(keys), order, dtype=np.uint8), keys).tolist() == wanted


NAMES = st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(-1, 6))


@EACH
@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(NAMES, st.integers(0, 4)), max_size=80), st.integers(1, 3))
def test_no_count_is_above_the_truth_and_a_set_keeps_what_outweighs_all_else(
    implementation: Any, accesses: list[tuple[Name, int]], num_sets: int
) -> None:
    """Of one key's weight the set loses at most what other keys brought:
    each of their units takes one off at most once."""
    reports = reports_of([name for name, _ in accesses], [exponent for _, exponent in accesses])
    memory = lines(num_sets)
    counts = implementation(memory)
    counts.add(reports)
    truth, found = true_counts(reports), all_counts(counts, (0, 1))
    assert all(found[name] <= truth[name] for name in found)
    assert counts.num_used == len(found) <= 4 * num_sets
    total = sum(truth.values())
    for name, count in truth.items():
        assert found.get(name, 0) >= count - (total - count)
    slots = memory.view(reference_counts.KEY_COUNT)
    assert not memory.reshape(-1, 16)[slots["count"] == 0].any()


@EACH
def test_keys_that_come_once_wear_down_nothing_that_is_counted_often(implementation: Any) -> None:
    """Three hot keys of a set stay whole through ten thousand others: only the smallest count pays."""
    counts = implementation(lines(1))
    hot = [(0, 1, key) for key in (11, 12, 13)]
    counts.add(reports_of(hot, [7, 8, 9]))
    counts.add(reports_of([(0, 1, 1000 + passing) for passing in range(10_000)]))
    assert counts.counts(0, 1, np.array([11, 12, 13])).tolist() == [128, 256, 512]


@EACH
def test_a_new_key_takes_the_place_of_the_smallest_count_with_what_is_left_of_its_weight(implementation: Any) -> None:
    counts = implementation(lines(1))
    names = [(0, 0, key) for key in range(1, 7)]
    counts.add(reports_of(names[:4], [2, 1, 3, 4]))
    counts.add(reports_of(names[4:5]))  # 1 off the 2 of key 2
    assert counts.counts(0, 0, np.arange(1, 7)).tolist() == [4, 1, 8, 16, 0, 0]
    counts.add(reports_of(names[4:5]))  # and the last: an empty slot
    assert counts.counts(0, 0, np.arange(1, 7)).tolist() == [4, 0, 8, 16, 0, 0]
    assert counts.num_used == 3
    counts.add(reports_of(names[4:6], [0, 3]))  # key 5 in it; of key 6's 8, 1 goes against that and 7 stay
    assert counts.counts(0, 0, np.arange(1, 7)).tolist() == [4, 0, 8, 16, 0, 7]


@EACH
def test_counts_saturate_and_age_by_halves_until_they_are_gone(implementation: Any) -> None:
    counts = implementation(lines(3))
    name, key = (2, 1, 0), np.array([0])
    for _ in range(3):
        counts.add(reports_of([name], [31]))
    assert counts.counts(2, 1, key).tolist() == [2**32 - 1]
    for age in range(1, 33):
        assert counts.num_used == 1
        counts.age()
        assert counts.counts(2, 1, key).tolist() == [(2**32 - 1) >> age]
    assert counts.num_used == len(counts.above(2, 1)[0]) == 0


@EACH
def test_tables_and_orders_that_share_a_key_are_counted_apart(implementation: Any) -> None:
    names = [(table, order, 0) for table in (0, 1, 256, 65535) for order in (0, 1, 255)]
    counts = implementation(lines(64))
    counts.add(reports_of(names, list(range(12))))
    assert all_counts(counts, (0, 1, 256, 65535)) == {name: 2**at for at, name in enumerate(names)}


@EACH
def test_an_empty_slot_is_no_key_0(implementation: Any) -> None:
    counts = implementation(lines(2))
    assert counts.counts(0, 0, np.array([0, -1, 5])).tolist() == [0, 0, 0]
    assert [len(column) for column in counts.above(0, 1)] == [0, 0, 0]
    assert counts.add(reports_of([])) == 0
    assert counts.counts(0, 0, np.zeros(0, dtype=np.int64)).shape == (0,)


@EACH
def test_what_does_not_fit_is_refused(implementation: Any) -> None:
    good = lines(4)
    read_only = lines(4)
    read_only.flags.writeable = False
    for bad in (good[:0], good[:63], good[8:72], good.reshape(4, 64), good[::2], good.view(np.int8), read_only):
        with pytest.raises(ValueError):
            implementation(bad)
    counts = implementation(good)
    for bad in (np.zeros((2, 2), dtype=REPORT), np.zeros(3, dtype=np.int64)):
        with pytest.raises((ValueError, TypeError)):
            counts.add(bad)
    for order_index, keys in (
        (np.zeros(2, dtype=np.uint8), np.zeros(3, dtype=np.int64)),
        (0, np.zeros((1, 1), dtype=np.int64)),
    ):
        with pytest.raises(ValueError):
            counts.counts(0, order_index, keys)
    with pytest.raises(ValueError):
        counts.above(0, 0)


def test_threads_that_count_at_once_lose_nothing_while_others_look_and_age_empties_the_rest() -> None:
    counts = kernels.KeyCounts(lines(4096))
    reports = zipf_reports(0, 40_000, 50)
    many = np.tile(reports, 50)  # so many that they are at it for longer than a thread takes to start
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            order_index, keys, found = counts.above(0, 1)
            assert (
                len(order_index)
                == len(keys)
                == len(found)
                == len(set(zip(order_index.tolist(), keys.tolist(), strict=True)))
            )

    writers = [threading.Thread(target=counts.add, args=(part,)) for part in np.array_split(many, 4)]
    looking = threading.Thread(target=look)
    looking.start()
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join(60)
    stop.set()
    looking.join(60)
    assert all_counts(counts) == {name: 50 * count for name, count in true_counts(reports).items()}
    looking = threading.Thread(target=look)
    stop.clear()
    looking.start()
    while counts.num_used:
        counts.age()  # what `above` makes room for is gone by the time that it copies, now and then
    stop.set()
    looking.join(60)
    assert all_counts(counts) == {}
