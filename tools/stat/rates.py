"""What two stat records of a daemon say of the time between them: rates, hit rates, quantiles of latency. Pure.

Flows in: records as `tierstore stat --json` prints them, and the seconds between two. Flows out: numbers. Where there
is nothing to divide, the result is NaN; where the later record is of another daemon, or of one that started anew,
there is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tierstore.daemon.record import Record, ratio


@dataclass(frozen=True)
class Counts:
    """Keys of one order of a table, by who answered. static and other: both of the dram tier."""

    hbm: int
    static: int
    other: int
    nvme: int

    @property
    def keys(self) -> int:
        return self.hbm + self.static + self.other + self.nvme

    @property
    def hit_rate(self) -> float:
        return ratio(self.keys - self.nvme, self.keys)

    def __add__(self, more: Counts) -> Counts:
        return Counts(self.hbm + more.hbm, self.static + more.static, self.other + more.other, self.nvme + more.nvme)

    def __sub__(self, less: Counts) -> Counts:
        return Counts(self.hbm - less.hbm, self.static - less.static, self.other - less.other, self.nvme - less.nvme)


@dataclass(frozen=True)
class Rates:
    """What went on between two records: counts of the keys by (table, order), and rates a second."""

    seconds: float
    counts: dict[tuple[str, str], Counts]
    batches_s: float
    reads_s: float
    read_bytes_s: float
    latency_counts: list[int]
    client_keys_s: dict[int, float]  # by process id

    @property
    def total(self) -> Counts:
        return total_of(self.counts)

    @property
    def keys_s(self) -> float:
        return self.total.keys / self.seconds


def counts_of(record: Record) -> dict[tuple[str, str], Counts]:
    """Returns the keys since the start by (table, order)."""
    counts = {}
    for table, of_table in record["counters"]["tables"].items():
        for order, hits in of_table["orders"].items():
            static = of_table["static_hits"].get(order, 0)
            counts[table, order] = Counts(hits["hbm"], static, hits["dram"] - static, hits["nvme"])
    return counts


def total_of(counts: dict[tuple[str, str], Counts]) -> Counts:
    """Returns the sum over tables and orders."""
    return sum(counts.values(), Counts(0, 0, 0, 0))


def expected_rate(record: Record) -> dict[str, float] | None:
    """Returns the hit rate of all keys that the placement's plan expected: {"expected", "low", "high"}.

    The rates of the tables and orders, weighted by the keys that were asked for: what the plan expects of this traffic.
    None where no plan made the placement, or nothing was asked for of what it planned.
    """
    rates = record["plan"]["hit_rates"] if record.get("plan") else {}
    sums, keys = dict.fromkeys(("expected", "low", "high"), 0.0), 0
    for (table, order), counts in counts_of(record).items():
        of_order = rates.get(table, {}).get(order)
        if of_order is None:
            continue
        keys += counts.keys
        for name in sums:
            sums[name] += of_order[name] * counts.keys
    return {name: total / keys for name, total in sums.items()} if keys else None


def reads_of(record: Record) -> int:
    """Returns the reads of NVMe since the start: of a page, or of a placed entry."""
    pages: int = record["counters"]["pages_read"]
    return pages + int(record["counters"]["entries_read"])


def rates_between(earlier: Record, later: Record, seconds: float) -> Rates | None:
    """Returns what went on in the `seconds` between two records of one daemon; None where they are of two,
    or of one moment."""
    same = all(earlier["daemon"][name] == later["daemon"][name] for name in ("pid", "started_at"))
    if not same or seconds <= 0 or earlier["latency"]["bounds_ns"] != later["latency"]["bounds_ns"]:
        return None
    before, none = counts_of(earlier), Counts(0, 0, 0, 0)  # a new version may bring tables
    before_keys = {client["pid"]: client["keys"] for client in earlier["clients"]["list"]}
    return Rates(
        seconds=seconds,
        counts={name: now - before.get(name, none) for name, now in counts_of(later).items()},
        batches_s=(later["counters"]["batches"] - earlier["counters"]["batches"]) / seconds,
        reads_s=(reads_of(later) - reads_of(earlier)) / seconds,
        read_bytes_s=(later["counters"]["bytes_read"] - earlier["counters"]["bytes_read"]) / seconds,
        latency_counts=[
            now - then for then, now in zip(earlier["latency"]["counts"], later["latency"]["counts"], strict=True)
        ],
        client_keys_s={
            client["pid"]: max(0, client["keys"] - before_keys.get(client["pid"], 0)) / seconds
            for client in later["clients"]["list"]
        },
    )


def quantile_ns(bounds_ns: Sequence[float], counts: Sequence[int], share: float) -> float:
    """Returns the latency that `share` of the lookups took at most, from a histogram of bounds and one count more.

    Within a bucket lookups are taken for evenly spread. NaN where there are none; infinity above the last bound.
    """
    assert len(counts) == len(bounds_ns) + 1
    total = sum(counts)
    if not total:
        return math.nan
    rank, below, lower = share * total, 0, 0.0
    for bound, count in zip(bounds_ns, counts, strict=False):
        if count and below + count >= rank:
            return lower + (bound - lower) * (rank - below) / count
        below, lower = below + count, bound
    return math.inf
