"""The nvme tier: pages read from shards and checked before anybody sees their rows.

Flows in: page numbers of a table. Flows out: pages in the caller's buffer, each verified. Refuses, with
`CorruptPageError`, a page that the disk does not give, or gives short, damaged, moved or foreign.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..errors import CorruptPageError, FormatError
from ..formats.catalog import CatalogImage, TableLayout
from ..formats.page import check_pages

STAGING_WAIT_S = 300.0


class TableFiles:
    """The open shards of one table. Any number of threads may read; `close` must come after the last read."""

    def __init__(self, image: CatalogImage, table: TableLayout) -> None:
        """Opens every shard and compares its length with the catalog's; raises `FormatError` where it differs."""
        self.table = table
        self._fds: list[int] = []
        try:
            for index in range(table.num_shards):
                self._fds.append(_open_shard(image, table, index))
        except BaseException:
            self.close()
            raise

    def fd(self, shard_index: int) -> int:
        """Returns the descriptor of a shard."""
        return self._fds[shard_index]

    def close(self) -> None:
        """Closes the descriptors; closing twice is harmless."""
        while self._fds:
            os.close(self._fds.pop())


def _open_shard(image: CatalogImage, table: TableLayout, index: int) -> int:
    shard = image.shards[table.spec.name][index]
    file = Path(image.path) / shard.file
    what = f"shard {index} of table {table.spec.name} ({file})"
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise FormatError(f"{what}: {error.strerror}; copy it again or rebuild") from error
    found_bytes = os.fstat(fd).st_size
    if found_bytes != shard.num_bytes:
        os.close(fd)
        raise FormatError(
            f"{what}: {found_bytes} bytes on disk, the catalog says {shard.num_bytes}; "
            f"the copy was cut short or is another file: copy it again or rebuild"
        )
    return fd


class PageReader(ABC):
    """Reads pages; the one contract that every way of reading keeps.

    `read` may be called from any number of threads. It never returns a page that is not the one asked for.
    """

    name: str

    def read(self, files: TableFiles, page_numbers: np.ndarray, out: np.ndarray) -> None:
        """Reads pages, int64 [P] ascending without repeats, into out, uint8 [P, page_bytes] contiguous, and checks each.

        Blocks until all are there. Raises `CorruptPageError` naming the first bad page; `out` is then undefined.
        """
        table = files.table
        assert out.shape == (len(page_numbers), table.page_bytes)
        assert out.flags.c_contiguous
        try:
            self._fill(files, page_numbers, out)
        except OSError as error:
            raise CorruptPageError(
                f"pages of table {table.spec.name} cannot be read: {error}; check the disk, then run 'tierstore verify'"
            ) from error
        check_pages(out, page_numbers, table.seed, table.spec.name)

    @abstractmethod
    def _fill(self, files: TableFiles, page_numbers: np.ndarray, out: np.ndarray) -> None:
        """Fills `out` with the pages, unchecked; raises OSError or CorruptPageError where the disk does not give them."""


class PreadReader(PageReader):
    """Portable, without threads: asks the kernel for every run of neighbouring pages first, then copies run by run.

    `posix_fadvise(WILLNEED)` starts a read and returns, so the disk sees the whole batch at once, and the `preadv` that
    follows finds the pages in the page cache or on their way.
    """

    name = "pread"

    def _fill(self, files: TableFiles, page_numbers: np.ndarray, out: np.ndarray) -> None:
        table = files.table
        shard = page_numbers // table.pages_per_shard
        breaks = np.flatnonzero((np.diff(page_numbers) != 1) | (np.diff(shard) != 0)) + 1
        starts = np.concatenate([[0], breaks]).tolist()
        ends = np.concatenate([breaks, [len(page_numbers)]]).tolist()
        byte_starts = ((page_numbers - shard * table.pages_per_shard) * table.page_bytes).tolist()
        runs = [(files.fd(int(shard[i])), byte_starts[i], i, j) for i, j in zip(starts, ends, strict=True)]
        if len(runs) > 1:
            for fd, byte_start, i, j in runs:
                os.posix_fadvise(fd, byte_start, (j - i) * table.page_bytes, os.POSIX_FADV_WILLNEED)
        for fd, byte_start, i, j in runs:
            _read_run(fd, byte_start, out[i:j], f"page {page_numbers[i]} of table {table.spec.name}")


def _read_run(fd: int, byte_start: int, pages: np.ndarray, what: str) -> None:
    view = pages.reshape(-1).data
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], byte_start + done)
        if count == 0:
            raise CorruptPageError(
                f"{what}: its shard ends at byte {byte_start + done}; it was cut while open: restore it from a copy or rebuild"
            )
        done += count


class StagingPool:
    """A fixed number of equal buffers for pages on their way; a thread that finds none free waits for one."""

    def __init__(self, num_buffers: int, buffer_bytes: int) -> None:
        self._buffers = [np.empty(buffer_bytes, dtype=np.uint8) for _ in range(num_buffers)]
        self._free = list(self._buffers)
        self._changed = threading.Condition()

    @contextmanager
    def buffer(self) -> Iterator[np.ndarray]:
        """Lends a buffer, uint8 [buffer_bytes]. Raises `TimeoutError` where none comes free within STAGING_WAIT_S."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._free, timeout=STAGING_WAIT_S):
                raise TimeoutError(
                    f"no staging buffer came free within {STAGING_WAIT_S} s: the disk has stopped answering"
                )
            buffer = self._free.pop()
        try:
            yield buffer
        finally:
            with self._changed:
                self._free.append(buffer)
                self._changed.notify()

    def after_fork(self) -> None:
        """Takes back, in a forked child, the buffers that the parent's other threads held."""
        self._free = list(self._buffers)
        self._changed = threading.Condition()
