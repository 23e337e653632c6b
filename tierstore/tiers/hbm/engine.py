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
from typing import Any, TypeVar

import numpy as np

from ... import kernels
from ...errors import StoreNotReadyError
from ...stats import add_counters
from ..engine import READ_WAIT_S, HostEngine, RowRange
from ..placed import PlacementFile
from .change import OnBytes, change_entries
from .host_lookups import HostLookups
from .lookup import DeviceLookup
from .open_lookups import OpenLookups
from .row_lookup import DeviceRows
from .tier import HbmTier
from .times import DeviceTimes

_T = TypeVar("_T")
_HBM_SOURCE = kernels.SOURCES.index("hbm")


class HbmEngine(HostLookups):
    """See `Engine`. Owns the tier: closes it after the engine below."""

    def __init__(self, what: str, engine: HostEngine, tier: HbmTier) -> None:
        """`what` names the store in errors. engine: what answers for all that slots do not hold."""
        super().__init__(what, engine, tier)
        self.try_lookup = _nothing
        # Guards what slots hold: one change of entries at a time, and none while the tier closes. Reentrant, because a
        # store may be collected, and so closed, while this thread changes another one's entries.
        self._changes_lock = threading.RLock()
        self.device = tier.device
        self._times = DeviceTimes(tier.device, self._quiet)
        self._lookups = OpenLookups(what, engine, tier, self._times)
        self._newest_counts = self._ask_device()  # what `counters` last asked for

    def open_lookup(self, index: int, tokens_max: int) -> DeviceLookup:
        with self._quiet.work("to open a lookup"), self._lookups.lock:
            self._check_device()
            return self._lookups.open(index, tokens_max)

    def open_rows(self, index: int, tokens_max: int, within: RowRange) -> DeviceRows:
        with self._quiet.work("to open a lookup by row id"), self._lookups.lock:
            self._check_device()
            return self._lookups.open_rows(index, tokens_max, within)

    def move(self, act: Callable[[], _T]) -> _T:
        """Has the engine below move to another version, by `act`, and returns what that does. The tier is empty
        afterwards.

        A lookup from the device is of one version: those that were launched before have taken from slots what they
        take, and are answered by the old version; later ones find nothing in slots, and are answered by the one or the
        other. Blocks on the device; `act` must leave the old engine open.
        """
        with self._quiet.work("to move to another version"), self._changes_lock:
            if self._has_device:
                self._tier.clear()
            done = act()
            # After the engine below has moved: what is asked from here on is answered by the new version.
            if self._has_device and not self._lookups.move_to(self._host.native, READ_WAIT_S):
                raise TimeoutError(f"{self._what}: a lookup from the device did not end within {READ_WAIT_S} s")
        return done

    def change_entries(self, file: PlacementFile, on_bytes: OnBytes = lambda _: None) -> list[np.ndarray]:
        """As `DeviceEngine.change_entries`. on_bytes: called with bytes as they are read."""
        with self._quiet.work("to change what hbm holds"), self._changes_lock:
            self._check_device()
            file.overlays = self._host.overlays  # its records are the base's
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
        with self._quiet.work("to follow an epoch"), self._changes_lock:
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
        counters["latency"] = add_counters(counters["latency"], self._times.record(may_collect=self._has_device))
        if not self._has_device:
            return counters | {"hbm": [hits.tolist() for hits in self._hits]}
        with self._quiet.work_unless_quiet() as may_ask:  # else the device's are those of the last time
            if may_ask:
                self._newest_counts = self._ask_device()
        of_device, steps = self._newest_counts
        counters["batches"] += steps
        counters["zero_miss_batches"] += steps
        return counters | _with_device_counts(counters, self._hits, of_device, self._tier.row_addresses)

    def _ask_device(self) -> tuple[list[dict[str, np.ndarray]], int]:
        """Returns what the device has counted: of each table, and steps without a miss. Blocks on the device."""
        return self._tier.counters(), self._lookups.steps_without_miss()

    def quiet(self) -> contextlib.AbstractContextManager[None]:
        """As `DeviceEngine.quiet`."""
        return self._quiet.hold()

    @property
    def is_quiet(self) -> bool:
        """Whether anybody holds a quiet time."""
        return self._quiet.is_quiet

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
            self._quiet.after_fork_in_child()
            self._times.after_fork_in_child()
            self._lookups.abandon_in_child()
            self.try_lookup = self._engine.try_lookup


def _nothing(_index: int, _keys: Any, _out: Any) -> bool:
    """The shortest way, which looks into no slots: every lookup must take the longer one."""
    return False


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
