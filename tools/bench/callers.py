"""Threads that call a lookup, so that every side of a comparison has equally many.

Input: a function of a half-open range of tokens. Output: the seconds from the first call to the last return. With one
thread the caller's own does the work; with more, each takes an equal part.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

WAIT_S = 600


class Callers:
    """A fixed number of threads. Use it in a `with`."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="bench") if threads > 1 else None
        if self._pool:
            list(self._pool.map(time.sleep, [0.01] * threads))  # all threads are there before anything is timed

    def seconds(self, work: Callable[[int, int], object], count: int) -> float:
        """Calls work(start, end) over range(count), a part in each thread; returns the seconds it took. Blocks."""
        if self._pool is None:
            started = time.perf_counter()
            work(0, count)
            return time.perf_counter() - started
        bounds = [count * i // self._threads for i in range(self._threads + 1)]
        started = time.perf_counter()
        futures = [self._pool.submit(work, start, end) for start, end in itertools.pairwise(bounds)]
        for future in futures:
            future.result(WAIT_S)
        return time.perf_counter() - started

    def __enter__(self) -> Callers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(wait=True)
