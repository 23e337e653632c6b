"""What a store counts: keys and hits by tier, table and order, batches, pages and bytes read.

Flows in: counts of one batch at a time. Flows out: one dict, consistent within itself. Any thread may count; one lock guards.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .formats.catalog import TableLayout

TIERS = ("hbm", "dram", "nvme")


class Counters:
    """Counters of one open store. Keys are counted once each, duplicates included; sentinels apart."""

    def __init__(self, tables: Mapping[str, TableLayout]) -> None:
        self._lock = threading.Lock()
        self._orders = {name: layout.spec.orders for name, layout in tables.items()}
        self._hits = {
            name: {tier: np.zeros(len(orders), np.int64) for tier in TIERS} for name, orders in self._orders.items()
        }
        self._totals = dict.fromkeys(
            ("batches", "zero_miss_batches", "sentinels", "rows", "pages_read", "bytes_read"), 0
        )

    def count_keys(self, table_name: str, order_index: np.ndarray, hits: np.ndarray, num_sentinels: int) -> None:
        """Counts keys of a table, order_index int64 [M]: hits, bool [M], were in DRAM, the others come from NVMe."""
        num_orders = len(self._orders[table_name])
        dram = np.bincount(order_index[hits], minlength=num_orders)
        nvme = np.bincount(order_index[~hits], minlength=num_orders)
        with self._lock:
            self._hits[table_name]["dram"] += dram
            self._hits[table_name]["nvme"] += nvme
            self._totals["sentinels"] += num_sentinels

    def count_batch(self, num_misses: int) -> None:
        """Counts one lookup or submit, over all its tables."""
        with self._lock:
            self._totals["batches"] += 1
            self._totals["zero_miss_batches"] += num_misses == 0

    def count_rows(self, num_rows: int) -> None:
        """Counts rows that were asked for by row id and answered without a key."""
        with self._lock:
            self._totals["rows"] += num_rows

    def count_pages(self, num_pages: int, page_bytes: int) -> None:
        """Counts pages read from shards."""
        with self._lock:
            self._totals["pages_read"] += num_pages
            self._totals["bytes_read"] += num_pages * page_bytes

    def as_dict(self) -> dict[str, Any]:
        """Returns all counters as plain numbers; hits are in keys."""
        with self._lock:
            tables: dict[str, dict[str, Any]] = {}
            for name, hits in self._hits.items():
                orders = {
                    order: {tier: int(hits[tier][index]) for tier in TIERS}
                    for index, order in enumerate(self._orders[name])
                }
                tables[name] = {"hits": _sums(orders.values()), "orders": orders}
            totals = dict(self._totals)
        hits_total = _sums(table["hits"] for table in tables.values())
        return {"keys": sum(hits_total.values()), "hits": hits_total, **totals, "tables": tables}

    def after_fork(self) -> None:
        """Makes the lock anew in a forked child."""
        self._lock = threading.Lock()


def _sums(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    counts = list(counts)
    return {tier: sum(count[tier] for count in counts) for tier in TIERS}
