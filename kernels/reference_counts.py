"""Counts of keys in plain Python: the oracle of kernels/cpu/key_counts.h, and what a report looks like.
As `kernels` documents.

Written from the description, not from the code, over the same memory: after the same reports both hold the same bytes.
About ten microseconds a report.
"""

from __future__ import annotations

import numpy as np

from .records import REPORT
from .reference_placed import _bucket_of, _mix

KEY_COUNT = np.dtype([("key", "<i8"), ("count", "<u4"), ("table", "<u2"), ("order", "u1"), ("unused", "u1")])
SLOTS = 4
COUNT_MAX = 2**32 - 1

_GOLDEN = 0x9E3779B97F4A7C15


class KeyCounts:
    """Counts in memory, uint8 [64 * sets], that is emptied. One thread at a time."""

    def __init__(self, memory: np.ndarray) -> None:
        if memory.dtype != np.uint8 or memory.ndim != 1 or not memory.flags.c_contiguous or not memory.flags.writeable:
            raise ValueError("memory must be contiguous uint8")
        if len(memory) == 0 or len(memory) % 64 or memory.ctypes.data % 64:
            raise ValueError("memory must be at a multiple of 64 bytes, whole lines of 64, one at least")
        memory[:] = 0
        self._slots = memory.view(KEY_COUNT).reshape(-1, SLOTS)

    @property
    def num_sets(self) -> int:
        return len(self._slots)

    @property
    def num_used(self) -> int:
        return int(np.count_nonzero(self._slots["count"]))

    def add(self, reports: np.ndarray) -> int:
        if reports.dtype != REPORT or reports.ndim != 1:
            raise TypeError("reports must be REPORT [n]")
        for key, table, order, source_and_weight in reports[reports["key"] >= 0].tolist():
            self._count((key, table, order), 2 ** (source_and_weight >> 3))
        return int(np.count_nonzero(reports["key"] >= 0))

    def _count(self, name: tuple[int, int, int], weight: int) -> None:
        key, table, order = name
        counted = self._slots[self._set_of(table, np.array([order]), np.array([key]))[0]]
        names = [tuple(slot) for slot in counted[["key", "table", "order"]].tolist()]
        used = counted["count"].tolist()
        for slot in range(SLOTS):
            if used[slot] and names[slot] == name:  # an empty slot looks like key 0 of table 0
                counted["count"][slot] = min(COUNT_MAX, used[slot] + weight)
                return
        least = min(range(SLOTS), key=lambda slot: used[slot])
        if used[least] > weight:
            counted["count"][least] -= weight
        elif used[least] == weight:
            counted[least] = np.zeros((), KEY_COUNT)
        else:
            counted[least] = (key, weight - used[least], table, order, 0)

    def _set_of(self, table: int, order_index: np.ndarray, keys: np.ndarray) -> np.ndarray:
        kinds = np.uint64(table << 8) | order_index.astype(np.uint64)
        return _bucket_of(_mix(keys.astype(np.uint64) + kinds * np.uint64(_GOLDEN)), len(self._slots))

    def counts(self, table: int, order_index: np.ndarray | int, keys: np.ndarray) -> np.ndarray:
        if keys.ndim != 1 or np.shape(order_index) not in ((), keys.shape):
            raise ValueError("order_index and keys must be [keys]")
        orders = np.broadcast_to(np.asarray(order_index, dtype=np.uint8), keys.shape)
        slots = self._slots[self._set_of(table, orders, keys)]
        same = (slots["key"] == keys[:, None]) & (slots["table"] == table) & (slots["order"] == orders[:, None])
        return (slots["count"] * same).max(axis=1, initial=0).astype(np.uint32)

    def above(
        self, table: int, minimum: int, first_set: int = 0, end_set: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if minimum < 1:
            raise ValueError("minimum must be at least 1")
        slots = self._slots[first_set:end_set].reshape(-1)
        found = slots[(slots["count"] >= minimum) & (slots["table"] == table)]
        return found["order"].copy(), found["key"].copy(), found["count"].copy()

    def age(self) -> None:
        self._slots["count"] //= 2
        self._slots[self._slots["count"] == 0] = np.zeros((), KEY_COUNT)
