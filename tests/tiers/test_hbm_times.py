"""Times of lookups from the device, of a GPU that is played by events: they are taken when it is done,
and never waited for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tierstore.tiers.hbm import times
from tierstore.tiers.hbm.times import WAITING_MAX, DeviceTimes

GPU = torch.device("cuda:1")


class Gpu:
    """Events of a GPU: each is a millisecond after the one before; those before `done_ms` have happened."""

    def __init__(self) -> None:
        self.now_ms = 0
        self.done_ms = 0


class Event:
    gpu: Gpu

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: Any) -> None:
        assert stream == "stream of cuda:1"
        self.at_ms, self.gpu.now_ms = self.gpu.now_ms, self.gpu.now_ms + 1

    def query(self) -> bool:
        return self.at_ms < self.gpu.done_ms

    def elapsed_time(self, end: Event) -> float:
        assert end.query(), "it is asked before it has happened"
        return end.at_ms - self.at_ms


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    monkeypatch.setattr(Event, "gpu", made, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(times, "LATENCY_FRACTION", 1.0)
    return made


def look_up(device_times: DeviceTimes) -> None:
    lookup = device_times.begin()
    assert lookup is not None
    with lookup.half():
        pass
    with lookup.half():
        pass
    device_times.end(lookup)


def test_a_lookup_is_counted_when_the_gpu_has_done_both_halves(gpu: Gpu) -> None:
    device_times = DeviceTimes(GPU)
    look_up(device_times)
    gpu.done_ms = 3  # the second half has not ended
    assert sum(device_times.record(may_collect=True)["counts"]) == 0
    gpu.done_ms = 4
    assert device_times.record(may_collect=True)["sum_ns"] == 2_000_000  # a millisecond each
    assert sum(device_times.record(may_collect=True)["counts"]) == 1


def test_a_gpu_that_does_not_get_on_keeps_a_bounded_number_of_events(gpu: Gpu) -> None:
    device_times = DeviceTimes(GPU)
    for _ in range(3 * WAITING_MAX):
        look_up(device_times)
    gpu.done_ms = gpu.now_ms
    assert sum(device_times.record(may_collect=True)["counts"]) == WAITING_MAX


def test_a_forked_child_asks_the_parents_gpu_nothing(gpu: Gpu) -> None:
    device_times = DeviceTimes(GPU)
    look_up(device_times)
    gpu.done_ms = gpu.now_ms
    device_times.after_fork_in_child()
    assert sum(device_times.record(may_collect=True)["counts"]) == 0


def test_one_lookup_in_eight_is_timed_and_the_users_random_numbers_stay_what_they_are() -> None:
    import random

    random.seed(5)
    expected = random.Random(5).random()
    device_times = DeviceTimes(torch.device("cpu"))
    begun = [device_times.begin() is not None for _ in range(4_000)]
    assert 350 < sum(begun) < 650
    assert random.random() == expected
