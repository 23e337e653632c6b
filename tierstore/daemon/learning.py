"""Learning: the tiers follow what clients ask for.

Input: reports of all clients. Output: missed entries, read by the daemon itself, which offers them to the recency
cache; counted keys; replans, now and then or on request. Errors: what goes wrong in a thread is logged as an event and
does not end the thread, without which nothing would be learned.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import kernels
from ..errors import TierStoreError
from ..ipc.events import event
from .host import Host
from .missed import MissedKeys
from .record import FeedInfo, LearningInfo
from .replanner import Replanner
from .reports import Reports
from .shared_tiers import pieces

logger = logging.getLogger("tierstore.daemon")

DRAIN_S = 0.02  # between two looks at the clients' rings: one has room for 8,192 reports
FEED_KEYS_MAX = 1 << 16  # missed keys that wait to be read
FEED_KEYS = 1024  # read before the next ones are chosen
POLL_S = 1.0
REPLAN_S = 600.0
CLOSE_WAIT_S = 10.0
CACHE_LINE_BYTES = 64


class Learner:
    """Takes reports, feeds the recency cache and replans, in three threads from `start` to `close`."""

    def __init__(self, host: Host, replan_s: float | None = REPLAN_S) -> None:
        """replan_s: seconds between automatic replans, None for none."""
        self._tiers, self._epochs, self._replan_s = host.tiers, host.epochs, replan_s
        self._ended = threading.Event()
        self._counts = _key_counts(host.tiers.plan.counts_bytes)
        self._missed = MissedKeys(FEED_KEYS_MAX)
        self.reports = Reports(host.tiers, host.epochs, host.attachments, self._counts, self._missed)
        self.replanner = Replanner(host.tiers, host.epochs, self._counts, self._ended)
        self._num_read_keys = 0  # written by the feed's thread
        self._next_replan: float | None = None  # of `time.monotonic`
        self._threads = [
            threading.Thread(target=run, name=f"tierstore-{name}", daemon=True)
            for name, run in (("reports", self._drain), ("feed", self._feed), ("replan", self._replan_often))
        ]

    def start(self) -> None:
        """Begins to learn."""
        for thread in self._threads:
            thread.start()

    def close(self) -> bool:
        """Ends the threads; returns whether all ended in time."""
        self._ended.set()
        self._missed.end()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(CLOSE_WAIT_S)
        return not any(thread.is_alive() for thread in self._threads)

    def info(self) -> LearningInfo:
        """Returns what the stat record says of learning."""
        next_s = None if self._next_replan is None else max(0.0, self._next_replan - time.monotonic())
        return LearningInfo(
            reports=self.reports.num_taken,
            reports_lost=self.reports.num_lost,
            reports_refused=self.reports.num_refused,
            tracked_keys=self._counts.num_used,
            replans=self.replanner.num_replans,
            next_replan_s=next_s,
            last_replan=self.replanner.last,
        )

    def feed_info(self) -> FeedInfo:
        """Returns what the stat record says of the feed."""
        return FeedInfo(
            queued_keys=len(self._missed),
            read_keys=self._num_read_keys,
            dropped_keys=self._missed.num_dropped,
            errors=self._tiers.num_read_errors,
        )

    def _drain(self) -> None:
        while not self._ended.wait(DRAIN_S):
            for reader, is_gone in self.reports.readers():
                self._guarded("reports_failed", self.reports.finish if is_gone else self.reports.take, reader)

    def _feed(self) -> None:
        while not self._ended.is_set():
            for missed in self._missed.take(FEED_KEYS, POLL_S):
                self._guarded("feed_failed", self._read_missed, missed)

    def _read_missed(self, missed: np.ndarray) -> None:
        """Reads what clients missed: each lookup of the daemon's offers what it had to read to the recency cache."""
        version = self._epochs.current
        for index, name in enumerate(self._tiers.tables):
            mine = missed[missed["table"] == index]
            pairs = np.unique(mine[["order", "key"]])
            for at in pieces(len(pairs)):
                if self._ended.is_set():
                    return
                self._tiers.read(version, name, pairs["order"][at], pairs["key"][at])
                self._num_read_keys += len(pairs[at])

    def _replan_often(self) -> None:
        while self._replan_s is not None:
            self._next_replan = time.monotonic() + self._replan_s
            if self._ended.wait(self._replan_s):
                return
            self._guarded("replan_failed", self.replanner.replan)

    def _guarded(self, name: str, act: Callable[..., Any], *arguments: Any) -> None:
        """Calls act; what it raises is an event and not the end of its thread."""
        try:
            act(*arguments)
        except TierStoreError as error:  # a version that was closed meanwhile, a disk that is gone
            event(logger, logging.WARNING, name, error=error)
        except Exception as error:
            event(logger, logging.ERROR, name, error=error)


def _key_counts(num_bytes: int) -> Any:
    """Returns a `kernels.KeyCounts` of so many bytes, which must begin at a cache line."""
    memory = np.zeros(num_bytes + CACHE_LINE_BYTES, dtype=np.uint8)
    start = -memory.ctypes.data % CACHE_LINE_BYTES
    return kernels.KeyCounts(memory[start : start + num_bytes])
