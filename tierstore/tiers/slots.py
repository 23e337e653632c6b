"""Static slots: a table's static set in shared memory, whose entries can be changed under its readers.

Input: entries to place, epochs to publish. Output: records in slots, and for either parity of epochs an index of them.
Errors: none but asserts; a caller that respects `num_free` and `capacity` meets none.

A slot that an epoch names is never written while somebody may read that epoch. The publisher of epochs waits for the
grace period, then calls `free_dead`. One thread at a time. Shapes: S slots, n entries.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .. import kernels
from ..layout import BUCKET_KEYS
from .placed import index_head

PIECE_SLOTS = 1 << 16  # handled at once, so that a pass over all takes little memory
COUNT_MAX = np.uint32(2**32 - 3)


class StaticSlots:
    """The slots of one table.

    Attributes:
        keys, order_index: int64 [S] and uint8 [S], the entry in each slot; key -1: the slot is free.
        live: bool [S], which slots the newest epoch names.
        capacity: The most entries that one epoch may name.
    """

    def __init__(
        self,
        records: np.ndarray,
        heads: tuple[np.ndarray, np.ndarray],
        areas: tuple[np.ndarray, np.ndarray],
        num_orders: int,
        entry_bytes: int,
        capacity: int,
    ) -> None:
        """records: uint8 [S, record_bytes]; heads: uint8 [128] and areas: uint8 [buckets, 64], one of each a parity."""
        self.records, self.heads, self.areas = records, heads, areas
        self.capacity = capacity
        self._num_orders, self._entry_bytes = num_orders, entry_bytes
        self.keys = np.full(len(records), -1, dtype=np.int64)
        self.order_index = np.zeros(len(records), dtype=np.uint8)
        self.live = np.zeros(len(records), dtype=bool)

    @property
    def num_live(self) -> int:
        """Entries of the newest epoch."""
        return int(self.live.sum())

    @property
    def num_free(self) -> int:
        """Slots that no epoch names."""
        return int((self.keys < 0).sum())

    def adopt(self, num_loaded: int) -> None:
        """Takes over the first num_loaded records, which were loaded from a placement; damaged ones are free slots."""
        for start in range(0, num_loaded, PIECE_SLOTS):
            part = np.s_[start : min(start + PIECE_SLOTS, num_loaded)]
            trailers = self.records[part, -kernels.RECORD_TRAILER.itemsize :].copy().view(kernels.RECORD_TRAILER)[:, 0]
            self.keys[part], self.order_index[part] = trailers["key"], trailers["order_index"]

    def counted(self, counts_of: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        """Returns 1 + the count of each live slot's entry, by counts_of(order_index, keys); 0 for others; uint32
        [S]."""
        counted = np.zeros(len(self.keys), dtype=np.uint32)
        for start in range(0, len(self.keys), PIECE_SLOTS):
            live = start + np.flatnonzero(self.live[start : start + PIECE_SLOTS])
            counted[live] = np.minimum(counts_of(self.order_index[live], self.keys[live]), COUNT_MAX) + np.uint32(1)
        return counted

    def write(self, order_index: np.ndarray, keys: np.ndarray, entries: np.ndarray, seed: int) -> np.ndarray:
        """Writes entries, uint8 [n, entry_bytes], into free slots, n at most `num_free`; returns the slots, int64 [n].

        seed: of the records' checksums.
        """
        slots = np.flatnonzero(self.keys < 0)[: len(keys)].copy()  # a view would keep the array of all free slots
        assert len(slots) == len(keys), "more entries than free slots"
        if len(keys) == 0:
            return slots
        new = np.empty((len(keys), self.records.shape[1]), dtype=np.uint8)
        new[:, : self._entry_bytes] = entries
        kernels.seal_records(new, keys, order_index.astype(np.uint32), self._entry_bytes, seed)
        self.records[slots] = new
        self.keys[slots], self.order_index[slots] = keys, order_index
        return slots

    def index(self, epoch: int, live: np.ndarray) -> None:
        """Makes the index of an epoch name the slots of `live`, bool [S], at most `capacity` of them.

        The index of epoch - 2 is overwritten, so that no reader may be left there. The caller then publishes the epoch,
        of all tables at once, and assigns `live`; an epoch that it does not publish may be indexed again.
        """
        assert live.sum() <= self.capacity
        head, area = self.heads[epoch % 2], self.areas[epoch % 2]
        num_entries = [np.count_nonzero(live & (self.order_index == order)) for order in range(self._num_orders)]
        num_buckets = [int(count // BUCKET_KEYS) + 1 if count else 0 for count in num_entries]
        head[:] = index_head(num_buckets)
        at = 0
        for order, count in enumerate(num_buckets):  # one after the other, since slots and keys of all are a lot
            if count:
                slots = np.flatnonzero(live & (self.order_index == order)).astype(np.uint32)
                kernels.index_entries(self.keys[slots], slots, area[at : at + count])
            at += count

    def free_dead(self) -> None:
        """Frees the slots that the newest epoch does not name. No reader may be left in the epoch before."""
        self.keys[~self.live] = -1
