"""Rows through np.memmap: what a user writes first, with the kernel's default read-ahead or with MADV_RANDOM.

Input: a made store's shards. Output: rows of row ids, gathered by NumPy's fancy indexing, page faults and all, with no
check. A map is made for each run and given up after it, because mapped pages cannot be dropped from the page cache.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

from ..stores import MadeStore


class MappedRows:
    """The shards of a table, mapped. `rows` may be called by one thread."""

    def __init__(self, made: MadeStore, *, random: bool) -> None:
        layout = made.layout
        self._layout = layout
        self._shards: list[np.ndarray] = []
        for file in made.files:
            shard = np.memmap(file, dtype=np.uint8, mode="r")
            base: Any = shard.base
            if random:
                base.madvise(mmap.MADV_RANDOM)
            shape = (len(shard) // layout.page_bytes, layout.rows_per_page, layout.spec.row_bytes)
            strides = (layout.page_bytes, layout.spec.row_bytes, 1)
            self._shards.append(np.lib.stride_tricks.as_strided(shard, shape, strides, writeable=False))

    def touch(self) -> None:
        """Maps every page now, so that no fault is left for later."""
        for rows in self._shards:
            rows[:, 0, 0].sum()

    def rows(self, row_ids: np.ndarray, out: np.ndarray) -> None:
        """Copies rows of row_ids, int64 [M], into out, uint8 [M, row_bytes]."""
        page, slot = np.divmod(row_ids, self._layout.rows_per_page)
        shard, page = np.divmod(page, self._layout.pages_per_shard)
        for index, rows in enumerate(self._shards):
            here = shard == index
            if here.all():
                out[:] = rows[page, slot]
                return
            if here.any():
                out[here] = rows[page[here], slot[here]]
