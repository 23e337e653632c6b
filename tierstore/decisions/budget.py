"""How a DRAM budget is divided: staging first, then tables that fit whole, then static sets and caches of entries.

Input: table layouts, a number of bytes, perhaps a placement. Output: a `DramPlan` whose parts add up to no more than
the budget. Errors: `BudgetError` for a budget below one set of entries a table, naming the least that would do. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .. import kernels
from ..errors import BudgetError
from ..formats.in_place import InPlaceLayout
from ..formats.placement import PlacedTable, Placement, group_start
from ..layout import BUCKET_KEYS, UNIT_BYTES, PageShape, TableLayout, round_up
from ..units import format_bytes
from .fair_division import divide_fairly

CACHE_WAYS = kernels.CACHE_WAYS
SET_OVERHEAD_BYTES = kernels.CACHE_SET_BYTES + kernels.CACHE_HISTORY_BYTES
ALIGNMENT_BYTES = UNIT_BYTES  # of each table's part of the block: records are read straight into it
LINE_BYTES = 64  # of what lies within: a cache line
READERS_FEW = 4  # one device is kept busy by so many; a plan for another machine counts with them
READERS_LIMIT = 256
READER_BYTES_WANTED = 512 << 10  # below it, fewer page readers serve better than smaller ones
DEPTH_MAX = 256  # pages in flight a page reader; beyond it, measured, a disk gives no more
# Rows that a read batch has room for, of each page in flight: while its last pages come, the other fills.
ROWS_AHEAD = 2
STAGING_BYTES_MAX = 16 << 20  # of READERS_FEW page readers
SIDE_FRACTION = 1 / 2  # of a table's share that its copied planes may take
STAGING_FRACTION = 1 / 16  # of the budget, at most, unless one key needs more


@dataclass(frozen=True)
class TableShare:
    """What one table gets, and at which bytes of the block: all its rows (`resident`), or three parts in a row.

    Of a table in place, `side_bytes` more come last: what checks its blocks, and perhaps its copied planes. Before
    these come `overlay_bytes`, if versions have rows of the table: the index of those. A resident table needs none.

    They are `static_bytes` for `static_entries` records of the placement, from its record `static_start` on,
    `index_bytes` for its indexes, and a cache of `num_sets` sets of 8 entries.
    """

    resident: bool
    num_sets: int
    byte_start: int
    num_bytes: int
    static_entries: int = 0
    static_bytes: int = 0
    index_bytes: int = 0
    static_start: int = 0
    side_bytes: int = 0
    overlay_bytes: int = 0


@dataclass(frozen=True)
class StagingPlan:
    """Staging of pages that are read: each page reader has `depth` pages, and twice `assembly_bytes` for entries."""

    num_readers: int
    depth: int
    page_bytes: int
    assembly_bytes: int

    @property
    def reader_bytes(self) -> int:
        """Bytes of one page reader."""
        return self.depth * self.page_bytes + 2 * self.assembly_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of all page readers."""
        return self.num_readers * self.reader_bytes


@dataclass(frozen=True)
class DramPlan:
    """The division of a DRAM budget. `dram_bytes` is what will be used, never more than the budget."""

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
    return SET_OVERHEAD_BYTES + CACHE_WAYS * round_up(table.spec.entry_bytes, 8)


