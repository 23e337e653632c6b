"""Entries and indexes in a device's memory: one block, divided into fixed parts.

Input: a plan, what DRAM holds, entries with the slots that they go to. Output: for each table an index and the
places of entries as the kernels take them (`DeviceTable`), and copies of entries for lookups from the host. `change`
decides which entries lie where. Shapes: N tokens, O orders, M pairs of (token, order).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import numpy as np
import torch

from ...decisions.hbm_budget import HbmPlan
from ...kernels.gpu.codecs import RowCodec
from ...kernels.gpu.gather import gather_entries
from ...layout import TableLayout
from ...spec import TableSpec
from .device import DramPart, PinnedMemory, lock, make_block, unlock, wait_for_current
from .pairs import Pairs
from .table import DeviceTable

logger = logging.getLogger("tierstore")


class HbmTier:
    """The tier as a whole. Any threads may call; `close` comes when nobody does any more.

    Attributes:
        tables: In the order of the catalog.
        row_addresses: Where the device reads all rows of a table in DRAM; 0 if it cannot.
        pinned: The page-locked memory that mailboxes lie in.
        lock: Guards each table's host side. A lookup keeps it from its look at an index until the launch that relies on
            that, so that no epoch is published in between.
    """

    @torch.inference_mode(False)  # or nobody could write to its tensors outside that mode
    def __init__(
        self,
        device: torch.device,
        plan: HbmPlan,
        layouts: Sequence[TableLayout],
        dram: Sequence[DramPart],
        pinned_bytes: int,
    ) -> None:
        """Makes an empty tier, which `change_entries` fills. dram: what DRAM holds of each table,
        for the device to read.

        Raises `ConfigError` and `BudgetError` as `device` does.
        """
        self.device, self.plan = device, plan
        # Guards staging (`_keys`, `_places`, `_entries`), `_closed`, and each table's host side. Reentrant: a store may
        # be garbage-collected, and so closed, by a thread that holds it.
        self.lock = threading.RLock()
        self.tables: list[DeviceTable] = []
        self._closed = False
        self._locked: list[np.ndarray] = []  # what of DRAM is page-locked
        self.pinned = PinnedMemory(device, pinned_bytes)
        try:
            self._block = make_block(device, plan.hbm_bytes)
            self._lay_out_staging()
            self.tables = [self._make_table(layout) for layout in layouts]
            for table, part in zip(self.tables, dram, strict=True):
                self._share_records(table, part)
            self.row_addresses = [self._share_rows(layout, part) for layout, part in zip(layouts, dram, strict=True)]
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

    def write(self, table: DeviceTable, slots: np.ndarray, entries: np.ndarray) -> None:
        """Writes entries, uint8 [M, entry_bytes], into slots, int64 [M], that no index names.
        Blocks until they are taken."""
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

    def _share_records(self, table: DeviceTable, dram: DramPart) -> None:
        """Lets the device read DRAM's records where they lie, if there are any that its indexes have room to name."""
        records = dram.records if table.share.static_entries else None
        if records is not None and self._share(table.spec, "static set", records):
            table.share_records(records, dram.named)

    def _share_rows(self, layout: TableLayout, dram: DramPart) -> int:
        """The same for all rows of a table; returns their address, 0 if the device cannot read them."""
        if dram.rows is None or not self._share(layout.spec, "rows", dram.rows):
            return 0
        return int(dram.rows.ctypes.data)

    def _share(self, spec: TableSpec, what: str, memory: np.ndarray) -> bool:
        """Page-locks memory of DRAM. If the driver does not, a warning is logged:
        the host then stages what the device needs of it."""
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
        """Returns which of keys, int64 [N, O], slots hold, bool [N, O], and their entries, uint8 [hits, entry_bytes],
        in order.

        For lookups from the host: blocks until they have come from the device. A closed tier has none.
        """
        with self.lock:
            if self._closed:  # the engine below raises
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
        """Names nothing any more, and returns when no kernel reads what was named."""
        self.synchronize()  # one that failed may have published what nobody waited for
        for table in self.tables:
            table.publish(Pairs.nothing())
        self.synchronize()

    def name_records(self) -> None:
        """Names what DRAM's records are now, beside what slots hold;
        returns when no kernel reads what they were before."""
        self.synchronize()  # as in `clear`
        for table in self.tables:
            here = table.in_slots()
            table.publish(Pairs.joined([here, table.records_beside(here)]))
        self.synchronize()

    def synchronize(self) -> None:
        """Blocks until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def end(self) -> None:
        """Blocks until the device has done all that it was given. A lost device is logged, and does not prevent
        closing."""
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
