"""Rows that ranks ask each other for, and how they do so early: for the next batch, while this one computes.

Input: row ids of a later batch. Output: which of this rank's rows the others will need, brought into DRAM meanwhile.
Errors: `RankError`, raised where the rows are used. Values never travel early: they may change until they are needed.

A prefetch is exchanged by a thread, over a group of its own, in the order in which it was asked for: the same on all
ranks. A forward uses it if every rank says that it has the same number; else ids travel again.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from tierstore import kernels
from tierstore.errors import RankError
from tierstore.training.ticket import WAIT_S, TrainingTicket

from .exchange import Ranks

logger = logging.getLogger("tierstore.ranks")

EARLY_MAX = 8  # prefetches of a table that no forward has used; the oldest is forgotten
QUEUE_MAX = 32  # prefetches that the thread has not exchanged yet
CLOSE_S = 5.0  # for a thread to end
SMALL_ROWS = 1 << 32  # slices below have row ids that travel in 4 bytes

_of_ranks: weakref.WeakKeyDictionary[Ranks, EarlyThread] = weakref.WeakKeyDictionary()  # of the main thread
_threads: weakref.WeakSet[EarlyThread] = weakref.WeakSet()


class AskedRows(NamedTuple):
    """Rows of this slice that ranks ask for, rank after rank."""

    row_ids: np.ndarray  # int64 [N], of the table
    counts: list[int]  # [W]

    @classmethod
    def exchange(
        cls, ranks: Ranks, what: str, owned: kernels.OwnedRows, counts: np.ndarray, starts: np.ndarray
    ) -> AskedRows:
        """Asks all ranks for rows; returns what they ask this one for. Blocks.

        counts: int64 [W], how many rows each asks for. starts: int64 [W + 1], where slices begin: ids travel from there
        on, in 4 bytes if all slices are small enough.
        """
        given, came = owned.counts, counts.tolist()
        local = owned.row_ids - np.repeat(starts[:-1], given)
        if (np.diff(starts) < SMALL_ROWS).all():
            sent = local.astype(np.uint32).view(np.int32)
            asked = ranks.all_to_all(what, torch.from_numpy(sent), given.tolist(), came).numpy().view(np.uint32)
        else:
            asked = ranks.all_to_all(what, torch.from_numpy(local), given.tolist(), came).numpy()
        return cls(asked.astype(np.int64) + starts[ranks.rank], came)


class EarlyBatch:
    """A prefetch of one table's rows: what travels early."""

    def __init__(self, number: int, table: str, starts: np.ndarray, row_ids: np.ndarray) -> None:
        """number: of the prefetches of these ranks, the same on all. row_ids: int64 [R], a copy of the caller's."""
        self.number, self.table, self.starts, self.row_ids = number, table, starts, row_ids
        self.ticket = TrainingTicket(f"prefetch {number} of table {table}")

    def exchange(self, ranks: Ranks) -> AskedRows:
        """Asks all ranks for its rows. Blocks."""
        what = f"prefetch {self.number} of table {self.table}"
        owned = kernels.OwnedRows(self.row_ids, self.starts)
        with ranks.whole(what):
            came = ranks.counts(what, owned.counts.reshape(-1, 1))
            return AskedRows.exchange(ranks, what, owned, came[:, 0], self.starts)


class EarlyTicket:
    """What a prefetch over ranks returns: ids travel, then rows are brought into DRAM. Any thread may wait."""

    def __init__(self, asked: TrainingTicket) -> None:
        """asked: its result is the ticket of the training's own prefetch."""
        self._asked = asked

    def done(self) -> bool:
        """Returns whether it has ended, well or with an error."""
        return self._asked.done() and (self._asked.failed() or self._asked.wait().done())

    def wait(self, timeout_s: float | None = None) -> None:
        """Blocks until the rows are there. Raises `RankError`, what reading raises, or `TimeoutError`."""
        until = time.monotonic() + (WAIT_S if timeout_s is None else timeout_s)
        self._asked.wait(timeout_s).wait(max(0.0, until - time.monotonic()))


