"""How a daemon divides its DRAM budget: staging, the counts that it learns from, then static slots and recency caches.

Input: table layouts, a number of bytes, perhaps a placement. Output: a `SharedPlan`: what every table gets, and where
in each shared block it lies. All parts together are no more than the budget, also while epochs or versions change.
Errors: `BudgetError`, naming the least budget that would do. Pure.

Against a store in a process of its own (`budget`): the static set has spare slots, into which the daemon writes the
entries of the next epoch while clients still read the one before. Indexes lie there twice, one for either parity of
epochs. A table is kept whole only if two versions of it fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .. import kernels
from ..errors import BudgetError
from ..formats.placement import PlacedTable, Placement
from ..layout import BUCKET_KEYS, UNIT_BYTES, TableLayout, record_bytes, round_up
from ..units import format_bytes
from .budget import (
    LINE_BYTES,
    StagingPlan,
    cache_set_bytes,
    least_side_bytes,
    overlay_bytes,
    plan_staging,
    side_bytes_of,
)
from .fair_division import divide_fairly

DEFAULT_STATIC_FRACTION = 0.5  # of a table's share, without a placement
SPARE_DRAM_FRACTION = 1 / 8  # of all slots, for entries that a change brings
SLOT_WORK_BYTES = 32  # of the daemon's own memory for each slot: its key, and what indexing and replans take
COUNTS_FRACTION = 1 / 64  # of the budget, for counting keys
COUNTS_BYTES_MAX = 256 << 20
COUNTS_BYTES_MIN = 64 << 10
FOLLOW_FRACTION = 1 / 32  # of the budget, for the index of rows that versions will have, of each of two versions
HEAD_BYTES = kernels.INDEX_HEAD.itemsize
BUCKET_BYTES = kernels.INDEX_BUCKET.itemsize


@dataclass(frozen=True)
class SharedShare:
    """What one table gets. Starts are in bytes of their block: `resident`, `static` or `recency`.

    A resident table has its rows at resident_start; one in place that is not resident has `side_bytes` there, of its
    checksums and perhaps its copied planes. Another has `num_slots` records at records_start, of which
    `capacity` are ever read in one epoch; two areas of `area_buckets` buckets at area_starts, their heads at
    head_starts; the index of the placement file, `file_buckets` buckets at file_start, its head at file_head_start; and
    num_sets sets at recency_start.
    """

    resident: bool
    resident_start: int = 0
    num_slots: int = 0
    capacity: int = 0
    records_start: int = 0
    head_starts: tuple[int, int] = (0, 0)
    area_starts: tuple[int, int] = (0, 0)
    area_buckets: int = 0
    file_head_start: int = 0
    file_start: int = 0
    file_buckets: int = 0
    num_sets: int = 0
    recency_start: int = 0
    side_bytes: int = 0


@dataclass(frozen=True)
class SharedPlan:
    """The division. Bytes of one version's `resident` block; there may be two of those. Each may have `overlay_bytes`
    besides, as far as its versions' rows need an index."""

    budget_bytes: int
    staging: StagingPlan
    counts_bytes: int
    resident_bytes: int
    static_bytes: int
    recency_bytes: int
    index_bytes: int
    work_bytes: int
    shares: Mapping[str, SharedShare]
    overlay_bytes: int = 0

    @property
    def dram_bytes(self) -> int:
        """Bytes that all parts take together, two versions of resident tables and of indexes of rows included."""
        return (
            self.staging.num_bytes
            + self.counts_bytes
            + 2 * (self.resident_bytes + self.overlay_bytes)
            + self.static_bytes
            + self.recency_bytes
            + self.work_bytes
        )


