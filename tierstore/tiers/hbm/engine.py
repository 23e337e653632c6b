"""The lookup path of a store with an hbm tier: what slots hold comes from the device, all else from the engine below.

Input: what the engine contract says. Output: the same rows. Errors: those of the contract. Lookups from the device
itself come by `open_lookup` alone; a thread of the engine below answers what they miss. A forked child does not have
the device: it reads what slots hold from the placement file. Shapes: N tokens, O orders, H rows per key.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from ... import kernels
from ...errors import StoreNotReadyError
from ...stats import add_counters
from ..engine import READ_WAIT_S, EngineWrapper, HostEngine, Pending, Request, RowRange, in_one_version
from ..placed import PlacementFile
from .change import OnBytes, change_entries
from .lookup import DeviceLookup
from .open_lookups import OpenLookups
from .row_hits import take_row_hits
from .row_lookup import DeviceRows
from .tier import HbmTier
from .times import DeviceTimes

_T = TypeVar("_T")
_HBM_SOURCE = kernels.SOURCES.index("hbm")


class HbmEngine(EngineWrapper):
    """See `Engine`. Owns the tier: closes it after the engine below."""

    def __init__(self, what: str, engine: HostEngine, tier: HbmTier) -> None:
        """`what` names the store in errors. engine: what answers for all that slots do not hold."""
        super().__init__(engine)
        self._what = what
        self._host, self._tier = engine, tier  # the first is `_engine`, with what only an engine of this host has
        self.try_lookup = _nothing
        self._counts_lock = threading.Lock()  # guards `_hits`, those of lookups from the host
        self._hits = [np.zeros(len(layout.spec.orders), dtype=np.int64) for layout in engine.layouts]
        # Guards what slots hold: one change of entries at a time, and none while the tier closes. Reentrant, because a
        # store may be collected, and so closed, while this thread changes another one's entries.
        self._changes_lock = threading.RLock()
        self._has_device = True
        self.device = tier.device
        self._times = DeviceTimes(tier.device)
        self._lookups = OpenLookups(what, engine, tier, self._times)

    def lookup(
        self,
        index: int,
        keys: np.ndarray,
        out: np.ndarray,
        sources: np.ndarray | None = None,
        timeout_s: float | None = None,
    ) -> None:
        # Of two versions, what slots held would be the old one's rows, and the rest the new one's.
        in_one_version(self._engine, lambda: self._lookup(index, keys, out, sources, timeout_s), self._what)

    def _lookup(
        self, index: int, keys: np.ndarray, out: np.ndarray, sources: np.ndarray | None, timeout_s: float | None
    ) -> None:
        rest, hits, entries = self._take_hits(index, keys)
        self._engine.lookup(index, rest, out, sources, timeout_s)
        _put(out, hits, entries)
        if sources is not None and hits is not None:
            sources[hits] = _HBM_SOURCE

    def submit(self, requests: Sequence[Request]) -> Pending | None:
        return in_one_version(self._engine, lambda: self._submit(requests), self._what)

    def _submit(self, requests: Sequence[Request]) -> Pending | None:
        taken = [self._take_hits(index, keys) for index, keys, _ in requests]
        rests = [(index, rest, out) for (index, _, out), (rest, _, _) in zip(requests, taken, strict=True)]

        def put() -> None:
            for (_, _, out), (_, hits, entries) in zip(requests, taken, strict=True):
                _put(out, hits, entries)

        return _started(self._engine.submit(rests), put)

    def rows(
        self,
        index: int,
        row_ids: np.ndarray,
        out: np.ndarray,
        within: RowRange | None = None,
        timeout_s: float | None = None,
    ) -> None:
        spec, ids = self._host.layouts[index].spec, row_ids.copy()  # ours: looked at more than once

        def look_up() -> None:
            hits = take_row_hits(spec, ids, within, partial(self._take_hits, index))
            self._engine.rows(index, hits.rest, out, within, timeout_s)
            hits.put(out)

        in_one_version(self._engine, look_up, self._what)

    def submit_rows(self, index: int, row_ids: np.ndarray, out: np.ndarray, within: RowRange | None) -> Pending | None:
        spec, ids = self._host.layouts[index].spec, row_ids.copy()

        def start() -> Pending | None:
            hits = take_row_hits(spec, ids, within, partial(self._take_hits, index))
            return _started(self._engine.submit_rows(index, hits.rest, out, within), partial(hits.put, out))

        return in_one_version(self._engine, start, self._what)

    def _take_hits(self, index: int, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Returns the keys for the engine below, and what slots hold: which, bool [N, O], and their entries; None:
        nothing."""
        if not self._has_device:
            return keys, None, None
        hits, entries = self._tier.take_hits(index, keys)
        if not len(entries):
            return keys, None, None
        with self._counts_lock:
            self._hits[index] += hits.sum(axis=0)
        return np.where(hits, -1, keys), hits, entries

    def locate(self, index: int, keys: np.ndarray, sources: np.ndarray) -> None:
        self._engine.locate(index, keys, sources)
        if self._has_device:
            sources[self._tier.in_slots(index, keys)] = _HBM_SOURCE

    def open_lookup(self, index: int, tokens_max: int) -> DeviceLookup:
        with self._lookups.lock:
            self._check_device()
            return self._lookups.open(index, tokens_max)

    def open_rows(self, index: int, tokens_max: int, within: RowRange) -> DeviceRows:
        with self._lookups.lock:
            self._check_device()
            return self._lookups.open_rows(index, tokens_max, within)

    def move(self, act: Callable[[], _T]) -> _T:
        """Has the engine below move to another version, by `act`, and returns what that does. The tier is empty
        afterwards.

        A lookup from the device is of one version: those that were launched before have taken from slots what they
        take, and are answered by the old version; later ones find nothing in slots, and are answered by the one or the
        other. Blocks on the device; `act` must leave the old engine open.
        """
        with self._changes_lock:
            if self._has_device:
                self._tier.clear()
            done = act()
            # After the engine below has moved: what is asked from here on is answered by the new version.
            if self._has_device and not self._lookups.move_to(self._host.native, READ_WAIT_S):
                raise TimeoutError(f"{self._what}: a lookup from the device did not end within {READ_WAIT_S} s")
        return done

    def change_entries(self, file: PlacementFile, on_bytes: OnBytes = lambda _: None) -> list[np.ndarray]:
        """As `DeviceEngine.change_entries`. on_bytes: called with bytes as they are read."""
        with self._changes_lock:
            self._check_device()
            return [
                change_entries(self._tier, index, layout, file, on_bytes)
                for index, layout in enumerate(self._host.layouts)
            ]

    @property
    def reads_records(self) -> bool:
        """Whether the device reads DRAM's records of any table."""
        return any(table.reads_records for table in self._tier.tables)

    def name_records(self) -> None:
        """Has the device see what DRAM's records are now; returns when no kernel reads what they were before.
        Blocks."""
        with self._changes_lock:
            self._check_device()
            self._tier.name_records()

    def _check_device(self) -> None:
        if not self._has_device:
            raise StoreNotReadyError(
                f"{self._what} is closed, or this process was forked from the one that has the device"
            )

    def memory(self) -> dict[str, int]:
        """Returns what of the device's memory was asked for, and what is used."""
        return {"hbm_budget_bytes": self._tier.plan.budget_bytes, "hbm_bytes": self._tier.plan.hbm_bytes}

    def counters(self) -> dict[str, Any]:
        """As `Engine.counters`, and under "hbm" a list for each table: keys by order found in slots. Latency is also
        that of lookups from the device: see `times`."""
        counters = self._engine.counters()
        counters["latency"] = add_counters(counters["latency"], self._times.record())
        if not self._has_device:
            return counters | {"hbm": [hits.tolist() for hits in self._hits]}
        steps = self._lookups.steps_without_miss()
        counters["batches"] += steps
        counters["zero_miss_batches"] += steps
        return counters | _with_device_counts(counters, self._hits, self._tier.counters(), self._tier.row_addresses)

    def close(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        with self._lookups.lock:  # so that no lookup from the device begins meanwhile
            # In this order: the device asks the host, the host's engine reads, and both use the tier's memory.
            if self._has_device and not self._lookups.end(deadline):
                return False
            if not self._engine.close(max(0.0, deadline - time.monotonic())):
                return False
            with self._changes_lock:
                if self._has_device:
                    self._has_device, self.device = False, None
                    self._lookups.clear()
                    self._tier.close()
        return True

    def before_fork(self) -> None:
        with contextlib.ExitStack() as stack:  # all of it, or nothing
            stack.enter_context(self._lookups.lock)
            stack.enter_context(self._counts_lock)
            self._lookups.before_fork()
            stack.callback(self._lookups.after_fork, child=False)
            self._engine.before_fork()
            stack.pop_all()  # `after_fork` gives it back

    def after_fork(self, *, child: bool) -> None:
        self._engine.after_fork(child=child)
        self._lookups.after_fork(child=child)
        self._counts_lock.release()
        self._lookups.lock.release()
        if child:  # a device's memory and its driver's state are the parent's, and so is who changes entries
            self._has_device, self.device = False, None
            self._changes_lock = threading.RLock()
            self._times.after_fork_in_child()
            self._lookups.abandon_in_child()
            self.try_lookup = self._engine.try_lookup


def _nothing(_index: int, _keys: Any, _out: Any) -> bool:
    """The shortest way, which looks into no slots: every lookup must take the longer one."""
    return False


def _put(out: np.ndarray, hits: np.ndarray | None, entries: np.ndarray | None) -> None:
    """Copies what slots held to its places."""
    if hits is not None and entries is not None:
        out.reshape(hits.size, entries.shape[1])[hits.reshape(-1)] = entries


def _started(pending: Pending | None, put: Callable[[], None]) -> Pending | None:
    """Puts what slots held over what the engine below has written, which is all that it does not read."""
    try:
        put()
        return pending
    except BaseException:  # nobody has the lookup
        if pending is not None:
            pending.cancel()
        raise


def _with_device_counts(
    counters: dict[str, Any], hits_of_host: list[np.ndarray], of_device: Any, row_addresses: Sequence[int]
) -> dict[str, Any]:
    """Returns what the device counted, and the host's lookups found in slots, joined to counters of the engine
    below."""
    in_hbm, tables, sentinels = [], [], counters["sentinels"]
    for hits, counted, row_address, (in_dram, in_static, from_nvme) in zip(
        hits_of_host, of_device, row_addresses, counters["tables"], strict=True
    ):
        # Of a table that DRAM holds whole, if the device reads it, a miss of the tier is a hit there.
        by_device = counted["records"] + (counted["misses"] if row_address else 0)
        in_hbm.append((hits + counted["slots"]).tolist())
        tables.append([(in_dram + by_device).tolist(), (in_static + counted["records"]).tolist(), from_nvme])
        # What slots held for the host was a key of -1 to the engine below.
        sentinels += int(counted["sentinels"][0] - hits.sum())
    return {"tables": tables, "hbm": in_hbm, "sentinels": sentinels}
