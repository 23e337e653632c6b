"""Quiet times: while somebody captures a CUDA graph, nothing of ours may disturb it.

A capture in CUDA's global mode ends if any thread of the process allocates, synchronises, page-locks or copies to the
host meanwhile. So whoever captures holds a quiet time, and whatever of ours does such a thing asks before.

Input: who holds quiet times, and who wants to work. Output: whether work may begin; it waits, or goes another way.
Errors: `ConfigError` for work that the thread must do before its own capture, `TimeoutError` after QUIET_MAX_S.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator

from ...errors import ConfigError

QUIET_MAX_S = 300.0  # the longest that either side waits for the other


class QuietTimes:
    """Quiet times of one device's store. Any thread may call."""

    def __init__(self, what: str) -> None:
        """`what` names the store in errors."""
        self._what = what
        self._changed = threading.Condition()  # guards `_holders`, `_workers`
        self._holders: Counter[int] = Counter()  # by thread: how many quiet times it holds
        self._workers: Counter[int] = Counter()  # by thread: how much work it has under way

    @property
    def is_quiet(self) -> bool:
        """Whether anybody holds a quiet time now."""
        return bool(self._holders)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """A quiet time: begins when work under way has ended, and until it ends, none begins. May be nested."""
        me = threading.get_ident()
        with self._changed:
            if me in self._workers:
                raise ConfigError(f"{self._what}: a quiet time cannot begin within work on the device")
            self._holders[me] += 1  # from here on no work begins
            try:
                if not self._changed.wait_for(lambda: not self._workers, QUIET_MAX_S):
                    raise TimeoutError(f"{self._what}: work on the device did not end within {QUIET_MAX_S:.0f} s")
            except BaseException:
                self._end(self._holders, me)
                raise
        try:
            yield
        finally:
            with self._changed:
                self._end(self._holders, me)

    @contextlib.contextmanager
    def work(self, doing: str) -> Iterator[None]:
        """Work that disturbs captures: waits until nobody holds a quiet time. doing: names it in errors."""
        me = threading.get_ident()
        with self._changed:
            if me not in self._workers:
                if me in self._holders:
                    raise ConfigError(
                        f"{self._what}: {doing} disturbs a graph's capture, for which this thread holds a quiet time; "
                        f"do it before"
                    )
                if not self._changed.wait_for(lambda: not self._holders, QUIET_MAX_S):
                    raise TimeoutError(f"{self._what}: {doing} waited {QUIET_MAX_S:.0f} s for a quiet time to end")
            self._workers[me] += 1
        with self._ending(me):
            yield

    @contextlib.contextmanager
    def work_unless_quiet(self) -> Iterator[bool]:
        """The same for what can be left out: gives False at once while somebody holds a quiet time."""
        me = threading.get_ident()
        with self._changed:
            may_work = not self._holders or me in self._workers
            if may_work:
                self._workers[me] += 1
        if not may_work:
            yield False
            return
        with self._ending(me):
            yield True

    @contextlib.contextmanager
    def _ending(self, me: int) -> Iterator[None]:
        """Notes the end of a thread's work."""
        try:
            yield
        finally:
            with self._changed:
                self._end(self._workers, me)

    def _end(self, counts: Counter[int], me: int) -> None:
        """One less of a thread's. `_changed` is held."""
        counts[me] -= 1
        if not counts[me]:
            del counts[me]
        self._changed.notify_all()

    def after_fork_in_child(self) -> None:
        """Forgets everybody: they are the parent's threads, and so is the device."""
        self._changed = threading.Condition()
        self._holders, self._workers = Counter(), Counter()
