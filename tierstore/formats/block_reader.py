"""Reads the blocks of a table that stays in place, and makes the rows of its side tables: checksums, copied planes.

Input: a checkpoint's table and how it lies in place. Output: for a build, a reader for each side table, whose rows come
range by range. Errors: those of `PlaneReader`. Each block is read once, for its checksum; a copied plane once, for its
pages.
"""

from __future__ import annotations

import os
import threading

import numpy as np

from .. import kernels
from ..causes import naming
from ..durable import read_exactly
from .in_place import BLOCK_BYTES, InPlaceLayout, Stretch, num_blocks_of, source_of_copy
from .stored_tensor import StoredTensor
from .table_source import PlaneReader, TableSource

READ_BYTES = 4 << 20  # at once; each thread keeps a buffer of it


def side_readers(source: TableSource, layout: InPlaceLayout) -> dict[str, PlaneReader]:
    """Returns the readers of a table's side tables, by name. They hold descriptors until they are closed."""
    readers: dict[str, PlaneReader] = {}
    try:
        readers[layout.checksums.spec.name] = ChecksumReader(source, layout)
        for side in layout.side_tables[1:]:
            readers[side.spec.name] = PlaneReader(source_of_copy(source, layout, side))
    except BaseException:
        for reader in readers.values():
            reader.close()
        raise
    return readers


class ChecksumReader(PlaneReader):
    """The checksums of a table's blocks, as rows of 4 bytes: row b is that of block b."""

    def __init__(self, source: TableSource, layout: InPlaceLayout) -> None:
        super().__init__(source)
        self.source_row_bytes = BLOCK_BYTES
        self._layout = layout
        self._stretches = [
            pair
            for plane, of_source in zip(layout.planes, source.planes, strict=True)
            for pair in zip(plane.stretches, (t for t in of_source.tensors if t.num_bytes), strict=False)
        ]  # each with its tensor; of a copied plane none
        self._buffers = threading.local()

    def read(self, row_start: int, row_end: int) -> list[np.ndarray]:
        """Returns the checksums of blocks [row_start, row_end) as uint8 [n, 4]. Blocks on the disk; see `PlaneReader`.

        Raises `FormatError` if a file has become shorter, `ConfigError` if the disk fails.
        """
        out = np.empty(row_end - row_start, dtype="<u4")
        for stretch, tensor in self._stretches:
            block_end = stretch.block_start + num_blocks_of(tensor.byte_start, tensor.num_bytes)
            start, end = max(row_start, stretch.block_start), min(row_end, block_end)
            if start < end:
                self._sum_up(stretch, tensor, start, end, out[start - row_start : end - row_start])
        return [out.view(np.uint8).reshape(-1, 4)]

    def will_read(self, row_start: int, row_end: int) -> None:
        """Nothing: `read` has the system read ahead of itself."""

    def check_unchanged(self) -> None:
        """Raises `FormatError` if a file was changed, replaced or removed since its header was read.

        Compares no samples: a block that changed unseen has another checksum whenever it is read.
        """
        self._check_identities()

    def _sum_up(self, stretch: Stretch, tensor: StoredTensor, start: int, end: int, out: np.ndarray) -> None:
        first = stretch.byte_start // BLOCK_BYTES - stretch.block_start
        file_bytes = tensor.identity.num_bytes if tensor.identity is not None else tensor.path.stat().st_size
        for block in range(start, end, READ_BYTES // BLOCK_BYTES):
            block_end = min(end, block + READ_BYTES // BLOCK_BYTES)
            byte_start = (first + block) * BLOCK_BYTES
            if block == start:
                os.posix_fadvise(self._fds[tensor.path], byte_start, READ_BYTES, os.POSIX_FADV_WILLNEED)
            # The next piece comes while this one is summed up: several threads at one file confuse its read-ahead.
            os.posix_fadvise(self._fds[tensor.path], byte_start + READ_BYTES, READ_BYTES, os.POSIX_FADV_WILLNEED)
            num_bytes = min((first + block_end) * BLOCK_BYTES, file_bytes) - byte_start
            data = self._buffer()[:num_bytes]
            what = f"blocks {block} to {block_end} of tensor {tensor.name} in {tensor.path}"
            with naming(what, tensor.path):
                read_exactly(self._fds[tensor.path], data, byte_start, what)
            out[block - start : block_end - start] = kernels.block_checksums(data, block, self._layout.seed)

    def _buffer(self) -> np.ndarray:
        if not hasattr(self._buffers, "data"):
            self._buffers.data = np.empty(READ_BYTES, dtype=np.uint8)
        data: np.ndarray = self._buffers.data
        return data
