"""Learning: the tiers follow what clients ask for.

Flows in: reports of all clients, lossy and not to be trusted. Flows out: missed entries, read by the daemon itself,
offered to the recency cache; counted keys; and, now and then or when asked, a replan: static entries that others were
asked for clearly more often than give way to those, in steps, each an epoch. Counts are halved at every replan, so that
what was hot once makes way. Refuses reports of tables, orders and keys that there are not.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from .. import kernels
from ..decisions.replan import LEAST_COUNT, Entries, Replan, choose_static, hotter, hottest_indexes, steps
from ..errors import DaemonError, TierStoreError
from ..ipc.events import event
from ..spec import KEY_MAX
from ..stats import COUNT_MAX
from .missed import MissedKeys
from .shared_tiers import Host, batches

logger = logging.getLogger("tierstore.daemon")

DRAIN_S = 0.02  # between two looks at the clients' rings: one holds 8,192 reports
TAKE_REPORTS_MAX = 4096  # of one client at once, before the others have their turn
WEIGHT_LOG2_MAX = 4  # of a report: what report_sink.h gives those that it makes of one in 16
FEED_KEYS_MAX = 1 << 16  # missed keys that wait to be read
FEED_KEYS = 1024  # read before it is asked anew which are next
ROUND_ENTRIES = 1 << 17  # that a round of a replan exchanges at most: sorting these takes little memory
SCAN_SETS = 1 << 14  # of the counts, looked through at once
POLL_S = 1.0
REPLAN_S = 600.0
CLOSE_WAIT_S = 10.0
_HITS = kernels.SOURCES.index("static"), kernels.SOURCES.index("recency")
_MISSES = kernels.SOURCES.index("record"), kernels.SOURCES.index("pages")


class Learner:
    """Reads reports, feeds the recency cache and replans, in three threads from `start` to `close`."""

    def __init__(self, host: Host, replan_s: float | None = REPLAN_S) -> None:
        """replan_s: seconds between automatic replans, None for none."""
        self._host = host
        self._replan_s = replan_s
        self._specs = [layout.spec for layout in host.current.opened.image.tables.values()]
        self._cached = np.array([spec.name in host.slots for spec in self._specs])
        self._num_orders = np.array([len(spec.orders) for spec in self._specs])
        self._keys_max = np.array([spec.num_rows - 1 if spec.is_plain else KEY_MAX for spec in self._specs])
        memory = np.zeros(host.plan.counts_bytes + 64, dtype=np.uint8)
        start = -memory.ctypes.data % 64
        self._counts = kernels.KeyCounts(memory[start : start + host.plan.counts_bytes])
        self._ended = threading.Event()
        self._missed = MissedKeys(FEED_KEYS_MAX)
        self._next_replan: float | None = None
        self._lost_of_gone = 0
        self.totals = dict.fromkeys(("reports", "reports_refused", "read_keys", "replans"), 0)
        self.last_replan: dict[str, Any] | None = None
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

    def stat(self) -> dict[str, Any]:
        """Returns the parts "learning" and "feed" of the stat record."""
        lost = self._lost_of_gone + sum(map(_lost_of, self._host.attachments.readers()))
        next_s = None if self._next_replan is None else max(0.0, self._next_replan - time.monotonic())
        return {
            "learning": {
                "reports": self.totals["reports"],
                "reports_lost": min(lost, COUNT_MAX),
                "reports_refused": self.totals["reports_refused"],
                "tracked_keys": self._counts.num_used,
                "replans": self.totals["replans"],
                "next_replan_s": next_s,
                "last_replan": self.last_replan,
            },
            "feed": {
                "queued_keys": len(self._missed),
                "read_keys": self.totals["read_keys"],
                "dropped_keys": self._missed.num_dropped,
                "errors": self._host.num_read_errors,
            },
        }

    def counts_of(self, name: str, order_index: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Returns how often entries of a table were asked for lately, uint32 [n], as far as it was counted."""
        index = next(i for i, spec in enumerate(self._specs) if spec.name == name)
        return self._counts.counts(index, order_index, keys)

    # Reports

    def _drain(self) -> None:
        reports = np.empty(TAKE_REPORTS_MAX, dtype=kernels.REPORT)
        while not self._ended.wait(DRAIN_S):
            for reader in self._host.attachments.readers():
                self._guarded("reports_failed", self._take, reader, reports)
            for reader in self._host.attachments.take_last_readers():
                for _ in range(kernels.NUM_RING_REPORTS // TAKE_REPORTS_MAX):
                    self._guarded("reports_failed", self._take, reader, reports)
                self._lost_of_gone += _lost_of(reader)

    def _take(self, reader: Any, reports: np.ndarray) -> None:
        taken = reader.take(reports)
        if taken:
            self._learn(reports[:taken])

    def _learn(self, reports: np.ndarray) -> None:
        """Counts reports, and sorts out what each is good for."""
        good = reports["table"] < len(self._specs)
        table = np.where(good, reports["table"], 0)
        good &= self._cached[table] & (reports["order"] < self._num_orders[table])
        good &= (reports["key"] >= 0) & (reports["key"] <= self._keys_max[table])
        good &= reports["source_and_weight"] >> 3 <= WEIGHT_LOG2_MAX
        self.totals["reports"] += len(reports)
        self.totals["reports_refused"] += len(reports) - int(good.sum())
        reports = reports[good]
        self._counts.add(reports)
        source = reports["source_and_weight"] & 7
        used = reports[source == _HITS[1]]
        missed = reports[(source == _MISSES[0]) | (source == _MISSES[1])]
        tag = np.uint8(self._host.current.tag << 4)
        for index, spec in enumerate(self._specs):
            cache = self._host.caches.get(spec.name)
            if cache is None:
                continue
            mine = used[used["table"] == index]
            cache.touch(mine["order"] | tag, np.ascontiguousarray(mine["key"]))
            weights = np.int64(1) << (reports["source_and_weight"][reports["table"] == index] >> 3).astype(np.int64)
            cache.count_accesses(int(weights.sum()))
        if len(missed):
            self._missed.put(missed, self._asked_again(missed))

    def _asked_again(self, missed: np.ndarray) -> np.ndarray:
        """Returns which reports, counted already, are of keys that were asked for before, bool [n]."""
        again = np.zeros(len(missed), dtype=bool)
        for index in np.unique(missed["table"]).tolist():
            mine = np.flatnonzero(missed["table"] == index)
            order_index, keys = missed["order"][mine].copy(), missed["key"][mine].copy()
            again[mine] = self._counts.counts(index, order_index, keys) > 1
        return again

    # Feeding

    def _feed(self) -> None:
        while not self._ended.is_set():
            for missed in self._missed.take(FEED_KEYS, POLL_S):
                self._guarded("feed_failed", self._read_missed, missed)

    def _read_missed(self, missed: np.ndarray) -> None:
        """Reads what clients missed: each lookup of the daemon's offers what it had to read to the recency cache."""
        version = self._host.current
        for index, spec in enumerate(self._specs):
            mine = missed[missed["table"] == index]
            pairs = np.unique(mine[["order", "key"]])
            for at in batches(pairs["order"], len(spec.orders)):
                if self._ended.is_set():
                    return
                self._host.read(version, spec.name, pairs["order"][at], np.ascontiguousarray(pairs["key"][at]))
                self.totals["read_keys"] += len(at)

    # Replans

    def _replan_often(self) -> None:
        while self._replan_s is not None:
            self._next_replan = time.monotonic() + self._replan_s
            if self._ended.wait(self._replan_s):
                return
            self._guarded("replan_failed", self.replan)

    def _guarded(self, name: str, act: Callable[..., Any], *arguments: Any) -> None:
        """Calls act; what it raises is an event and not the end of its thread,
        without which nothing would be learned."""
        try:
            act(*arguments)
        except TierStoreError as error:  # a version that was closed meanwhile, a disk that is gone
            event(logger, logging.WARNING, name, error=error)
        except Exception as error:
            event(logger, logging.ERROR, name, error=error)

    def replan(self) -> dict[str, Any]:
        """Replans now; returns what was done. Blocks; raises `DaemonError` where the daemon ends meanwhile, or a
        GPU still reads the epoch before."""
        with self._host.changes:
            started = time.monotonic()
            done = {"at": time.time(), "entered": 0, "left": 0, "seconds": 0.0, "steps": 0}
            try:
                for index, spec in enumerate(self._specs):
                    if spec.name in self._host.slots:
                        self._replan_table(index, spec.name, done)
            finally:
                done["at"], done["seconds"] = time.time(), time.monotonic() - started
                self.last_replan = done
            self._counts.age()
            self.totals["replans"] += 1
            self._say("replan", done)
            return done

    def adopt(self, wanted: Mapping[str, tuple[np.ndarray, np.ndarray]], *, only_free: bool = False) -> dict[str, Any]:
        """Makes (order index, key) pairs static, hottest first, as many as there is room for;
        returns what was done. Blocks.

        Others make way for them, unless only_free: then they get what is free.
        """
        done = {"at": time.time(), "entered": 0, "left": 0, "seconds": 0.0, "steps": 0}
        with self._host.changes:
            started = time.monotonic()
            for name, (order_index, keys) in wanted.items():
                slots = self._host.slots[name]
                order_index, keys = order_index[: slots.capacity], keys[: slots.capacity]
                ranks = np.arange(len(keys), 0, -1, dtype=np.uint32)
                target, live = Entries(order_index, keys, ranks), np.flatnonzero(slots.live)
                current = Entries(slots.order_index[live], slots.keys[live], np.zeros(len(live), dtype=np.uint32))
                enter, leave = target[~target.are_in(current)], ~current.are_in(target)
                if only_free:
                    enter, leave = enter[: slots.capacity - len(live)], np.zeros(len(live), dtype=bool)
                replan = Replan(enter, leave, np.flatnonzero(leave))
                self._apply(name, replan, live, slots.capacity, done)
            done["seconds"] = time.monotonic() - started
        self._say("placement_adopted", done)
        return done

    def _say(self, name: str, done: Mapping[str, Any]) -> None:
        event(
            logger, logging.INFO, name,
            entered=done["entered"], left=done["left"], steps=done["steps"], seconds=round(done["seconds"], 3),
        )  # fmt: skip

    def _replan_table(self, index: int, name: str, done: dict[str, Any]) -> None:
        """Exchanges the coldest entries for the hottest candidates, and again the next ones,
        until a round has too few."""
        slots = self._host.slots[name]
        for _ in range(1 + slots.capacity // ROUND_ENTRIES):
            counted = slots.counted(partial(self._counts.counts, index))
            coldest = hottest_indexes(np.where(counted, ~counted, 0), min(ROUND_ENTRIES, slots.num_live))
            current = Entries(slots.order_index[coldest], slots.keys[coldest], counted[coldest] - np.uint32(1))
            capacity = slots.capacity - slots.num_live + len(coldest)  # of these, beside the others
            replan = choose_static(current, self._candidates(index, name), capacity)
            self._apply(name, replan, coldest, capacity, done)
            if len(replan.enter) < ROUND_ENTRIES:
                return

    def _candidates(self, index: int, name: str) -> Entries:
        """Returns the hottest keys that are not static, ROUND_ENTRIES at most, found piece by piece."""
        none = np.empty(0, dtype=np.uint8), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.uint32)
        best = Entries(*none)
        for start in range(0, self._counts.num_sets, SCAN_SETS):
            piece = Entries(*self._counts.above(index, LEAST_COUNT, start, start + SCAN_SETS))
            piece = piece[~self._host.are_static(name, piece.order_index, piece.keys)]
            best = hotter(best, piece, ROUND_ENTRIES)
        return best

    def _apply(self, name: str, replan: Replan, live: np.ndarray, capacity: int, done: dict[str, Any]) -> None:
        """Carries a replan of a capacity out, step by step; live: the slots, int64 [n],
        that it calls its current entries."""
        slots = self._host.slots[name]
        spare = len(slots.keys) - slots.capacity
        for step in steps(replan, capacity, spare):
            if self._ended.is_set():
                raise DaemonError("the daemon ends; the rest of the replan is left")
            done["entered"] += self._host.change(
                {name: (step.enter.order_index, step.enter.keys)}, {name: live[step.leave]}
            )
            done["left"] += len(step.leave)
            done["steps"] += 1


def _lost_of(reader: Any) -> int:
    """Returns how many of a client's reports were lost; of those that it dropped, it says so itself."""
    return int(reader.lost) + min(int(reader.dropped), COUNT_MAX)
