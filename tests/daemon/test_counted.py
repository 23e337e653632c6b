"""The stat record of a daemon at work: what its clients looked up is timed and counted in it,
beside what was planned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import remote_servers
from support.served import KIB, MIB, request, serving
from support.shapes import HEADS, ROW_BYTES
from support.stores import random_keys
from support.waiting import eventually

import tierstore
from tierstore.offline.place import place_entries
from tierstore.offline.placement_file import Chosen

LOOKUPS = 200  # one in eight is timed, by chance: none of 200 would be once in 10^11 runs


def timed(latency: dict) -> int:
    return sum(latency["counts"])


def submit_some(store: tierstore.Store, lookups: int = LOOKUPS) -> None:
    keys, out = random_keys(np.random.default_rng(0), 4), np.empty((4, HEADS, ROW_BYTES), dtype=np.uint8)
    for _ in range(lookups):
        store.submit({"layers.1": (keys, out)}).wait(60)


def test_lookups_that_attached_clients_submit_are_timed_in_the_daemons_record(built: Path, tmp_path: Path) -> None:
    with serving(built, tmp_path / "socket", 2 * MIB) as daemon:
        with tierstore.connect(tmp_path / "socket") as store:
            submit_some(store)
            assert timed(store.stats()["latency"]) > 0
        eventually(lambda: daemon.stat().counters.batches == LOOKUPS)
        assert sum(daemon.stat().latency.counts) > 0


def test_remote_lookups_are_each_timed_by_the_client_whether_they_block_or_not(built: Path) -> None:
    keys = random_keys(np.random.default_rng(1), 3)
    with remote_servers.serving(built) as server, tierstore.connect(f"grpc://{server.address}") as store:
        store["layers.1"].lookup(keys)
        submit_some(store, 3)
        store["layers.1"].rows(np.arange(5))
        stats = store.stats()
        assert timed(stats["latency"]) == stats["batches"] == 5
        assert stats["latency"]["share"] == 1
        assert stats["latency"]["sum_ns"] > 0
        assert stats["row_bytes_read"] == 5 * 40


def test_what_the_plan_expected_is_in_the_record_and_in_the_stats_of_a_store(own_store: Path, tmp_path: Path) -> None:
    rates = {name: {"2": rate, "all": rate} for name, rate in (("hit_rate", 0.8), ("low", 0.7), ("high", 0.9))}
    details = {"plan": {"groups": [{"tables": ["layers.1"], **rates}]}}
    chosen = {"layers.1": Chosen(np.zeros(1, dtype=np.uint8), np.zeros(1, dtype=np.int64), 0.5)}
    epoch = place_entries(own_store, chosen, details=details).placement.epoch
    expected = {"layers.1": {key: {"expected": 0.8, "low": 0.7, "high": 0.9} for key in ("2", "all")}}
    with tierstore.open(own_store, dram="600KiB") as store:
        assert store.stats()["placement"]["expected"] == expected
    with serving(own_store, tmp_path / "socket", 2 * MIB):
        assert request(tmp_path / "socket", "stat")["plan"] == {"epoch": epoch, "hit_rates": expected}


@pytest.mark.parametrize(
    "details", [{}, {"plan": {}}, {"plan": {"groups": [{"tables": 3}]}}, {"plan": "by hand"}], ids=str
)
def test_a_placement_that_no_plan_made_expects_nothing(own_store: Path, details: dict) -> None:
    chosen = {"layers.1": Chosen(np.zeros(1, dtype=np.uint8), np.zeros(1, dtype=np.int64), 0.5)}
    place_entries(own_store, chosen, details=details)
    with tierstore.open(own_store, dram="600KiB") as store:
        assert store.stats()["placement"]["expected"] is None


def test_the_record_says_how_far_recency_caches_have_filled(built: Path, tmp_path: Path) -> None:
    with serving(built, tmp_path / "socket", 900 * KIB) as daemon, tierstore.connect(tmp_path / "socket") as store:
        epochs = daemon.stat().epochs
        assert set(epochs.recency_entries) == set(epochs.recency_slots) == set(epochs.static_slots)
        name = "layers.1"
        assert epochs.recency_entries[name] == 0 < epochs.recency_slots[name]
        keys = np.arange(90, dtype=np.int64).reshape(30, 3)
        store[name].lookup(keys)
        eventually(lambda: daemon.stat().feed.read_keys >= keys.size)
        found = daemon.stat().epochs
        assert 0 < found.recency_entries[name] <= min(keys.size, found.recency_slots[name])
