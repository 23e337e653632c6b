"""Long computations in other threads, so that Ctrl-C or an alarm in the main thread takes effect at once.

Input: functions that only compute: they write to nothing but arrays of their own. Output: what they return.
Errors: theirs.

A native kernel does not look at signals, and Python runs signal handlers in the main thread alone. So the main thread
waits and the kernel runs elsewhere. If the wait is interrupted, nobody waits for the kernel: it ends by itself, and
what it made is dropped. Functions that call many kernels ask `check_stopped` before each.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import functools
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

UNKNOWN_STARTS_S = 1.0  # after which a thread that never ran is given up
POLL_S = 0.001

_pool_numbers = itertools.count()
_aside: set[_thread.LockType] = set()  # of computations under way: a lock that is free once they have ended
_of_thread = threading.local()  # stop: the event of the pool whose thread this is


class Stopped(Exception):
    """Whoever wanted the result was interrupted. Nobody sees this: the result is dropped."""


def check_stopped() -> None:
    """Raises `Stopped` in a thread of a pool that has stopped; elsewhere it does nothing."""
    stop = getattr(_of_thread, "stop", None)
    if stop is not None and stop.is_set():
        raise Stopped


def aside(function: Callable[..., Result], *arguments: Any) -> Result:
    """Returns function(*arguments), computed in a thread of its own if this is the main thread. Costs about 0.1 ms.

    What the function writes to must not be used any more if this raises: it may still be writing.
    """
    if threading.current_thread() is not threading.main_thread():
        return function(*arguments)
    future: Future[Result] = Future()
    ended = _thread.allocate_lock()

    def run() -> None:
        try:
            _aside.add(ended)  # here, so that an interrupted start leaves nothing to wait for
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)
        finally:
            _aside.discard(ended)
            ended.release()

    ended.acquire()
    try:
        _thread.start_new_thread(run, ())
    except RuntimeError:  # the system gives no thread: slower to interrupt, and right
        return function(*arguments)
    # A bare lock: what a signal handler raises within a `Condition`, in which the start of a `Thread` and
    # `Future.result` wait, may come out as "cannot release un-acquired lock" (CPython 3.11).
    ended.acquire()
    return future.result(0)


def _wait_for_asides() -> None:
    """Waits for computations that nobody waits for: a native function that returns while Python is taken apart would
    end the process by an abort."""
    for ended in tuple(_aside):
        ended.acquire()


atexit.register(_wait_for_asides)
os.register_at_fork(after_in_child=_aside.clear)  # the parent's threads are not here


@contextlib.contextmanager
def joined_pool(num_threads: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads of which none is left when the `with` is: whatever ends it, and wherever. Blocks on its end.

    A signal handler that raises while the main thread starts another leaves that one unknown to `ThreadPoolExecutor`
    (CPython adds it to its list once it has started), whose `shutdown` then does not wait for what it does.
    """
    prefix = f"{name}-{next(_pool_numbers)}"
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix=prefix)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True)
        until = time.monotonic() + UNKNOWN_STARTS_S
        while unknown := [each for each in threading.enumerate() if each.name.startswith(f"{prefix}_")]:
            running = [thread for thread in unknown if thread.is_alive()]
            for thread in running:
                thread.join()
            if not running:
                if time.monotonic() > until:
                    break
                time.sleep(POLL_S)


class Workers:
    """A pool of threads for computations; use it with `with`. Left by an exception, it does not wait for what runs."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._stop = threading.Event()

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yields function(item) of each item, in order, computed `num_threads` at once."""
        return self._pool.map(functools.partial(self._call, function), items)

    def _call(self, function: Callable[[Item], Result], item: Item) -> Result:
        _of_thread.stop = self._stop
        check_stopped()
        return function(item)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stop.set()
        self._pool.shutdown(wait=kind is None, cancel_futures=True)
