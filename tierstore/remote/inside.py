"""Which threads are inside a `with`, so that a fork, or a close, can wait until they have left.

Input: threads that enter. Output: waits that end when all have left. Errors: none.

Each thread has a lock of its own, which it holds while it is inside. Python looks for signals before a function's first
line and after a call, but not between the body of a `with` and the C method that releases a lock: so an interrupt in a
lookup leaves nobody inside, as a count that Python code takes down again would.
"""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import AbstractContextManager
from typing import Any


class Inside:
    """Any thread may call, also a signal handler within a call."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # guards `_locks`, `_held`; held through a fork
        self._locks: weakref.WeakSet[Any] = weakref.WeakSet()  # each thread's, which goes with the thread
        self._mine = threading.local()
        self._is_shut = False
        self._held: list[Any] = []  # locks of others, through a fork

    def of_thread(self) -> AbstractContextManager[Any]:
        """Returns what this thread enters, as often as it likes; blocks while the process forks."""
        lock = getattr(self._mine, "lock", None)
        if lock is None:
            lock = threading.RLock()
            with self._lock:
                self._locks.add(lock)
            self._mine.lock = lock
        elif self._is_shut:  # else a thread that enters again and again would never let a fork begin
            with self._lock:
                pass
        return lock

    def wait(self, timeout_s: float) -> bool:
        """Waits until all who are inside now have left, timeout_s at most; returns whether they have."""
        until = time.monotonic() + timeout_s
        with self._lock:
            locks = list(self._locks)
        left = [lock for lock in locks if lock.acquire(timeout=max(0.0, until - time.monotonic()))]
        for lock in left:
            lock.release()
        return len(left) == len(locks)

    def close_for_fork(self, timeout_s: float) -> None:
        """Waits until nobody is inside, timeout_s at most, and lets nobody in."""
        self._lock.acquire()
        self._is_shut = True
        until = time.monotonic() + timeout_s
        for lock in list(self._locks):
            if lock.acquire(timeout=max(0.0, until - time.monotonic())):
                self._held.append(lock)

    def open_after_fork(self) -> None:
        """Lets threads in again, in the parent; the child, where the others are gone, makes another `Inside`."""
        held, self._held, self._is_shut = self._held, [], False
        for lock in held:
            lock.release()
        self._lock.release()
