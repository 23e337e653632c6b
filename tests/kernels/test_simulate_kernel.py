"""Predicted hits of the recency cache: the compiled code that serves, against the policy in plain Python,
access for access."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.marks import slow_but

import tierstore
from tierstore import kernels
from tierstore.kernels import reference, reference_cache

IMPLEMENTATIONS: dict[str, Any] = {"reference": reference, "compiled": kernels}

KEY_MAX = 2**63 - 1
Accesses = tuple[np.ndarray, np.ndarray, np.ndarray]


def zipf_accesses(seed: int, num_accesses: int, num_keys: int, batch_max: int) -> Accesses:
    """Zipf-like accesses of 3 orders that share keys, with keys 0, the largest, and -1,
    in batches of 0 to batch_max."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, num_keys + 1)
    pool = rng.integers(0, KEY_MAX, num_keys)
    pool[[1, 2]] = 0, KEY_MAX
    keys = pool[rng.choice(num_keys, num_accesses, p=weights / weights.sum())]
    keys[rng.random(num_accesses) < 0.05] = -1
    order_index = rng.integers(0, 3, num_accesses).astype(np.uint8)
    return order_index, keys, batches(rng, num_accesses, batch_max)


def batches(rng: np.random.Generator, num_accesses: int, batch_max: int) -> np.ndarray:
    ends = np.cumsum(rng.integers(0, batch_max + 1, 4 * num_accesses // batch_max + 8))
    return np.append(ends[ends < num_accesses], num_accesses)


def one_by_one(keys: list[int], order: int = 0) -> Accesses:
    """Accesses of one order, each a batch of its own."""
    return (
        np.full(len(keys), order, dtype=np.uint8),
        np.array(keys, dtype=np.int64),
        np.arange(1, len(keys) + 1),
    )


def assert_agree(accesses: Accesses, num_sets: int) -> np.ndarray:
    expected = reference.simulate_cache(*accesses, num_sets)
    np.testing.assert_array_equal(kernels.simulate_cache(*accesses, num_sets), expected)
    return expected


@pytest.mark.parametrize("num_sets", [1, 2, 3, 8, 37, 1000])
@pytest.mark.parametrize("batch_max", [1, 7, 200])
@pytest.mark.parametrize("seed", range(2))
def test_hits_equal_the_policys_access_for_access(num_sets: int, batch_max: int, seed: int) -> None:
    accesses = zipf_accesses(seed, 6000, 40 * num_sets + 20, batch_max)
    hits = assert_agree(accesses, num_sets)
    assert 0 < hits.sum() < len(hits)


@pytest.mark.parametrize("num_sets", [1, 3])
def test_hits_agree_while_counts_age_several_times_and_clocks_go_round(num_sets: int) -> None:
    """One set: 80 accesses an age, and a clock that starts again at 0 after 256 arrivals."""
    rng = np.random.default_rng(num_sets)
    hot = rng.integers(0, KEY_MAX, 6 * num_sets)
    passing = rng.integers(0, KEY_MAX, 400 * num_sets)
    keys = np.where(rng.random(40_000) < 0.6, rng.choice(hot, 40_000), rng.choice(passing, 40_000))
    keys[15_000:30_000] = rng.choice(passing, 15_000)  # the hot ones are forgotten, then come back
    accesses = np.zeros(40_000, dtype=np.uint8), keys, batches(rng, 40_000, 5)
    hits = assert_agree(accesses, num_sets)
    hot_hits = hits & np.isin(keys, hot)
    assert hot_hits[10_000:15_000].mean() > 0.3
    assert hot_hits[35_000:].mean() > 0.3


@pytest.mark.parametrize("ages", slow_but([255, 256], range(254, 259)))
def test_hits_agree_where_a_set_is_not_written_for_256_ages(ages: int) -> None:
    """The age of a set is a byte: after 256 ages without an arrival its counts look as if none had passed."""
    rng = np.random.default_rng(0)
    keys = rng.integers(0, KEY_MAX, 64)
    in_second = np.array([reference_cache._set_of((0, key), 2) == 1 for key in keys.tolist()])
    quiet, busy = keys[~in_second], keys[in_second]
    quiet_part = np.tile(quiet[:8], 12)
    busy_part = np.resize(np.concatenate([busy, busy[::-1]]), ages * 160)
    stream = np.concatenate([quiet_part, busy_part, quiet[8:], quiet[:8], quiet[8:]])
    assert_agree(one_by_one(stream.tolist()), 2)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_equal_keys_of_different_orders_are_different_entries(name: str) -> None:
    order_index = np.array([0, 1, 0, 1, 2, 1, 2], dtype=np.uint8)
    keys = np.zeros(7, dtype=np.int64)
    hits = IMPLEMENTATIONS[name].simulate_cache(order_index, keys, np.arange(1, 8), 3)
    assert hits.tolist() == [False, False, True, True, False, True, True]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_batch_misses_its_own_first_seen_keys_as_often_as_it_has_them(name: str) -> None:
    keys = np.array([5, 5, 7, 5, 5, 7, -1, 9], dtype=np.int64)
    hits = IMPLEMENTATIONS[name].simulate_cache(np.zeros(8, dtype=np.uint8), keys, np.array([4, 8]), 1)
    assert hits.tolist() == [False] * 4 + [True, True, False, False]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_no_key_is_never_a_hit_and_takes_no_place(name: str) -> None:
    accesses = one_by_one([-1, *range(8), -1, -1, *range(8)])
    hits = IMPLEMENTATIONS[name].simulate_cache(*accesses, 1)
    assert hits.tolist() == [False] * 11 + [True] * 8


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("ends", [[], [0], [0, 0]], ids=str)
def test_no_accesses_give_no_hits(name: str, ends: list[int]) -> None:
    empty = np.empty(0, dtype=np.int64)
    hits = IMPLEMENTATIONS[name].simulate_cache(empty.astype(np.uint8), empty, np.array(ends, dtype=np.int64), 1)
    assert hits.shape == (0,)
    assert hits.dtype == bool


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_strided_and_narrow_arguments_are_taken(name: str) -> None:
    order_index, keys, ends = zipf_accesses(7, 500, 60, 9)
    keys = keys % 1000
    expected = reference.simulate_cache(order_index, keys, ends, 2)
    strided = np.repeat(keys, 2)[::2], np.repeat(order_index, 3)[::3]
    hits = IMPLEMENTATIONS[name].simulate_cache(strided[1], strided[0].astype(np.int32), ends.astype(np.int32), 2)
    np.testing.assert_array_equal(hits, expected)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_accesses_that_do_not_fit_are_refused(name: str) -> None:
    good: dict[str, Any] = {
        "order_index": np.array([0, 15], dtype=np.uint8), "keys": np.array([1, -1]), "batch_ends": np.array([0, 2]),
        "num_sets": 1,
    }  # fmt: skip
    IMPLEMENTATIONS[name].simulate_cache(**good)
    for change in (
        {"order_index": np.array([0], dtype=np.uint8)}, {"order_index": np.array([0, 16], dtype=np.uint8)},
        {"keys": np.array([1, -2])}, {"keys": np.array([[1, 2]])}, {"keys": np.array([1, 2, 3])},
        {"batch_ends": np.array([1])}, {"batch_ends": np.array([3])}, {"batch_ends": np.array([2, 1])},
        {"batch_ends": np.array([-1, 2])}, {"batch_ends": np.array([], dtype=np.int64)},
        {"batch_ends": np.array([[2]])}, {"num_sets": 0}, {"num_sets": -1},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            IMPLEMENTATIONS[name].simulate_cache(**good | change)


@pytest.mark.parametrize("num_sets", [2**50, 2**62, 2**63 - 1])
def test_a_cache_that_memory_cannot_hold_is_refused(num_sets: int) -> None:
    with pytest.raises(MemoryError):
        kernels.simulate_cache(*one_by_one([1]), num_sets)


@pytest.mark.parametrize(
    "batch_max", [1, 4, 12]
)  # batches that one read batch reads: the order of its offers is then known
def test_a_store_hits_exactly_what_is_predicted(built: Path, batch_max: int) -> None:
    rng = np.random.default_rng(batch_max)
    weights = 1 / np.arange(1, 3001)
    pool = rng.integers(0, KEY_MAX, (3000, 3))
    pool[5] = 0
    keys = pool[rng.choice(3000, 6000, p=weights / weights.sum())]
    keys[rng.random(keys.shape) < 0.05] = -1
    ends = batches(rng, len(keys), batch_max)
    with tierstore.open(built, dram="600KiB", io="mmap") as store:
        table = store["layers.1"]
        seen = []
        for batch in np.split(keys, ends[:-1]):
            before = sum(table._engine.counters()["tables"][table.index][0])
            table.lookup(batch)
            seen.append(sum(table._engine.counters()["tables"][table.index][0]) - before)
        num_sets = store._backing._plan.shares["layers.1"].num_sets
    order_index = np.tile(np.arange(3, dtype=np.uint8), len(keys))
    hits = kernels.simulate_cache(order_index, keys.reshape(-1), ends * 3, num_sets)
    starts = np.concatenate([[0], ends[:-1]]) * 3
    predicted = np.diff(np.concatenate([[0], np.cumsum(hits)])[np.stack([starts, ends * 3])], axis=0)[0]
    assert seen == predicted.tolist()
    assert sum(seen) > 1000
