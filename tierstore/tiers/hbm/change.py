"""Another placement's entries in the slots of a table, exchanged under running kernels: epochs of the device.

Flows in: a table of the tier, a placement file. Flows out: the file's first entries in slots. What both placements have
stays where it is; what is new goes into slots that no index names; then the next epoch's index names those and not what
leaves; when the device has done all that it was given before, the slots of what left are free. Rounds of this are as many
as it takes: spare slots are few. Lookups are right at any moment, from the device and from the host. Damaged entries are
left out, as when the tier is loaded.
"""

from __future__ import annotations

import logging

import numpy as np

from ... import kernels
from ...formats.catalog import TableLayout
from ...formats.placement import PlacedTable, group_start
from ..memory import allocate
from ..placed import PlacementFile, load_indexes, load_records
from .pairs import Pairs, record_trailers
from .tier import DeviceTable, HbmTier, load_step

logger = logging.getLogger("tierstore")


def change_entries(tier: HbmTier, index: int, layout: TableLayout, file: PlacementFile) -> int:
    """Brings the first entries of `file` into a table's slots; returns how many are new there. Blocks on disk and device.

    One thread at a time. Raises `FormatError` where an index of the file is damaged; the tier is then as it was.
    """
    table = tier.tables[index]
    placed = file.placement.tables.get(table.spec.name)
    wanted, numbers = _first_entries(file, placed, table.share.num_entries)
    present = table.in_slots()
    staying, entering = present.among(wanted), ~wanted.among(present)
    records = table.in_records()
    records = records[~records.among(Pairs.joined([present, wanted]))]
    change = _Change(tier, table, present[staying], present[~staying], records)
    num_damaged = 0
    if placed is not None:
        num_damaged = _bring_in(change, layout, file, placed, wanted[entering], numbers[entering])
    change.finish()
    if num_damaged:
        logger.error(
            "%s: %d entries of table %s are damaged and left out of HBM; plan again",
            file.path,
            num_damaged,
            table.spec.name,
        )
    return int(entering.sum()) - num_damaged


class _Change:
    """A change under way: `here` are the entries that stay or have come, `leaving` those that the newest epoch still
    names."""

    def __init__(self, tier: HbmTier, table: DeviceTable, staying: Pairs, leaving: Pairs, records: Pairs) -> None:
        self._tier, self._table = tier, table
        self._here, self._leaving, self._records = staying, leaving, records
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
            self._here = Pairs.joined([self._here, Pairs(order_index[part], keys[part], slots)])
            start += count

    def _turn(self, wanted: int) -> None:
        """Publishes an epoch that names all that came, and no more of what leaves than has to stay; frees its slots.

        The indexes have room for as many entries as are wanted, not for one in every slot: the spare ones are over that.
        """
        assert len(self._leaving), "there are more slots than wanted entries"
        wanted = max(wanted, len(self._here) + len(self._leaving) - self._table.share.num_entries)
        gone, self._leaving = self._leaving[:wanted], self._leaving[wanted:]
        self._table.publish(Pairs.joined([self._here, self._leaving, self._records]))
        self._tier.synchronize()  # no kernel reads the slots of what is gone any more
        self._free = np.concatenate([self._free, gone.places])

    def finish(self) -> None:
        """Publishes the epoch that the change was for: DRAM's records that left the slots, or never came, are named again."""
        records = self._table.in_records()
        self._table.publish(Pairs.joined([self._here, records[~records.among(self._here)]]))
        self._tier.synchronize()


def _bring_in(
    change: _Change, layout: TableLayout, file: PlacementFile, placed: PlacedTable, pairs: Pairs, numbers: np.ndarray
) -> int:
    """Reads the records of these numbers, some MiB of the file at once, and adds their entries; returns how many are
    damaged."""
    by_number = np.argsort(numbers)
    pairs, numbers = pairs[by_number], numbers[by_number]
    scratch = allocate(load_step(placed) * placed.record_bytes)  # page-aligned, as reads past the page cache want it
    num_damaged = at = 0
    while at < len(numbers):
        start = group_start(int(numbers[at]))
        end = min(start + len(scratch) // placed.record_bytes, placed.num_entries)
        until = int(np.searchsorted(numbers, end))
        load_records(file, placed, scratch, end - start, layout.seed, lambda _: None, first=start)
        records = scratch[: (end - start) * placed.record_bytes].reshape(-1, placed.record_bytes)[
            numbers[at:until] - start
        ]
        part = pairs[at:until]
        trailers = record_trailers(records)
        good = (trailers["key"] == part.keys) & (trailers["order_index"] == part.order_index)
        num_damaged += int((~good).sum())
        change.add(part.order_index[good], part.keys[good], records[good, : placed.entry_bytes])
        at = until
    return num_damaged


def _first_entries(file: PlacementFile, placed: PlacedTable | None, count: int) -> tuple[Pairs, np.ndarray]:
    """Returns the first `count` entries of a placement, or all, with their numbers in the file."""
    if placed is None:
        return Pairs.nothing(), np.empty(0, dtype=np.int64)
    area = np.empty(
        (placed.index_bytes // kernels.INDEX_BUCKET.itemsize, kernels.INDEX_BUCKET.itemsize), dtype=np.uint8
    )
    parts = [Pairs.of_index(order, buckets) for order, buckets in enumerate(load_indexes(file, placed, area))]
    pairs = Pairs.joined(parts)
    pairs = pairs[pairs.places < min(count, placed.num_entries)]
    return pairs, pairs.places
