"""Rows that are brought into DRAM before a step asks for them, by a thread of the training.

Input: row ids. Output: records in the cache, the same that a step would have read. Errors: those of reading, by the
ticket; a step then reads by itself.

It is a hint. Rows go to the cache and nowhere else, and updates go there too, so results do not depend on it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from .health import Health
from .rows import POLL_S, CachedRows
from .ticket import WAIT_S, TrainingTicket

REQUESTS_MAX = 64  # that wait; more are dropped: a hint that comes too late costs reads
ROWS_FRACTION = 1 / 2  # of a cache's slots, that one prefetch may fill


class _Request:
    """Distinct rows, ascending, of each table, and the ticket."""

    def __init__(self, rows: dict[str, np.ndarray]) -> None:
        self.rows = rows
        self.ticket = TrainingTicket("a prefetch")


class Prefetches:
    """Prefetches under way. Any thread may call."""

    def __init__(self, tables: Mapping[str, CachedRows], buffer_bytes: int, health: Health) -> None:
        """buffer_bytes: of records that are read at once."""
        self._tables, self._buffer_bytes, self._health = tables, buffer_bytes, health
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._open: dict[int, _Request] = {}  # by id, oldest first; a dict's operations need no lock
        self._stopping = self._is_paused = self._is_serving = False
        # Not `Thread.join`: interrupted, it takes a thread that goes on for one that has ended (CPython 3.11).
        self._ended = TrainingTicket("the prefetches of a training")
        self.thread = threading.Thread(target=self._serve, name="tierstore-training-prefetch", daemon=True)
        self.num_rows = 0  # brought
        self.num_dropped = 0  # requests

    @property
    def is_started(self) -> bool:
        """Whether the thread was started."""
        return self.thread.ident is not None

    def start(self) -> None:
        """Starts the thread."""
        self.thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Ends the thread after what it reads now, and drops the rest; returns whether it ended in time."""
        self._stopping = True
        self._requests.put(None)
        return self.thread.ident is None or self._ended.ends_within(timeout_s)

    def add(self, row_ids: Mapping[str, np.ndarray]) -> TrainingTicket:
        """Starts to bring rows, int64 [R], -1 for none."""
        rows = {}
        for name, ids in row_ids.items():
            distinct = np.unique(ids)
            rows[name] = distinct[np.searchsorted(distinct, 0) :]
        request = _Request(rows)
        if len(self._open) >= REQUESTS_MAX:
            self.num_dropped += 1
            request.ticket.end()
            return request.ticket
        self._requests.put(request)
        self._open[id(request)] = request  # not before: a step would wait for a request that nobody serves
        if request.ticket.done():
            self._open.pop(id(request), None)
        return request.ticket

    def wait_for(self, name: str, rows: np.ndarray) -> None:
        """Waits for prefetches of any of distinct `rows` of a table, if there are some; they may have failed."""
        for request in list(self._open.values()):
            theirs = request.rows.get(name)
            if theirs is None or not len(theirs) or request.ticket.done():
                continue
            at = np.minimum(np.searchsorted(theirs, rows), len(theirs) - 1)
            if (theirs[at] == rows).any():
                try:
                    request.ticket.wait()
                except TimeoutError:
                    raise
                except Exception:
                    continue

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it, requests end without a read. Waits for the one that is served now. One thread at a time."""
        self._is_paused = True
        try:
            until = time.monotonic() + WAIT_S
            while self._is_serving:
                if time.monotonic() > until:
                    raise TimeoutError(f"{self._health.what}: a prefetch did not end within {WAIT_S:g} s")
                time.sleep(POLL_S)
            yield
        finally:
            self._is_paused = False

    def _serve(self) -> None:
        try:
            self._serve_all()
        finally:
            self._ended.end()

    def _serve_all(self) -> None:
        while (request := self._requests.get()) is not None:
            error: BaseException | None = None
            self._is_serving = True  # first: `paused` sets its flag, then looks at this one
            try:
                if not self._is_ending() and self._health.broken is None:
                    for name, rows in request.rows.items():
                        self._bring(self._tables[name], rows)
            except BaseException as raised:
                error = raised
            self._is_serving = False
            request.ticket.end(error=error)
            self._open.pop(id(request), None)

    def _is_ending(self) -> bool:
        return self._stopping or self._is_paused

    def _bring(self, table: CachedRows, rows: np.ndarray) -> None:
        missing = rows[table.cache.find(rows)][: max(1, int(table.num_slots * ROWS_FRACTION))]
        chunk = max(1, self._buffer_bytes // table.layout.record_bytes)
        records = np.empty((min(chunk, len(missing)), table.layout.record_bytes), dtype=np.uint8)
        for start in range(0, len(missing), chunk):
            part = missing[start : start + chunk]
            found = table.read(part, records[: len(part)])
            done = table.offer(part, records[: len(part)], found)
            self.num_rows += done
            if done < len(part) or self._is_ending():
                if not table.is_whole and table.spill is not None and table.has_too_many_dirty():
                    table.spill()
                return
