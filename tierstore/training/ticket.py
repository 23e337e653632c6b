"""What a prefetch or a commit returns: something to wait for.

Input: work that a thread of the training does. Output: its result. Errors: those of the work, raised by `wait`.
"""

from __future__ import annotations

import threading
from typing import Any

WAIT_S = 300.0  # the longest that anything waits for the disk


class TrainingTicket:
    """Work under way. Dropping it without `wait` leaks nothing. Any thread may call."""

    def __init__(self, what: str) -> None:
        """what: names the work in errors."""
        self._what = what
        self._ended = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Returns whether the work has ended, well or with an error."""
        return self._ended.is_set()

    def wait(self, timeout_s: float | None = None) -> Any:
        """Blocks until the work has ended; returns its result: of a commit the `Commit`, of a prefetch None.

        Raises what the work raised, or `TimeoutError` after timeout_s (None: 300 s); then it goes on, wait again.
        """
        limit_s = WAIT_S if timeout_s is None else timeout_s
        if not self._ended.wait(limit_s):
            raise TimeoutError(f"{self._what} did not end within {limit_s:g} s; it goes on, wait again")
        if self._error is not None:
            raise self._error
        return self._result

    def end(self, result: Any = None, error: BaseException | None = None) -> None:
        """Ends it, for whoever does the work."""
        self._result, self._error = result, error
        self._ended.set()
