"""What a store shows of its counts: keys and hits by tier, table and order, batches, pages and bytes read.

Flows in: an engine's counters. Flows out: one dict of plain numbers; hits are in keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .spec import TableSpec

TIERS = ("hbm", "dram", "nvme")


def stats_of(counters: Mapping[str, Any], specs: Sequence[TableSpec]) -> dict[str, Any]:
    """Returns counters for people and programs. Keys are counted once each, duplicates included; sentinels apart.

    static_hits, by order: those of the dram tier's hits that its static set answered.
    """
    tables: dict[str, dict[str, Any]] = {}
    for spec, (in_dram, in_static, from_nvme) in zip(specs, counters["tables"], strict=True):
        orders = {
            order: {"hbm": 0, "dram": dram, "nvme": nvme}
            for order, dram, nvme in zip(spec.orders, in_dram, from_nvme, strict=True)
        }
        static = dict(zip(spec.orders, in_static, strict=True))
        tables[spec.name] = {"hits": _sums(orders.values()), "orders": orders, "static_hits": static}
    hits = _sums(table["hits"] for table in tables.values())
    totals = {name: count for name, count in counters.items() if name != "tables"}
    return {"keys": sum(hits.values()), "hits": hits, **totals, "tables": tables}


def _sums(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    counts = list(counts)
    return {tier: sum(count[tier] for count in counts) for tier in TIERS}
