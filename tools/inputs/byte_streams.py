"""The bytes of a file, decompressed on the way if need be, in pieces whose memory is bounded whatever the file says.

Input: a path and the codec that its content names: "", "zstd", "gzip", "xz", "bzip2".
Output: pieces of bytes, each with how many bytes of the file it took; or a file object over them.
Errors: `FormatError` for damaged and cut streams, `ConfigError` for whole ones that need a dictionary or more memory,
or that unfold without end.
"""

from __future__ import annotations

import bz2
import contextlib
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

from tierstore.errors import ConfigError, FormatError
from tierstore.tiers.memory import available_memory
from tierstore.units import format_bytes

from .unfolding import Unfolding

CODECS = ("zstd", "gzip", "xz", "bzip2")
READ_BYTES = 1 << 20  # larger pieces are fresh pages each, and leave the processor's cache
# Compressed bytes at once. A byte of zstd or xz makes at most some 32 KiB: no piece grows past 256 MiB.
COMPRESSED_READ_BYTES = 1 << 13
WINDOW_BYTES_MAX = 1 << 31  # of zstd, what --long=31 makes: the decoder keeps as much in memory
WINDOW_BYTES_FREE = 1 << 27  # windows up to it, zstd's own limit, are read whatever memory is left
_GZIP_WINDOW = 31  # zlib's number for gzip's header and its largest window
_DAMAGED = (zstandard.ZstdError, zlib.error, lzma.LZMAError, OSError, EOFError)


def read_chunks(path: Path, codec: str) -> Iterator[tuple[bytes, int]]:
    """Yields (bytes, bytes of the file that they took). Blocks on the disk."""
    if not codec:
        yield from _plain(path, READ_BYTES)
        return
    unfolding = Unfolding(path, path.stat().st_size)
    frame: Any = None
    for data, read_bytes in _plain(path, COMPRESSED_READ_BYTES):
        while data:
            if frame is None:
                if codec != "zstd" and not data.strip(b"\0"):
                    break  # padding behind the last member
                frame = _decoder(path, codec, data)
            try:
                unfolded = frame.decompress(data)
            except _DAMAGED as error:
                raise FormatError(f"{path} is no {codec} file, or damaged ({error}); copy it again") from error
            unfolding.add(len(unfolded))
            yield unfolded, read_bytes
            read_bytes = 0  # counted once, also if several frames lie in it
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise FormatError(f"{path} ends within a {codec} frame: it was cut short; copy it again")


def _plain(path: Path, read_bytes: int) -> Iterator[tuple[bytes, int]]:
    with path.open("rb") as file:
        with contextlib.suppress(OSError):  # no file system must know it
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)  # reads further ahead
        while data := file.read(read_bytes):
            yield data, len(data)


def _decoder(path: Path, codec: str, data: bytes) -> Any:
    """Returns what decompresses the frame (or member) that `data` begins with; has decompress, eof and unused_data."""
    if codec == "gzip":
        return zlib.decompressobj(_GZIP_WINDOW)
    if codec == "xz":
        return lzma.LZMADecompressor(memlimit=WINDOW_BYTES_MAX)
    if codec == "bzip2":
        return bz2.BZ2Decompressor()
    _check_zstd(path, data)
    return zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX).decompressobj()


def _check_zstd(path: Path, data: bytes) -> None:
    """Raises for a whole frame that cannot be decoded here, before the decoder calls it damaged."""
    try:
        frame = zstandard.get_frame_parameters(data)
    except zstandard.ZstdError:
        return  # damaged, or a header that goes on in the next bytes: the decoder says
    if frame.dict_id:
        raise ConfigError(
            f"{path} was compressed with a dictionary, number {frame.dict_id}; decompress it with that: "
            "zstd -d -D DICTIONARY"
        )
    free = max(available_memory()[0], WINDOW_BYTES_FREE)
    most = min(free, WINDOW_BYTES_MAX)
    if frame.window_size > most:
        raise ConfigError(
            f"{path} was compressed with a window of {format_bytes(frame.window_size)}, and {format_bytes(most)} can "
            f"be taken for it here; compress it again without --long, or decompress it on a machine with more memory"
        )


class ChunkFile(io.RawIOBase):
    """A file object over `read_chunks`, for text and lines; wrap it in a buffer."""

    def __init__(self, path: Path, codec: str) -> None:
        self.consumed = 0  # bytes of the file that were read so far
        self._chunks = read_chunks(path, codec)
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills a part of `buffer` and returns how much; 0 at the end."""
        while not self._left:
            data, read_bytes = next(self._chunks, (None, 0))
            if data is None:
                return 0
            self.consumed += read_bytes
            self._left = memoryview(data)
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


def first_bytes(path: Path, codec: str, count: int) -> bytes:
    """Returns the first `count` bytes of what a file holds, fewer if it holds no more."""
    found = b""
    for data, _ in read_chunks(path, codec):
        found += data[: count - len(found)]
        if len(found) == count:
            break
    return found


def count_bytes(path: Path, codec: str) -> int:
    """Returns how many bytes a file holds, decompressed. Reads all of it."""
    return sum(len(data) for data, _ in read_chunks(path, codec)) if codec else path.stat().st_size
