"""Reads that fail, come short, are corrupt or slow, at operation 1, 2, 3 ...: right rows or a named error,
never a hang."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.shapes import HEADS, POISON, ROW_BYTES
from support.stores import Model, random_keys

import tierstore
from tierstore.errors import CorruptPageError

MODES = ("uring", "mmap", "pread")
PERSISTENT = 1 << 40
MESSAGES = {"failing": "cannot be read", "short": "ends before it", "corrupt": "checksum is wrong"}


def lookup(store: tierstore.Store, keys: np.ndarray, early: bool) -> np.ndarray:
    out = np.full((len(keys), HEADS, ROW_BYTES), POISON, dtype=np.uint8)
    if early:
        store.submit({"layers.1": (keys, out)}).wait(timeout_s=60)
    else:
        store["layers.1"].lookup(keys, out)
    return out


@pytest.mark.parametrize("early", [False, True], ids=["lookup", "submit"])
@pytest.mark.parametrize("fault", ["failing", "short", "corrupt"])
@pytest.mark.parametrize("io", MODES)
@pytest.mark.parametrize("which", ["built", "placed"])
def test_a_bad_read_anywhere_is_a_named_error_and_the_next_lookup_right(
    request: pytest.FixtureRequest, model: Model, which: str, io: str, fault: str, early: bool
) -> None:
    path = request.getfixturevalue(which)
    keys = random_keys(np.random.default_rng(0), 4 if which == "built" else 6)
    expected = model.expected("layers.1", keys)
    operation = 0
    while True:
        with tierstore.open(path, dram="200KiB", io=io) as store:
            engine = store._engine._engine
            engine.inject(fault, operation)
            try:
                rows, error = lookup(store, keys, early), None
            except CorruptPageError as raised:
                error = str(raised)
            if error is None:
                np.testing.assert_array_equal(rows, expected)
                assert engine.injected_reads() <= operation  # the sweep went past the last read
                break
            assert MESSAGES[fault] in error or "placed entry" in error
            assert "of table layers.1" in error
            for _ in range(2):
                np.testing.assert_array_equal(lookup(store, keys, early), expected)
        operation += 1
    assert operation > 20


@pytest.mark.parametrize("fault", ["failing", "short", "corrupt"])
@pytest.mark.parametrize("io", MODES)
def test_a_disk_that_stays_bad_fails_every_lookup_and_no_cached_one(
    built: Path, model: Model, io: str, fault: str
) -> None:
    keys = random_keys(np.random.default_rng(1), 40)
    with tierstore.open(built, dram="600KiB", io=io) as store:
        warm = lookup(store, keys[:10], early=False)
        store._engine._engine.inject(fault, 0, PERSISTENT)
        for early in (False, True):
            with pytest.raises(CorruptPageError, match=MESSAGES[fault]):
                lookup(store, keys[10:], early)
        np.testing.assert_array_equal(lookup(store, keys[:10], early=False), warm)
        store._engine._engine.inject("none")
        np.testing.assert_array_equal(lookup(store, keys, early=True), model.expected("layers.1", keys))


@pytest.mark.parametrize("io", MODES)
def test_slow_reads_are_only_slow(built: Path, model: Model, io: str) -> None:
    keys = random_keys(np.random.default_rng(2), 3)
    with tierstore.open(built, dram="600KiB", io=io) as store:
        store._engine._engine.inject("slow", 3, 5)
        np.testing.assert_array_equal(lookup(store, keys, early=False), model.expected("layers.1", keys))


@pytest.mark.parametrize("io", MODES)
def test_a_ticket_dropped_and_a_store_closed_in_flight_leave_nothing(built: Path, io: str) -> None:
    keys = random_keys(np.random.default_rng(3), 30)
    for _ in range(5):
        store = tierstore.open(built, dram="300KiB", io=io)
        store._engine._engine.inject("slow", 0, 2)
        for _ in range(10):
            store.submit({"layers.1": (keys, np.empty((30, HEADS, ROW_BYTES), dtype=np.uint8))})
        store.close()


@pytest.mark.parametrize("io", MODES)
def test_a_store_dropped_in_flight_ends_its_reads_first(built: Path, io: str) -> None:
    keys = random_keys(np.random.default_rng(4), 30)
    store = tierstore.open(built, dram="300KiB", io=io)
    store._engine._engine.inject("slow", 0, 2)
    out = np.full((30, HEADS, ROW_BYTES), POISON, dtype=np.uint8)
    store.submit({"layers.1": (keys, out)})
    del store
    with tierstore.open(built, dram="64MiB") as resident:
        np.testing.assert_array_equal(out, resident["layers.1"].lookup(keys))
