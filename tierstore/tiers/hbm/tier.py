"""Entries and indexes in a device's memory: one block of it, in which every part has its place.

Flows in: a plan, a placement file, what of it DRAM holds. Flows out: for each table an index and the places of entries as the
kernels take them (`DeviceTable`), and copies of entries for lookups from the host. Entries are checked on their way, by
their records' checksums; damaged ones are left out, so that their keys go to the tiers below. Shapes: N tokens, O orders, M
pairs of (token, order).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from ... import kernels
from ...decisions.hbm_budget import CONTROL_BYTES, SLOT_ALIGNMENT, HbmPlan, HbmShare
from ...formats.catalog import TableLayout
from ...formats.placement import BUCKET_KEYS, GROUP_RECORDS, PlacedTable, group_start
from ...kernels.gpu.codecs import RowCodec
from ...kernels.gpu.gather import EntrySources, gather_entries
from ...kernels.gpu.probe import DeviceIndex
from ...spec import TableSpec
from ..memory import allocate
from ..placed import OnProgress, PlacementFile, load_records
from .device import DramPart, PinnedMemory, lock, make_block, unlock, wait_for_current
from .pairs import Pairs

logger = logging.getLogger("tierstore")

LOAD_BYTES = 8 << 20  # of host memory through which records pass on their way
_HEADS_AT, _COUNTS_AT = 64, 640  # in a table's control, as int64; the epoch is at 0


class DeviceTable:
    """One table's part of the block: what kernels read (`index`, `sources`), what they count (`counts`), and the host's
    copy of the index.

    counts: int64 [3 * O + 1], as `lookup_entries` has them. Entries with places below `num_slots` lie in slots, others in
    DRAM's records.
    """

    def __init__(self, spec: TableSpec, share: HbmShare, part: torch.Tensor, lock: AbstractContextManager[Any]) -> None:
        """part: uint8 [share.num_bytes], zeroed, of the device's block; lock: the tier's."""
        self.spec, self.share, self._lock = spec, share, lock
        self.num_slots = share.num_slots
        num_orders = len(spec.orders)
        control = part[:CONTROL_BYTES].view(torch.int64)
        heads_at, counts_at = _HEADS_AT // 8, _COUNTS_AT // 8
        self.counts = control[counts_at : counts_at + 3 * num_orders + 1]
        at = CONTROL_BYTES
        areas = part[at : at + 2 * share.index_bytes].view(-1, kernels.INDEX_BUCKET.itemsize)
        self.index = DeviceIndex(
            control[:1], control[heads_at : heads_at + 4 * num_orders].view(2, num_orders, 2), areas
        )
        self._area_start = len(areas) // 2  # of the area for odd epochs
        at += 2 * share.index_bytes
        slots = part[at : at + share.num_slots * share.stride].view(share.num_slots, share.stride)
        self.sources = EntrySources(slots, 0, 0, 0)
        self.records: np.ndarray | None = None  # of DRAM, where the device reads them,
        self.record_start = 0  # from this number of the placement on
        self.epoch = 0
        self.counts_of_known = np.zeros(3 * num_orders + 1, dtype=np.int64)  # as `counts`, of keys that the host knew
        # The newest epoch's index: buckets, uint8 [n, 64], and of each order the first one and how many, int64 [O, 2].
        self._host_index = (
            np.empty((0, kernels.INDEX_BUCKET.itemsize), dtype=np.uint8),
            np.zeros((num_orders, 2), dtype=np.int64),
        )

    @property
    def entry_bytes(self) -> int:
        """Bytes of an entry."""
        return self.spec.entry_bytes

    def share_records(self, records: np.ndarray, record_start: int) -> None:
        """Lets kernels read DRAM's records, uint8 [n, record_bytes], page-locked, the first being that number of the
        placement."""
        self.records, self.record_start = records, record_start
        self.sources = EntrySources(self.sources.slots, records.ctypes.data, records.shape[1], len(records))

    def release(self) -> None:
        """Lets the block go, also where somebody keeps the table."""
        nothing = torch.empty(0, dtype=torch.int64)
        self.counts = torch.zeros(len(self.counts), dtype=torch.int64)
        self.index = DeviceIndex(nothing, nothing, nothing)
        self.sources = EntrySources(nothing.view(torch.uint8).view(0, SLOT_ALIGNMENT), 0, 0, 0)
        self.records = None

    def publish(self, pairs: Pairs) -> None:
        """Makes the next epoch's index of pairs at their places, and lets kernels and the host see it. One thread at a time.

        Ordered behind what the current stream has been given. Kernels that run meanwhile see the one epoch or the other, and
        none may be left that saw the one before; those that are launched when this has returned see the next one. Blocks until
        then: whoever waits for the device afterwards waits for every kernel that saw the epoch before, also if other threads
        replay graphs meanwhile.
        """
        heads = np.zeros((len(self.spec.orders), 2), dtype=np.int64)
        parts = [pairs[pairs.order_index == order] for order in range(len(heads))]
        heads[:, 1] = [int(len(part) // BUCKET_KEYS) + 1 if len(part) else 0 for part in parts]
        heads[:, 0] = np.cumsum([0, *heads[:-1, 1]])
        area = np.empty((heads[:, 1].sum(), kernels.INDEX_BUCKET.itemsize), dtype=np.uint8)
        for part, (start, num_buckets) in zip(parts, heads.tolist(), strict=True):
            if num_buckets:
                kernels.index_entries(part.keys, part.places.astype(np.uint32), area[start : start + num_buckets])
        parity = (self.epoch + 1) % 2
        area_start = parity * self._area_start
        self.index.buckets[area_start : area_start + len(area)].copy_(torch.from_numpy(area))
        self.index.heads[parity].copy_(torch.from_numpy(np.add(heads, (area_start, 0))))
        with self._lock:
            self.epoch += 1
            self.index.epoch.copy_(torch.tensor([self.epoch]))  # from the host's memory, so that it blocks
            self._host_index = area, heads

    def in_slots(self) -> Pairs:
        """What the newest epoch names in slots."""
        area, heads = self._host_index
        pairs = Pairs.joined(
            [Pairs.of_index(order, area[start : start + count]) for order, (start, count) in enumerate(heads.tolist())]
        )
        return pairs[pairs.places < self.num_slots]

    def in_records(self) -> Pairs:
        """What of DRAM's records the indexes have room to name, at their places, whether slots hold it too or not."""
        if self.records is None:
            return Pairs.nothing()
        both = max(0, self.share.num_entries - self.record_start)  # records that slots held at first
        more = self.records[both : both + self.share.static_entries]
        return Pairs.of_records(more, self.num_slots + both + np.arange(len(more)), len(self.spec.orders))

    def count_known(self, keys: np.ndarray, places: np.ndarray) -> None:
        """Counts a lookup of keys that the host knows, int64 [N, O], as kernels count others."""
        in_slots = (places >= 0) & (places < self.num_slots)
        in_records = places >= self.num_slots
        missed = (places < 0) & (keys >= 0)
        by_order = [each.sum(axis=0) for each in (in_slots, in_records, missed)]
        self.counts_of_known += np.concatenate([*by_order, [(keys < 0).sum()]])

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Returns the places of keys, int64 [N, O], as int64 [N, O]; -1 where neither slots nor indexed records hold them."""
        places = np.full(keys.shape, -1, dtype=np.int64)
        area, heads = self._host_index
        for order, (start, count) in enumerate(heads.tolist()):
            if count:
                places[:, order] = kernels.find_entries(
                    area[start : start + count], np.ascontiguousarray(keys[:, order])
                )
        return places


class HbmTier:
    """The tier as a whole. Any threads may call; `close` comes when nobody does any more.

    tables: by their place in the catalog. row_addresses: where the device reads all rows of a table in DRAM, 0 where it
    cannot. pinned: what mailboxes lie in. lock: of each table's host side, held from a look at its index until the launch
    that rests on it.
    """

    @torch.inference_mode(False)  # or nobody could write to its tensors outside that mode
    def __init__(
        self,
        device: torch.device,
        plan: HbmPlan,
        layouts: Sequence[TableLayout],
        placed: PlacementFile | None,
        dram: Sequence[DramPart],
        pinned_bytes: int,
        on_progress: OnProgress | None,
    ) -> None:
        """Loads the placement's first entries. Blocks on the disk. dram: what DRAM holds of each table.

        Raises `ConfigError` and `BudgetError` as `device` does, `CorruptPageError` never: damaged entries are left out.
        """
        self.device, self.plan = device, plan
        # Of staging, and of the tables' host side. Reentered where a store is collected by who holds it.
        self.lock = threading.RLock()
        self.tables: list[DeviceTable] = []
        self._closed = False
        self._locked: list[np.ndarray] = []  # what of DRAM is page-locked
        self.pinned = PinnedMemory(device, pinned_bytes)
        try:
            self._block = make_block(device, plan.hbm_bytes)
            self._lay_out_staging()
            self.tables = [self._make_table(layout) for layout in layouts]
            self.row_addresses = [self._share_rows(layout, part) for layout, part in zip(layouts, dram, strict=True)]
            total, done = 0, 0
            if placed:
                parts = placed.placement.tables
                total = sum(t.share.num_entries * parts[t.spec.name].record_bytes for t in self.tables if t.num_slots)

            def on_bytes(num_bytes: int) -> None:
                nonlocal done
                done += num_bytes
                if on_progress:
                    on_progress(done, total)

            for table, layout, part in zip(self.tables, layouts, dram, strict=True):
                if table.num_slots and placed is not None:
                    self._load(table, layout, placed, part, on_bytes)
            self.synchronize()
        except BaseException:
            self.close()
            raise

    def _lay_out_staging(self) -> None:
        """Keys, places and entries of one part of a host lookup."""
        pairs = self.plan.lookup_pairs
        self._keys = self._block[: pairs * 8].view(torch.int64)
        self._places = self._block[pairs * 8 : pairs * 12].view(torch.int32)
        self._entries = self._block[pairs * 16 : self.plan.staging_bytes]

    def _make_table(self, layout: TableLayout) -> DeviceTable:
        share = self.plan.shares[layout.spec.name]
        return DeviceTable(
            layout.spec, share, self._block[share.byte_start : share.byte_start + share.num_bytes], self.lock
        )

    def _load(
        self, table: DeviceTable, layout: TableLayout, file: PlacementFile, dram: DramPart, on_bytes: Any
    ) -> None:
        placed = file.placement.tables[table.spec.name]
        pairs, num_damaged = self._load_slots(table, placed, file, layout.seed, on_bytes)
        if (
            dram.records is not None
            and table.share.static_entries
            and self._share(table.spec, "static set", dram.records)
        ):
            table.share_records(dram.records, dram.record_start)
        table.publish(Pairs.joined([pairs, table.in_records()]))
        if num_damaged:
            if dram.area is not None:  # or the engine below would look for the very records
                index = dram.area.reshape(-1).view(kernels.INDEX_BUCKET)
                in_slots = index["places"] < table.share.num_entries
                index["keys"][in_slots & ~np.isin(index["places"], pairs.places)] = -1
            logger.error(
                "%s: %d placed entries of table %s are damaged and left out of HBM: their keys are read from pages; plan again",
                file.path, num_damaged, table.spec.name,
            )  # fmt: skip

    def _load_slots(
        self, table: DeviceTable, placed: PlacedTable, file: PlacementFile, seed: int, on_bytes: Callable[[int], None]
    ) -> tuple[Pairs, int]:
        """Brings the first entries into slots 0, 1, ...; returns those, and how many are damaged and so left out."""
        step = load_step(placed)
        scratch = allocate(min(step, GROUP_RECORDS + group_start(table.share.num_entries)) * placed.record_bytes)
        parts, num_damaged = [Pairs.nothing()], 0
        for start in range(0, table.share.num_entries, step):
            count = min(step, table.share.num_entries - start)
            num_damaged += load_records(file, placed, scratch, count, seed, on_bytes, first=start)
            records = scratch[: count * placed.record_bytes].reshape(count, placed.record_bytes)
            slots = np.arange(start, start + count)
            self.write(table, slots, records[:, : table.entry_bytes])
            parts.append(Pairs.of_records(records, slots, len(table.spec.orders)))
        return Pairs.joined(parts), num_damaged

    def write(self, table: DeviceTable, slots: np.ndarray, entries: np.ndarray) -> None:
        """Writes entries, uint8 [M, entry_bytes], into slots, int64 [M], that no index names. Blocks until they are taken."""
        stride = table.share.stride
        packed = np.zeros((min(len(slots), self.plan.lookup_pairs), stride), dtype=np.uint8)
        for start in range(0, len(slots), self.plan.lookup_pairs):
            part = slots[start : start + self.plan.lookup_pairs]
            packed[: len(part), : table.entry_bytes] = entries[start : start + len(part)]
            with self.lock:
                staged = self._entries[: len(part) * stride].view(len(part), stride)
                staged.copy_(torch.from_numpy(packed[: len(part)]))
                self._keys[: len(part)].copy_(torch.from_numpy(part))
                table.sources.slots.index_copy_(0, self._keys[: len(part)], staged)
                wait_for_current(self.device)  # staging is for any stream then

    def _share_rows(self, layout: TableLayout, dram: DramPart) -> int:
        """The same for all rows of a table; returns their address, 0 where the device cannot read them."""
        if dram.rows is None or not self._share(layout.spec, "rows", dram.rows):
            return 0
        return int(dram.rows.ctypes.data)

    def _share(self, spec: TableSpec, what: str, memory: np.ndarray) -> bool:
        """Page-locks memory of DRAM; where the driver does not, says so: the host then stages what the device needs of it."""
        why = lock(self.device, memory.reshape(-1))
        if why is None:
            self._locked.append(memory.reshape(-1))
        else:
            logger.warning(
                "table %s: its %s in DRAM cannot be page-locked: %s; they go to the device by way of the host",
                spec.name,
                what,
                why,
            )
        return why is None

    def take_hits(self, index: int, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns which of keys, int64 [N, O], slots hold, bool [N, O], and their entries, uint8 [hits, entry_bytes], in
        order.

        For lookups from the host: blocks until they have come from the device. A closed tier has none.
        """
        with self.lock:
            if self._closed:  # the engine below says so
                return np.zeros(keys.shape, dtype=bool), np.empty((0, 0), dtype=np.uint8)
            table = self.tables[index]
            places = table.find(keys)
            hits = (places >= 0) & (places < table.num_slots)
            entries = np.empty((int(hits.sum()), table.entry_bytes), dtype=np.uint8)
            wanted = places[hits]
            for start in range(0, len(wanted), self.plan.lookup_pairs):
                part = wanted[start : start + self.plan.lookup_pairs]
                entries[start : start + len(part)] = self._copy_out(table, part)
        return hits, entries

    def in_slots(self, index: int, keys: np.ndarray) -> np.ndarray:
        """Returns which of keys, int64 [N, O], slots hold, bool [N, O]."""
        with self.lock:
            if self._closed:
                return np.zeros(keys.shape, dtype=bool)
            places = self.tables[index].find(keys)
            return (places >= 0) & (places < self.tables[index].num_slots)

    def _copy_out(self, table: DeviceTable, slots: np.ndarray) -> np.ndarray:
        count = len(slots)
        keys, places = self._keys[:count], self._places[:count]
        out = self._entries[: count * table.entry_bytes].view(count, table.entry_bytes)
        keys.fill_(0)  # of no matter: all are there
        places.copy_(torch.from_numpy(slots.astype(np.int32)))
        spec = table.spec
        codec = RowCodec("bytes", spec.rows_per_key, spec.row_bytes, spec.dim)
        gather_entries(places.view(count, 1), keys.view(count, 1), table.sources, codec, out)
        rows: np.ndarray = out.cpu().numpy()
        return rows

    def counters(self) -> list[dict[str, np.ndarray]]:
        """Returns what lookups from the device have counted of each table: by order, int64 [O], "slots", "records",
        "misses"; "sentinels" [1].

        Blocks on the device.
        """
        counted = []
        for table in self.tables:
            counts = np.array(table.counts.tolist(), dtype=np.int64) + table.counts_of_known
            slots, records, misses = counts[:-1].reshape(3, -1)
            counted.append({"slots": slots, "records": records, "misses": misses, "sentinels": counts[-1:]})
        return counted

    def clear(self) -> None:
        """Names nothing any more, and returns when no kernel reads what was named. DRAM is not read from then on."""
        for table in self.tables:
            table.records = None
            table.publish(Pairs.nothing())
        self.synchronize()

    def synchronize(self) -> None:
        """Blocks until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def end(self) -> None:
        """Blocks until the device has done all that it was given, or is lost, which is said and keeps nobody from closing."""
        try:
            self.synchronize()
        except RuntimeError as error:
            logger.error(
                "hbm: %s was lost, or a kernel failed there before the store was closed: %s", self.device, error
            )

    def close(self) -> None:
        """Gives the memory back, when the device has done all that it was given. Closing twice is harmless."""
        self.end()
        with self.lock:
            self._closed = True
            for memory in self._locked:
                unlock(self.device, memory)
            self._locked.clear()
            self.pinned.close()
            for table in self.tables:
                table.release()
            self._block = self._keys = self._places = self._entries = torch.empty(0, dtype=torch.uint8)


def load_step(placed: PlacedTable) -> int:
    """Returns how many records are read at once: whole groups of LOAD_BYTES, one at least."""
    return max(GROUP_RECORDS, group_start(LOAD_BYTES // placed.record_bytes))
