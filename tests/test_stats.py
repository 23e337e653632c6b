"""What a store counts and times: every kind of lookup has a latency, and the parts of the counts add up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.shapes import HEADS, ROW_BYTES
from support.stores import Model, random_keys
from support.waiting import eventually

import tierstore
from tierstore.kernels import LATENCY_FRACTION

LOOKUPS = 400  # one in eight is timed, by chance: fewer than 10 of 400 would be once in 10^13 runs
TIMED_MIN = 10
SLOW_READ_NS = 16_000_000  # a read that `inject` slows down takes 20 ms and more


def timed(store: tierstore.Store) -> int:
    return sum(store.stats()["latency"]["counts"])


def slow_ones(store: tierstore.Store) -> int:
    latency = store.stats()["latency"]
    return sum(
        count
        for start, count in zip([0, *latency["bounds_ns"]], latency["counts"], strict=True)
        if start >= SLOW_READ_NS
    )


@pytest.mark.parametrize("dram", ["64MiB", "600KiB"], ids=["resident", "cached"])
def test_submitted_lookups_have_a_latency_as_blocking_ones_do(built: Path, dram: str) -> None:
    keys = random_keys(np.random.default_rng(0), 4)
    out = np.empty((4, HEADS, ROW_BYTES), dtype=np.uint8)
    with tierstore.open(built, dram=dram) as store:
        for _ in range(LOOKUPS):
            store.submit({"layers.1": (keys, out)}).wait()
        submitted = timed(store)
        for _ in range(LOOKUPS):
            store["layers.1"].lookup(keys, out)
        assert TIMED_MIN < submitted < LOOKUPS / 2
        assert TIMED_MIN < timed(store) - submitted < LOOKUPS / 2
        assert store.stats()["latency"]["share"] == LATENCY_FRACTION


def test_a_submitted_lookup_is_timed_until_its_rows_are_there_also_if_nobody_waits(built: Path) -> None:
    keys = np.full((128, 1, 3), -1, dtype=np.int64)
    keys[:, 0, 0] = np.arange(128)  # none is asked for twice
    buffers = [np.empty((1, HEADS, ROW_BYTES), dtype=np.uint8) for _ in keys]
    with tierstore.open(built, dram="300KiB", io="pread") as store:
        store._engine._engine.inject("slow", 0, 1 << 20)
        for each, out in zip(keys, buffers, strict=True):
            store.submit({"layers.1": (each, out)})
        eventually(lambda: slow_ones(store) > 0)
        store._engine._engine.inject("none")


def test_a_models_layers_that_take_turns_are_timed_alike(built: Path) -> None:
    """Every eighth lookup would always be the same layer's: here the one that reads nothing."""
    with tierstore.open(built, dram="64MiB") as store:
        few, many = np.zeros((1, 3), dtype=np.int64), np.zeros((20_000, 3), dtype=np.int64)
        for turn in range(LOOKUPS):
            store["layers.1"].lookup(many if turn % 8 == 0 else few)
        counts = store.stats()["latency"]["counts"]
        assert sum(counts[:7]) > TIMED_MIN  # up to 64 us
        assert sum(counts[7:]) > 0


def test_row_ids_of_whole_tokens_of_a_resident_table_count_as_their_keys(built: Path, model: Model) -> None:
    keys = random_keys(np.random.default_rng(1), 20)
    row_ids = model.row_ids("layers.1", keys)
    with tierstore.open(built, dram="64MiB") as store:
        rows = store["layers.1"].rows(row_ids.reshape(4, 5, 24))
        np.testing.assert_array_equal(rows.reshape(20, HEADS, ROW_BYTES), model.expected("layers.1", keys))
        stats = store.stats()
        assert stats["hits"] == {"hbm": 0, "dram": int((keys >= 0).sum()), "nvme": 0}
        assert stats["sentinels"] == int((keys < 0).sum())
        by_order = stats["tables"]["layers.1"]["orders"]
        assert [by_order[order]["dram"] for order in (2, 3, 4)] == (keys >= 0).sum(axis=0).tolist()
        assert (stats["batches"], stats["zero_miss_batches"], stats["rows"]) == (1, 1, 0)


def test_rows_of_a_resident_plain_table_count_as_keys_and_are_timed(built: Path) -> None:
    ids = np.array([3, -1, 32, 3], dtype=np.int64)
    with tierstore.open(built, dram="64MiB") as store:
        for _ in range(LOOKUPS):
            store["plain"].rows(ids)
        stats = store.stats()
        assert stats["tables"]["plain"]["hits"] == {"hbm": 0, "dram": 3 * LOOKUPS, "nvme": 0}
        assert stats["sentinels"] == LOOKUPS
        assert TIMED_MIN < timed(store) < LOOKUPS / 2


@pytest.mark.parametrize(("dram", "missed"), [("64MiB", 0), ("600KiB", 4)], ids=["resident", "cached"])
def test_single_rows_are_counted_apart_from_keys_with_what_they_read(built: Path, dram: str, missed: int) -> None:
    ids = np.array([0, 5, -1, 7, 5], dtype=np.int64)
    with tierstore.open(built, dram=dram) as store:
        before = store.stats()
        store["layers.1"].rows(ids)
        stats = store.stats()
        assert stats["keys"] == 0
        assert (stats["rows"], stats["rows_missed"]) == (4, missed)
        assert stats["row_bytes_read"] == stats["bytes_read"] - before["bytes_read"]
        assert (stats["row_bytes_read"] > 0) == (missed > 0)


def test_what_keys_read_is_not_among_what_rows_read(built: Path) -> None:
    with tierstore.open(built, dram="600KiB") as store:
        store["layers.1"].lookup(random_keys(np.random.default_rng(2), 50))
        stats = store.stats()
        assert stats["bytes_read"] > 0
        assert stats["row_bytes_read"] == 0
