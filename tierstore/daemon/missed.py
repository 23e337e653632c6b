"""Missed keys: what clients had to read from NVMe, until the daemon reads it too, for the recency cache.

Input: reports of misses, those of keys that were asked for before apart from those of new ones. Output: the next
to read: what was asked for before comes first, for it is likely to be asked for again; of either the newest, for the
cache is of recent use. There is room for so many; beyond, the oldest of the new ones go, then the oldest of the others.
Any thread may call.
"""

from __future__ import annotations

import threading
from collections import deque

import numpy as np


class MissedKeys:
    """Waiting reports of at most keys_max missed keys."""

    def __init__(self, keys_max: int) -> None:
        self._keys_max = keys_max
        self._changed = threading.Condition()  # guards `_again`, `_new`, `_num_keys`, `_ended`, `num_dropped`
        self._again: deque[np.ndarray] = deque()  # of keys asked for before, as arrays of reports, oldest first
        self._new: deque[np.ndarray] = deque()
        self._num_keys = 0
        self._ended = False
        self.num_dropped = 0

    def __len__(self) -> int:
        return self._num_keys

    def put(self, missed: np.ndarray, again: np.ndarray) -> None:
        """Adds reports [n]; again: bool [n], which are of keys that were asked for before. Does not block."""
        with self._changed:
            for queue, part in ((self._again, missed[again]), (self._new, missed[~again])):
                if len(part):
                    queue.append(part)
                    self._num_keys += len(part)
            while self._num_keys > self._keys_max:
                dropped = (self._new or self._again).popleft()
                self._num_keys -= len(dropped)
                self.num_dropped += len(dropped)
            self._changed.notify()

    def take(self, keys_max: int, timeout_s: float) -> list[np.ndarray]:
        """Returns the next reports, arrays of keys_max keys or a few more; none if none came in time,
        or it ended. Blocks."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_keys or self._ended, timeout_s)
            taken: list[np.ndarray] = []
            while (self._again or self._new) and sum(map(len, taken)) < keys_max and not self._ended:
                taken.append((self._again or self._new).pop())
            self._num_keys -= sum(map(len, taken))
            return taken

    def end(self) -> None:
        """Gives nothing out any more."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
