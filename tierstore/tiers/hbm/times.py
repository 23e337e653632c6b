"""How long lookups from the device take, measured without waiting for it.

Input: the two halves of a lookup, as they are launched. Output: a histogram of what both took on the device,
waits for the host's answer included. What ran between the two halves is not counted, so that a prefetch is not timed by
how late its rows were wanted. A lookup in a captured graph is launched without us: what its replays miss,
the mailbox's server times.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

from ...kernels import LATENCY_FRACTION
from ...stats import LatencyCounts
from .quiet import QuietTimes

WAITING_MAX = 64  # timed lookups that the device has not done; beyond it, the oldest is forgotten

_chance = random.Random()  # of our own: a model's seeded numbers stay what they are


class DeviceTimes:
    """The histogram of a store's lookups from the device. Any thread may call."""

    def __init__(self, device: torch.device, quiet: QuietTimes | None = None) -> None:
        """quiet: while it is, the device is asked for nothing."""
        self._device, self._quiet = device, quiet
        self._lock = threading.Lock()  # guards `_counts`, `_waiting`
        self._counts = LatencyCounts()
        self._waiting: deque[LookupTimes] = deque(maxlen=WAITING_MAX)

    def begin(self) -> LookupTimes | None:
        """Returns what times the lookup that begins now; None for seven in eight, by chance, which are not timed."""
        return LookupTimes(self._device) if _chance.random() < LATENCY_FRACTION else None

    def end(self, times: LookupTimes | None) -> None:
        """Counts a lookup whose halves have been launched, when the device has done them.
        Not while a graph is captured."""
        if times is not None:
            with self._lock:
                self._waiting.append(times)
                self._collect()

    def record(self, *, may_collect: bool) -> dict[str, Any]:
        """Returns the histogram as `stats.latency_of` does.

        may_collect: whether the device may be asked what it has done meanwhile; not once its store is closed, because
        nobody holds a quiet time of that.
        """
        with self._lock:
            if may_collect:
                self._collect()
            return self._counts.record()

    def after_fork_in_child(self) -> None:
        """Forgets what is under way, which is the parent's; its counts stay, as those of its hits do."""
        self._lock = threading.Lock()
        self._waiting.clear()

    def _collect(self) -> None:
        """Counts what the device has done, unless it is quiet: to ask an event ends a capture. `_lock` is held."""
        with contextlib.nullcontext(True) if self._quiet is None else self._quiet.work_unless_quiet() as may_ask:
            while may_ask and self._waiting and self._waiting[0].are_known():
                self._counts.add(self._waiting.popleft().took_ns())


class LookupTimes:
    """When the halves of one lookup began and ended, on the device; on a CPU,
    whose kernels end before they return, here."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"
        self._halves: list[tuple[Any, Any]] = []

    @contextlib.contextmanager
    def half(self) -> Iterator[None]:
        """Around what launches a half, on the current stream."""
        start = self._mark()
        yield
        self._halves.append((start, self._mark()))

    def are_known(self) -> bool:
        """Whether the device has done all halves."""
        return not self._on_gpu or all(end.query() for _, end in self._halves)

    def took_ns(self) -> int:
        """Returns what the halves took together."""
        if self._on_gpu:
            return round(sum(start.elapsed_time(end) for start, end in self._halves) * 1e6)
        return int(sum(end - start for start, end in self._halves))

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class LookupTimer:
    """Times one lookup after the other of the same buffers. Its owner's lock guards it."""

    def __init__(self, times: DeviceTimes) -> None:
        self._times = times
        self._timed: LookupTimes | None = None  # of the lookup at hand

    @property
    def is_timed(self) -> bool:
        """Whether the lookup at hand is timed."""
        return self._timed is not None

    def begin(self, *, is_timed: bool) -> None:
        """Begins with another lookup; is_timed: whether it may be timed, by chance."""
        self._timed = self._times.begin() if is_timed else None

    def half(self) -> contextlib.AbstractContextManager[None]:
        """Around what launches a half of the lookup."""
        return contextlib.nullcontext() if self._timed is None else self._timed.half()

    def end(self) -> None:
        """Counts the lookup, all of which was launched."""
        timed, self._timed = self._timed, None
        self._times.end(timed)

    def forget(self) -> None:
        """Does not time the lookup at hand."""
        self._timed = None
