"""While somebody holds a quiet time, nothing of the store but lookups that were opened before uses the device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.device import DEVICE
from support.shapes import HEADS, POISON, ROW_BYTES
from support.stores import Model, random_keys
from support.waiting import WAIT_S

import tierstore
from tierstore.tiers.hbm.quiet import QuietTimes

NAME = "layers.1"


@pytest.fixture
def store(placed: Path) -> Iterator[tierstore.Store]:
    with tierstore.open(placed, dram="500KiB", hbm="256KiB", device=DEVICE) as store:
        yield store


@pytest.fixture
def calls(store: tierstore.Store, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What of the tier was called that copies, allocates or synchronises."""
    seen: list[str] = []
    tier = store._engine._tier
    for name in ("_copy_out", "counters", "clear", "name_records", "synchronize", "write"):
        act = getattr(tier, name)
        monkeypatch.setattr(tier, name, lambda *a, act=act, name=name: (seen.append(name), act(*a))[1])
    return seen


def in_thread(act: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(act())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def test_lookups_and_counts_in_a_quiet_time_leave_the_device_alone(
    store: tierstore.Store, model: Model, calls: list[str]
) -> None:
    keys = random_keys(np.random.default_rng(0), 60)
    ids = model.row_ids(NAME, keys)
    store[NAME].lookup(keys)
    before = store.stats()
    assert before["hits"]["hbm"] > 0
    assert set(calls) == {"_copy_out", "counters"}
    calls.clear()
    with store.quiet():
        np.testing.assert_array_equal(store[NAME].lookup(keys), model.expected(NAME, keys))
        np.testing.assert_array_equal(store[NAME].rows(ids), model.expected(NAME, keys))
        out = np.full((60, HEADS, ROW_BYTES), POISON, dtype=np.uint8)
        store[NAME].submit_rows(ids, out).wait(WAIT_S)
        np.testing.assert_array_equal(out, model.expected(NAME, keys))
        quiet = store.stats()
    assert calls == []
    assert quiet["hits"]["hbm"] == before["hits"]["hbm"]
    assert quiet["keys"] == 4 * before["keys"]
    store[NAME].lookup(keys)
    assert store.stats()["hits"]["hbm"] == 2 * before["hits"]["hbm"]
    assert set(calls) == {"_copy_out", "counters"}


def test_lookups_that_were_opened_before_launch_in_a_quiet_time(store: tierstore.Store, model: Model) -> None:
    ids = model.row_ids(NAME, random_keys(np.random.default_rng(1), 20))
    rows = store.open_rows(NAME, 20)
    out = torch.full((20, HEADS, ROW_BYTES), POISON, dtype=torch.uint8, device=DEVICE)
    with store.quiet():
        rows.look_up(torch.from_numpy(ids).to(DEVICE), out)
    rows.check()
    np.testing.assert_array_equal(out.cpu().numpy(), store[NAME].rows(ids))


def test_what_would_disturb_a_capture_is_refused_in_its_thread_and_waits_in_others(
    store: tierstore.Store, calls: list[str]
) -> None:
    acts = {
        "a lookup": lambda: store.open_lookup(NAME, 2),
        "by row id": lambda: store.open_rows(NAME, 2),
        "what hbm holds": store.change_hbm,
        "another version": lambda: store._engine.move(lambda: None),
        "an epoch": store._engine.name_records,
    }
    with store.quiet():
        for what, act in acts.items():
            with pytest.raises(tierstore.ConfigError, match=what):
                act()
        started = [in_thread(act) for act in acts.values()]
        for thread, _ in started:
            thread.join(0.2)
            assert thread.is_alive()
        assert calls == []
    for thread, results in started:
        thread.join(WAIT_S)
        assert not thread.is_alive()
        assert not isinstance(results[0], BaseException), results


def test_a_quiet_time_begins_when_work_under_way_has_ended(store: tierstore.Store) -> None:
    begun, end = threading.Event(), threading.Event()

    def work() -> None:
        with store._engine._quiet.work("work"):
            begun.set()
            assert end.wait(WAIT_S)

    worker, _ = in_thread(work)
    assert begun.wait(WAIT_S)

    def hold() -> bool:
        with store.quiet():
            return end.is_set()

    holder, results = in_thread(hold)
    holder.join(0.2)
    assert holder.is_alive()
    end.set()
    holder.join(WAIT_S)
    worker.join(WAIT_S)
    assert results == [True]


class Timed:
    """A lookup that was timed; whoever asks whether the device has done it waits until `answer`."""

    def __init__(self) -> None:
        self.asked, self.answer = threading.Event(), threading.Event()

    def are_known(self) -> bool:
        self.asked.set()
        return self.answer.wait(WAIT_S)

    def took_ns(self) -> int:
        return 1_000


@pytest.mark.parametrize("asks", ["counters", "a lookup's end"])
def test_a_quiet_time_begins_when_the_device_has_said_how_long_lookups_took(store: tierstore.Store, asks: str) -> None:
    timed: Any = Timed()
    times: Any = store._engine._times
    times._waiting.clear()
    before = store.stats()["latency"]["sum_ns"]
    if asks == "counters":
        times._waiting.append(timed)
    asker, _ = in_thread(store.stats if asks == "counters" else lambda: times.end(timed))
    assert timed.asked.wait(WAIT_S)

    def hold() -> bool:
        with store.quiet():
            return bool(timed.answer.is_set())

    holder, results = in_thread(hold)
    holder.join(0.2)
    assert holder.is_alive()
    timed.answer.set()
    for thread in (asker, holder):
        thread.join(WAIT_S)
    assert results == [True]
    assert store.stats()["latency"]["sum_ns"] == before + timed.took_ns()


def test_how_long_lookups_took_is_not_asked_in_a_quiet_time_nor_of_a_closed_store(store: tierstore.Store) -> None:
    timed: Any = Timed()
    timed.answer.set()
    times: Any = store._engine._times
    times._waiting.clear()
    with store.quiet():
        times.end(timed)
        store.stats()
    store.close()
    store.stats()
    assert not timed.asked.is_set()


def test_quiet_times_and_work_may_be_nested_but_not_in_each_other() -> None:
    times = QuietTimes("the store")
    with times.work("one"), times.work("two"), times.work_unless_quiet() as may_work:
        assert may_work
        with pytest.raises(tierstore.ConfigError, match="cannot begin within work"), times.hold():
            pass
    with times.hold(), times.hold(), times.work_unless_quiet() as may_work:
        assert not may_work
    assert not times.is_quiet
    with times.work_unless_quiet() as may_work:
        assert may_work


def test_what_raises_in_a_quiet_time_ends_it() -> None:
    times = QuietTimes("the store")
    with pytest.raises(KeyError), times.hold():
        raise KeyError
    with pytest.raises(KeyError), times.work("work"):
        raise KeyError
    with times.hold():
        assert times.is_quiet
    assert not times.is_quiet


def test_without_an_hbm_tier_a_quiet_time_is_nothing(placed: Path) -> None:
    with tierstore.open(placed, dram="500KiB") as store, store.quiet():
        store[NAME].lookup(np.zeros((1, 3), dtype=np.int64))
