"""Static slots: a table's static set in shared memory, whose entries can be changed under its readers.

Flows in: entries to place, epochs to publish. Flows out: records in slots, and an index of them for either parity of
epochs. A slot that an epoch names is never written while that epoch is read; who publishes epochs says when one has
been left. Not for several threads at once. Shapes: S slots, n entries.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .. import kernels
from ..layout import BUCKET_KEYS
from .placed import index_head

PIECE_SLOTS = 1 << 16  # looked at at once, so that looking at all takes little memory
COUNT_MAX = np.uint32(2**32 - 3)


class StaticSlots:
    """The slots of one table. `keys` int64 [S] and `order_index` uint8 [S] say what each holds; a key of -1 is none."""

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
        self.live = np.zeros(len(records), dtype=bool)  # what the newest epoch names

    @property
    def num_live(self) -> int:
        """Entries of the newest epoch."""
        return int(self.live.sum())

    @property
    def num_free(self) -> int:
        """Slots that no epoch names."""
        return int((self.keys < 0).sum())

    def adopt(self, num_loaded: int) -> None:
        """Takes the first num_loaded records as they lie there, loaded from a placement;
        damaged ones count as free slots."""
        for start in range(0, num_loaded, PIECE_SLOTS):
            part = np.s_[start : min(start + PIECE_SLOTS, num_loaded)]
            trailers = self.records[part, -kernels.RECORD_TRAILER.itemsize :].copy().view(kernels.RECORD_TRAILER)[:, 0]
            self.keys[part], self.order_index[part] = trailers["key"], trailers["order_index"]

    def counted(self, counts_of: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        """Returns one more than (order index, key) -> count says of each live slot, 0 for others; uint32 [S]."""
        counted = np.zeros(len(self.keys), dtype=np.uint32)
        for start in range(0, len(self.keys), PIECE_SLOTS):
            live = start + np.flatnonzero(self.live[start : start + PIECE_SLOTS])
            counted[live] = np.minimum(counts_of(self.order_index[live], self.keys[live]), COUNT_MAX) + np.uint32(1)
        return counted

    def write(self, order_index: np.ndarray, keys: np.ndarray, entries: np.ndarray, seed: int) -> np.ndarray:
        """Writes entries, uint8 [n, entry_bytes], into free slots and returns those, int64 [n];
        n is at most `num_free`.

        seed: of the records' checksums.
        """
        slots = np.flatnonzero(self.keys < 0)[: len(keys)].copy()  # a view would keep the places of all free slots
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
        """Makes epoch's index name the slots of `live`, bool [S]; at most `capacity` of them.
        Nobody may be in epoch - 2.

        What is published then, of all tables, is `live` from then on; until that it may be given up.
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
        """Frees the slots that the newest epoch does not name. Nobody may be in the one before."""
        self.keys[~self.live] = -1
