"""How a DRAM budget is divided: staging first, then tables that fit whole, then caches of entries.

Flows in: table layouts and a number of bytes. Flows out: a `DramPlan` whose parts add up to no more than that number.
Refuses a budget that cannot hold one set of entries a table, naming the least that would do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import BudgetError
from ..formats.catalog import TableLayout
from ..units import format_bytes

CACHE_WAYS = 8
SET_OVERHEAD_BYTES = 128 + 128  # keys, orders, version, uses of 8 entries; the set's history
ALIGNMENT_BYTES = 64  # of each table's part of the block: a cache line
LANES_MAX = 4
LANE_BYTES_WANTED = 512 << 10  # below it, fewer lanes serve better than smaller ones
DEPTH_MAX = 256  # pages in flight a lane; beyond it, measured, a disk gives no more
STAGING_BYTES_MAX = 16 << 20
STAGING_FRACTION = 16  # staging takes at most this part of the budget, unless one key needs more


@dataclass(frozen=True)
class TableShare:
    """What one table gets: all its rows (`resident`), or a cache of `num_sets` sets of 8 entries; where in the block."""

    resident: bool
    num_sets: int
    byte_start: int
    num_bytes: int


@dataclass(frozen=True)
class StagingPlan:
    """Staging of pages on their way: each lane has `depth` pages and twice `assembly_bytes` of entries put together."""

    num_lanes: int
    depth: int
    page_bytes: int
    assembly_bytes: int

    @property
    def lane_bytes(self) -> int:
        """Bytes of one lane."""
        return self.depth * self.page_bytes + 2 * self.assembly_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of all lanes."""
        return self.num_lanes * self.lane_bytes


@dataclass(frozen=True)
class DramPlan:
    """The division of a DRAM budget. `dram_bytes` is what will be used, never more than what was asked."""

    budget_bytes: int
    staging: StagingPlan
    shares: Mapping[str, TableShare]

    @property
    def block_bytes(self) -> int:
        """Bytes of the block that holds resident tables and caches, one after the other."""
        return sum(share.num_bytes for share in self.shares.values())

    @property
    def dram_bytes(self) -> int:
        """Bytes that staging, resident tables, entries and their index take together."""
        return self.staging.num_bytes + self.block_bytes


def cache_set_bytes(table: TableLayout) -> int:
    """Returns the bytes of one set of a table's entry cache, index included; entries begin at multiples of 8."""
    return SET_OVERHEAD_BYTES + CACHE_WAYS * _round_up(table.spec.entry_bytes, 8)


def divide_dram(tables: Mapping[str, TableLayout], budget_bytes: int) -> DramPlan:
    """Divides `budget_bytes` among staging and tables; raises `BudgetError` where it is too small.

    Every table of a model is asked for equally many keys a token, so each gets an equal share; a table smaller than its
    share is kept resident, and what it leaves goes to the others. The shares of larger ones become caches of entries.
    """
    least_lane = _least_staging(tables)
    least_for_tables = len(tables) * _round_up(max(map(cache_set_bytes, tables.values())), ALIGNMENT_BYTES)
    least = least_lane.lane_bytes + least_for_tables
    if budget_bytes < least:
        raise BudgetError(
            f"dram: {budget_bytes} bytes ({format_bytes(budget_bytes)}) is below the {least} bytes ({format_bytes(least)}) "
            f"that staging and one set of entries a table take; ask for more"
        )
    staging = _plan_staging(least_lane, budget_bytes, budget_bytes - least_for_tables)
    left = budget_bytes - staging.num_bytes
    sizes: dict[str, tuple[int, int]] = {}  # sets (0: resident), bytes
    by_size = sorted(tables.values(), key=lambda table: table.spec.table_bytes)
    for count, table in zip(range(len(by_size), 0, -1), by_size, strict=True):
        share_bytes = left // count // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        whole_bytes = _round_up(table.spec.table_bytes, ALIGNMENT_BYTES)
        num_sets = 0 if whole_bytes <= share_bytes else share_bytes // cache_set_bytes(table)
        num_bytes = _round_up(num_sets * cache_set_bytes(table), ALIGNMENT_BYTES) if num_sets else whole_bytes
        sizes[table.spec.name] = num_sets, num_bytes
        left -= num_bytes
    shares, byte_start = {}, 0
    for name in tables:
        num_sets, num_bytes = sizes[name]
        shares[name] = TableShare(num_sets == 0, num_sets, byte_start, num_bytes)
        byte_start += num_bytes
    return DramPlan(budget_bytes, staging, shares)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _least_staging(tables: Mapping[str, TableLayout]) -> StagingPlan:
    """One lane that holds one key of any table: a page for each of its rows, and the entry."""
    return StagingPlan(
        num_lanes=1,
        depth=max(table.spec.rows_per_key for table in tables.values()),
        page_bytes=max(table.page_bytes for table in tables.values()),
        assembly_bytes=_round_up(max(table.spec.entry_bytes for table in tables.values()), ALIGNMENT_BYTES),
    )


def _plan_staging(least: StagingPlan, budget_bytes: int, most_bytes: int) -> StagingPlan:
    """Divides a sixteenth of the budget, at most 16 MiB, into lanes: a third for pages, the rest for entries."""
    wanted_bytes = min(STAGING_BYTES_MAX, budget_bytes // STAGING_FRACTION, most_bytes)
    num_lanes = max(1, min(LANES_MAX, wanted_bytes // max(least.lane_bytes, LANE_BYTES_WANTED)))
    lane_bytes = max(wanted_bytes // num_lanes, least.lane_bytes)
    most_pages = (lane_bytes - 2 * least.assembly_bytes) // least.page_bytes
    depth = max(least.depth, min(DEPTH_MAX, lane_bytes // 3 // least.page_bytes, most_pages))
    assembly_bytes = (lane_bytes - depth * least.page_bytes) // 2 // ALIGNMENT_BYTES * ALIGNMENT_BYTES
    return StagingPlan(num_lanes, depth, least.page_bytes, assembly_bytes)
