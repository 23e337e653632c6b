"""Traffic of rows: exact counts against a plain replay, and a working set that predicts what a cache has to read."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest

from tierstore.decisions import row_traffic
from tierstore.decisions.row_traffic import RowTraffic, TrafficCounter
from tierstore.decisions.training_estimate import DiskRates, TableNeeds, estimate_training
from tierstore.errors import BudgetError

NUM_ROWS, NUM_STEPS = 4000, 120


def zipf_steps(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    mixed = rng.permutation(NUM_ROWS)
    return [np.unique(mixed[np.minimum(rng.zipf(1.3, 300) - 1, NUM_ROWS - 1)]) for _ in range(NUM_STEPS)]


def counted(steps: list[np.ndarray]) -> RowTraffic:
    counter = TrafficCounter(NUM_ROWS)
    for rows in steps:
        counter.add_step(rows.astype(np.int64), rows[:, None].astype(np.int64))
    return counter.traffic()


def lru_misses(steps: list[np.ndarray], num_slots: int) -> tuple[int, int]:
    """Reads of a cache that drops the rows that were used longest ago, and those that are first touches."""
    cache: OrderedDict[int, None] = OrderedDict()
    seen: set[int] = set()
    misses = 0
    for rows in steps:
        for row in rows.tolist():
            misses += row not in cache
            cache[row] = None
            cache.move_to_end(row)
            if len(cache) > num_slots:
                cache.popitem(last=False)
        seen |= set(rows.tolist())
    return misses, len(seen)


def test_counts_are_those_of_a_plain_replay() -> None:
    steps = zipf_steps(1)
    traffic = counted(steps)
    misses, touched = lru_misses(steps, NUM_ROWS)
    assert traffic.watched_one_in == 1
    assert traffic.touched_rows == touched == misses
    assert traffic.rows_per_step * NUM_STEPS == pytest.approx(sum(map(len, steps)))
    assert traffic.first_touches * NUM_STEPS == pytest.approx(touched)
    late = set(np.concatenate(steps[NUM_STEPS // 2 :]).tolist()) - set(np.concatenate(steps[: NUM_STEPS // 2]).tolist())
    assert traffic.touched_late == len(late)


@pytest.mark.parametrize("num_slots", [60, 150, 400, 900])
def test_misses_are_near_those_of_a_cache_that_drops_the_oldest(num_slots: int) -> None:
    steps = zipf_steps(2)
    traffic = counted(steps)
    found, _ = lru_misses(steps, num_slots)
    predicted = traffic.misses(traffic.window_of(num_slots)) * NUM_STEPS
    assert predicted == pytest.approx(found, rel=0.2)  # a window of whole steps, an LRU of single rows


def test_rows_of_some_steps_are_near_those_counted() -> None:
    steps = zipf_steps(3)
    traffic = counted(steps)
    for length in (1, 5, 20):
        starts = range(0, NUM_STEPS - length, length)
        found = np.mean([len(np.unique(np.concatenate(steps[at : at + length]))) for at in starts])
        assert traffic.rows_in(length) == pytest.approx(found, rel=0.1)
    assert traffic.rows_in(10 * NUM_STEPS) <= traffic.touched_rows


def test_of_a_large_table_one_row_in_some_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = zipf_steps(4)
    exact = counted(steps)
    monkeypatch.setattr(row_traffic, "COUNTERS_MAX", NUM_ROWS // 4)
    watched = counted(steps)
    assert watched.watched_one_in == 4
    assert watched.touched_rows == pytest.approx(exact.touched_rows, rel=0.1)
    assert watched.first_touches == pytest.approx(exact.first_touches, rel=0.1)


def test_rows_that_were_touched_together_are_one_place() -> None:
    counter = TrafficCounter(100)
    key, other = np.arange(8)[None], np.arange(50, 58)[None]
    counter.add_step(key[0], key)
    counter.add_step(other[0], other)
    counter.add_step(key[0], key)  # 8 rows, touched together: one place
    assert counter.traffic().places_fraction == 1 / 8
    mixed = np.concatenate([key[:, :4], other[:, :4]], axis=1)
    counter.add_step(np.sort(mixed[0]), mixed)  # two places for 8 rows
    assert counter.traffic().places_fraction == 3 / 16


def test_what_a_disk_carries_adds_up_and_a_log_without_room_is_refused() -> None:
    traffic = counted(zipf_steps(5))
    options = {"num_tokens": 1200, "batch_tokens": 10, "commit_steps": 5}
    disk = DiskRates(1000, 500, 1e6)
    few, all_of_them = TableNeeds(1048, 100, 0), TableNeeds(1048, NUM_ROWS, 0)
    small = estimate_training({"t": traffic}, {"t": few}, free_bytes=1 << 40, disk=disk, **options)
    large = estimate_training({"t": traffic}, {"t": all_of_them}, free_bytes=1 << 40, disk=disk, **options)
    assert small.tables["t"].run_reads_per_step > large.tables["t"].run_reads_per_step == 0
    assert large.tables["t"].rows_written_per_step == pytest.approx(traffic.rows_in(5) / 5)
    assert large.tables["t"].rows_written_per_step <= small.tables["t"].rows_written_per_step <= traffic.rows_per_step
    assert small.tokens_per_s is not None
    assert large.tokens_per_s is not None
    seconds = large.tables["t"].base_reads_per_step / 1000 + large.tables["t"].rows_written_per_step * (1048 + 8) / 1e6
    assert large.tokens_per_s == pytest.approx(10 / seconds)
    assert large.tokens_per_s > small.tokens_per_s
    drawn = estimate_training({"t": traffic}, {"t": TableNeeds(1048, NUM_ROWS, 0, True)}, free_bytes=1 << 40, **options)
    assert drawn.tables["t"].base_reads_per_step == 0
    assert drawn.tokens_per_s is None
    with pytest.raises(BudgetError, match=r"take up to .*\(\d+ bytes\), the store's disk has .*\(1000 bytes\)"):
        estimate_training({"t": traffic}, {"t": few}, free_bytes=1000, **options)
