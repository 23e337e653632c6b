"""The analysis of what was counted: for each table group, the curves that a profile's footer keeps.

Input: table groups, the tables' geometry, how much was counted. Output: `GroupCurves`. Budgets are of all tables of the
store together, divided as opening the store divides them. Errors: none of its own.

Threads: simulations run two at once, beside the main thread, so that Ctrl-C takes effect between two of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import numpy as np

from ..decisions.budget import cache_set_bytes
from ..decisions.curves import LADDER_BYTES_MIN, Curves, build_curves, ladder
from ..decisions.hit_rates import EntryCost, GroupCurves, Sampling
from ..decisions.item_statistics import TableGroup
from ..decisions.plan import INDEX_ENTRY_BYTES, usable_bytes, whole_budget
from ..decisions.ranking import Ranking
from ..decisions.replay import simulate
from ..errors import BudgetError
from ..layout import TableLayout, record_bytes
from ..process.progress import CHECKING, OnPhase, no_report
from ..process.workers import Workers
from ..units import format_bytes
from .count_documents import ProfileCounts

CURVE_ACCESSES = 2_000_000  # curves of more held-out accesses are drawn from a share of the items
STEP_TOKENS = 500_000  # of the held-out documents, over which steps are simulated, with all items
SIMULATIONS_AT_ONCE = 2
SMALL_LADDER_DOUBLINGS = 4  # of tables so small that budgets from 16 MiB on would say little
NEAR_WHOLE = 1.25  # whoever has nearly as much memory takes a little more, and nothing is read at all


def analyse(
    layouts: Mapping[str, TableLayout],
    groups: Sequence[TableGroup],
    counts: ProfileCounts,
    on_progress: OnPhase | None = None,
) -> tuple[GroupCurves, ...]:
    """Returns the curves of each group of which anything was held out. Blocks, seconds a million held-out accesses.

    layouts: all tables of the store. on_progress, called on any thread, gets replaying, intervals, decoding, checking.
    """
    report = on_progress or no_report
    with Workers(SIMULATIONS_AT_ONCE, "tierstore-simulate") as pool:
        return tuple(_curves_of(layouts, group, counts, pool, report) for group in groups if len(group.replay.items))


def _curves_of(
    layouts: Mapping[str, TableLayout], group: TableGroup, counts: ProfileCounts, pool: Workers, report: OnPhase
) -> GroupCurves:
    ranking = Ranking(group.sampled(CURVE_ACCESSES))
    cost = entry_cost(layouts[group.tables[0]], len(layouts), len(group.tables))
    budgets, usable, whole_bytes = _budgets(layouts, group, ranking, cost)
    curves = build_curves(
        ranking,
        cost,
        budgets,
        counts.held_out_tokens,
        np.random.default_rng(0),
        steps_ranking=Ranking(group.truncated(STEP_TOKENS)),
        usable_bytes=usable,
        whole_bytes=whole_bytes,
        map_over=pool.map,
        on_progress=report,
    )
    distinct = dict(zip(map(str, group.orders), group.distinct, strict=True))
    report(CHECKING, 0, None)
    sampling = _sampling(group, ranking, curves)
    source = {
        "tables": ", ".join(group.tables),
        "documents": f"{counts.documents:,}, {counts.held_out_documents:,} of them held out",
        "tokens": f"{counts.tokens:,}, {counts.held_out_tokens:,} of them held out",
        "distinct n-grams": ", ".join(f"{count:,} of order {order}" for order, count in distinct.items()),
        "curves": _words_of(sampling),
    }
    return curves.described(group.tables, distinct, sampling, source)


def _budgets(
    layouts: Mapping[str, TableLayout], group: TableGroup, ranking: Ranking, cost: EntryCost
) -> tuple[list[int], list[int], int]:
    """Returns the budgets to simulate, what each leaves to entries, and the one that stores the group's tables whole.

    The division is the one that opening the store makes, so that curves and plans agree.
    """
    whole_bytes = whole_budget(layouts, group.tables)
    first_bytes = min(LADDER_BYTES_MIN, 1 << max(whole_bytes >> SMALL_LADDER_DOUBLINGS, 1).bit_length())
    budgets, usable = [], []
    for budget in ladder(ranking, cost, first_bytes=first_bytes):
        if budget * NEAR_WHOLE < whole_bytes:
            with contextlib.suppress(BudgetError):  # too little to open the store with
                usable.append(usable_bytes(layouts, group.tables, budget))
                budgets.append(budget)
    return budgets, usable, whole_bytes


def _sampling(group: TableGroup, sampled: Ranking, curves: Curves) -> Sampling | None:
    """Returns how far the curves' share of the items is off all of them, at one budget; None if it is all of them."""
    share = sampled.group.replay.sample_rate / group.replay.sample_rate
    if share == 1 or curves.points[0].resident:
        return None
    budget = curves.recommended[0].dram_bytes
    point = next(point for point in curves.points if point.dram_bytes == budget)
    static = Ranking(group).static(point.static_entries)
    exact = simulate(group.replay, static, point.recency_sets, 1).hit_rate
    return Sampling(share, budget, float(abs(exact - point.outcome.hit_rate).max()))


def _words_of(sampling: Sampling | None) -> str:
    if sampling is None:
        return "simulated access by access"
    return (
        f"from {100 * sampling.share:.0f} % of the items (SHARDS); all of them give hit rates at most "
        f"{100 * sampling.error:.1f} points off these, any order, at {format_bytes(sampling.dram_bytes)}"
    )


def entry_cost(layout: TableLayout, num_tables: int, group_tables: int) -> EntryCost:
    """Returns what an entry costs if every one of num_tables tables gets as much memory as this one.

    group_tables: those that the same access reads, whose NVMe reads it costs.
    """
    spec = layout.spec
    static_bytes = record_bytes(spec.entry_bytes) + INDEX_ENTRY_BYTES
    return EntryCost(
        round(static_bytes * num_tables),
        cache_set_bytes(layout) * num_tables,
        reads=spec.rows_per_key * group_tables,
        packed_reads=group_tables,
    )