def divide_dram(
    tables: Mapping[str, TableLayout],
    budget_bytes: int,
    placement: Placement | None = None,
    hbm_entries: Mapping[str, int] | None = None,
    readers: int = READERS_FEW,
    touched: Mapping[str, int] | None = None,
) -> DramPlan:
    """Divides `budget_bytes` among staging and tables.

    Tables get fair shares (`divide_fairly`). A table smaller than its share is kept resident; the shares of larger ones
    become static sets, as far as the placement goes, and caches of entries.

    Args:
        tables: By name.
        budget_bytes: All that may be used.
        placement: What static sets are filled from; None: only caches.
        hbm_entries: How many of a table's first placed entries are in HBM. Its static set begins after them, at the
            start of their last, unfinished group of records (`group_start`).
        readers: Page readers at most.
        touched: How many rows of a table versions have, by name: what is not resident needs an index of them.

    Returns:
        The division.

    Raises:
        BudgetError: The budget is below what staging and one set of entries a table take.
    """
    in_hbm, touched = hbm_entries or {}, touched or {}
    placed = placement.tables if placement else {}
    least_reader = _least_staging(tables, placed, touched)
    least_for_tables = len(tables) * max(
        _least_share(table, placed.get(name)) + overlay_bytes(touched.get(name, 0)) for name, table in tables.items()
    )
    least = least_reader.plan.reader_bytes + least_for_tables
    if budget_bytes < least:
        what, remedy = (
            ("staging, the placement's index", ", place less, or open with placement='none'")
            if placement
            else ("staging", "")
        )
        if touched:
            what += f", the index of the {sum(touched.values())} rows that versions have"
            remedy += ", or open with version=0, or a store that 'tierstore compact' made"
        raise BudgetError(
            f"dram: {budget_bytes} bytes ({format_bytes(budget_bytes)}) is below the {least} bytes "
            f"({format_bytes(least)}) that {what} and one set of entries a table take; ask for more{remedy}"
        )
    staging = _plan_staging(least_reader, readers, budget_bytes, budget_bytes - least_for_tables)

    def take(name: str, most_bytes: int) -> tuple[TableShare, int]:
        share_bytes = most_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        whole_bytes = round_up(tables[name].spec.table_bytes, ALIGNMENT_BYTES)
        if whole_bytes <= share_bytes:
            return TableShare(True, 0, 0, whole_bytes), whole_bytes
        index_bytes = overlay_bytes(touched.get(name, 0))
        share = _divide_share(tables[name], share_bytes - index_bytes, placed.get(name), in_hbm.get(name, 0))
        share = replace(share, num_bytes=share.num_bytes + index_bytes, overlay_bytes=index_bytes)
        return share, share.num_bytes

    sizes = {name: table.spec.table_bytes for name, table in tables.items()}
    shares = divide_fairly(budget_bytes - staging.num_bytes, sizes, take)
    byte_start = 0
    for name in tables:
        shares[name] = replace(shares[name], byte_start=byte_start)
        byte_start += shares[name].num_bytes
    return DramPlan(budget_bytes, staging, shares)


