"""How the DRAM budget of a training is divided: the base store's readers, buffers, then a cache for each table.

Input: how large each table's records are, a number of bytes. Output: a `TrainingPlan` whose parts add up to no more
than the budget. Errors: `BudgetError` for a budget in which a table has no room for a few records. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .. import kernels
from ..errors import BudgetError
from ..layout import round_up
from ..units import format_bytes
from .fair_division import divide_fairly

SLOTS_MIN = 16  # of a table that does not fit whole
ASIDE_BYTES_MAX = 32 << 20  # of records that a commit froze and a step changes before they are written
ASIDE_FRACTION = 1 / 8  # of a table's slots, at most
BUFFER_BYTES_MAX = 4 << 20  # of what one write takes
BUFFER_FRACTION = 1 / 32  # of the budget
BUFFER_BYTES_MIN = 64 << 10
NUM_BUFFERS = 4  # two of the run that is being written, one that misses are read into, one of prefetches
BASE_BYTES_MAX = 64 << 20  # for reading the store's own rows, unless their checksums take more
BASE_FRACTION = 1 / 8  # of the budget
READING_FRACTION = 1 / 32  # of the budget, for reads of runs under way, of all tables
PAGE_BYTES = 4096


@dataclass(frozen=True)
class RecordShape:
    """What the memory of one table depends on."""

    num_rows: int
    dim: int
    record_bytes: int
    index_bytes: int  # of the rows that have a record in a run now, and what reading runs takes
    index_bytes_max: int  # the same if all rows had


@dataclass(frozen=True)
class TableMemory:
    """What one table gets: `cache_bytes` for slots, and the rest of `share_bytes` for the index of its runs.

    is_whole: every row has a slot, and the index room for all of them.
    """

    share_bytes: int
    cache_bytes: int
    num_slots: int
    num_aside: int
    is_whole: bool


@dataclass(frozen=True)
class TrainingPlan:
    """The division of a budget. `num_bytes` is never more than the budget."""

    budget_bytes: int
    base_bytes: int
    buffer_bytes: int
    tables: Mapping[str, TableMemory]

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        shares = sum(table.share_bytes for table in self.tables.values())
        return self.base_bytes + NUM_BUFFERS * self.buffer_bytes + shares


def divide_training(shapes: Mapping[str, RecordShape], budget_bytes: int, base_bytes: int) -> TrainingPlan:
    """Divides `budget_bytes`, of which the base store takes `base_bytes`.

    Tables get fair shares (`divide_fairly`); one that fits whole into its share is kept whole.

    Raises:
        BudgetError: A table would have room for fewer than a few records.
    """
    record_max = max(shape.record_bytes for shape in shapes.values())
    wanted = max(BUFFER_BYTES_MIN, min(BUFFER_BYTES_MAX, int(budget_bytes * BUFFER_FRACTION)))
    buffer_bytes = round_up(max(wanted, 2 * record_max + PAGE_BYTES), PAGE_BYTES)
    left = budget_bytes - base_bytes - NUM_BUFFERS * buffer_bytes
    least = sum(_least_bytes(shape) for shape in shapes.values())
    if left < least:
        needed = budget_bytes - left + least
        raise BudgetError(
            f"dram: {budget_bytes} bytes ({format_bytes(budget_bytes)}) is below the {needed} bytes "
            f"({format_bytes(needed)}) that reading the store, buffers, the index of touched rows and {SLOTS_MIN} "
            f"records a table take; ask for more"
        )
    return TrainingPlan(budget_bytes, base_bytes, buffer_bytes, _divide(shapes, left))


def _divide(shapes: Mapping[str, RecordShape], left: int) -> dict[str, TableMemory]:
    least = {name: _least_bytes(shape) for name, shape in shapes.items()}

    def take(name: str, most_bytes: int) -> tuple[TableMemory, int]:
        whole = _whole(shapes[name])
        if whole.share_bytes <= least[name] + most_bytes:
            return whole, max(0, whole.share_bytes - least[name])
        return _part(shapes[name], least[name] + most_bytes), most_bytes

    sizes = {name: shape.num_rows * shape.record_bytes for name, shape in shapes.items()}
    return divide_fairly(left - sum(least.values()), sizes, take)


def _least_bytes(shape: RecordShape) -> int:
    return shape.index_bytes + _cache_bytes(shape, min(SLOTS_MIN, shape.num_rows), 1)


def _num_aside(shape: RecordShape, num_slots: int) -> int:
    return max(1, min(int(num_slots * ASIDE_FRACTION), ASIDE_BYTES_MAX // shape.record_bytes))


def _cache_bytes(shape: RecordShape, num_slots: int, num_aside: int) -> int:
    found = kernels.row_cache_bytes(shape.num_rows, shape.dim, shape.record_bytes, num_slots, num_aside)
    return round_up(int(found), PAGE_BYTES)


def _whole(shape: RecordShape) -> TableMemory:
    num_aside = _num_aside(shape, shape.num_rows)
    cache_bytes = _cache_bytes(shape, shape.num_rows, num_aside)
    return TableMemory(cache_bytes + shape.index_bytes_max, cache_bytes, shape.num_rows, num_aside, True)


def _part(shape: RecordShape, share_bytes: int) -> TableMemory:
    """As many slots as fit beside the index as it is now; the cache gives some up as the index grows."""
    room = share_bytes - shape.index_bytes
    low, high = min(SLOTS_MIN, shape.num_rows), shape.num_rows
    if high > low:
        high -= 1  # a cache of all rows would not shrink
    while low < high:
        middle = (low + high + 1) // 2
        if _cache_bytes(shape, middle, _num_aside(shape, middle)) <= room:
            low = middle
        else:
            high = middle - 1
    num_aside = _num_aside(shape, low)
    return TableMemory(share_bytes, _cache_bytes(shape, low, num_aside), low, num_aside, False)
