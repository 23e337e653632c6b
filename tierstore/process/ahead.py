"""Results that threads compute ahead of whoever takes them, in order, and never more than a few of them.

Input: functions that only compute. Output: what they return, in the order in which they were put. Errors: theirs, when
their result is taken.

The main thread waits on a bare lock: what a signal handler raises within a `Condition`, in which `Future.result`
waits, may come out as "cannot release un-acquired lock" (CPython 3.11).
"""

from __future__ import annotations

import _thread
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


class _Task(Generic[Result]):
    """One computation. `ended` is released once `result` or `error` is there."""

    def __init__(self, function: Callable[..., Result], arguments: tuple[Any, ...]) -> None:
        self._function, self._arguments = function, arguments
        self.result: Result | None = None
        self.error: BaseException | None = None
        self.ended = _thread.allocate_lock()
        self.ended.acquire()

    def run(self) -> None:
        try:
            self.result = self._function(*self._arguments)
        except BaseException as error:
            self.error = error
        finally:
            self._arguments = ()
            self.ended.release()


class Ahead(Generic[Result]):
    """Computes in `num_threads` threads; close it. One thread puts and takes."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._tasks: deque[_Task[Result]] = deque()

    def __len__(self) -> int:
        return len(self._tasks)

    def put(self, function: Callable[..., Result], *arguments: Any) -> None:
        """Starts function(*arguments) once a thread is free."""
        task = _Task(function, arguments)
        self._pool.submit(task.run)
        self._tasks.append(task)

    def take(self) -> Result:
        """Returns the oldest result. Blocks until it is there; raises what its function raised."""
        task = self._tasks.popleft()
        task.ended.acquire()
        if task.error is not None:
            raise task.error
        return task.result  # type: ignore[return-value]

    def close(self) -> None:
        """Drops what was not taken; waits for the functions under way. Closing twice is harmless."""
        self._tasks.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)
