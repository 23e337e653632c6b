"""One table's part of the device's block: its indexes and slots as the kernels take them,
and the host's copy of the index.

Input: pairs with the places of their entries. Output: the next epoch's index, for kernels that are launched from
then on and for the host. Shapes: N tokens, O orders, M pairs of (token, order).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from ... import kernels
from ...decisions.hbm_budget import CONTROL_BYTES, SLOT_ALIGNMENT, HbmShare
from ...kernels.gpu.gather import EntrySources
from ...kernels.gpu.probe import DeviceIndex
from ...layout import BUCKET_KEYS
from ...spec import TableSpec
from .pairs import Pairs

_HEADS_AT, _COUNTS_AT = 64, 640  # in a table's control, as int64; the epoch is at 0


class DeviceTable:
    """One table's part of the block: what kernels read (`index`, `sources`), what they count (`counts`), and the host's
    copy of the index.

    counts: int64 [3 * O + 1], as `lookup_entries` has them. Entries with places below `num_slots` lie in slots, others
    in DRAM's records.
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
        self._records: np.ndarray | None = None  # of DRAM, if the device reads them,
        self._named: Callable[[int], Pairs] = Pairs.nothing  # and which of them it may
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

    def share_records(self, records: np.ndarray, named: Callable[[int], Pairs]) -> None:
        """Lets kernels read DRAM's records, uint8 [n, record_bytes], page-locked; named: see `DramPart`. Once."""
        self._records, self._named = records, named
        self.sources = EntrySources(self.sources.slots, records.ctypes.data, records.shape[1], len(records))

    def release(self) -> None:
        """Lets the block go, also if somebody keeps the table."""
        nothing = torch.empty(0, dtype=torch.int64)
        self.counts = torch.zeros(len(self.counts), dtype=torch.int64)
        self.index = DeviceIndex(nothing, nothing, nothing)
        self.sources = EntrySources(nothing.view(torch.uint8).view(0, SLOT_ALIGNMENT), 0, 0, 0)
        self._records, self._named = None, Pairs.nothing

    def publish(self, pairs: Pairs) -> None:
        """Makes the next epoch's index of pairs at their places, and lets kernels and the host see it.
        One thread at a time.

        Ordered behind what the current stream has been given. Kernels that run meanwhile see the one epoch or the
        other, and none may be left that saw the one before; those that are launched when this has returned see the next
        one. Blocks until then: whoever waits for the device afterwards waits for every kernel that saw the epoch
        before, also if other threads replay graphs meanwhile.
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
        # Under the lock, so that a lookup from the host sees index and epoch of one publication. The word comes last on
        # the device: kernels read the index that it names.
        with self._lock:
            self.epoch += 1
            self.index.epoch.copy_(torch.tensor([self.epoch]))  # from the host's memory, so that it blocks
            self._host_index = area, heads

    def in_slots(self) -> Pairs:
        """Returns what the newest epoch names in slots."""
        area, heads = self._host_index
        return Pairs.joined(
            [
                Pairs.of_index(order, area[start : start + count], self.num_slots)
                for order, (start, count) in enumerate(heads.tolist())
            ]
        )

    @property
    def reads_records(self) -> bool:
        """Whether kernels read DRAM's records."""
        return self._records is not None

    def records_beside(self, pairs: Pairs) -> Pairs:
        """Returns the hottest of DRAM's records that are not among pairs, as many as the indexes have room to name."""
        records = self._named(self.share.static_entries + len(pairs))
        beside = records[~records.are_in(pairs)][: self.share.static_entries]
        return Pairs(beside.order_index, beside.keys, self.num_slots + beside.places)

    def count_known(self, keys: np.ndarray, places: np.ndarray) -> None:
        """Counts a lookup of keys that the host knows, int64 [N, O], as kernels count others."""
        in_slots = (places >= 0) & (places < self.num_slots)
        in_records = places >= self.num_slots
        missed = (places < 0) & (keys >= 0)
        by_order = [each.sum(axis=0) for each in (in_slots, in_records, missed)]
        self.counts_of_known += np.concatenate([*by_order, [(keys == -1).sum()]])

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Returns the places of keys, int64 [N, O], as int64 [N, O];
        -1 if neither slots nor indexed records hold them."""
        places = np.full(keys.shape, -1, dtype=np.int64)
        area, heads = self._host_index
        for order, (start, count) in enumerate(heads.tolist()):
            if count:
                places[:, order] = kernels.find_entries(
                    area[start : start + count], np.ascontiguousarray(keys[:, order])
                )
        return places
