"""What a prefetch or a commit returns: something to wait for.

Input: work that a thread of the training does. Output: its result. Errors: those of the work, raised by `wait`.

Waits are on a bare lock: what a signal handler raises within a `Condition`, in which `Event.wait` waits, may come out
as "cannot release un-acquired lock" (CPython 3.11).
"""

from __future__ import annotations

import _thread
import time
from typing import Any

WAIT_S = 300.0  # the longest that anything waits for the disk
SLICE_S = 0.05  # after which a wait looks again, in case that an interrupted one did not pass the lock on


class TrainingTicket:
    """Work under way. Dropping it without `wait` leaks nothing. Any thread may call."""

    def __init__(self, what: str) -> None:
        """what: names the work in errors."""
        self._what = what
        self._under_way = _thread.allocate_lock()
        self._under_way.acquire()
        self._ended = False
        self._result: Any = None
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Returns whether the work has ended, well or with an error."""
        return self._ended

    def failed(self) -> bool:
        """Returns whether the work has ended with an error."""
        return self._error is not None

    def wait(self, timeout_s: float | None = None) -> Any:
        """Blocks until the work has ended; returns its result: of a commit the `Commit`, of a prefetch None.

        Raises what the work raised, or `TimeoutError` after timeout_s (None: 300 s); then it goes on, wait again.
        """
        limit_s = WAIT_S if timeout_s is None else max(0.0, timeout_s)
        until = time.monotonic() + limit_s
        while not self._ended:
            left_s = until - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"{self._what} did not end within {limit_s:g} s; it goes on, wait again")
            if self._under_way.acquire(timeout=min(left_s, SLICE_S)):
                self._under_way.release()
        if self._error is not None:
            raise self._error
        return self._result

    def ends_within(self, timeout_s: float) -> bool:
        """Blocks until the work has ended, or timeout_s are over; returns whether it has, well or with an error."""
        try:
            self.wait(timeout_s)
        except TimeoutError:
            return self._ended
        return True

    def end(self, result: Any = None, error: BaseException | None = None) -> None:
        """Ends it, for whoever does the work; only the first end counts."""
        if not self._ended:
            self._result, self._error = result, error
            self._ended = True
            self._under_way.release()
