"""What a store shows of its counts: keys and hits by tier, table and order, batches, pages and bytes read.

Flows in: an engine's counters. Flows out: one dict of plain numbers; hits are in keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .spec import TableSpec

TIERS = ("hbm", "dram", "nvme")
LATENCY_BOUNDS_NS = tuple(
    1000 << power for power in range(21)
)  # upper ends of the buckets; what took longer comes last
COUNT_MAX = 1 << 56  # where sums of what clients tell end: a hundred of them still fit a message's 64 bits
LATENCY_SHARE = 1 / 8  # of blocking lookups are timed


def stats_of(counters: Mapping[str, Any], specs: Sequence[TableSpec]) -> dict[str, Any]:
    """Returns counters for people and programs. Keys are counted once each, duplicates included; sentinels apart.

    static_hits, by order: those of the dram tier's hits that its static set answered.
    """
    tables: dict[str, dict[str, Any]] = {}
    nothing_in_hbm = [[0] * len(spec.orders) for spec in specs]
    of_tables = zip(specs, counters["tables"], counters.get("hbm", nothing_in_hbm), strict=True)
    for spec, (in_dram, in_static, from_nvme), in_hbm in of_tables:
        orders = {
            order: {"hbm": hbm, "dram": dram, "nvme": nvme}
            for order, hbm, dram, nvme in zip(spec.orders, in_hbm, in_dram, from_nvme, strict=True)
        }
        static = dict(zip(spec.orders, in_static, strict=True))
        tables[spec.name] = {"hits": _sums(orders.values()), "orders": orders, "static_hits": static}
    hits = _sums(table["hits"] for table in tables.values())
    totals = {name: count for name, count in counters.items() if name not in ("tables", "hbm", "latency")}
    if "latency" in counters:
        totals["latency"] = dict(counters["latency"]) | {"bounds_ns": list(LATENCY_BOUNDS_NS), "share": LATENCY_SHARE}
    return {"keys": sum(hits.values()), "hits": hits, **totals, "tables": tables}


def add_counters(total: Any, more: Any) -> Any:
    """Returns the sum of two engines' counters, number by number, of the same tables; None counts as nothing.

    Raises `ValueError` or `TypeError` where they are not of one shape, or where a number is below 0 or none.
    """
    if total is None or more is None:
        return more if total is None else total
    if isinstance(total, Mapping):
        if total.keys() != more.keys():
            raise ValueError(f"counters {sorted(total)} and {sorted(more)} are not of one shape")
        return {name: add_counters(part, more[name]) for name, part in total.items()}
    if isinstance(total, (list, tuple)):
        return [add_counters(part, other) for part, other in zip(total, more, strict=True)]
    if type(more) is not int or more < 0:
        raise ValueError(f"{more!r} is no count")
    return min(total + more, COUNT_MAX)


def counters_since(now: Any, before: Any) -> Any:
    """Returns what an engine's counters have grown by since `before`, of the same shape; None counts as nothing."""
    if before is None:
        return now
    if isinstance(now, Mapping):
        return {name: counters_since(part, before[name]) for name, part in now.items()}
    if isinstance(now, (list, tuple)):
        return [counters_since(part, earlier) for part, earlier in zip(now, before, strict=True)]
    return now - before


def latency_of(counts: Sequence[int], sum_ns: int) -> dict[str, Any]:
    """Returns the latencies of blocking lookups as `stats` has them, from an engine's buckets and their sum."""
    return {"counts": list(counts), "sum_ns": sum_ns}


def _sums(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    counts = list(counts)
    return {tier: sum(count[tier] for count in counts) for tier in TIERS}
