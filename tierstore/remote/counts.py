"""What a client counts of its own lookups at a server, in the form of an engine's counters.

Input: answers. Output: `record`. pages_read counts the rows that the server's disk answered, of which each is a page at
most; bytes_read the bytes of rows that came over the network; latency is what the client sees, network included.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from operator import add
from typing import Any

from ..spec import TableSpec
from ..stats import LatencyCounts
from ..tiers.engine import Request
from .replies import DRAM, NVME, STATIC, Counted

TOTALS = (
    "batches",
    "zero_miss_batches",
    "sentinels",
    "rows",
    "pages_read",
    "entries_read",
    "bytes_read",
    "row_bytes_read",
)


class ClientCounts:
    """Any thread may call."""

    def __init__(self, specs: Sequence[TableSpec]) -> None:
        self._specs = specs
        self._lock = threading.Lock()  # guards `_totals`, `_latency` and `_hits`; held through a fork
        self._totals = dict.fromkeys(TOTALS, 0)
        self._latency = LatencyCounts()
        self._hits = [[[0] * len(spec.orders) for _ in (DRAM, STATIC, NVME)] for spec in specs]

    def add_latency(self, started_ns: int) -> None:
        """Counts the time since started_ns, of time.monotonic_ns, as that of a lookup which was answered."""
        with self._lock:
            self._latency.add(time.monotonic_ns() - started_ns)

    def add_lookup(self, requests: Sequence[Request], answers: Sequence[Counted]) -> None:
        """Counts a lookup by keys, whose answers are all there."""
        num_keys = sum([keys.size for _, keys, _ in requests])
        num_nvme = 0
        with self._lock:
            totals = self._totals
            for answer in answers:
                totals["bytes_read"] += answer.num_bytes
                totals["pages_read"] += answer.num_nvme_rows
                for (index, _, _), hits in zip(answer.requests, answer.hits, strict=True):
                    for total, counts in zip(self._hits[index], hits, strict=True):
                        total[:] = map(add, total, counts)
                    from_nvme = sum(hits[NVME])
                    num_nvme += from_nvme
                    num_keys -= from_nvme + sum(hits[DRAM])
            totals["sentinels"] += num_keys
            totals["batches"] += 1
            totals["zero_miss_batches"] += not num_nvme

    def add_rows(self, num_rows: int, answers: Sequence[Counted]) -> None:
        """Counts a lookup by row ids, whose answers are all there."""
        num_bytes = sum(answer.num_bytes for answer in answers)
        with self._lock:
            self._totals["rows"] += num_rows
            self._totals["batches"] += 1
            self._totals["bytes_read"] += num_bytes
            self._totals["row_bytes_read"] += num_bytes

    def record(self) -> dict[str, Any]:
        """Returns everything, as `Engine.counters` does."""
        with self._lock:
            latency = self._latency.record() | {"share": 1.0}  # each is timed: a network is slower than a clock
            return {**self._totals, "latency": latency, "tables": [tuple(map(list, hits)) for hits in self._hits]}

    def before_fork(self) -> None:
        """Takes the lock."""
        self._lock.acquire()

    def after_fork(self, *, child: bool) -> None:
        """Gives it back; in the child, its owner may be a thread that is not there."""
        if child:
            self._lock = threading.Lock()
        else:
            self._lock.release()
