"""What a profile predicts: hit rates and NVMe reads over budgets of DRAM, and the budgets to choose from.

Input: the numbers of simulated curves, or the dict that a profile's file keeps of them. Output: frozen dataclasses, and
the same dict again. Errors: `KeyError`, `TypeError` or `ValueError` for a dict that is not one of these.

*Rates* are {"2": .., "3": .., "all": ..}: a fraction for each order by its name, and for all of them together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .recommend import Recommendation

Rates = Mapping[str, float]


@dataclass(frozen=True)
class ReplaySize:
    """The held-out text that was replayed. sample_rate: the fraction of its items that the simulation kept."""

    tokens: int
    documents: int
    accesses: int
    items: int
    sample_rate: float


@dataclass(frozen=True)
class EntryCost:
    """What an item costs in all tables together, which store it side by side.

    static_bytes: an entry of the static set, its part of the index included. recency_set_bytes: a set of 8 of the
    recency cache, index and history included. reads, packed_reads: NVMe reads of a miss, from the tables' shards and
    from a placement.
    """

    static_bytes: int
    recency_set_bytes: int
    reads: int
    packed_reads: int


@dataclass(frozen=True)
class Interval:
    """The prediction intervals: of streams of so many tokens, a fraction `level` lies within."""

    level: float
    tokens: int


@dataclass(frozen=True)
class MixedPolicy:
    """A static set and a recency cache in one budget, divided as it hits most.

    hit_rate, low, high: of accesses, with the ends of their interval. static_share, recency_share: the accesses that
    each part answers. static_fraction: of the bytes. static_entries, recency_entries: of each table. The rest are a
    token's.
    """

    hit_rate: Rates
    low: Rates
    high: Rates
    static_share: Rates
    recency_share: Rates
    static_fraction: float
    static_entries: int
    recency_entries: int
    misses_per_token: float
    reads_per_token: float
    packed_reads_per_token: float


@dataclass(frozen=True)
class CurvePoint:
    """One budget of DRAM, in bytes, and the hit rates that it buys by policy.

    resident: the budget stores the tables whole, so that every access hits; at most one point, the last. static,
    recency, lru: what single caches of as many bytes would hit.
    """

    dram_bytes: int
    resident: bool
    static: Rates
    recency: Rates
    lru: Rates
    mixed: MixedPolicy


@dataclass(frozen=True)
class Steps:
    """`sequences` decoded side by side over a budget: the fraction of steps without a read (None: unknown), and the
    like."""

    dram_bytes: int
    sequences: int
    without_read: float | None
    entries_shared: float
    hit_rate: float
    reads_per_token: float
    packed_reads_per_token: float


@dataclass(frozen=True)
class Sampling:
    """How far curves of a `share` of the items are off those of all items: the largest error of a hit rate, at one
    budget."""

    share: float
    dram_bytes: int
    error: float


@dataclass(frozen=True)
class GroupCurves:
    """The curves of tables whose accesses are the same, points by ascending budget.

    first_touch: accesses to items never seen before, which no cache answers. recommended: the budgets to choose from,
    the least first. distinct: items of each order. sampling: None if the curves are of all items. source: texts for
    people.
    """

    tables: tuple[str, ...]
    orders: tuple[int, ...]
    replay: ReplaySize
    first_touch: Rates
    cost: EntryCost
    interval: Interval
    points: tuple[CurvePoint, ...]
    steps: tuple[Steps, ...]
    recommended: tuple[Recommendation, ...]
    distinct: Mapping[str, int]
    sampling: Sampling | None
    source: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Returns the curves for JSON and for the profile's file: every field under its name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> GroupCurves:
        """Reads what `to_dict` gave."""
        sampling = record["sampling"]
        return cls(
            tables=tuple(record["tables"]),
            orders=tuple(record["orders"]),
            replay=ReplaySize(**record["replay"]),
            first_touch=record["first_touch"],
            cost=EntryCost(**record["cost"]),
            interval=Interval(**record["interval"]),
            points=tuple(_point_of(point) for point in record["points"]),
            steps=tuple(Steps(**steps) for steps in record["steps"]),
            recommended=tuple(Recommendation(**choice) for choice in record["recommended"]),
            distinct=record["distinct"],
            sampling=None if sampling is None else Sampling(**sampling),
            source=record["source"],
        )


def _point_of(record: Mapping[str, Any]) -> CurvePoint:
    """Reads a point; profiles of older versions do not say `resident`."""
    return CurvePoint(**{"resident": False, **record, "mixed": MixedPolicy(**record["mixed"])})


def rates_by_order(orders: tuple[int, ...], rates: np.ndarray) -> dict[str, float]:
    """Returns an array of rates, float [O + 1], by the orders' names and "all".

    Of heads that are orders of their own, such as LongCat's, all of one n-gram length are one rate: each is accessed
    once a token, so theirs is the mean.
    """
    of_name = {str(order): rates[:-1][np.array(orders) == order].mean() for order in orders}
    return {name: float(rate) for name, rate in (of_name | {"all": rates[-1]}).items()}
