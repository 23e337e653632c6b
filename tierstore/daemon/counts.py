"""What a stat record says of keys: who answered them, by table and order, and what the plan expected. Pure.

Input: a record. Output: counts and rates, NaN if there is nothing to divide. Errors: none.
"""

from __future__ import annotations

from dataclasses import dataclass

from .record import ExpectedRate, StatRecord, ratio


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


def counts_of(record: StatRecord) -> dict[tuple[str, int], Counts]:
    """Returns the keys since the start by (table, order)."""
    counts = {}
    for table, of_table in record.counters.tables.items():
        for order, hits in of_table.orders.items():
            static = of_table.static_hits.get(order, 0)
            counts[table, order] = Counts(hits.hbm, static, hits.dram - static, hits.nvme)
    return counts


def total_of(counts: dict[tuple[str, int], Counts]) -> Counts:
    """Returns the sum over tables and orders."""
    return sum(counts.values(), Counts(0, 0, 0, 0))


def expected_rate(record: StatRecord) -> ExpectedRate | None:
    """Returns the hit rate of all keys that the placement's plan expected.

    The rates of the tables and orders, weighted by the keys that were asked for: what the plan expects of this traffic.
    None if no plan made the placement, or nothing was asked for of what it planned.
    """
    rates = record.plan.hit_rates if record.plan else {}
    weighted = [
        (counts.keys, rates[table][str(order)])
        for (table, order), counts in counts_of(record).items()
        if str(order) in rates.get(table, {})
    ]
    total = sum(keys for keys, _ in weighted)
    if not total:
        return None
    return ExpectedRate(
        expected=sum(keys * rate.expected for keys, rate in weighted) / total,
        low=sum(keys * rate.low for keys, rate in weighted) / total,
        high=sum(keys * rate.high for keys, rate in weighted) / total,
    )


def reads_of(record: StatRecord) -> int:
    """Returns the reads of NVMe since the start: of a page, or of a placed entry."""
    return record.counters.pages_read + record.counters.entries_read
