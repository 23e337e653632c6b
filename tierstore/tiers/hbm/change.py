"""A placement's first entries in the slots of a table, brought in under running kernels: epochs of the device.

Input: a table of the tier, empty or with another placement's entries, and a placement file. Output: the file's first
entries in slots. Errors: `FormatError` for a damaged index of the file; an entry whose record's checksum is wrong is
left out.

Entries of both placements stay where they are. The new ones take rounds, because spare slots are few. Each round

1. writes entries into slots that no index names,
2. publishes the next epoch's index, which names those and no longer names as many that leave,
3. waits until the device has done all that it was given before: then no kernel reads the slots of what left,
4. frees those slots.

Lookups are right at any moment, from the device and from the host.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import numpy as np

from ... import kernels
from ...formats.placement import GROUP_RECORDS, PlacedTable, group_start
from ...layout import TableLayout
from ..memory import allocate
from ..placed import PlacementFile, load_indexes, load_records
from .pairs import Pairs, record_trailers
from .table import DeviceTable
from .tier import HbmTier

logger = logging.getLogger("tierstore")

LOAD_BYTES = 8 << 20  # of host memory through which records pass on their way
OnBytes = Callable[[int], None]


def change_entries(
    tier: HbmTier, index: int, layout: TableLayout, file: PlacementFile, on_bytes: OnBytes
) -> np.ndarray:
    """Brings the first entries of `file` into a table's slots; returns the numbers of damaged records, int64, left out.

    on_bytes: called with bytes as they are read. One thread at a time. Blocks on disk and device. Raises `FormatError`
    if an index of the file is damaged; the tier is then as it was.
    """
    table = tier.tables[index]
    placed = file.placement.tables.get(table.spec.name)
    wanted = _first_entries(file, placed, table.share.num_entries)
    present = table.in_slots()
    staying, entering = present.are_in(wanted), ~wanted.are_in(present)
    tier.synchronize()  # a change that failed may have published an epoch without waiting for it
    records = functools.cache(lambda: table.records_beside(Pairs.joined([present, wanted])))
    change = _Change(tier, table, present[staying], present[~staying], records)
    damaged = np.empty(0, dtype=np.int64)
    if placed is not None:
        damaged = _bring_in(change, layout, file, placed, wanted[entering], on_bytes)
    change.finish()
    if len(damaged):
        logger.error(
            "%s: %d placed entries of table %s are damaged and left out of HBM; plan again",
            file.path, len(damaged), table.spec.name,
        )  # fmt: skip
    return damaged


class _Change:
    """A change under way.

    `_here` are the entries that stay or have come, in parts; `_leaving` those that leave and that the newest epoch
    still names; `_free` the slots that no epoch names.
    """

    def __init__(
        self, tier: HbmTier, table: DeviceTable, staying: Pairs, leaving: Pairs, records: Callable[[], Pairs]
    ) -> None:
        """records: returns DRAM's records that are named meanwhile."""
        self._tier, self._table = tier, table
        self._here, self._num_here = [staying], len(staying)
        self._leaving, self._records = leaving, records
        used = np.zeros(table.num_slots, dtype=bool)
        used[staying.places] = used[leaving.places] = True
        self._free = np.flatnonzero(~used)

    def add(self, order_index: np.ndarray, keys: np.ndarray, entries: np.ndarray) -> None:
        """Puts entries, uint8 [n, entry_bytes], into free slots, in as many rounds as it takes."""
        start = 0
        while start < len(keys):
            if not len(self._free):
                self._turn(len(keys) - start)
            count = min(len(self._free), len(keys) - start)
            part = np.s_[start : start + count]
            slots, self._free = self._free[:count], self._free[count:]
            self._tier.write(self._table, slots, entries[part])
            self._here.append(Pairs(order_index[part], keys[part], slots))
            self._num_here += count
            start += count

    def _turn(self, wanted: int) -> None:
        """Publishes an epoch that names all that came, and of what leaves only what may stay; frees the slots of the
        rest.

        The indexes have room for as many entries as are wanted, not for one in every slot:
        the spare ones are over that.
        """
        assert len(self._leaving), "there are more slots than wanted entries"
        wanted = max(wanted, self._num_here + len(self._leaving) - self._table.share.num_entries)
        gone, self._leaving = self._leaving[:wanted], self._leaving[wanted:]
        self._table.publish(Pairs.joined([*self._here, self._leaving, self._records()]))
        self._tier.synchronize()  # only now does no kernel read the slots of what is gone
        self._free = np.concatenate([self._free, gone.places])

    def finish(self) -> None:
        """Publishes the epoch that the change was for: DRAM's records that left the slots, or never came,
        are named again."""
        here = Pairs.joined(self._here)
        self._table.publish(Pairs.joined([here, self._table.records_beside(here)]))
        self._tier.synchronize()


def _bring_in(
    change: _Change, layout: TableLayout, file: PlacementFile, placed: PlacedTable, pairs: Pairs, on_bytes: OnBytes
) -> np.ndarray:
    """Reads the records of pairs, whose places are record numbers in the file, some MiB at once, and adds their
    entries.

    Returns the numbers of those that are damaged.
    """
    pairs = pairs[np.argsort(pairs.places)]
    step = max(GROUP_RECORDS, group_start(LOAD_BYTES // placed.record_bytes))
    scratch = allocate(step * placed.record_bytes)  # page-aligned, as reads past the page cache want it
    damaged = [np.empty(0, dtype=np.int64)]
    at = 0
    while at < len(pairs):
        start = group_start(int(pairs.places[at]))
        end = min(start + step, int(pairs.places[-1]) + 1)
        until = int(np.searchsorted(pairs.places, end))
        part, at = pairs[at:until], until
        load_records(file, placed, scratch, end - start, layout.seed, on_bytes, first=start)
        all_records = scratch[: (end - start) * placed.record_bytes].reshape(-1, placed.record_bytes)
        records = all_records[part.places - start]
        trailers = record_trailers(records)
        good = (trailers["key"] == part.keys) & (trailers["order_index"] == part.order_index)
        damaged.append(part.places[~good])
        change.add(part.order_index[good], part.keys[good], records[good, : placed.entry_bytes])
    return np.concatenate(damaged)


def _first_entries(file: PlacementFile, placed: PlacedTable | None, count: int) -> Pairs:
    """Returns the first `count` entries of a placement, or all, at their numbers in the file."""
    end = 0 if placed is None else min(count, placed.num_entries)
    if placed is None or not end:
        return Pairs.nothing()
    bucket_bytes = kernels.INDEX_BUCKET.itemsize
    area = np.empty((placed.index_bytes // bucket_bytes, bucket_bytes), dtype=np.uint8)
    return Pairs.joined(
        [Pairs.of_index(order, buckets, end) for order, buckets in enumerate(load_indexes(file, placed, area))]
    )
