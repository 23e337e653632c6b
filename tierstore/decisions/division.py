"""How a store divides both of its budgets when it opens: what HBM takes, and what is left for DRAM to do.

Input: table layouts, bytes of DRAM and HBM, a placement. Output: a `DramPlan` and an `HbmPlan`. Errors: `BudgetError`.
Pure.

With an hbm tier, DRAM sets aside what the device reads and writes, and the host's copy of the device's indexes. Its
static set begins after HBM's entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..formats.placement import Placement
from ..layout import TableLayout
from .budget import READERS_FEW, DramPlan, divide_dram
from .hbm_budget import HbmPlan, divide_hbm, pinned_bytes


def divide_budgets(
    tables: Mapping[str, TableLayout],
    dram_bytes: int,
    hbm_bytes: int | None,
    placement: Placement | None,
    readers: int = READERS_FEW,
    touched: Mapping[str, int] | None = None,
) -> tuple[DramPlan, HbmPlan | None]:
    """Divides both budgets; hbm_bytes: None without an hbm tier; readers: page readers at most;
    touched: as of `divide_dram`. Raises `BudgetError` as the two divisions do."""
    if hbm_bytes is None:
        return divide_dram(tables, dram_bytes, placement, readers=readers, touched=touched), None
    pinned = pinned_bytes(dram_bytes)
    without = divide_dram(
        tables, dram_bytes - pinned, placement, readers=readers, touched=touched
    )  # what the static set could be at most
    static = {name: share.static_entries for name, share in without.shares.items()}
    placed = {name: part.num_entries for name, part in placement.tables.items()} if placement else {}
    hbm = divide_hbm(tables, hbm_bytes, placed, static)
    entries = {name: share.num_entries for name, share in hbm.shares.items()}
    left = dram_bytes - pinned - hbm.host_index_bytes
    return replace(divide_dram(tables, left, placement, entries, readers, touched), budget_bytes=dram_bytes), hbm