def divide_shared(
    tables: Mapping[str, TableLayout],
    budget_bytes: int,
    placement: Placement | None = None,
    touched: Mapping[str, int] | None = None,
    *,
    follows: bool = False,
) -> SharedPlan:
    """Divides a daemon's budget; raises `BudgetError` if it is too small, naming the least that would do.

    Tables get equal shares, as in `divide_dram`; one of which two copies fit its share is kept whole. touched: how many
    rows of a table versions have, by name. follows: whether versions that come later are served too: then there is room
    for twice as many rows, at least.
    """
    placed, touched = placement.tables if placement else {}, touched or {}
    now_bytes = sum(map(overlay_bytes, touched.values()))
    most_bytes = sum(overlay_bytes(table.spec.num_rows) for table in tables.values())  # if versions have every row
    ahead_bytes = round_up(max(2 * now_bytes, int(budget_bytes * FOLLOW_FRACTION)), UNIT_BYTES) if follows else 0
    rows_bytes = max(now_bytes, min(ahead_bytes, most_bytes))  # of each of two versions
    counts_bytes = (
        min(COUNTS_BYTES_MAX, max(COUNTS_BYTES_MIN, int(budget_bytes * COUNTS_FRACTION))) // LINE_BYTES * LINE_BYTES
    )
    least_share = max(_least_share(table, placed.get(name)) for name, table in tables.items())
    fixed_bytes = counts_bytes + 2 * rows_bytes + len(tables) * least_share
    wide = touched or (tables if follows else {})  # whose pages of rows staging has room for
    staging = plan_staging(tables, placed, budget_bytes, budget_bytes - fixed_bytes, touched=dict.fromkeys(wide, 0))
    least = staging.num_bytes + fixed_bytes
    if budget_bytes < least:
        of_rows = f", twice the index of {sum(touched.values())} rows that versions have" if rows_bytes else ""
        raise BudgetError(
            f"dram: {budget_bytes} bytes ({format_bytes(budget_bytes)}) is below the {least} bytes "
            f"({format_bytes(least)}) that staging, counts, indexes{of_rows} and one set of entries a table take; "
            "ask for more with --dram"
        )
    ends = {"resident": 0, "static": 0, "recency": 0}
    index_bytes = work_bytes = 0

    def take(name: str, most_bytes: int) -> tuple[SharedShare, int]:
        nonlocal index_bytes, work_bytes
        table, share_bytes = tables[name], most_bytes // UNIT_BYTES * UNIT_BYTES
        whole_bytes = round_up(table.spec.table_bytes, UNIT_BYTES)
        if 2 * whole_bytes <= share_bytes:
            share = SharedShare(True, resident_start=ends["resident"])
            ends["resident"] += whole_bytes
            return share, 2 * whole_bytes
        rest_bytes = _least_share(table, placed.get(name)) - 2 * least_side_bytes(table)
        side_bytes = side_bytes_of(table, share_bytes // 2, -(-rest_bytes // 2))  # two versions have their own
        share_bytes -= 2 * side_bytes
        share, static_bytes, recency_bytes = _divide_share(table, share_bytes, placed.get(name), ends)
        share = replace(share, resident_start=ends["resident"], side_bytes=side_bytes)
        ends["resident"] += side_bytes
        index_bytes += static_bytes - round_up(share.num_slots * record_bytes(table.spec.entry_bytes), UNIT_BYTES)
        work_bytes += _work_bytes(share.num_slots)
        ends["static"] += static_bytes
        ends["recency"] += recency_bytes
        return share, 2 * side_bytes + static_bytes + recency_bytes + _work_bytes(share.num_slots)

    sizes = {name: table.spec.table_bytes for name, table in tables.items()}
    shares = divide_fairly(budget_bytes - staging.num_bytes - counts_bytes - 2 * rows_bytes, sizes, take)
    return SharedPlan(
        budget_bytes, staging, counts_bytes, ends["resident"], ends["static"], ends["recency"], index_bytes, work_bytes,
        shares, rows_bytes,
    )  # fmt: skip


def _least_share(table: TableLayout, placed: PlacedTable | None) -> int:
    """Bytes of an empty static set with its heads and indexes, the index of the placement's file, and one set."""
    num_orders = len(table.spec.orders)
    index_bytes = 3 * HEAD_BYTES + 2 * (num_orders + 1) * BUCKET_BYTES + (placed.index_bytes if placed else 0)
    slots_bytes = 2 * record_bytes(table.spec.entry_bytes)
    return (
        2 * least_side_bytes(table)
        + _work_bytes(2)
        + round_up(index_bytes, UNIT_BYTES)
        + round_up(slots_bytes, UNIT_BYTES)
        + round_up(cache_set_bytes(table), UNIT_BYTES)
    )


def _divide_share(
    table: TableLayout, share_bytes: int, placed: PlacedTable | None, starts: Mapping[str, int]
) -> tuple[SharedShare, int, int]:
    """Divides a table's share; returns it, and its bytes of the static and of the recency block, in whole units."""
    num_orders, record = len(table.spec.orders), record_bytes(table.spec.entry_bytes)
    fraction = placed.static_fraction if placed else DEFAULT_STATIC_FRACTION
    file_bytes = placed.index_bytes if placed else 0
    fixed_bytes = 3 * HEAD_BYTES + 2 * num_orders * BUCKET_BYTES + file_bytes
    recency_least = round_up(cache_set_bytes(table), UNIT_BYTES)
    room = min(int((share_bytes - fixed_bytes) * fraction), share_bytes - fixed_bytes - recency_least) - 3 * UNIT_BYTES
    num_slots = max(2, int(room / (record + SLOT_WORK_BYTES + 2 * BUCKET_BYTES / BUCKET_KEYS)))
    share_bytes -= _work_bytes(num_slots)
    area_buckets = int(num_slots / BUCKET_KEYS) + num_orders
    at = starts["static"]
    records_start, at = at, at + round_up(num_slots * record, UNIT_BYTES)
    head_starts, at = (at, at + HEAD_BYTES), at + 2 * HEAD_BYTES
    file_head_start, at = at, at + round_up(HEAD_BYTES, LINE_BYTES)
    area_starts, at = (at, at + area_buckets * BUCKET_BYTES), at + 2 * area_buckets * BUCKET_BYTES
    file_start, at = at, at + file_bytes
    static_bytes = round_up(at - starts["static"], UNIT_BYTES)
    num_sets = max(1, (share_bytes - static_bytes) // cache_set_bytes(table))
    recency_bytes = round_up(num_sets * cache_set_bytes(table), UNIT_BYTES)
    if recency_bytes > share_bytes - static_bytes and num_sets > 1:
        num_sets = (share_bytes - static_bytes) // UNIT_BYTES * UNIT_BYTES // cache_set_bytes(table)
        recency_bytes = round_up(num_sets * cache_set_bytes(table), UNIT_BYTES)
    share = SharedShare(
        False,
        num_slots=num_slots,
        capacity=num_slots - max(1, int(num_slots * SPARE_DRAM_FRACTION)),
        records_start=records_start,
        head_starts=head_starts,
        area_starts=area_starts,
        area_buckets=area_buckets,
        file_head_start=file_head_start,
        file_start=file_start,
        file_buckets=file_bytes // BUCKET_BYTES,
        num_sets=num_sets,
        recency_start=starts["recency"],
    )
    return share, static_bytes, recency_bytes


def _work_bytes(num_slots: int) -> int:
    return round_up(num_slots * SLOT_WORK_BYTES, UNIT_BYTES)
