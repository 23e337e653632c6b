"""The replanner: static entries give way to others that were asked for clearly more often.

Input: counted keys; or a placement that was made meanwhile. Output: changes of the static set, in steps, each an epoch.
Errors: `DaemonError` if the daemon ends meanwhile, or a GPU still reads the epoch before.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from ..decisions.replan import LEAST_COUNT, Entries, Replan, choose_static, hotter, hottest_indexes, steps
from ..errors import DaemonError
from ..ipc.events import event
from ..ipc.messages import ReplanResult
from .epochs import Epochs, Pairs
from .shared_tiers import SharedTiers

logger = logging.getLogger("tierstore.daemon")

ROUND_ENTRIES = 1 << 17  # that a round of a replan exchanges at most: sorting these takes little memory
SCAN_SETS = 1 << 14  # of the counts, looked through at once


class Replanner:
    """Changes the static set, one change at a time. last: what the last replan did; num_replans: since the start."""

    def __init__(self, tiers: SharedTiers, epochs: Epochs, counts: Any, ended: threading.Event) -> None:
        """counts: a `kernels.KeyCounts`; ended: set when the daemon ends."""
        self._tiers, self._epochs, self._counts, self._ended = tiers, epochs, counts, ended
        self._names = list(tiers.tables)
        self.num_replans = 0
        self.last: ReplanResult | None = None

    def counts_of(self, name: str, order_index: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Returns how often entries of a table were asked for lately, uint32 [n], as far as it was counted."""
        return np.asarray(self._counts.counts(self._names.index(name), order_index, keys))

    def replan(self) -> ReplanResult:
        """Replans now. Blocks. Counts are halved afterwards, so that what was hot once makes way."""
        with self._epochs.changes:
            work = _Work()
            try:
                for name in self._tiers.slots:
                    self._replan_table(name, work)
            finally:
                self.last = work.done()
            self._counts.age()
            self.num_replans += 1
            _report("replan", self.last)
            return self.last

    def adopt(self, wanted: Mapping[str, Pairs], *, only_free: bool = False) -> ReplanResult:
        """Makes entries static, as many as there is room for. Blocks.

        Args:
            wanted: (order index, key) pairs by table, hottest first.
            only_free: they get only slots that are free; otherwise others make way for them.
        """
        with self._epochs.changes:
            work = _Work()
            for name, (order_index, keys) in wanted.items():
                slots = self._tiers.slots[name]
                order_index, keys = order_index[: slots.capacity], keys[: slots.capacity]
                ranks = np.arange(len(keys), 0, -1, dtype=np.uint32)
                target, live = Entries(order_index, keys, ranks), np.flatnonzero(slots.live)
                current = Entries(slots.order_index[live], slots.keys[live], np.zeros(len(live), dtype=np.uint32))
                enter, leave = target[~target.are_in(current)], ~current.are_in(target)
                if only_free:
                    enter, leave = enter[: slots.capacity - len(live)], np.zeros(len(live), dtype=bool)
                self._apply(name, Replan(enter, leave, np.flatnonzero(leave)), live, slots.capacity, work)
            done = work.done()
        _report("placement_adopted", done)
        return done

    def _replan_table(self, name: str, work: _Work) -> None:
        """Exchanges the coldest entries for the hottest candidates, and again the next ones, until a round has too
        few."""
        slots = self._tiers.slots[name]
        for _ in range(1 + slots.capacity // ROUND_ENTRIES):
            counted = slots.counted(partial(self.counts_of, name))
            coldest = hottest_indexes(np.where(counted, ~counted, 0), min(ROUND_ENTRIES, slots.num_live))
            current = Entries(slots.order_index[coldest], slots.keys[coldest], counted[coldest] - np.uint32(1))
            capacity = slots.capacity - slots.num_live + len(coldest)  # of these, beside the others
            replan = choose_static(current, self._candidates(name), capacity)
            self._apply(name, replan, coldest, capacity, work)
            if len(replan.enter) < ROUND_ENTRIES:
                return

    def _candidates(self, name: str) -> Entries:
        """Returns the hottest keys that are not static, ROUND_ENTRIES at most, found piece by piece."""
        none = np.empty(0, dtype=np.uint8), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.uint32)
        best, index = Entries(*none), self._names.index(name)
        for start in range(0, self._counts.num_sets, SCAN_SETS):
            piece = Entries(*self._counts.above(index, LEAST_COUNT, start, start + SCAN_SETS))
            static = self._tiers.are_static(self._epochs.current, name, piece.order_index, piece.keys)
            best = hotter(best, piece[~static], ROUND_ENTRIES)
        return best

    def _apply(self, name: str, replan: Replan, live: np.ndarray, capacity: int, work: _Work) -> None:
        """Carries a replan of a capacity out, step by step; live: the slots, int64 [n], that it calls its current
        entries."""
        slots = self._tiers.slots[name]
        spare = len(slots.keys) - slots.capacity
        for step in steps(replan, capacity, spare):
            if self._ended.is_set():
                raise DaemonError("the daemon ends; the rest of the replan is left")
            enter, leave = (step.enter.order_index, step.enter.keys), live[step.leave]
            work.entered += self._epochs.change({name: enter}, {name: leave})
            work.left += len(leave)
            work.steps += 1


class _Work:
    """Adds up what a change does."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.entered = self.left = self.steps = 0

    def done(self) -> ReplanResult:
        """Returns the sum, at its end."""
        seconds = time.monotonic() - self._started
        return ReplanResult(at=time.time(), entered=self.entered, left=self.left, seconds=seconds, steps=self.steps)


def _report(name: str, done: ReplanResult) -> None:
    seconds = round(done.seconds, 3)
    event(logger, logging.INFO, name, entered=done.entered, left=done.left, steps=done.steps, seconds=seconds)
