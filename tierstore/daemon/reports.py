"""Reports of clients: which keys they asked for, lossy and not to be trusted.

Input: rings of reports in clients' blocks. Output: counted keys, recency caches that know what was used, missed keys
for the feed. Errors: reports of tables, orders and keys that there are not are counted as refused, and left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import kernels
from ..spec import KEY_MAX
from ..stats import COUNT_MAX
from .attachments import Attachments
from .epochs import Epochs
from .missed import MissedKeys
from .shared_tiers import SharedTiers

TAKE_REPORTS_MAX = 4096  # of one client at once, before the others have their turn
WEIGHT_LOG2_MAX = 4  # of a report: what report_sink.h gives those that it makes of one in 16
_RECENCY = kernels.SOURCES.index("recency")
_MISSES = kernels.SOURCES.index("record"), kernels.SOURCES.index("pages")


class Reports:
    """Takes reports, in one thread. num_taken, num_refused: since the start."""

    def __init__(
        self, tiers: SharedTiers, epochs: Epochs, attachments: Attachments, counts: Any, missed: MissedKeys
    ) -> None:
        """counts: a `kernels.KeyCounts`."""
        self._caches, self._epochs, self._attachments = tiers.caches, epochs, attachments
        self._counts, self._missed = counts, missed
        specs = [layout.spec for layout in tiers.tables.values()]
        self._names = [spec.name for spec in specs]
        self._cached = np.array([name in tiers.caches for name in self._names])
        self._num_orders = np.array([len(spec.orders) for spec in specs])
        self._keys_max = np.array([spec.num_rows - 1 if spec.is_plain else KEY_MAX for spec in specs])
        self._buffer = np.empty(TAKE_REPORTS_MAX, dtype=kernels.REPORT)
        self._lost_of_gone = 0
        self.num_taken = self.num_refused = 0

    def readers(self) -> list[tuple[Any, bool]]:
        """Returns the readers of all clients, and whether each client is gone: `take` and `finish` those."""
        attached = [(reader, False) for reader in self._attachments.readers()]
        return attached + [(reader, True) for reader in self._attachments.take_last_readers()]

    def take(self, reader: kernels.ReportReader) -> None:
        """Takes a part of what a client has reported."""
        taken = reader.take(self._buffer)
        if taken:
            self.learn(self._buffer[:taken])

    def finish(self, reader: kernels.ReportReader) -> None:
        """Takes all that a client reported before it went, and keeps how much of it was lost."""
        try:
            for _ in range(kernels.NUM_RING_REPORTS // TAKE_REPORTS_MAX):
                self.take(reader)
        finally:
            self._lost_of_gone += _lost_of(reader)

    @property
    def num_lost(self) -> int:
        """Reports that found a ring full, clients that are gone included."""
        return min(self._lost_of_gone + sum(map(_lost_of, self._attachments.readers())), COUNT_MAX)

    def learn(self, reports: np.ndarray) -> None:
        """Counts reports, [n] of `kernels.REPORT`, and passes each on to what it is good for."""
        good = self._are_good(reports)
        self.num_taken += len(reports)
        self.num_refused += len(reports) - int(good.sum())
        reports = reports[good]
        self._counts.add(reports)
        source = reports["source_and_weight"] & 7
        used = reports[source == _RECENCY]
        missed = reports[(source == _MISSES[0]) | (source == _MISSES[1])]
        tag = np.uint8(self._epochs.current.tag << 4)
        for index, name in enumerate(self._names):
            cache = self._caches.get(name)
            if cache is None:
                continue
            mine = used[used["table"] == index]
            cache.touch(mine["order"] | tag, np.ascontiguousarray(mine["key"]))
            weights = np.int64(1) << (reports["source_and_weight"][reports["table"] == index] >> 3).astype(np.int64)
            cache.count_accesses(int(weights.sum()))
        if len(missed):
            self._missed.put(missed, self._asked_again(missed))

    def _are_good(self, reports: np.ndarray) -> np.ndarray:
        """Returns which reports can be of the store's tables, bool [n]."""
        good: np.ndarray = reports["table"] < len(self._names)
        table = np.where(good, reports["table"], 0)
        good &= self._cached[table] & (reports["order"] < self._num_orders[table])
        good &= (reports["key"] >= 0) & (reports["key"] <= self._keys_max[table])
        good &= reports["source_and_weight"] >> 3 <= WEIGHT_LOG2_MAX
        return good

    def _asked_again(self, missed: np.ndarray) -> np.ndarray:
        """Returns which reports, counted already, are of keys that were asked for before, bool [n]."""
        again = np.zeros(len(missed), dtype=bool)
        for index in np.unique(missed["table"]).tolist():
            mine = np.flatnonzero(missed["table"] == index)
            order_index, keys = missed["order"][mine].copy(), missed["key"][mine].copy()
            again[mine] = self._counts.counts(index, order_index, keys) > 1
        return again


def _lost_of(reader: kernels.ReportReader) -> int:
    """Returns how many of a client's reports were lost: gaps that we saw, plus drops that the client counted."""
    return int(reader.lost) + min(int(reader.dropped), COUNT_MAX)
