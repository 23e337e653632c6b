"""The dram tier: a table's rows kept whole, or a set-associative cache of its entries.

Flows in: (order index, key) pairs to copy out, entries offered after a read. Flows out: entries in the caller's buffer
and which pairs were there. An entry is found by its whole key and order, never by a hash alone,
so a hit is always exact.
"""

from __future__ import annotations

import threading

import numpy as np

from ..decisions.budget import CACHE_WAYS
from ..errors import CorruptPageError

_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: multiplicative hashing (Knuth, TAOCP 3, 6.4)


class ResidentTable:
    """All rows of a table in memory, by row id. Read-only once filled, so any number of threads may read.

    `bad_pages` maps the pages that could not be loaded to what was wrong: their rows are refused, the others served.
    """

    def __init__(self, num_rows: int, row_bytes: int, rows_per_page: int) -> None:
        self.rows = np.empty((num_rows, row_bytes), dtype=np.uint8)
        self.bad_pages: dict[int, str] = {}
        self._rows_per_page = rows_per_page

    def copy_rows(self, row_ids: np.ndarray, out: np.ndarray) -> None:
        """Copies rows, ids int64 [R] with -1 for zero rows, into out, uint8 [R, row_bytes] contiguous.

        Raises `CorruptPageError` where one of them lies on a page that could not be loaded.
        """
        if self.bad_pages:
            wanted = np.unique(row_ids[row_ids >= 0] // self._rows_per_page).tolist()
            for page_number in sorted(self.bad_pages.keys() & set(wanted)):
                raise CorruptPageError(self.bad_pages[page_number])
        np.take(self.rows, row_ids, axis=0, out=out, mode="clip")
        out[row_ids < 0] = 0


class EntryCache:
    """A recency cache of entries: sets of 8, the least recently used of a set gives way. One lock guards all.

    Memory is `num_sets * 8 * (entry_bytes + 13)` bytes: entries, and for each its key,
    order index and time of last use.
    """

    def __init__(self, num_sets: int, entry_bytes: int) -> None:
        self._num_sets = num_sets
        self._keys = np.full((num_sets, CACHE_WAYS), -1, dtype=np.int64)  # -1: empty
        self._order_index = np.zeros((num_sets, CACHE_WAYS), dtype=np.int8)
        self._last_use = np.zeros((num_sets, CACHE_WAYS), dtype=np.uint32)
        self._entries = np.empty((num_sets * CACHE_WAYS, entry_bytes), dtype=np.uint8)
        self._clock = 0
        self.lock = threading.Lock()  # also held over a fork, so that a child never sees half an update

    @property
    def capacity(self) -> int:
        """Entries that fit."""
        return self._num_sets * CACHE_WAYS

    def copy_hits(self, order_index: np.ndarray, keys: np.ndarray, out: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Copies the entries that are there; returns which were, bool [M].

        order_index, keys: int64 [M], keys >= 0; out: uint8 [*, entry_bytes]; entry i goes to out[places[i]].
        """
        sets = self._sets_of(order_index, keys)
        with self.lock:
            same = (self._keys[sets] == keys[:, None]) & (self._order_index[sets] == order_index[:, None])
            hits = same.any(axis=1)
            sets, ways = sets[hits], same[hits].argmax(axis=1)
            out[places[hits]] = self._entries[sets * CACHE_WAYS + ways]
            self._last_use[sets, ways] = self._tick()
        return hits

    def holds(self, order_index: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Returns which pairs are there, bool [M], without using them."""
        sets = self._sets_of(order_index, keys)
        with self.lock:
            same = (self._keys[sets] == keys[:, None]) & (self._order_index[sets] == order_index[:, None])
        return same.any(axis=1)

    def offer(self, order_index: np.ndarray, keys: np.ndarray, entries: np.ndarray) -> None:
        """Puts entries in, each in place of the least recently used of its set; (order index, key) pairs must differ.

        order_index, keys: int64 [M]; entries: uint8 [M, entry_bytes]. Those that are there already, and more than 8 new
        ones for one set, are left out.
        """
        sets = self._sets_of(order_index, keys)
        with self.lock:
            same = (self._keys[sets] == keys[:, None]) & (self._order_index[sets] == order_index[:, None])
            new = np.flatnonzero(~same.any(axis=1))
            new = new[np.argsort(sets[new], kind="stable")]
            new_sets = sets[new]
            first_of_set = np.searchsorted(new_sets, new_sets, side="left")
            rank = np.arange(len(new)) - first_of_set
            new, new_sets, rank = (part[rank < CACHE_WAYS] for part in (new, new_sets, rank))
            ways = np.argsort(self._last_use[new_sets], axis=1, kind="stable")[np.arange(len(new)), rank]
            self._keys[new_sets, ways] = keys[new]
            self._order_index[new_sets, ways] = order_index[new]
            self._entries[new_sets * CACHE_WAYS + ways] = entries[new]
            self._last_use[new_sets, ways] = self._tick()

    def _sets_of(self, order_index: np.ndarray, keys: np.ndarray) -> np.ndarray:
        mixed = (keys.astype(np.uint64) ^ (order_index.astype(np.uint64) << np.uint64(56))) * _MIX
        mixed = (mixed ^ (mixed >> np.uint64(29))) * _MIX
        return ((mixed >> np.uint64(32)) * np.uint64(self._num_sets) >> np.uint64(32)).astype(np.int64)

    def _tick(self) -> int:
        """Returns the next time; when 32 bits run out, all entries become equally old."""
        self._clock += 1
        if self._clock == 2**32:
            self._last_use[:] = 0
            self._clock = 1
        return self._clock
