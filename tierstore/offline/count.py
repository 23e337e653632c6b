"""Counting in bounded memory: 128-bit items come in any order and number, distinct items and their sums go out sorted.

Input: items with weights, until a buffer is full. It is then sorted, equal items are summed, and the sorted run goes
to a temporary file, while the next buffer fills. Output: all runs merged, block by block. What an item means (an
n-gram, a table's key) is the caller's matter. The file has no name in the folder,
so that nothing is left of it however the process ends.

Errors: memory without room for an item; a disk that is full. One thread adds and merges; another of this module's own
sorts and writes. An interrupt of the first does not wait for the second, which ends by itself and closes the file.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

import numpy as np

from .. import kernels
from ..causes import named
from ..durable import read_exactly, write_all
from ..errors import BudgetError, TierStoreError
from ..process.workers import aside

ITEM_BYTES = 16
SORT_BYTES = 48  # that `kernels.sort_items` takes an item, and 8 a weight
BLOCK_ITEMS_MIN = 256  # of each run while all are merged: fewer would be more steps than work
RUN_WAIT_S = 600.0  # a buffer that takes longer to sort and write has a disk that has stopped

Counted = tuple[np.ndarray, np.ndarray]  # items uint64 [M, 2], sorted and distinct, and their sums int64 [M, W]


class _Run(NamedTuple):
    """A sorted run in the file: first its items, then its sums, as narrow as they may be."""

    items_start: int
    sums_start: int
    num_items: int
    sums_dtype: np.dtype


class ItemCounter:
    """Sums weights of 128-bit items. A context manager; `close` gives memory and disk back.

    folder: where the temporary file is made. num_weights: W, columns that are summed side by side. memory_bytes: the
    most that buffers and sorting take together, and then blocks of runs and merging; runs, if it has room for fewer
    than there are, at about 40 KiB each, take that much all the same. On disk a distinct item of a run takes 16 bytes,
    and 4 a weight (8 where sums do not fit). Sixteen million windows of text, two columns: 3 s on two cores, 200 MiB on
    disk; more memory than the default was slower, not faster.

    Raises `BudgetError` if memory_bytes has no room for an item. One thread at a time may use it.
    """

    def __init__(self, folder: str | os.PathLike[str], num_weights: int, memory_bytes: int = 256 << 20) -> None:
        self._folder = Path(folder)
        self._num_weights = num_weights
        self._memory_bytes = memory_bytes
        record_bytes = ITEM_BYTES + 8 * num_weights
        capacity = memory_bytes // (2 * record_bytes + SORT_BYTES + 8 * num_weights)
        if num_weights < 1 or capacity < 1:
            raise BudgetError(
                f"counting: {memory_bytes} bytes for items with {num_weights} weights; there must be a weight, and "
                f"{2 * record_bytes + SORT_BYTES + 8 * num_weights} bytes an item: ask for more"
            )
        self._merge_items = memory_bytes // (3 * record_bytes + SORT_BYTES + 8 * num_weights)
        self._buffers = [_Buffer.of(capacity, num_weights) for _ in range(2)]  # the first fills, the second is sorted
        self._file: IO[bytes] | None = None
        self._bytes_spilled = 0
        self._runs: list[_Run] = []
        self._whole: Counted | None = None  # all there is, if it never filled a buffer
        self._sorter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tierstore-count")
        self._sorting: Future[None] | None = None
        self._num_taken = 0  # by the last merge, so far

    @property
    def bytes_spilled(self) -> int:
        """Bytes of the temporary file."""
        return self._bytes_spilled

    def add(self, items: np.ndarray, weights: np.ndarray | int) -> None:
        """Adds items, uint64 [N, 2], the high word first, with weights, int64 [N, W],
        or 1 each in the column of that number.

        Blocks while both buffers are full. Raises `TypeError` and `ValueError` for arguments that do not fit, or after
        `merged`; `BudgetError` if the disk is full, `ConfigError` if it fails,
        also for items that were added before.
        """
        if not self._buffers:
            raise ValueError("items were merged or the counter was closed; make another ItemCounter")
        if items.dtype != np.uint64:
            raise TypeError(f"items are {items.dtype}, expected uint64")
        if items.ndim != 2 or items.shape[1] != 2:
            raise ValueError(f"items are {list(items.shape)}, expected [items, 2]")
        if isinstance(weights, np.ndarray):
            if not np.can_cast(weights.dtype, np.int64):
                raise TypeError(f"weights are {weights.dtype}, expected int64")
            if weights.shape != (len(items), self._num_weights):
                raise ValueError(f"weights are {list(weights.shape)}, expected [{len(items)}, {self._num_weights}]")
        elif not 0 <= weights < self._num_weights:
            raise ValueError(f"column {weights}: there are {self._num_weights}, from 0 on")
        done = 0
        while done < len(items):
            done += self._buffers[0].fill(items[done:], weights if isinstance(weights, int) else weights[done:])
            if self._buffers[0].is_full:
                self._wait()
                self._buffers.reverse()
                self._sorting = self._sorter.submit(self._spill, self._buffers[1])

    def merged(self) -> Iterator[Counted]:
        """Returns all distinct items, sorted over all blocks, with their sums: (uint64 [M, 2], int64 [M, W]) at a time.

        Ends adding; may be called again. Blocks while the last buffer is sorted, the iterator while it reads.
        Raises as `add`.
        """
        if self._buffers:
            self._wait()
            if self._runs:
                self._sorting = last = self._sorter.submit(self._spill, self._buffers[0])
                try:
                    self._wait()
                finally:
                    if last.done():  # if it failed, the buffer is whole still, and the next call writes it again
                        self._sorting = None
            else:
                self._whole = aside(self._buffers[0].counted)
            self._buffers = []
        if self._whole is not None:
            return iter([self._whole] if len(self._whole[0]) else [])
        return self._merge()

    @property
    def num_merged(self) -> tuple[int, int]:
        """How many items `merged` has taken from the runs, and of how many, once it was called: its progress."""
        num_items = sum(run.num_items for run in self._runs) if self._whole is None else len(self._whole[0])
        return (self._num_taken if self._whole is None else num_items), num_items

    def close(self) -> None:
        """Gives memory and disk back; if a run is being written still, as soon as that has ended,
        without waiting for it."""
        self._buffers = []
        self._whole = None
        with contextlib.suppress(RuntimeError):  # closed before
            self._sorter.submit(self._close_file)
        self._sorter.shutdown(wait=self._sorting is None or self._sorting.done())

    def _close_file(self) -> None:
        """In the sorting thread, which may have been writing to the file until now."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> ItemCounter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait(self) -> None:
        """Waits for the buffer that is being sorted, if one is, and raises what came of it."""
        if self._sorting is None:
            return
        try:
            self._sorting.result(RUN_WAIT_S)
        except FutureTimeoutError:
            raise TimeoutError(
                f"{self._folder}: a run was not written within {RUN_WAIT_S:.0f} s; the disk has stopped answering"
            ) from None

    def _spill(self, buffer: _Buffer) -> None:
        """Sorts and sums a buffer, writes what comes of it as a run, and leaves it empty. In the sorting thread,
        or alone."""
        if not buffer.num_items:
            return
        items, sums = buffer.counted()
        narrow = sums.min() >= 0 and sums.max() < 2**32
        sums = sums.astype(np.uint32) if narrow else sums
        sums_start = self._bytes_spilled + items.nbytes
        run = _Run(self._bytes_spilled, sums_start, len(items), sums.dtype)
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
            write_all(self._file.fileno(), items, run.items_start)
            write_all(self._file.fileno(), sums, run.sums_start)
        except OSError as error:
            raise self._named(error) from error
        self._bytes_spilled = sums_start + sums.nbytes
        self._runs.append(run)
        buffer.num_items = 0

    def _merge(self) -> Iterator[Counted]:
        """Merges the runs: what lies up to the least last item of all blocks, of which more is to come, is complete.

        Arrays are made once, and blocks are sorted in one thread: the allocator keeps what was freed, for each thread
        by itself, and took twice the memory.
        """
        assert self._file is not None, "there are runs"
        block_items = max(BLOCK_ITEMS_MIN, self._merge_items // len(self._runs))
        heads = [_Head.of(self._file, run, self._num_weights, block_items) for run in self._runs]
        block = _Buffer.of(sum(len(head.items) for head in heads), self._num_weights)
        self._num_taken = 0
        while heads:
            try:
                for head in heads:
                    head.read()
            except OSError as error:
                raise self._named(error) from error
            limits = [head.last for head in heads if not head.at_end]
            block.num_items = 0
            for head in heads:
                block.fill(*head.take(min(limits) if limits else None))
            heads = [head for head in heads if head.num_left or not head.at_end]
            self._num_taken += block.num_items
            yield self._sorter.submit(block.counted).result()

    def _named(self, error: OSError) -> TierStoreError:
        what = f"counts in {self._folder}, {self._bytes_spilled} bytes so far"
        return named(error, what, self._folder, writing=True, note=f"{self._memory_bytes} bytes are counted in memory")


@dataclass
class _Buffer:
    """Items to be counted, the first `num_items` of its room. Written by the thread that adds,
    then by the one that sorts."""

    items: np.ndarray
    weights: np.ndarray
    num_items: int = 0

    @classmethod
    def of(cls, capacity: int, num_weights: int) -> _Buffer:
        return cls(np.empty((capacity, 2), dtype=np.uint64), np.empty((capacity, num_weights), dtype=np.int64))

    @property
    def is_full(self) -> bool:
        return self.num_items == len(self.items)

    def fill(self, items: np.ndarray, weights: np.ndarray | int) -> int:
        """Takes as many items as there is room for, and returns how many."""
        start, end = self.num_items, min(self.num_items + len(items), len(self.items))
        self.items[start:end] = items[: end - start]
        if isinstance(weights, np.ndarray):
            self.weights[start:end] = weights[: end - start]
        else:
            self.weights[start:end] = 0
            self.weights[start:end, weights] = 1
        self.num_items = end
        return end - start

    def counted(self) -> Counted:
        return _sorted_and_summed(self.items[: self.num_items], self.weights[: self.num_items])


@dataclass
class _Head:
    """The items of a run that were read and not taken yet: `items[start:end]`."""

    file: IO[bytes]
    run: _Run
    items: np.ndarray
    sums: np.ndarray
    num_read: int = 0
    start: int = 0
    end: int = 0

    @classmethod
    def of(cls, file: IO[bytes], run: _Run, num_weights: int, num_items: int) -> _Head:
        """num_items: for how many there is room at most."""
        room = min(num_items, run.num_items)
        return cls(file, run, np.empty((room, 2), dtype=np.uint64), np.empty((room, num_weights), dtype=np.int64))

    @property
    def at_end(self) -> bool:
        return self.num_read == self.run.num_items

    @property
    def num_left(self) -> int:
        return self.end - self.start

    @property
    def last(self) -> tuple[int, int]:
        return _item(self.items, self.end - 1)

    def read(self) -> None:
        """Reads until the room is full, or the run's end is reached."""
        for array in (self.items, self.sums):
            array[: self.num_left] = array[self.start : self.end]
        self.start, self.end = 0, self.num_left
        count = min(len(self.items) - self.end, self.run.num_items - self.num_read)
        if count == 0:
            return
        new = slice(self.end, self.end + count)
        sums = self.sums[new]
        narrow = sums if sums.dtype == self.run.sums_dtype else np.empty(sums.shape, dtype=self.run.sums_dtype)
        for array, start in ((self.items[new], self.run.items_start), (narrow, self.run.sums_start)):
            byte_start = start + self.num_read * array.itemsize * array.shape[1]
            read_exactly(self.file.fileno(), array.reshape(-1).view(np.uint8), byte_start, "a sorted run of counts")
        if narrow is not sums:
            sums[:] = narrow
        self.end += count
        self.num_read += count

    def take(self, limit: tuple[int, int] | None) -> Counted:
        """Removes and returns what lies up to and at `limit`; all, if it is None. It is valid until the next `read`."""
        first, self.start = self.start, self.end
        if limit is not None:
            items = self.items
            self.start = bisect.bisect_right(range(self.end), limit, lo=first, key=lambda at: _item(items, at))
        return self.items[first : self.start], self.sums[first : self.start]


def _sorted_and_summed(items: np.ndarray, weights: np.ndarray) -> Counted:
    kernels.sort_items(items, weights)
    return kernels.sum_items(items, weights, 0)


def _item(items: np.ndarray, index: int) -> tuple[int, int]:
    return int(items[index, 0]), int(items[index, 1])
