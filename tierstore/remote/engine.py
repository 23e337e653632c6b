"""The engine of a store on other hosts: has lookups answered, each at once or by a ticket, and counts them.

Input: what the engine contract says; a `Peer`, or several behind one `Cluster`, which answer. Output: rows, and counts
of this client's own requests. Errors: those of the contract; `DaemonError` and `TimeoutError` if a server does not
answer, `FormatError` if it answers something else. Shapes: N tokens, O orders, H rows per key.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from typing import Any

import numpy as np

from ..errors import ConfigError, StoreNotReadyError
from ..ipc.identity import this_process
from ..spec import TableSpec
from ..tiers.engine import READ_WAIT_S, Engine, Request, RowRange
from .counts import ClientCounts
from .inside import Inside
from .peer import Asked
from .split_rows import SplitRows

SUBMIT_THREADS = 16
TICKETS_MAX = 256  # under way; beyond, submit waits for one to end


class RemoteEngine(Engine):
    """See `Engine`. Any number of threads may call; each call blocks on the network, timeout_s at most."""

    io = "grpc"

    def __init__(self, asked: Asked, specs: Sequence[TableSpec], timeout_s: float) -> None:
        """specs: the engine's (`TableSpec.local`)."""
        self.bad_pages = {}
        self._asked, self._timeout_s, self._specs = asked, timeout_s, specs
        self._counts = ClientCounts(specs)
        self._calls = Inside()  # but those of tickets
        self._lock = threading.RLock()  # guards `_tickets`, `_closed`, `_pool`
        self._ended = threading.Condition(self._lock)  # signalled when a ticket has, and at `close`
        self._tickets: set[object] = set()  # under way
        self._closed = False
        self._pool: ThreadPoolExecutor | None = None
        self.try_lookup = lambda index, keys, out: False  # noqa: ARG005

    @property
    def version(self) -> int:  # type: ignore[override]
        return self._asked.version

    def lookup(
        self,
        index: int,
        keys: np.ndarray,
        out: np.ndarray,
        sources: np.ndarray | None = None,
        timeout_s: float | None = None,
    ) -> None:
        started_ns, until = time.monotonic_ns(), self._until(timeout_s)
        with self._calls.of_thread():
            self._check_open()
            # A reply has counts by tier and order, and not what answered each key, so that is asked for; and before the
            # lookup, which brings the keys into the server's cache.
            if sources is not None:
                self._asked.locate(index, keys, sources, until)
            self._look_up([(index, keys, out)], until)
            self._counts.add_latency(started_ns)

    def _until(self, timeout_s: float | None = None) -> float:
        """Returns when a call that begins now must have its answers."""
        return time.monotonic() + (self._timeout_s if timeout_s is None else min(self._timeout_s, timeout_s))

    def submit(self, requests: Sequence[Request]) -> RemotePending | None:
        kept = [(index, keys.copy(), out) for index, keys, out in requests if len(keys)]
        return self._start(partial(self._look_up, kept), is_empty=not kept)

    def _start(self, act: Callable[[float], None], *, is_empty: bool) -> RemotePending | None:
        """Has a thread of the pool call act, with the time by which it must be done; is_empty: there is nothing to
        do."""
        started_ns = time.monotonic_ns()
        ticket = object()
        with self._lock:
            while len(self._tickets) >= TICKETS_MAX and not self._closed:
                if not self._ended.wait(READ_WAIT_S):
                    raise TimeoutError(f"{self._asked.url}: {TICKETS_MAX} tickets did not end within {READ_WAIT_S} s")
            self._check_open()
            if is_empty:
                return None
            self._pool = self._pool or ThreadPoolExecutor(SUBMIT_THREADS, thread_name_prefix="tierstore-remote-submit")
            try:
                self._tickets.add(ticket)
                return RemotePending(self._pool.submit(self._finish, ticket, act, started_ns), self._asked.url)
            except BaseException:  # an interrupt, or no thread is left
                self._tickets.discard(ticket)
                raise

    def _finish(self, ticket: object, act: Callable[[float], None], started_ns: int) -> None:
        """A ticket's work, in a thread of the pool."""
        try:
            act(self._until())
            self._counts.add_latency(started_ns)
        finally:
            with self._lock:
                self._tickets.discard(ticket)
                self._ended.notify_all()

    def submit_pairs(
        self,
        index: int,  # noqa: ARG002
        keys: np.ndarray,  # noqa: ARG002
        pairs: np.ndarray,  # noqa: ARG002
        out: np.ndarray,  # noqa: ARG002
    ) -> RemotePending | None:
        raise ConfigError(f"{self._asked.url}: a GPU needs a store on its own host; open it or attach to its daemon")

    def is_resident(self, index: int) -> bool:  # noqa: ARG002
        return False  # ids of whole tokens travel as keys, an eighth of the bytes

    def rows(
        self, index: int, row_ids: np.ndarray, out: np.ndarray, within: RowRange | None, timeout_s: float | None
    ) -> None:
        started_ns, until = time.monotonic_ns(), self._until(timeout_s)
        with self._calls.of_thread():
            self._check_open()
            self._look_up_rows(SplitRows(index, self._specs[index], row_ids, out, within), until)
            self._counts.add_latency(started_ns)

    def submit_rows(
        self, index: int, row_ids: np.ndarray, out: np.ndarray, within: RowRange | None
    ) -> RemotePending | None:
        split = SplitRows(index, self._specs[index], row_ids, out, within)
        return self._start(partial(self._look_up_rows, split), is_empty=not row_ids.size)

    def locate(self, index: int, keys: np.ndarray, sources: np.ndarray) -> None:
        with self._calls.of_thread():
            self._check_open()
            self._asked.locate(index, keys, sources, self._until())

    def counters(self) -> dict[str, Any]:
        return self._counts.record()

    def close(self, timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        with self._lock:
            self._closed = True
            self._ended.notify_all()
            ended = self._ended.wait_for(lambda: not self._tickets, timeout_s)
            pool, self._pool = self._pool, None
        ended &= self._calls.wait(until - time.monotonic())
        ended &= self._asked.close(until - time.monotonic())
        if pool is not None:
            pool.shutdown(wait=ended)
        return ended

    def before_fork(self) -> None:
        self._asked.before_fork()
        self._lock.acquire()
        self._counts.before_fork()

    def after_fork(self, *, child: bool) -> None:
        self._counts.after_fork(child=child)
        if child:  # threads, what they locked and what they were at are the parent's
            self._lock = threading.RLock()
            self._ended = threading.Condition(self._lock)
            self._calls, self._tickets, self._pool = Inside(), set(), None
        else:
            self._lock.release()
        self._asked.after_fork(child=child)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreNotReadyError(f"the store {self._asked.url} is closed; connect again")

    def _look_up(self, requests: Sequence[Request], until: float) -> None:
        """Fills the buffers of a lookup, and counts it."""
        by_key, _ = self._asked.ask(requests, None, until)
        self._counts.add_lookup(requests, by_key)

    def _look_up_rows(self, split: SplitRows, until: float) -> None:
        split.take(*self._asked.ask(split.lookups, split.by_id, until), self._counts)


class RemotePending:
    """A lookup that a thread of the pool makes."""

    def __init__(self, future: Future[None], url: str) -> None:
        self._future, self._url, self._process = future, url, this_process()

    def cancel(self) -> None:
        """See `Pending`. An answer that is on its way is still written to the buffers, which the lookup owns."""

    def detach(self) -> None:
        """See `Pending`: it ends by itself."""

    def done(self) -> bool:
        """See `Pending`."""
        return self._future.done() or self._process != this_process()

    def wait(self, timeout_s: float | None) -> None:
        """See `Pending`."""
        if self._process != this_process() and not self._future.done():
            raise StoreNotReadyError(f"{self._url}: the lookup was under way in the parent when this process forked")
        try:
            self._future.result(2 * READ_WAIT_S if timeout_s is None else max(0.0, timeout_s))
        except FutureTimeoutError:
            if self._future.done():  # the lookup's own
                raise
            raise TimeoutError(
                f"the rows were not there within {timeout_s} s; the lookup goes on, wait again"
            ) from None
