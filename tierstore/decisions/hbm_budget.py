"""How an HBM budget is divided: staging of host lookups, then slots of entries and two indexes for each table.

Input: table layouts, a number of bytes, how many entries are placed, and how many of them DRAM will have. Output: an
`HbmPlan` whose parts add up to no more than the budget. Errors: `BudgetError` for a budget below one entry a table,
naming the least that would do. Pure.

The indexes name what lies in HBM and what lies in DRAM's static set, so that one probe answers for both. There are two
of them, one for either parity of epochs, and a few spare slots, so that entries can be exchanged under running kernels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from .. import kernels
from ..errors import BudgetError
from ..layout import BUCKET_KEYS, TableLayout, round_up
from ..units import format_bytes
from .fair_division import divide_fairly

ALIGNMENT_BYTES = 256  # of each part of the block, as devices want it
CONTROL_BYTES = 1280  # of a table: epoch, heads of two indexes, counts
SLOT_ALIGNMENT = 16  # the widest load of a device
SPARE_HBM_FRACTION = 1 / 32  # of slots with entries: as many more are spare
STATIC_INDEX_FRACTION = 1 / 4  # of a table's share, at most, is for the index of DRAM's static set
LOOKUP_PAIRS_MAX = 4096  # of one part of a host lookup
LOOKUP_FRACTION = 1 / 16  # of the budget, at most, is for the staging of host lookups
PINNED_BYTES_MAX = 256 << 20
PINNED_DRAM_FRACTION = 1 / 16  # of DRAM, at most, is set aside for what the device reads and writes
_BUCKET_BYTES = kernels.INDEX_BUCKET.itemsize


@dataclass(frozen=True)
class HbmShare:
    """What one table gets, and where in the block: control, two indexes of `num_buckets`, `num_slots` slots of `stride`
    bytes.

    It starts with the placement's first `num_entries`; DRAM's first `static_entries` are in its indexes too.
    """

    num_slots: int
    num_entries: int
    static_entries: int
    stride: int
    num_buckets: int
    byte_start: int = 0

    @property
    def index_bytes(self) -> int:
        """Bytes of one index."""
        return round_up(self.num_buckets * _BUCKET_BYTES, ALIGNMENT_BYTES)

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return CONTROL_BYTES + 2 * self.index_bytes + round_up(self.num_slots * self.stride, ALIGNMENT_BYTES)


@dataclass(frozen=True)
class HbmPlan:
    """The division of an HBM budget. `hbm_bytes` is what will be used, never more than the budget."""

    budget_bytes: int
    lookup_pairs: int
    staging_bytes: int
    shares: Mapping[str, HbmShare]

    @property
    def hbm_bytes(self) -> int:
        """Bytes of the block: staging first, then the tables' parts."""
        return self.staging_bytes + sum(share.num_bytes for share in self.shares.values())

    @property
    def host_index_bytes(self) -> int:
        """Bytes of DRAM that the host's copies of the indexes take, of which there are two while an epoch changes."""
        return 2 * sum(share.num_buckets * _BUCKET_BYTES for share in self.shares.values())


def pinned_bytes(dram_bytes: int) -> int:
    """Returns how much of a DRAM budget is set aside for mailboxes, page-locked."""
    return min(PINNED_BYTES_MAX, int(dram_bytes * PINNED_DRAM_FRACTION)) // 4096 * 4096


def divide_hbm(
    tables: Mapping[str, TableLayout], budget_bytes: int, entries: Mapping[str, int], static_entries: Mapping[str, int]
) -> HbmPlan:
    """Divides `budget_bytes` fairly among the tables that have entries for it.

    Args:
        tables: By name.
        budget_bytes: All that may be used.
        entries: The most that a table has for HBM; tables without any get their control alone.
        static_entries: The most that DRAM's static set may have of each.

    Raises:
        BudgetError: Not even one entry of each of those tables fits.
    """
    wanted = {name: entries.get(name, 0) for name in tables}
    pair_bytes = max(map(_stride, tables.values())) + 8 + 8  # an entry, its key, its slot
    lookup_pairs = max(1, min(LOOKUP_PAIRS_MAX, int(budget_bytes * LOOKUP_FRACTION) // pair_bytes))
    staging_bytes = round_up(lookup_pairs * pair_bytes, ALIGNMENT_BYTES)
    least = staging_bytes + sum(_share(tables[name], min(1, wanted[name]), 0).num_bytes for name in tables)
    if budget_bytes < least:
        raise BudgetError(
            f"hbm: {budget_bytes} bytes ({format_bytes(budget_bytes)}) is below the {least} bytes "
            f"({format_bytes(least)}) that staging, indexes and an entry a table take; ask for more, or leave hbm out"
        )

    def take(name: str, share_bytes: int) -> tuple[HbmShare, int]:
        share = _divide_share(tables[name], wanted[name], static_entries.get(name, 0), share_bytes)
        return share, share.num_bytes

    sizes = {name: wanted[name] * _stride(table) for name, table in tables.items()}
    shares = divide_fairly(budget_bytes - staging_bytes, sizes, take)
    byte_start = staging_bytes
    for name in tables:
        shares[name] = replace(shares[name], byte_start=byte_start)
        byte_start += shares[name].num_bytes
    return HbmPlan(budget_bytes, lookup_pairs, staging_bytes, shares)


def _stride(table: TableLayout) -> int:
    return round_up(table.spec.entry_bytes, SLOT_ALIGNMENT)


def _share(table: TableLayout, num_entries: int, static_entries: int) -> HbmShare:
    num_slots = num_entries + math.ceil(num_entries * SPARE_HBM_FRACTION)
    num_buckets = int((num_entries + static_entries) // BUCKET_KEYS) + len(table.spec.orders)  # each order rounds up
    return HbmShare(num_slots, num_entries, static_entries, _stride(table), num_buckets)


def _divide_share(table: TableLayout, num_placed: int, static_entries: int, share_bytes: int) -> HbmShare:
    """Returns the share with most entries that takes at most share_bytes. One entry fits, if DRAM's are left out."""
    if num_placed == 0:
        return _share(table, 0, 0)
    static = min(static_entries, int(share_bytes * STATIC_INDEX_FRACTION // (2 * _BUCKET_BYTES) * BUCKET_KEYS))
    if _share(table, 1, static).num_bytes > share_bytes:
        static = 0
    fits, too_many = 1, num_placed + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if _share(table, middle, static).num_bytes <= share_bytes:
            fits = middle
        else:
            too_many = middle
    return _share(table, fits, static)