def overlay_buckets(num_touched: int) -> int:
    """Returns how many buckets index so many rows of versions."""
    return int(num_touched // BUCKET_KEYS) + 1


def overlay_bytes(num_touched: int) -> int:
    """Returns the bytes of the index of so many rows of versions, 18 for each; 0 for none."""
    bucket_bytes = kernels.INDEX_BUCKET.itemsize
    return round_up(overlay_buckets(num_touched) * bucket_bytes, ALIGNMENT_BYTES) if num_touched else 0


def _least_share(table: TableLayout, placed: PlacedTable | None) -> int:
    """Bytes of the placement's indexes and one set."""
    index_bytes = round_up(placed.index_bytes, LINE_BYTES) if placed else 0
    return round_up(index_bytes + cache_set_bytes(table), ALIGNMENT_BYTES) + least_side_bytes(table)


def least_side_bytes(table: TableLayout) -> int:
    """Returns the bytes without which a table in place cannot be read: its checksums. 0 of other tables."""
    return round_up(table.checksum_bytes, ALIGNMENT_BYTES) if isinstance(table, InPlaceLayout) else 0


def side_bytes_of(table: TableLayout, share_bytes: int, rest_bytes: int) -> int:
    """Returns how much of a share holds a table's checksums, and its copied planes if they take at most half of it.

    A copied plane in memory halves the reads of a miss; what a cache holds more without it saves less than that.

    rest_bytes: that all else in the share takes at least: an index, for one, may be more than half of it.
    """
    if not isinstance(table, InPlaceLayout):
        return 0
    whole = round_up(table.checksum_bytes + table.copy_bytes, ALIGNMENT_BYTES)
    return whole if whole <= min(SIDE_FRACTION * share_bytes, share_bytes - rest_bytes) else least_side_bytes(table)


def _divide_share(table: TableLayout, share_bytes: int, placed: PlacedTable | None, hbm_entries: int) -> TableShare:
    """Static set, indexes and cache of a table in `share_bytes`; the cache has one set at least."""
    set_bytes = cache_set_bytes(table)
    index_bytes = round_up(placed.index_bytes, LINE_BYTES) if placed else 0
    side_bytes = side_bytes_of(table, share_bytes, index_bytes + set_bytes)
    share_bytes -= side_bytes
    static_start = static_entries = static_bytes = 0
    if placed:
        left = share_bytes - index_bytes
        most_bytes = (
            max(0, min(int(left * placed.static_fraction), left - set_bytes)) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        )
        static_start = group_start(min(hbm_entries, placed.num_entries))
        static_entries = min(placed.num_entries - static_start, most_bytes // placed.record_bytes)
        static_bytes = round_up(static_entries * placed.record_bytes, ALIGNMENT_BYTES)
    num_sets = (share_bytes - static_bytes - index_bytes) // set_bytes
    num_bytes = round_up(static_bytes + index_bytes + num_sets * set_bytes, ALIGNMENT_BYTES) + side_bytes
    return TableShare(
        False, num_sets, 0, num_bytes, static_entries, static_bytes, index_bytes, static_start, side_bytes
    )


@dataclass(frozen=True)
class _LeastReader:
    """One page reader for one key of any table. read_bytes: what a page in flight takes, with its rows in either read
    batch."""

    plan: StagingPlan
    read_bytes: int


def _least_staging(
    tables: Mapping[str, TableLayout], placed: Mapping[str, PlacedTable], touched: Mapping[str, int]
) -> _LeastReader:
    """Returns one page reader for one key of any table: a page for each of its rows or its record, and the entry."""
    page_bytes = max(
        [table.page_bytes for table in tables.values()]
        + [part.read_bytes_max for part in placed.values()]
        + [PageShape.of_rows(tables[name].spec.row_bytes).page_bytes for name in touched]
    )
    entry_bytes = max(table.spec.entry_bytes for table in tables.values())
    row_bytes = max(table.spec.row_bytes for table in tables.values())
    plan = StagingPlan(
        num_readers=1,
        depth=max(table.spec.rows_per_key for table in tables.values()),
        page_bytes=page_bytes,
        assembly_bytes=round_up(entry_bytes, LINE_BYTES),
    )
    return _LeastReader(plan, page_bytes + 2 * max(ROWS_AHEAD * row_bytes, entry_bytes if placed else 0))


def plan_staging(
    tables: Mapping[str, TableLayout],
    placed: Mapping[str, PlacedTable],
    budget_bytes: int,
    most_bytes: int,
    readers: int = READERS_FEW,
    touched: Mapping[str, int] | None = None,
) -> StagingPlan:
    """Returns staging for a budget, at most most_bytes, and at most so many page readers; but one key of any table
    fits."""
    return _plan_staging(_least_staging(tables, placed, touched or {}), readers, budget_bytes, most_bytes)


def _plan_staging(least: _LeastReader, readers: int, budget_bytes: int, most_bytes: int) -> StagingPlan:
    """Divides a sixteenth of the budget into page readers, of the same size each.

    The first four are made if each has 512 KiB, and take at most 16 MiB together. There are more only if each can have
    all the pages that a disk deserves: a few deep ones read faster than many shallow ones.
    """
    one = least.plan
    wanted_bytes = min(int(budget_bytes * STAGING_FRACTION), most_bytes)
    deep_bytes = max(one.reader_bytes, DEPTH_MAX * least.read_bytes)
    few = min(readers, READERS_FEW, min(wanted_bytes, STAGING_BYTES_MAX) // max(one.reader_bytes, READER_BYTES_WANTED))
    num_readers = max(1, few, min(readers, wanted_bytes // deep_bytes) if readers > READERS_FEW else 0)
    bytes_max = STAGING_BYTES_MAX // num_readers if num_readers <= READERS_FEW else deep_bytes
    reader_bytes = max(min(wanted_bytes // num_readers, bytes_max), one.reader_bytes)
    most_pages = (reader_bytes - 2 * one.assembly_bytes) // one.page_bytes
    depth = max(one.depth, min(DEPTH_MAX, reader_bytes // least.read_bytes, most_pages))
    assembly_bytes = (reader_bytes - depth * one.page_bytes) // 2 // LINE_BYTES * LINE_BYTES
    return StagingPlan(num_readers, depth, one.page_bytes, assembly_bytes)
