"""Which entries go where within given budgets, and what to expect of that.

Flows in: a `Ranking`, the store's tables, bytes of HBM, DRAM and packed entries on NVMe. Flows out: a `GroupPlan`: how
many of the first entries each tier takes, how much of DRAM is left to recency, and the simulated outcome on held-out
documents. The division is the one that opening the store will make (`divide_dram`), not a model of it. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import kernels
from ..errors import BudgetError
from ..formats.placement import TableShape, lay_out_placement
from ..layout import BUCKET_KEYS, TableLayout, record_bytes
from .budget import DramPlan
from .division import divide_budgets
from .hbm_budget import HbmPlan
from .ranking import Ranking
from .replay import Outcome, shares, simulate

FRACTIONS = (0.0, 0.25, 0.5, 0.625, 0.75, 0.875, 0.95)
WHOLE_STEP_BITS = 8  # a budget that holds whole tables has so many binary digits, or one less
INDEX_ENTRY_BYTES = kernels.INDEX_BUCKET.itemsize / BUCKET_KEYS

MapLike = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Budgets:
    """Bytes for all tables together: of HBM, of DRAM, and of packed entries on NVMe beyond those in memory."""

    hbm_bytes: int
    dram_bytes: int
    nvme_bytes: int

    @property
    def hbm_asked(self) -> int | None:
        """Bytes of HBM, None where there is to be no such tier."""
        return self.hbm_bytes or None


@dataclass(frozen=True, eq=False)
class GroupPlan:
    """What a group's tables get, each: entries by tier, hottest first, and sets of the recency cache.

    outcome: of the held-out documents, with HBM and static set together as its static part. hbm_share: float [O + 1],
    of accesses that HBM alone answers. reads_per_token, reads_unpacked: NVMe reads of all the group's tables, with
    packed entries and without.
    """

    tables: tuple[str, ...]
    resident: bool
    hbm_entries: int
    static_entries: int
    nvme_entries: int
    recency_sets: int
    static_fraction: float
    outcome: Outcome
    hbm_share: np.ndarray
    reads_per_token: float
    reads_unpacked: float

    @property
    def num_entries(self) -> int:
        """Entries to place of each table."""
        return self.hbm_entries + self.static_entries + self.nvme_entries


def plan_group(
    ranking: Ranking,
    layouts: Mapping[str, TableLayout],
    budgets: Budgets,
    batch_tokens: int = 1,
    fractions: Iterable[float] = FRACTIONS,
    map_over: MapLike = map,
) -> GroupPlan:
    """Returns the plan whose outcome has most hits, of static fractions `fractions`. Blocks: one simulation for each.

    layouts: all tables of the store. Raises `BudgetError` where DRAM cannot hold the indexes of what is to be placed.
    """
    tables = ranking.group.tables
    name = _largest(tables, layouts)
    if divide_budgets(layouts, budgets.dram_bytes, budgets.hbm_asked, None)[0].shares[name].resident:
        return _plan_resident(ranking, layouts, budgets, batch_tokens)

    def tried(fraction: float) -> GroupPlan:
        return _plan_at(ranking, layouts, budgets, batch_tokens, fraction)

    return max(map_over(tried, list(fractions)), key=lambda plan: float(plan.outcome.hit_rate[-1]))


def whole_budget(layouts: Mapping[str, TableLayout], tables: Iterable[str]) -> int:
    """Returns the least DRAM budget with which `tables` are kept whole, so that `plan_group` says `resident`.

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
    """The table that is the last to fit its share whole: where it does, all of a group do."""
    return max(tables, key=lambda name: layouts[name].spec.table_bytes)


def divide_as_opened(
    layouts: Mapping[str, TableLayout],
    dram_bytes: int,
    tables: Iterable[str],
    num_entries: int,
    fraction: float,
    hbm_bytes: int | None = None,
) -> tuple[DramPlan, HbmPlan | None]:
    """Returns the division that a store opens with whose placement has so many entries of each of `tables`.

    hbm_bytes: None where there is no hbm tier.
    """
    shapes = {}
    for name in tables:
        num_orders = len(layouts[name].spec.orders)
        spread = [num_entries // num_orders + (place < num_entries % num_orders) for place in range(num_orders)]
        shapes[name] = TableShape(tuple(spread), fraction)
    return divide_budgets(layouts, dram_bytes, hbm_bytes, lay_out_placement(0, layouts, shapes, {}))


def _plan_resident(
    ranking: Ranking, layouts: Mapping[str, TableLayout], budgets: Budgets, batch_tokens: int
) -> GroupPlan:
    """Where DRAM holds whole tables there is nothing to place but what goes to HBM."""
    tables, replay = ranking.group.tables, ranking.group.replay
    outcome = simulate(replay, np.ones(len(replay.counts), dtype=bool), 0, batch_tokens)
    hbm_entries, hbm_share = 0, np.zeros(len(outcome.accesses))
    largest = _largest(tables, layouts)
    most = min(ranking.num_valued, budgets.hbm_bytes // len(layouts) // layouts[largest].spec.entry_bytes)
    _, hbm = divide_as_opened(layouts, budgets.dram_bytes, tables, most, 1.0, budgets.hbm_asked)
    if hbm is not None:
        hbm_entries = hbm.shares[largest].num_entries
        hbm_share = shares(replay.per_order(ranking.static(hbm_entries)[replay.items]), outcome.accesses)
    return GroupPlan(tables, True, hbm_entries, 0, 0, 0, 1.0, outcome, hbm_share, 0.0, 0.0)


def _plan_at(
    ranking: Ranking, layouts: Mapping[str, TableLayout], budgets: Budgets, batch_tokens: int, fraction: float
) -> GroupPlan:
    tables, num_tables = ranking.group.tables, len(layouts)
    largest = _largest(tables, layouts)
    spec = layouts[largest].spec
    record = record_bytes(spec.entry_bytes)
    left = ranking.num_valued
    dram, hbm = divide_budgets(layouts, budgets.dram_bytes, budgets.hbm_asked, None)
    share_bytes = float(dram.shares[largest].num_bytes)
    hbm_entries = 0
    if hbm is not None:  # as if all were placed that both could hold
        most = min(left, int((budgets.hbm_bytes / num_tables + share_bytes) / spec.entry_bytes))
        _, hbm = divide_as_opened(layouts, budgets.dram_bytes, tables, most, fraction, budgets.hbm_asked)
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
    dram, hbm = divide_as_opened(layouts, budgets.dram_bytes, tables, num_entries, fraction, budgets.hbm_asked)
    share = dram.shares[largest]
    if hbm is not None:
        hbm_entries = hbm.shares[largest].num_entries
    in_memory = max(hbm_entries, share.static_start + share.static_entries)
    static_entries = in_memory - hbm_entries
    replay = ranking.group.replay
    outcome = simulate(replay, ranking.static(in_memory), share.num_sets, batch_tokens)
    in_hbm = replay.per_order(ranking.static(hbm_entries)[replay.items])
    packed = ranking.static(num_entries)[outcome.missed_items]
    per_miss = np.where(packed, 1, spec.rows_per_key).sum(), len(packed) * spec.rows_per_key
    tokens = max(outcome.num_tokens * outcome.sample_rate, 1e-9)
    return GroupPlan(
        tables, False, hbm_entries, static_entries, num_entries - in_memory, share.num_sets, fraction,
        outcome, shares(in_hbm, outcome.accesses),
        *(float(reads * len(tables) / tokens) for reads in per_miss),
    )  # fmt: skip