class EarlyThread:
    """The thread that exchanges what is prefetched, in the order in which it was asked for. One for some ranks."""

    def __init__(self, ranks: Ranks) -> None:
        """Makes a group for it. Blocks until all ranks are here."""
        self._ranks = ranks.beside()
        self._numbers = itertools.count(1)
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(QUEUE_MAX)
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name="tierstore-early-rows", daemon=True)
        self._thread.start()
        _threads.add(self)

    @classmethod
    def of(cls, ranks: Ranks) -> EarlyThread:
        """Returns the one of these ranks; all ranks call it together, at first."""
        found = _of_ranks.get(ranks)
        if found is None:
            found = _of_ranks[ranks] = cls(ranks)
            weakref.finalize(ranks, found.close)
        return found

    def next_number(self) -> int:
        """Returns the number of the next prefetch of one table."""
        return next(self._numbers)

    def add(self, batches: Sequence[EarlyBatch], bring: Callable[[dict[str, np.ndarray]], Any]) -> EarlyTicket:
        """Exchanges batches, then calls `bring` with the rows that ranks asked this one for, by table.

        Blocks only while more than `QUEUE_MAX` prefetches are under way; then raises `RankError` after the limit.
        """
        whole = TrainingTicket("a prefetch over ranks")

        def job() -> None:
            try:
                rows = {}
                for batch in batches:
                    asked = batch.exchange(self._ranks)
                    rows[batch.table] = asked.row_ids
                    batch.ticket.end(asked)
                whole.end(bring(rows))
            except BaseException as error:
                for batch in batches:
                    batch.ticket.end(error=error)
                whole.end(error=error)
                logger.warning("rows cannot be prefetched over ranks any more: %s", error)

        try:
            self._jobs.put(job, timeout=self._ranks.timeout_s)
        except queue.Full:
            raise RankError(
                f"{QUEUE_MAX} prefetches are under way, and none has ended in {self._ranks.timeout_s:g} s: all ranks "
                "must prefetch alike"
            ) from None
        return EarlyTicket(whole)

    def close(self) -> None:
        """Ends the thread; prefetches under way fail. Twice is harmless."""
        self._ranks.end("the ranks were closed")
        with contextlib.suppress(queue.Full):  # then the thread finds nothing else possible, job by job
            self._jobs.put_nowait(None)
        if self._thread is not threading.current_thread():
            self._thread.join(CLOSE_S)


def _work(jobs: queue.Queue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job


class EarlyRows:
    """The prefetches of one table that no forward has used yet. Of the thread that takes steps."""

    def __init__(self, thread: EarlyThread, table: str, starts: np.ndarray) -> None:
        """starts: int64 [W + 1], the first row of each rank's slice."""
        self._thread, self._table, self._starts = thread, table, starts
        self._batches: deque[EarlyBatch] = deque(maxlen=EARLY_MAX)

    @property
    def thread(self) -> EarlyThread:
        """What exchanges them."""
        return self._thread

    def begin(self, row_ids: np.ndarray) -> EarlyBatch:
        """Notes a prefetch of rows, int64 [R], and returns it, for `EarlyThread.add`."""
        batch = EarlyBatch(self._thread.next_number(), self._table, self._starts, row_ids)
        self._batches.append(batch)
        return batch

    def take(self, row_ids: np.ndarray) -> EarlyBatch | None:
        """Returns the prefetch of just these rows, and forgets it and those before it; None if there is not one."""
        for place, batch in enumerate(self._batches):
            if np.array_equal(batch.row_ids, row_ids):
                for _ in range(place + 1):
                    self._batches.popleft()
                return batch
        return None


@atexit.register
def _close_all() -> None:
    """A thread that the interpreter stops within torch ends the process with a signal."""
    for thread in list(_threads):
        thread.close()
