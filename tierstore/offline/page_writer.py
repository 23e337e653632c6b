"""Pages on their way to a new shard: written by a thread of their own, past the page cache, while the next are made.

Input: a descriptor at its beginning, and buffers that a caller fills one after the other. Output: the file, byte for
byte what was given, not yet synced. Errors: `OSError` of the disk, in the caller's thread: at the next buffer, or at
the end.

Why past the page cache: to copy a page there, and to find memory for it, took more of a build's processor time than
all else; and a large store would push out what processes beside it use. Why a thread: a worker that waits for the disk
reads and checksums nothing meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import logging
import mmap
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from ..durable import write_all
from ..process.workers import joined_pool

BUFFERS = 2  # one is filled while the other is written

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def writing(fd: int, shape: tuple[int, int]) -> Iterator[PageWriter]:
    """A `PageWriter` for one thread, which may close the descriptor after the `with`: whatever ended it, no write is
    under way any more.

    Args:
        fd: Open for writing.
        shape: Of a buffer: pages, and bytes of a page, whole units of 4 KiB.
    """
    with joined_pool(1, "tierstore-write") as pool:
        yield PageWriter(fd, shape, pool)


class PageWriter:
    """Writes buffers to a descriptor, in the order given. See `writing`."""

    def __init__(self, fd: int, shape: tuple[int, int], pool: ThreadPoolExecutor) -> None:
        """pool: of one thread."""
        self._fd, self._pool = fd, pool
        self._free = deque(aligned_pages(shape) for _ in range(BUFFERS))
        self._under_way: deque[tuple[Future[None], np.ndarray]] = deque()
        write_past_cache(fd)

    def buffer(self) -> np.ndarray:
        """Returns a buffer to fill, uint8 [pages, page_bytes]. Blocks until one was written. Raises `OSError`."""
        if not self._free:
            self._finish_oldest()
        return self._free[0]

    def write(self, pages: np.ndarray) -> None:
        """Writes the first pages of the last `buffer`, which must not be touched until it is given again."""
        buffer = self._free.popleft()
        assert np.shares_memory(pages, buffer)
        self._under_way.append((self._pool.submit(write_pages, self._fd, pages), buffer))

    def finish(self) -> None:
        """Blocks until everything is written. Raises `OSError`."""
        while self._under_way:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        future, buffer = self._under_way[0]
        future.result()
        self._under_way.popleft()
        self._free.append(buffer)


def aligned_pages(shape: tuple[int, int]) -> np.ndarray:
    """Returns zeros, uint8 of a shape, at the beginning of a page of memory, as direct writes need it."""
    return np.frombuffer(mmap.mmap(-1, shape[0] * shape[1]), dtype=np.uint8).reshape(shape)


def write_past_cache(fd: int) -> None:
    """Has a file written past the page cache, if its file system can do that."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as error:
        _report_cached_writes(str(error))


def write_pages(fd: int, pages: np.ndarray) -> None:
    """Writes pages at the descriptor's position, through the page cache if it must be."""
    start = os.lseek(fd, 0, os.SEEK_CUR)
    try:
        write_all(fd, pages)
    except OSError as error:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
            raise
        # Some file systems take the flag, and then not the write.
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        _report_cached_writes(str(error))
        os.lseek(fd, start, os.SEEK_SET)
        write_all(fd, pages)


@functools.cache
def _report_cached_writes(reason: str) -> None:
    """Logs it once for each reason."""
    _log.info("shards are written through the page cache: their file system has no direct writes (%s)", reason)
