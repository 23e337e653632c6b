"""Missed keys: which the daemon reads first, and which it lets go."""

from __future__ import annotations

import threading

import numpy as np

from tierstore.daemon.missed import MissedKeys


def keys(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def put(missed: MissedKeys, numbers: np.ndarray, again: bool) -> None:
    missed.put(numbers, np.full(len(numbers), again))


def taken(missed: MissedKeys, most: int = 1) -> list[list[int]]:
    return [part.tolist() for part in missed.take(most, 0.0)]


def test_what_was_asked_for_before_comes_first_and_of_each_kind_the_newest() -> None:
    missed = MissedKeys(100)
    put(missed, keys(1), again=False)
    put(missed, keys(2, 3), again=True)
    put(missed, keys(4), again=True)
    missed.put(keys(5, 6), np.array([True, False]))
    assert [taken(missed) for _ in range(6)] == [[[5]], [[4]], [[2, 3]], [[6]], [[1]], []]
    assert len(missed) == 0


def test_as_many_as_are_asked_for_come_at_once() -> None:
    missed = MissedKeys(100)
    for number in range(5):
        put(missed, keys(number, number + 10), again=True)
    assert taken(missed, most=3) == [[4, 14], [3, 13]]
    assert len(missed) == 6


def test_the_oldest_new_keys_give_way_then_the_oldest_others() -> None:
    missed = MissedKeys(4)
    put(missed, keys(1), again=False)
    put(missed, keys(2), again=True)
    put(missed, keys(3), again=False)
    put(missed, keys(4, 5), again=True)
    assert (len(missed), missed.num_dropped) == (4, 1)
    put(missed, keys(6, 7, 8), again=True)
    assert (len(missed), missed.num_dropped) == (3, 5)  # in whole arrays, as they came
    assert taken(missed, most=9) == [[6, 7, 8]]


def test_whoever_waits_is_woken_by_keys_and_by_the_end() -> None:
    missed = MissedKeys(10)
    got: list[list[np.ndarray]] = []
    for act in (lambda: put(missed, keys(1), again=True), missed.end):
        thread = threading.Thread(target=lambda: got.append(missed.take(1, 60.0)))
        thread.start()
        act()
        thread.join(30)
        assert not thread.is_alive()
    assert [len(parts) for parts in got] == [1, 0]
    put(missed, keys(1), again=True)
    assert taken(missed) == []
