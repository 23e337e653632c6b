"""The engine of a store on another host: asks for lookups, and puts the answers in the caller's buffers.

Input: what the engine contract says. Output: rows, and counts of this client's own requests. Errors: those of the
contract; `DaemonError` and `TimeoutError` if the server does not answer, `FormatError` if it answers something else.

Small lookups are one message each way; the rows of larger ones are streamed. The rows of one lookup are all of one
version of the store: it is asked again if a change came between its requests. Shapes: N tokens, O orders, H rows per
key.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from typing import Any

import numpy as np

from ..errors import ConfigError, StoreNotReadyError, TierStoreError
from ..ipc.identity import this_process
from ..spec import TableSpec
from ..tiers.engine import READ_WAIT_S, Engine, Request, RowRange, VersionChangedError, in_one_version
from . import messages
from .channel import Connection
from .counts import ClientCounts
from .inside import Inside
from .messages import Description
from .replies import Answer, decoded
from .requests import Attempt, Requests
from .split_rows import SplitRows
from .wire import encode

logger = logging.getLogger("tierstore")

SUBMIT_THREADS = 16
TICKETS_MAX = 256  # under way; beyond, submit waits for one to end


class RemoteEngine(Engine):
    """See `Engine`. Any number of threads may call; each call blocks on the network, timeout_s at most."""

    io = "grpc"

    def __init__(
        self, connection: Connection, specs: Sequence[TableSpec], description: Description, timeout_s: float
    ) -> None:
        """specs: the engine's (`TableSpec.local`). description: of the server, which states its limits."""
        self.bad_pages = {}
        self.version = description.version  # one more whenever another version answered than before
        self.build = description.build
        # Instance of the server, and its version, that answered last.
        self._answered = (description.instance, description.version) if description.instance else None
        self._connection, self._timeout_s = connection, timeout_s
        self._specs = specs
        self._requests = Requests(connection, specs, description)
        self._counts = ClientCounts(specs)
        self._calls = Inside()  # but those of tickets
        self._lock = threading.RLock()  # guards `_tickets`, `_closed`, `_pool`
        self._ended = threading.Condition(self._lock)  # signalled when a ticket has, and at `close`
        self._tickets: set[object] = set()  # under way
        self._closed = False
        self._pool: ThreadPoolExecutor | None = None
        self._version_lock = threading.Lock()  # guards `version` and `_answered`
        self.try_lookup = lambda index, keys, out: False  # noqa: ARG005

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
                self._requests.locate(index, keys, sources, until)
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
                    raise TimeoutError(
                        f"{self._connection.url}: {TICKETS_MAX} tickets did not end within {READ_WAIT_S} s"
                    )
            self._check_open()
            if is_empty:
                return None
            self._pool = self._pool or ThreadPoolExecutor(SUBMIT_THREADS, thread_name_prefix="tierstore-remote-submit")
            try:
                self._tickets.add(ticket)
                return RemotePending(self._pool.submit(self._finish, ticket, act, started_ns), self._connection.url)
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
        raise ConfigError(
            f"{self._connection.url}: a GPU needs a store on its own host; open it or attach to its daemon"
        )

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
            self._requests.locate(index, keys, sources, self._until())

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
        if pool is not None:
            pool.shutdown(wait=ended)
        return ended

    def before_fork(self) -> None:
        self._connection.before_fork()
        self._lock.acquire()
        self._counts.before_fork()

    def after_fork(self, *, child: bool) -> None:
        self._counts.after_fork(child=child)
        if child:  # threads, what they locked and what they were at are the parent's
            self._lock, self._version_lock = threading.RLock(), threading.Lock()
            self._ended = threading.Condition(self._lock)
            self._calls, self._tickets, self._pool = Inside(), set(), None
        else:
            self._lock.release()
        self._connection.after_fork(child=child)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreNotReadyError(f"the store {self._connection.url} is closed; connect again")

    def _look_up(self, requests: Sequence[Request], until: float) -> None:
        """Fills the buffers of a lookup, and counts it."""
        self._counts.add_lookup(requests, self._answers(self._requests.lookup(requests), until))

    def _look_up_rows(self, split: SplitRows, until: float) -> None:
        split.take(self._answers(split.attempts(self._requests), until), self._counts)

    def _answers(self, attempts: Sequence[Attempt], until: float) -> list[Answer]:
        """Makes the requests of one lookup, again if the store was changed between them."""

        def ask_all() -> list[Answer]:
            answers = [self._connection.tried(partial(ask, until), until) for ask in attempts]
            if len({answer.version for answer in answers}) > 1:
                raise VersionChangedError(f"{self._connection.url}: its store was changed between two requests")
            return answers

        answers = in_one_version(self, ask_all, self._connection.url)
        for version in {answer.version for answer in answers} - {self._answered}:
            self._take_version(version, until)
        return answers

    def _take_version(self, version: tuple[int, int], until: float) -> None:
        """Takes note that another version answers than before, and says so if it is of another server,
        or a restarted one."""
        with self._version_lock:
            before, self._answered = self._answered, version
            self.version += before is not None
        if before is None or before == version:  # the latter: another thread was here first
            return
        now = _describe(self._connection, until)
        if now is None:
            return
        known, self.build = self.build, now.build
        if version[0] != before[0] and known and now.build and known != now.build:
            _warn_of_another_build(self._connection.url, now, known)


def _warn_of_another_build(url: str, now: Description, known: str) -> None:
    logger.warning(
        "%s: connected again, to another version of the store than before: rows come from %s (digest %.12s) now, their "
        "digest was %.12s; if that is not meant, use 'tierstore swap' on the server's host",
        url, now.name, now.build, known,
    )  # fmt: skip


def _describe(connection: Connection, until: float) -> Description | None:
    """Returns what a server says of the version that answers now; None, with a warning, if it says nothing."""
    try:
        reply = connection.unary("Describe", encode(messages.DescribeRequest()), until)
        return decoded(Description, reply, connection.url)
    except (TierStoreError, TimeoutError) as error:
        logger.warning(
            "%s: another version of the store answers now; which, it does not say: %s", connection.url, error
        )
        return None


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
