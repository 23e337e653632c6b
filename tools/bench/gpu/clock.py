"""How work on a GPU is timed: launches in a replayed graph, or one after the other, between two events of the device.

Input: launches, of which each does the same work on other inputs, so that no run finds its inputs in a cache. Output:
callables that time one run, seconds a launch; `pairs.interleave` sets several side by side. Warmed up, compiled and
captured before the first. Tests give another clock, by which the same cases run where there is no GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Launch = Callable[[], None]
Timed = Callable[[], float]

REPLAYS = 10  # of which a run's seconds are the median; one more comes before
FLUSH_BYTES = 256 << 20  # several times the caches of a GPU


class Clock(Protocol):
    """What cases are timed by. Every method returns what gives the seconds of a launch, the median of several runs."""

    def in_graph(self, launches: Sequence[Launch], before: Launch | None = None) -> Timed:
        """Of all launches in one replayed graph, divided by their number; `before` runs before each replay, untimed."""

    def in_turn(self, launches: Sequence[Launch]) -> Timed:
        """Of all launches, given to the device one after the other, divided by their number:
        for launches of a millisecond."""

    def on_host(self, work: Launch, before: Launch | None = None) -> Timed:
        """Of `work` on the host's own clock, until the device has done what it was given."""

    def flush(self) -> None:
        """Fills the device's caches with something else. Asynchronous."""

    def allocated_bytes(self) -> int:
        """Returns how much of the device's memory is given out to tensors."""


class DeviceClock:
    """The clock of a GPU. See `Clock`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._scratch: torch.Tensor | None = None

    def in_graph(self, launches: Sequence[Launch], before: Launch | None = None) -> Timed:
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        if before is not None:
            before()
        with torch.cuda.stream(side):
            for launch in launches:  # compiles the kernels
                launch()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for launch in launches:
                launch()
        return lambda: self._median(graph.replay, before) / len(launches)

    def in_turn(self, launches: Sequence[Launch]) -> Timed:
        def all_of_them() -> None:
            for launch in launches:
                launch()

        return lambda: self._median(all_of_them, None) / len(launches)

    def on_host(self, work: Launch, before: Launch | None = None) -> Timed:
        def timed() -> float:
            samples = []
            for _ in range(REPLAYS // 2 + 1):
                if before is not None:
                    before()
                torch.cuda.synchronize(self._device)
                started = time.perf_counter()
                work()
                torch.cuda.synchronize(self._device)
                samples.append(time.perf_counter() - started)
            return statistics.median(samples[1:])

        return timed

    def _median(self, run: Launch, before: Launch | None) -> float:
        """Returns the median seconds between two events around a run."""
        samples = []
        for _ in range(REPLAYS + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if before is not None:
                before()
            start.record()
            run()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) / 1e3)
        return statistics.median(samples[1:])

    def flush(self) -> None:
        if self._scratch is None:
            self._scratch = torch.ones(FLUSH_BYTES, dtype=torch.uint8, device=self._device)
        self._scratch.add_(1)

    def allocated_bytes(self) -> int:
        return torch.cuda.memory_allocated(self._device)
