"""What a training closes at its end, or an opening that fails: in one place, before any of it is made.

Input: functions that close something, which may be called again. Output: all of it closed, last first. Errors: those of
what is closed.

Not `contextlib.ExitStack`: it forgets what it closes before that is closed, and so does Ctrl-C in between.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class Owned:
    """Closes what it owns, last first: also when it is dropped before `hand_over`, unless by a forked child."""

    _process = 0  # until it can own anything, and once another object closes it

    def __init__(self) -> None:
        self._closes: list[Callable[[], None]] = []
        self._process = os.getpid()

    def add(self, close: Callable[[], None]) -> None:
        """Owns one more. close: may be called again, and before there is anything to close."""
        self._closes.append(close)

    def close(self) -> None:
        """Closes all. If it raises, or is interrupted, what is not closed stays owned: call it again."""
        while self._closes:
            self._closes[-1]()
            self._closes.pop()  # only now

    def hand_over(self) -> None:
        """Another object closes it from now on, which knows in which thread the collector may."""
        self._process = 0

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:  # when this runs, sys may be gone
        if self._process and not is_finalizing() and os.getpid() == self._process:
            self.close()
