"""What the cache of entries keeps: what is counted, whatever passes by; and what it lets go as counts age."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tierstore

BUDGET = "600KiB"  # a cache of some 800 entries a table


@pytest.fixture
def table(built: Path):
    with tierstore.open(built, dram=BUDGET, io="mmap") as store:
        assert "layers.1" not in store.stats()["memory"]["resident_tables"]
        yield store["layers.1"]


def keys_from(start: int, count: int) -> np.ndarray:
    """Returns keys that no other range shares, int64 [count, 3]."""
    return (np.arange(start, start + count)[:, None] * 3 + np.arange(3)) * 1_000_003


def hit_rate(table, keys: np.ndarray) -> float:
    """Returns which share of keys is found in DRAM."""
    before = table_hits(table)["dram"]
    table.lookup(keys)
    return (table_hits(table)["dram"] - before) / keys.size


def table_hits(table) -> dict[str, int]:
    in_dram, _, from_nvme = table._engine.counters()["tables"][table.index]
    return {"dram": sum(in_dram), "nvme": sum(from_nvme)}


def test_one_long_prefill_of_first_seen_keys_washes_out_nothing_that_is_counted(table) -> None:
    hot = keys_from(0, 80)
    for _ in range(4):
        table.lookup(hot)
    assert hit_rate(table, hot) > 0.97
    table.lookup(keys_from(1000, 3000))
    assert hit_rate(table, hot) > 0.9  # a cache that keeps the most recent would have none of them


def test_a_first_seen_key_is_found_again_soon_after(table) -> None:
    table.lookup(keys_from(0, 1000))
    table.lookup(keys_from(5000, 15))
    assert hit_rate(table, keys_from(5000, 15)) > 0.9


@pytest.mark.long
def test_keys_that_are_used_no_more_give_way_as_counts_age(table) -> None:
    old, new = keys_from(0, 150), keys_from(10_000, 150)
    for _ in range(16):
        table.lookup(old)
    assert hit_rate(table, old) > 0.97
    for step in range(100):
        table.lookup(new)
        table.lookup(keys_from(20_000 + 300 * step, 300))
    assert hit_rate(table, new) > 0.9
    assert hit_rate(table, old) < 0.5
