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
SLOT_OVERHEAD_BYTES = 8 + 1 + 4  # key, order index, time of last use
STAGING_BUFFERS = 2
STAGING_BYTES_MAX = 8 << 20
STAGING_FRACTION = 16  # a staging buffer takes at most this part of the budget, unless one key needs more


@dataclass(frozen=True)
class TableShare:
    """What one table gets: all its rows (`resident`), or a cache of `num_sets` sets of 8 entries."""

    resident: bool
    num_sets: int
    num_bytes: int


@dataclass(frozen=True)
class DramPlan:
    """The division of a DRAM budget. `dram_bytes` is what will be used, never more than what was asked."""

    budget_bytes: int
    staging_bytes: int
    shares: Mapping[str, TableShare]

    @property
    def dram_bytes(self) -> int:
        """Bytes that staging, resident tables, entries and their index take together."""
        return STAGING_BUFFERS * self.staging_bytes + sum(share.num_bytes for share in self.shares.values())


def staging_unit_bytes(table: TableLayout) -> int:
    """Returns the staging that one key of a table can need: a page for each of its rows, and the entry itself."""
    return table.spec.rows_per_key * table.page_bytes + table.spec.entry_bytes


def cache_set_bytes(table: TableLayout) -> int:
    """Returns the bytes of one set of a table's entry cache, index included."""
    return CACHE_WAYS * (table.spec.entry_bytes + SLOT_OVERHEAD_BYTES)


def divide_dram(tables: Mapping[str, TableLayout], budget_bytes: int) -> DramPlan:
    """Divides `budget_bytes` among staging and tables; raises `BudgetError` where it is too small.

    Every table of a model is asked for equally many keys a token, so each gets an equal share; a table smaller than its
    share is kept resident, and what it leaves goes to the others. The shares of larger ones become caches of entries.
    """
    unit_bytes = max(staging_unit_bytes(table) for table in tables.values())
    least_for_tables = len(tables) * max(cache_set_bytes(table) for table in tables.values())
    least = STAGING_BUFFERS * unit_bytes + least_for_tables
    if budget_bytes < least:
        raise BudgetError(
            f"dram: {budget_bytes} bytes ({format_bytes(budget_bytes)}) is below the {least} bytes ({format_bytes(least)}) "
            f"that staging and one set of entries a table take; ask for more"
        )
    spare_bytes = (budget_bytes - least_for_tables) // STAGING_BUFFERS
    staging_bytes = max(unit_bytes, min(STAGING_BYTES_MAX, budget_bytes // STAGING_FRACTION, spare_bytes))
    left = budget_bytes - STAGING_BUFFERS * staging_bytes
    shares = {}
    by_size = sorted(tables.values(), key=lambda table: table.spec.table_bytes)
    for count, table in zip(range(len(by_size), 0, -1), by_size, strict=True):
        share_bytes = left // count
        set_bytes = cache_set_bytes(table)
        if table.spec.table_bytes <= share_bytes:
            share = TableShare(True, 0, table.spec.table_bytes)
        else:
            share = TableShare(False, share_bytes // set_bytes, share_bytes // set_bytes * set_bytes)
        shares[table.spec.name] = share
        left -= share.num_bytes
    return DramPlan(budget_bytes, staging_bytes, {name: shares[name] for name in tables})
