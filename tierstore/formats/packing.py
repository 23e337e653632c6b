"""Blocks of columns, packed by threads while the next ones are filled, and written in the order in which they came.

Input: arrays of one size that a writer fills, and gives away once they are full. Output: packed blocks in its
`ColumnWriter`. Errors: those of `pack_block` and of the writer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import numpy as np

from ..process.ahead import Ahead
from .columns import ColumnWriter, PackedBlock, pack_block


class Packing:
    """Packs blocks of one section; close it. One thread at a time."""

    def __init__(self, writer: ColumnWriter, section: str, level: int, threads: int) -> None:
        """level: of zstd. threads: that pack; 0: whoever puts a block packs it. The bytes are the same."""
        self._writer, self._section, self._level, self._threads = writer, section, level, threads
        self._ahead: Ahead[PackedBlock] | None = None
        self._under_way: deque[np.ndarray] = deque()  # of each block that threads pack, in order
        self._spare: list[np.ndarray] = []  # written blocks: pages that need not be fresh again

    def put(self, columns: Mapping[str, np.ndarray], filled: np.ndarray) -> np.ndarray:
        """Packs a block and writes it, or one before it; returns memory for the next. Blocks on the disk.

        filled: what columns lie in; it must not be touched until it is returned.
        """
        if not self._threads:
            self._writer.write_packed(pack_block(self._section, columns, self._level))
            return filled
        self._ahead = self._ahead or Ahead(self._threads, "tierstore-packing")
        self._ahead.put(pack_block, self._section, columns, self._level)
        self._under_way.append(filled)
        self._write(self._threads)
        return self._spare.pop() if self._spare else np.empty_like(filled)

    def finish(self) -> None:
        """Writes what is left. Blocks on the disk."""
        self._write(0)

    def _write(self, left: int) -> None:
        """Writes blocks that threads have packed, until `left` are under way."""
        while self._ahead is not None and len(self._ahead) > left:
            block = self._ahead.take()
            self._spare.append(self._under_way.popleft())
            self._writer.write_packed(block)

    def close(self) -> None:
        """Drops what is not written. Closing twice is harmless."""
        if self._ahead is not None:
            self._ahead.close()
