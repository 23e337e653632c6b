"""The engine of a store on another host: cuts lookups into requests, asks,
and puts the answers in the caller's buffers.

Flows in: what the engine contract says. Flows out: rows, and counts of this client's own requests. Small lookups are
one message each way; the rows of larger ones are streamed. A lookup's rows are all of one version of the store: it is
asked again where a change came between its requests. Refuses answers that are not what was asked for, and pages, which
are not handed out.

Latency is what this client sees, network included. pages_read counts the rows that the server's disk answered, of which
each is a page at most; bytes_read the bytes of rows that came over the network. Shapes: N tokens, O orders,
H rows per key.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from ..errors import ConfigError, FormatError, StoreNotReadyError, TierStoreError
from ..ipc.identity import this_process
from ..spec import TableSpec
from ..stats import LatencyCounts
from ..tiers.engine import READ_WAIT_S, Engine, Request, VersionChangedError, in_one_version
from . import messages
from .channel import Connection
from .messages import Description, TableKeys
from .replies import DRAM, NVME, STATIC, Answer, decoded
from .wire import encode

logger = logging.getLogger("tierstore")

UNARY_BYTES_MAX = 256 << 10  # of rows; beyond, they are streamed
HEAD_BYTES = 4096  # of a message, at most, beside its keys or rows
ID_BYTES = 8  # of a key or a row id
SUBMIT_THREADS = 16
TICKETS_MAX = 256  # under way; beyond, submit waits for one to end
COUNTS = (
    "batches",
    "zero_miss_batches",
    "sentinels",
    "rows",
    "pages_read",
    "entries_read",
    "bytes_read",
    "row_bytes_read",
)


class RemoteEngine(Engine):
    """See `Engine`. Any number of threads may call; each call blocks on the network, timeout_s at most."""

    io = "grpc"

    def __init__(
        self, connection: Connection, specs: Sequence[TableSpec], description: Description, timeout_s: float
    ) -> None:
        """description: of the server, which says its limits."""
        self.bad_pages = {}
        self.version = description.version  # one more whenever another version answered than before
        self.build = description.build
        # Instance of the server, and its version, that answered last.
        self._answered = (description.instance, description.version) if description.instance else None
        self._connection, self._specs, self._timeout_s = connection, specs, timeout_s
        self._identity = bytes(description.identity)
        self._tokens_max = max(1, description.tokens_max)
        self._unary_bytes_max = min(UNARY_BYTES_MAX, description.message_bytes_max - HEAD_BYTES)
        self._ids_max = max(1, (description.message_bytes_max - HEAD_BYTES) // ID_BYTES)
        self._state = threading.Condition()  # of the four below
        self._num_under_way = self._num_tickets = 0
        self._closed = False
        self._pool: ThreadPoolExecutor | None = None
        self._counts_lock = threading.Lock()  # of the three below
        self._totals = dict.fromkeys(COUNTS, 0)
        self._latency = LatencyCounts()
        self._hits = [[[0] * len(spec.orders) for _ in (DRAM, STATIC, NVME)] for spec in specs]
        self.try_lookup = lambda index, keys, out: False  # noqa: ARG005

    def lookup(
        self,
        index: int,
        keys: np.ndarray,
        out: np.ndarray,
        sources: np.ndarray | None = None,
        timeout_s: float | None = None,
    ) -> None:
        until = self._until(timeout_s)
        if sources is not None:  # a reply has counts by tier and order, which is enough for the counts of a client
            self._locate(index, keys, sources, until)  # before the lookup brings the keys into the server's cache
        with self._under_way(), self._timed():
            self._look_up([(index, keys, out)], until)

    def _until(self, timeout_s: float | None = None) -> float:
        """Returns when a call that begins now must have its answers."""
        return time.monotonic() + (self._timeout_s if timeout_s is None else min(self._timeout_s, timeout_s))

    @contextmanager
    def _timed(self, started_ns: int | None = None) -> Iterator[None]:
        """Times what answers a lookup, from started_ns or from here; of one that fails there is no latency."""
        started_ns = time.monotonic_ns() if started_ns is None else started_ns
        yield
        with self._counts_lock:
            self._latency.add(time.monotonic_ns() - started_ns)

    def submit(self, requests: Sequence[Request]) -> RemotePending | None:
        started_ns = time.monotonic_ns()
        kept = [(index, keys.copy(), out) for index, keys, out in requests if len(keys)]
        with self._state:
            while self._num_tickets >= TICKETS_MAX and not self._closed:
                if not self._state.wait(READ_WAIT_S):
                    raise TimeoutError(
                        f"{self._connection.url}: {TICKETS_MAX} tickets did not end within {READ_WAIT_S} s"
                    )
            self._check_open()
            if not kept:
                return None
            self._num_tickets += 1
            self._num_under_way += 1
            self._pool = self._pool or ThreadPoolExecutor(SUBMIT_THREADS, thread_name_prefix="tierstore-remote-submit")
            return RemotePending(self._pool.submit(self._finish, kept, started_ns), self._connection.url)

    def _finish(self, requests: Sequence[Request], started_ns: int) -> None:
        """A ticket's work, in a thread of the pool."""
        try:
            with self._timed(started_ns):
                self._look_up(requests, self._until())
        finally:
            with self._state:
                self._num_tickets -= 1
                self._num_under_way -= 1
                self._state.notify_all()

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

    def rows(self, index: int, row_ids: np.ndarray, out: np.ndarray) -> None:
        spec = self._specs[index]
        step = min(self._ids_max, self._tokens_max * spec.num_heads)
        starts = range(0, len(row_ids), step)
        with self._under_way(), self._timed():
            attempts = [
                self._attempt_rows(spec, row_ids[start : start + step], out[start : start + step]) for start in starts
            ]
            answers = self._answers(attempts, self._until())
        with self._counts_lock:
            self._totals["rows"] += len(row_ids)
            self._totals["batches"] += 1
            for name in ("bytes_read", "row_bytes_read"):
                self._totals[name] += sum(answer.num_bytes for answer in answers)

    def locate(self, index: int, keys: np.ndarray, sources: np.ndarray) -> None:
        self._locate(index, keys, sources, self._until())

    def _locate(self, index: int, keys: np.ndarray, sources: np.ndarray, until: float) -> None:
        with self._under_way():
            for start, end in self._token_ranges(index, len(keys)):
                of_table = self._table_keys(index, keys[start:end])
                request = encode(messages.LocateRequest(self._identity, of_table))
                data = self._connection.tried(partial(self._connection.unary, "Locate", request, until), until)
                found = decoded(messages.LocateReply, data, self._connection.url).sources
                if len(found) != keys[start:end].size:
                    raise FormatError(
                        f"{self._connection.url} answered {len(found)} places of {keys[start:end].size} keys; client "
                        "and server differ: update both"
                    )
                sources[start:end] = np.frombuffer(found, dtype=np.uint8).reshape(-1, keys.shape[1])

    def counters(self) -> dict[str, Any]:
        with self._counts_lock:
            latency = self._latency.record() | {"share": 1.0}  # each is timed: a network is slower than a clock
            return {**self._totals, "latency": latency, "tables": [tuple(map(list, hits)) for hits in self._hits]}

    def close(self, timeout_s: float) -> bool:
        with self._state:
            self._closed = True
            self._state.notify_all()
            ended = self._state.wait_for(lambda: self._num_under_way == 0, timeout_s)
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=ended)
        return ended

    def before_fork(self) -> None:
        self._connection.before_fork()
        self._state.acquire()
        self._counts_lock.acquire()

    def after_fork(self, *, child: bool) -> None:
        if child:  # threads and what they were at are the parent's
            self._state, self._counts_lock = threading.Condition(), threading.Lock()
            self._num_under_way = self._num_tickets = 0
            self._pool = None
        else:
            self._counts_lock.release()
            self._state.release()
        self._connection.after_fork(child=child)

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        with self._state:
            self._check_open()
            self._num_under_way += 1
        try:
            yield
        finally:
            with self._state:
                self._num_under_way -= 1
                if self._closed:
                    self._state.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreNotReadyError(f"the store {self._connection.url} is closed; connect again")

    def _look_up(self, requests: Sequence[Request], until: float) -> None:
        """Fills the buffers of a lookup, and counts it."""
        answers = self._answers([self._attempt_lookup(piece) for piece in self._pieces(requests)], until)
        num_keys = sum(keys.size for _, keys, _ in requests)
        num_nvme = 0
        with self._counts_lock:
            totals = self._totals
            for answer in answers:
                totals["bytes_read"] += answer.num_bytes
                for (index, _, _), hits in zip(answer.requests, answer.hits, strict=True):
                    for total, counts in zip(self._hits[index], hits, strict=True):
                        total[:] = [sum(pair) for pair in zip(total, counts, strict=True)]
                    from_nvme = sum(hits[NVME])
                    num_nvme += from_nvme
                    num_keys -= from_nvme + sum(hits[DRAM])
                    totals["pages_read"] += from_nvme * self._specs[index].rows_per_key
            totals["sentinels"] += num_keys
            totals["batches"] += 1
            totals["zero_miss_batches"] += not num_nvme

    def _answers(self, attempts: Sequence[Callable[[float], Answer]], until: float) -> list[Answer]:
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
        with self._counts_lock:
            before, self._answered = self._answered, version
            self.version += before is not None
        if before is None or before == version:  # the latter: another thread was here first
            return
        try:
            request = encode(messages.DescribeRequest())
            reply = self._connection.unary("Describe", request, until)
            now = decoded(Description, reply, self._connection.url)
        except (TierStoreError, TimeoutError) as error:
            logger.warning(
                "%s: another version of the store answers now; which, it does not say: %s", self._connection.url, error
            )
            return
        known, self.build = self.build, now.build
        if version[0] != before[0] and known and now.build and known != now.build:
            logger.warning(
                "%s: connected again, to another version of the store than before: rows come from %s (digest %.12s) "
                "now, their digest was %.12s; if that is not meant, use 'tierstore swap' on the server's host",
                self._connection.url, now.name, now.build, known,
            )  # fmt: skip

    def _attempt_lookup(self, piece: Sequence[Request]) -> Callable[[float], Answer]:
        """Returns what asks for a piece of a lookup."""
        tables = [self._table_keys(index, keys) for index, keys, _ in piece]
        request = encode(messages.LookupRequest(self._identity, tables))
        specs = [self._specs[index] for index, _, _ in piece]
        unit_bytes = [spec.num_heads * spec.row_bytes for spec in specs]
        orders = [len(spec.orders) for spec in specs]
        is_small = sum(out.nbytes for _, _, out in piece) <= self._unary_bytes_max

        def ask(until: float) -> Answer:
            answer = Answer(self._connection.url, piece, unit_bytes, orders)
            if is_small:
                answer.take(self._connection.unary("Lookup", request, until))
            else:
                self._connection.stream("LookupStream", request, until, answer.take)
            answer.check_whole()
            return answer

        return ask

    def _attempt_rows(self, spec: TableSpec, row_ids: np.ndarray, out: np.ndarray) -> Callable[[float], Answer]:
        """Returns what asks for rows by their ids."""
        request = encode(messages.RowsRequest(self._identity, spec.name, _packed(row_ids)))

        def ask(until: float) -> Answer:
            answer = Answer(self._connection.url, [(0, row_ids, out)], [spec.row_bytes], [0])
            self._connection.stream("Rows", request, until, answer.take)
            answer.check_whole()
            return answer

        return ask

    def _pieces(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """Yields a lookup in parts that the server's limits allow, each of one or more tables."""
        piece: list[Request] = []
        num_tokens = num_ids = 0
        for index, keys, out in requests:
            for start, end in self._token_ranges(index, len(keys)):
                part = keys[start:end]
                if piece and (num_tokens + len(part) > self._tokens_max or num_ids + part.size > self._ids_max):
                    yield piece
                    piece, num_tokens, num_ids = [], 0, 0
                piece.append((index, part, out[start:end]))
                num_tokens += len(part)
                num_ids += part.size
        if piece:
            yield piece

    def _token_ranges(self, index: int, num_tokens: int) -> Iterator[tuple[int, int]]:
        step = max(1, min(self._tokens_max, self._ids_max // len(self._specs[index].orders)))
        for start in range(0, num_tokens, step):
            yield start, min(start + step, num_tokens)

    def _table_keys(self, index: int, keys: np.ndarray) -> TableKeys:
        return TableKeys(self._specs[index].name, len(keys), _packed(keys))


class RemotePending:
    """A lookup that a thread of the pool makes."""

    def __init__(self, future: Future[None], url: str) -> None:
        self._future, self._url, self._process = future, url, this_process()

    def cancel(self) -> None:
        """See `Pending`. An answer that is on its way is still written to the buffers, which the lookup holds."""

    def detach(self) -> None:
        """See `Pending`: it ends by itself."""

    def done(self) -> bool:
        """Whether it has ended."""
        return self._future.done() or self._process != this_process()

    def wait(self, timeout_s: float | None) -> None:
        """Blocks until it has ended; raises what it raised, or `TimeoutError`."""
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


def _packed(ids: np.ndarray) -> memoryview:
    """Returns int64s as little-endian bytes, without a copy where they lie so."""
    return np.ascontiguousarray(ids, dtype="<i8").reshape(-1).view(np.uint8).data
