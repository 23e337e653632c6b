"""Which entries go where within given budgets, and what to expect of that.

Input: a `Ranking`, the store's tables, bytes of HBM, DRAM and packed entries on NVMe. Output: a `GroupPlan`: how many
of the first entries each tier takes, how much of DRAM is left to recency, and the simulated outcome on held-out
documents. The division is the one that opening the store will make (`divide_budgets`), not a model of it. Errors:
`BudgetError` for DRAM that is too small for the indexes. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import kernels
from ..errors import BudgetError
from ..formats.placement import Placement, TableShape, lay_out_placement
from ..layout import BUCKET_KEYS, TableLayout, record_bytes
from .budget import DramPlan, cache_set_bytes
from .division import divide_budgets
from .hbm_budget import HbmPlan
from .hit_rates import rates_by_order
from .intervals import prediction_intervals
from .ranking import Ranking
from .replay import Outcome, shares, simulate

FRACTIONS = (0.0, 0.25, 0.5, 0.625, 0.75, 0.875, 0.95)
WHOLE_STEP_BITS = 8  # a budget that stores whole tables has so many binary digits, or one less
INTERVAL_SEED = 0  # the same plan says the same interval
RATE_DIGITS = 6
INDEX_ENTRY_BYTES = kernels.INDEX_BUCKET.itemsize / BUCKET_KEYS

MapLike = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Budgets:
    """Bytes for all tables together: of HBM, of DRAM, and of packed entries on NVMe beyond those in memory.

    touched: How many rows of a table versions have, by name: their index takes a part of DRAM.
    """

    hbm_bytes: int
    dram_bytes: int
    nvme_bytes: int
    touched: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def hbm_asked(self) -> int | None:
        """Bytes of HBM, None if there must not be such a tier."""
        return self.hbm_bytes or None

    def divide(
        self, layouts: Mapping[str, TableLayout], placement: Placement | None = None
    ) -> tuple[DramPlan, HbmPlan | None]:
        """Returns the division of HBM and DRAM that a store opens with. Raises `BudgetError`."""
        return divide_budgets(layouts, self.dram_bytes, self.hbm_asked, placement, touched=self.touched)


@dataclass(frozen=True, eq=False)
class GroupPlan:
    """What the tables of a group get, and what to expect of that; entries are of each table.

    Attributes:
        tables: whose accesses are the same.
        orders: of their n-grams.
        resident: DRAM stores the tables whole, so that nothing is static or left to recency.
        hbm_entries, static_entries, nvme_entries: entries by tier, the hottest in HBM; on NVMe they are packed, one
        read each.
        recency_sets: sets of 8 entries of the recency cache.
        static_fraction: of the share of DRAM that is left to entries.
        bytes_by_tier: of all the group's tables: {"hbm": .., "dram": .., "nvme": ..}, indexes in DRAM included.
        outcome: of the held-out documents, with HBM and static set together as its static part.
        document_tokens: int64 [D], tokens of the held-out documents.
        hbm_rates: float [O + 1], of accesses that HBM alone answers.
        reads_per_token, reads_per_token_unpacked: NVMe reads of all the tables, with packed entries and without.

    *Rates* below are {"2": .., "3": .., "all": ..}: a fraction of the accesses of each order, and of all.
    """

    tables: tuple[str, ...]
    orders: tuple[int, ...]
    resident: bool
    hbm_entries: int
    static_entries: int
    nvme_entries: int
    recency_sets: int
    static_fraction: float
    bytes_by_tier: Mapping[str, int]
    outcome: Outcome = field(repr=False)
    document_tokens: np.ndarray = field(repr=False)
    hbm_rates: np.ndarray = field(repr=False)
    reads_per_token: float
    reads_per_token_unpacked: float

    @property
    def num_entries(self) -> int:
        """Entries to place of each table."""
        return self.hbm_entries + self.static_entries + self.nvme_entries

    @property
    def hit_rate(self) -> dict[str, float]:
        """Rates of accesses that HBM or DRAM answers."""
        return self._rates(self.outcome.hit_rate)

    @property
    def hits_by_tier(self) -> dict[str, float]:
        """The fraction of all accesses that each tier answers: {"hbm": .., "dram": .., "nvme": ..}."""
        hbm, hits = float(self.hbm_rates[-1]), float(self.outcome.hit_rate[-1])
        return {"hbm": hbm, "dram": hits - hbm, "nvme": 1 - hits}

    def interval(self, num_tokens: int) -> tuple[dict[str, float], dict[str, float]]:
        """Returns the rates between which a stream of num_tokens tokens hits, 95 times in 100. Blocks, a moment."""
        hits, accesses = (
            np.column_stack([part, part.sum(axis=1)])
            for part in (self.outcome.document_hits, self.outcome.document_accesses)
        )
        low, high = prediction_intervals(
            hits, accesses, self.document_tokens, num_tokens, np.random.default_rng(INTERVAL_SEED)
        )
        return self._rates(low), self._rates(high)

    def to_dict(self, interval_tokens: int) -> dict[str, Any]:
        """Returns the plan for JSON, with the interval of a stream of so many tokens."""
        outcome = self.outcome
        low, high = self.interval(interval_tokens)
        return {
            "tables": list(self.tables),
            "resident": self.resident,
            "hbm_entries": self.hbm_entries,
            "static_entries": self.static_entries,
            "nvme_entries": self.nvme_entries,
            "recency_sets": self.recency_sets,
            "static_fraction": self.static_fraction,
            "hit_rate": self.hit_rate,
            "low": low,
            "high": high,
            "hbm_share": self._rates(self.hbm_rates),
            "static_share": self._rates(outcome.static_share - self.hbm_rates),
            "recency_share": self._rates(outcome.recency_share),
            "first_touch_share": self._rates(outcome.first_touch_share),
            "steps_without_read": outcome.share_without_miss,
            "reads_per_token": self.reads_per_token,
            "reads_per_token_unpacked": self.reads_per_token_unpacked,
        }

    def _rates(self, rates: np.ndarray) -> dict[str, float]:
        return {name: round(rate, RATE_DIGITS) for name, rate in rates_by_order(self.orders, rates).items()}


def plan_group(
    ranking: Ranking,
    layouts: Mapping[str, TableLayout],
    budgets: Budgets,
    batch_tokens: int = 1,
    fractions: Iterable[float] = FRACTIONS,
    map_over: MapLike = map,
) -> GroupPlan:
    """Returns the plan whose outcome has most hits, of static fractions `fractions`. Blocks: one simulation for each.

    layouts: all tables of the store. Raises `BudgetError` if DRAM is too small for the indexes of what must be placed.
    """
    tables = ranking.group.tables
    name = _largest(tables, layouts)
    if budgets.divide(layouts)[0].shares[name].resident:
        return _plan_resident(ranking, layouts, budgets, batch_tokens)

    def tried(fraction: float) -> GroupPlan:
        return _plan_at(ranking, layouts, budgets, batch_tokens, fraction)

    return max(map_over(tried, list(fractions)), key=lambda plan: float(plan.outcome.hit_rate[-1]))


def whole_budget(layouts: Mapping[str, TableLayout], tables: Iterable[str]) -> int:
    """Returns the least DRAM budget that stores `tables` whole, so that `plan_group` says `resident`.

    Rounded up by less than a 128th, to a number of bytes that people can write: 50.25 MiB. layouts:
    all tables of the store.
    """
    name = _largest(tables, layouts)

    def fits(num_bytes: int) -> bool:
        try:
            return divide_budgets(layouts, num_bytes, None, None)[0].shares[name].resident
        except BudgetError:
            return False

    most = layouts[name].spec.table_bytes
    while not fits(most):
        most *= 2
    step = max(1, 1 << most.bit_length() - 1 - WHOLE_STEP_BITS)
    steps_start, steps_end = 0, -(-most // step)  # the first does not fit, the last does
    if not fits(steps_end * step):
        return most
    while steps_end - steps_start > 1:
        middle = (steps_start + steps_end) // 2
        steps_start, steps_end = (steps_start, middle) if fits(middle * step) else (middle, steps_end)
    return steps_end * step


def usable_bytes(layouts: Mapping[str, TableLayout], tables: Iterable[str], dram_bytes: int) -> int:
    """Returns what a budget leaves to entries, if every table got as much as the largest of `tables`,
    which is not whole.

    Raises `BudgetError` if a store cannot open with it.
    """
    return divide_budgets(layouts, dram_bytes, None, None)[0].shares[_largest(tables, layouts)].num_bytes * len(layouts)


def _largest(tables: Iterable[str], layouts: Mapping[str, TableLayout]) -> str:
    """The table that is the last to fit its share whole: if it does, all of a group do."""
    return max(tables, key=lambda name: layouts[name].spec.table_bytes)


def divide_as_opened(
    layouts: Mapping[str, TableLayout], budgets: Budgets, tables: Iterable[str], num_entries: int, fraction: float
) -> tuple[DramPlan, HbmPlan | None]:
    """Returns the division that a store opens with whose placement has so many entries of each of `tables`."""
    shapes = {}
    for name in tables:
        num_orders = len(layouts[name].spec.orders)
        spread = [num_entries // num_orders + (order < num_entries % num_orders) for order in range(num_orders)]
        shapes[name] = TableShape(tuple(spread), fraction)
    return budgets.divide(layouts, lay_out_placement(0, layouts, shapes, {}))


def _plan_resident(
    ranking: Ranking, layouts: Mapping[str, TableLayout], budgets: Budgets, batch_tokens: int
) -> GroupPlan:
    """If DRAM stores the tables whole, only what goes to HBM is placed."""
    tables, replay = ranking.group.tables, ranking.group.replay
    outcome = simulate(replay, np.ones(len(replay.counts), dtype=bool), 0, batch_tokens)
    hbm_entries, hbm_rates = 0, np.zeros(len(outcome.accesses))
    largest = _largest(tables, layouts)
    most = min(ranking.num_valued, budgets.hbm_bytes // len(layouts) // layouts[largest].spec.entry_bytes)
    _, hbm = divide_as_opened(layouts, budgets, tables, most, 1.0)
    if hbm is not None:
        hbm_entries = hbm.shares[largest].num_entries
        hbm_rates = shares(replay.per_order(ranking.static(hbm_entries)[replay.items]), outcome.accesses)
    return GroupPlan(
        tables=tables,
        orders=replay.orders,
        resident=True,
        hbm_entries=hbm_entries,
        static_entries=0,
        nvme_entries=0,
        recency_sets=0,
        static_fraction=1.0,
        bytes_by_tier={
            "hbm": hbm_entries * _sum_of(tables, layouts, lambda layout: layout.spec.entry_bytes),
            "dram": _sum_of(tables, layouts, lambda layout: layout.spec.table_bytes),
            "nvme": 0,
        },
        outcome=outcome,
        document_tokens=replay.document_tokens,
        hbm_rates=hbm_rates,
        reads_per_token=0.0,
        reads_per_token_unpacked=0.0,
    )


def _plan_at(
    ranking: Ranking, layouts: Mapping[str, TableLayout], budgets: Budgets, batch_tokens: int, fraction: float
) -> GroupPlan:
    tables, num_tables = ranking.group.tables, len(layouts)
    largest = _largest(tables, layouts)
    spec = layouts[largest].spec
    record = record_bytes(spec.entry_bytes)
    left = ranking.num_valued
    dram, hbm = budgets.divide(layouts)
    share_bytes = float(dram.shares[largest].num_bytes - dram.shares[largest].overlay_bytes)
    hbm_entries = 0
    if hbm is not None:  # as if everything were placed that both have room for
        most = min(left, int((budgets.hbm_bytes / num_tables + share_bytes) / spec.entry_bytes))
        _, hbm = divide_as_opened(layouts, budgets, tables, most, fraction)
        assert hbm is not None, "asked for"
        hbm_entries = hbm.shares[largest].num_entries
        share_bytes -= hbm.host_index_bytes / num_tables
    left -= hbm_entries
    beyond = int(budgets.nvme_bytes / num_tables / record)
    # Indexes are of all that is placed: of those in HBM and beyond, and of static ones;
    # but never of more than there are.
    room = max(
        (share_bytes - INDEX_ENTRY_BYTES * (hbm_entries + beyond)) / (record + fraction * INDEX_ENTRY_BYTES),
        (share_bytes - INDEX_ENTRY_BYTES * (hbm_entries + left)) / record,
    )
    static_entries = min(left, max(0, int(fraction * room)))
    nvme_entries = min(left - static_entries, beyond)
    num_entries = hbm_entries + static_entries + nvme_entries
    dram, hbm = divide_as_opened(layouts, budgets, tables, num_entries, fraction)
    share = dram.shares[largest]
    if hbm is not None:
        hbm_entries = hbm.shares[largest].num_entries
    in_memory = max(hbm_entries, share.static_start + share.static_entries)
    return _expected(ranking, layouts, hbm_entries, in_memory, num_entries, share.num_sets, fraction, batch_tokens)


def _expected(
    ranking: Ranking,
    layouts: Mapping[str, TableLayout],
    hbm_entries: int,
    in_memory: int,
    num_entries: int,
    recency_sets: int,
    fraction: float,
    batch_tokens: int,
) -> GroupPlan:
    """Simulates a division: of num_entries entries the first hbm_entries in HBM, those before `in_memory` in memory."""
    tables, replay = ranking.group.tables, ranking.group.replay
    outcome = simulate(replay, ranking.static(in_memory), recency_sets, batch_tokens)
    in_hbm = replay.per_order(ranking.static(hbm_entries)[replay.items])
    packed = ranking.static(num_entries)[outcome.missed_items]
    reads = layouts[_largest(tables, layouts)].spec.rows_per_key
    tokens = max(outcome.num_tokens * outcome.sample_rate, 1e-9)
    placed_bytes = _sum_of(tables, layouts, lambda layout: record_bytes(layout.spec.entry_bytes))
    set_bytes = _sum_of(tables, layouts, cache_set_bytes)
    index_bytes = int(num_entries * len(tables) * INDEX_ENTRY_BYTES)
    return GroupPlan(
        tables=tables,
        orders=replay.orders,
        resident=False,
        hbm_entries=hbm_entries,
        static_entries=in_memory - hbm_entries,
        nvme_entries=num_entries - in_memory,
        recency_sets=recency_sets,
        static_fraction=fraction,
        bytes_by_tier={
            "hbm": hbm_entries * _sum_of(tables, layouts, lambda layout: layout.spec.entry_bytes),
            "dram": (in_memory - hbm_entries) * placed_bytes + recency_sets * set_bytes + index_bytes,
            "nvme": (num_entries - in_memory) * placed_bytes,
        },
        outcome=outcome,
        document_tokens=replay.document_tokens,
        hbm_rates=shares(in_hbm, outcome.accesses),
        reads_per_token=float(np.where(packed, 1, reads).sum() * len(tables) / tokens),
        reads_per_token_unpacked=float(len(packed) * reads * len(tables) / tokens),
    )


def _sum_of(tables: Iterable[str], layouts: Mapping[str, TableLayout], bytes_of: Callable[[TableLayout], int]) -> int:
    return sum(bytes_of(layouts[name]) for name in tables)
