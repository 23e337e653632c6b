"""A tensor's bytes in a file: where they lie, in which file as it was when its header was read, and how to read them.

Input: what a header says. Output: bytes. Errors: `FormatError` if the file has become shorter;
`OSError` if it cannot be read.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..durable import read_exactly
from ..errors import FormatError

DIGEST_BLOCK_BYTES = 4096
DIGEST_BLOCKS_PER_TENSOR = 16


class FileIdentity(NamedTuple):
    """Which file was read: another length, time or inode means that it was changed or replaced since."""

    num_bytes: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> FileIdentity:
        """Returns the identity that a stat gives."""
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)


@dataclass(frozen=True)
class TensorFile:
    """What a file holds.

    header_digest: the SHA-256 (hex) of its header. unusable: why each tensor that cannot be read cannot. inner_names:
    of tensors that lie in a dict within the file's dict, the full names (outer keys first) by each shorter name.
    offsets: of a rank's file, where in the whole tensor the part of each begins.
    """

    tensors: list[StoredTensor]
    header_digest: str
    identity: FileIdentity
    unusable: dict[str, str] = field(default_factory=dict)
    inner_names: dict[str, list[str]] = field(default_factory=dict)
    offsets: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: row-major elements of `dtype` (safetensors' names) from byte `byte_start` on.

    identity: of the file when its header was read; None if nobody looked. pieces: of a tensor that lies in several
    places, each of them a range of its rows; path and byte_start are then the first one's.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    byte_start: int
    num_bytes: int
    identity: FileIdentity | None = None
    pieces: tuple[StoredTensor, ...] = ()

    @property
    def places(self) -> tuple[StoredTensor, ...]:
        """The pieces; of a tensor that lies in one place, itself."""
        return self.pieces or (self,)

    def first_rows(self, num_rows: int) -> StoredTensor:
        """Returns the tensor of the first rows only."""
        assert 0 < num_rows <= self.shape[0]
        if self.pieces:
            kept, left = [], num_rows
            for piece in self.pieces:
                if left > 0:
                    kept.append(piece.first_rows(min(left, piece.shape[0])))
                    left -= piece.shape[0]
            return stacked(kept, self.name, (num_rows, *self.shape[1:]))
        num_bytes = self.num_bytes // self.shape[0] * num_rows
        return replace(self, shape=(num_rows, *self.shape[1:]), num_bytes=num_bytes)

    def read_bytes(self) -> bytes:
        """Reads the whole tensor: for scalars and hash buffers, not for tables. Blocks on the disk."""
        if self.pieces:
            return b"".join(piece.read_bytes() for piece in self.pieces)
        out = np.empty(self.num_bytes, dtype=np.uint8)
        fd = os.open(self.path, os.O_RDONLY)
        try:
            read_exactly(fd, out, self.byte_start, f"tensor {self.name} in {self.path}")
        finally:
            os.close(fd)
        return out.tobytes()


def stacked(pieces: Sequence[StoredTensor], name: str, shape: tuple[int, ...]) -> StoredTensor:
    """Returns the tensor that pieces of its rows make up, in their order; one piece is the tensor itself."""
    num_bytes = sum(piece.num_bytes for piece in pieces)
    if not pieces:
        raise FormatError(f"of shape {list(shape)} is empty; there is no row to store")
    if len(pieces) == 1:
        return replace(pieces[0], name=name, shape=shape)
    return replace(pieces[0], name=name, shape=shape, num_bytes=num_bytes, pieces=tuple(pieces))


def first_hole(tensor: StoredTensor) -> tuple[int, int] | None:
    """Returns the first range of the tensor's bytes that was never written (byte offsets in the file),
    None without one.

    Downloaders that allocate a file's full length at once leave such holes where they have not come yet.
    They read as zeros.
    """
    fd = os.open(tensor.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        end = tensor.byte_start + tensor.num_bytes
        if found.st_blocks * 512 >= found.st_size or not tensor.num_bytes:
            return None
        hole = os.lseek(fd, tensor.byte_start, os.SEEK_HOLE)
        if hole >= end:
            return None
        try:
            return hole, min(end, os.lseek(fd, hole, os.SEEK_DATA))
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: there is no data behind it
                raise
            return hole, end
    finally:
        os.close(fd)


def sampled(fd: int, tensors: Sequence[StoredTensor]) -> Iterator[memoryview]:
    """Yields the samples of tensors of one file, by ascending offset. Each is overwritten by the next one."""
    block = np.empty(DIGEST_BLOCK_BYTES, dtype=np.uint8)
    ordered = sorted(tensors, key=lambda tensor: tensor.byte_start)
    for tensor in ordered:  # all are asked for first: one by one, a cold disk takes ten times as long
        for byte_start, num_bytes in _sample_blocks(tensor.num_bytes):
            os.posix_fadvise(fd, tensor.byte_start + byte_start, num_bytes, os.POSIX_FADV_WILLNEED)
    for tensor in ordered:
        for byte_start, num_bytes in _sample_blocks(tensor.num_bytes):
            part = block[:num_bytes]
            read_exactly(fd, part, tensor.byte_start + byte_start, f"tensor {tensor.name} in {tensor.path}")
            yield part.data


def check_identity(file: Path, found: os.stat_result, identity: FileIdentity) -> None:
    """Raises `FormatError` if a file is not the one whose header was read."""
    now = FileIdentity.of(found)
    if now != identity:
        changes = [
            f"{what} {before} before, {after} now"
            for what, before, after in zip(("bytes", "mtime_ns", "inode"), identity, now, strict=True)
            if before != after
        ]
        raise FormatError(
            f"{file} was changed while it was read ({'; '.join(changes)}): its rows may be of two checkpoints; let "
            f"whoever writes it finish, and run again"
        )


def _sample_blocks(num_bytes: int) -> list[tuple[int, int]]:
    """Returns (start, length) of the blocks of a tensor that go into its checkpoint's digest:
    first and last included."""
    if num_bytes <= DIGEST_BLOCK_BYTES * DIGEST_BLOCKS_PER_TENSOR:
        return [
            (start, min(DIGEST_BLOCK_BYTES, num_bytes - start)) for start in range(0, num_bytes, DIGEST_BLOCK_BYTES)
        ]
    last = num_bytes - DIGEST_BLOCK_BYTES
    return [(last * i // (DIGEST_BLOCKS_PER_TENSOR - 1), DIGEST_BLOCK_BYTES) for i in range(DIGEST_BLOCKS_PER_TENSOR)]
