"""What a store shows of its counts: keys and hits by tier, table and order, batches, pages and bytes read.

Input: an engine's counters. Output: one dict of plain numbers; hits are in keys.
Errors: `ValueError` and `TypeError` for counters of two shapes.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .kernels import LATENCY_BOUNDS_NS, LATENCY_FRACTION
from .spec import TableSpec

TIERS = ("hbm", "dram", "nvme")
# Sums of what clients report stop here: a hundred of them still fit a message's 64 bits.
COUNT_MAX = 1 << 56


def stats_of(counters: Mapping[str, Any], specs: Sequence[TableSpec]) -> dict[str, Any]:
    """Returns counters for people and programs.

    Args:
        counters: As `Engine.counters` returns them.
        specs: Of the tables, in the catalog's order.

    Returns:
        keys: Every key that was looked up, duplicates included, sentinels not; hits: the same by tier. rows: those
        read by their ids, which are not keys; rows_missed: those of them that no memory held; row_bytes_read: the part
        of bytes_read that they took. latency: see `latency_of`. tables: hits by order; static_hits: those of the dram
        tier's hits that its static set answered.
    """
    tables: dict[str, dict[str, Any]] = {}
    nothing_in_hbm = [[0] * len(spec.orders) for spec in specs]
    of_tables = zip(specs, counters["tables"], counters.get("hbm", nothing_in_hbm), strict=True)
    for spec, (in_dram, in_static, from_nvme), in_hbm in of_tables:
        orders: dict[int, dict[str, int]] = {}
        static = dict.fromkeys(spec.orders, 0)
        for order, *in_tiers, in_set in zip(spec.orders, in_hbm, in_dram, from_nvme, in_static, strict=True):
            # A table may have an order several times: heads that share no key are orders of their own.
            before = orders.get(order, dict.fromkeys(TIERS, 0))
            orders[order] = _sums([before, dict(zip(TIERS, in_tiers, strict=True))])
            static[order] += in_set
        tables[spec.name] = {"hits": _sums(orders.values()), "orders": orders, "static_hits": static}
    hits = _sums(table["hits"] for table in tables.values())
    totals = {name: count for name, count in counters.items() if name not in ("tables", "hbm", "latency")}
    if "latency" in counters:
        shape = {"bounds_ns": list(LATENCY_BOUNDS_NS), "share": LATENCY_FRACTION}
        totals["latency"] = shape | dict(counters["latency"])
    return {"keys": sum(hits.values()), "hits": hits, **totals, "tables": tables}


def add_counters(total: Any, more: Any) -> Any:
    """Returns the sum of two engines' counters, number by number, of the same tables; None counts as nothing.

    Raises:
        ValueError, TypeError: They are not of one shape, or a number is below 0 or not an int.
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
        raise ValueError(f"{more!r} is not a count")
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
    """Returns latencies as `stats` has them, from an engine's buckets and their sum.

    A lookup's latency lasts from the call until its rows are there. Blocking and submitted lookups are timed alike,
    also if nobody waits for them, and so are rows by id.
    """
    return {"counts": list(counts), "sum_ns": sum_ns}


class LatencyCounts:
    """A histogram of latencies for an engine that has none in C++. Not for several threads at once."""

    def __init__(self) -> None:
        self._counts = [0] * (len(LATENCY_BOUNDS_NS) + 1)
        self._sum_ns = 0

    def add(self, took_ns: int) -> None:
        """Counts a lookup that took took_ns nanoseconds."""
        self._counts[bisect.bisect_left(LATENCY_BOUNDS_NS, took_ns)] += 1
        self._sum_ns += took_ns

    def record(self) -> dict[str, Any]:
        """Returns what was counted, as `latency_of` does."""
        return latency_of(self._counts, self._sum_ns)


def expected_of(details: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]] | None:
    """Returns the hit rates that a placement's plan expected: {table: {order or "all": {"expected", "low", "high"}}}.

    details: as the placement has them. None where no plan made it. low and high: another stream of the same source has
    a rate between them in 95 of 100 cases.
    """
    try:
        return {
            str(table): {
                str(order): {
                    name: float(group[key][order])
                    for name, key in (("expected", "hit_rate"), ("low", "low"), ("high", "high"))
                }
                for order in group["hit_rate"]
            }
            for group in details["plan"]["groups"]
            for table in group["tables"]
        }
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ):  # details are free text: others may have made the placement
        return None


def _sums(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    counts = list(counts)
    return {tier: sum(count[tier] for count in counts) for tier in TIERS}
