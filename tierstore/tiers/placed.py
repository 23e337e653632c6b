"""Placed entries: an open placement file, and the static set that is loaded from its top.

Input: a placement file and the memory that a plan gives. Output: a table's `StaticSet`: indexes of all placed entries,
the hottest records in memory, the rest in the file, one read each. Errors: `FormatError` for a damaged index; a damaged
record is left out, so that its key is read from pages.

Loading is sequential, past the page cache if the file system allows that, and checks every record.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import kernels
from ..causes import Fault, named
from ..decisions.budget import LINE_BYTES, TableShare
from ..durable import read_up_to
from ..errors import CorruptPageError, FormatError
from ..formats.catalog import CatalogImage
from ..formats.placement import GROUP_RECORDS, PlacedIndex, PlacedTable, Placement, read_head
from ..layout import UNIT_BYTES, TableLayout, round_up
from ..process.progress import OnProgress
from ..process.workers import joined_pool
from .nvme import open_direct
from .overlay import Patches

logger = logging.getLogger("tierstore")

LOAD_THREADS = (
    6  # most wait for the disk while others check; measured, 2 read at 0.81 of its sequential rate, 6 at 0.98
)
LOAD_BYTES = 4 << 20
CHECKED_BUCKETS = 1 << 16  # of an index at once: some ms, so that signals are handled soon


class PlacementFile:
    """An open placement. Any number of threads may read; `close` must come after the last read.
    Pruning does not harm it.

    overlays: by table, the rows of versions over those of its records, which are the base's; whoever opens a store at a
    version sets them, before records are loaded.
    """

    def __init__(self, image: CatalogImage, epoch: int, *, direct: bool) -> None:
        """Opens the file of a published epoch and checks its head; raises `FormatError`. direct: for O_DIRECT too."""
        self.overlays: Mapping[str, Patches] = {}
        record = image.placements[epoch]
        self.path = Path(image.path) / record.file
        self.fd = self.direct_fd = -1
        try:
            self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would block for ever
        except OSError as error:
            fault = Fault(FormatError, "plan again, or open the store with placement='none'")
            raise named(error, f"{self.path} (placement {epoch})", self.path, fault=fault) from error
        try:
            if not stat.S_ISREG(os.fstat(self.fd).st_mode):
                raise FormatError(f"{self.path} (placement {epoch}): it is no regular file; plan again")
            self.placement: Placement = read_head(self.path, self.fd, record, image.tables)
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)
            if direct:
                self.direct_fd = open_direct(self.path)
        except BaseException:
            self.close()
            raise

    @property
    def handle(self) -> tuple[int, int, int]:
        """(descriptor, O_DIRECT descriptor or -1, bytes)."""
        return self.fd, self.direct_fd, self.placement.num_bytes

    def keys(self, layout: TableLayout, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the keys of `count` of a table's entries from `start` on, the hottest of all first: their indices of
        orders, uint8 [n], and keys, int64 [n]. Fewer at the end; damaged ones are left out. Blocks on the disk."""
        table = self.placement.tables.get(layout.spec.name)
        first, end = (min(at, table.num_entries if table else 0) for at in (start, start + count))
        order_index, keys = [np.empty(0, dtype=np.uint8)], [np.empty(0, dtype=np.int64)]
        while table is not None and first < end:
            num = min(end - first, max(1, LOAD_BYTES // table.record_bytes))
            data = bytearray(os.pread(self.fd, num * table.record_bytes, table.byte_start + first * table.record_bytes))
            whole = np.frombuffer(data, dtype=np.uint8)[: len(data) // table.record_bytes * table.record_bytes]
            records = whole.reshape(-1, table.record_bytes)
            kernels.invalidate_bad_records(records, table.entry_bytes, layout.seed)
            trailers = records[:, -kernels.RECORD_TRAILER.itemsize :].copy().view(kernels.RECORD_TRAILER)[:, 0]
            trailers = trailers[trailers["key"] >= 0]
            order_index.append(trailers["order_index"].astype(np.uint8))
            keys.append(trailers["key"].astype(np.int64))
            first += num
        return np.concatenate(order_index), np.concatenate(keys)

    def close(self) -> None:
        """Closes the descriptors; closing twice is harmless, also after an interrupted one: each is forgotten first."""
        fds, self.fd, self.direct_fd = (self.fd, self.direct_fd), -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)


@dataclass(frozen=True)
class StaticSet:
    """A table's placed entries: indexes by order, uint8 [num_buckets, 64]; the records in memory,
    uint8 [loaded, record_bytes].

    area: all indexes, back to back; seed: of the records' checksums; loaded_start: the number of the first record in
    memory. Those before it lie in another tier, or are read from the file, as those behind the loaded ones are.
    """

    table: PlacedTable
    file: PlacementFile
    indexes: tuple[np.ndarray, ...]
    area: np.ndarray
    records: np.ndarray
    seed: int
    loaded_start: int = 0

    def to_native(self) -> kernels.StaticRecord:
        """Returns it as the C++ side takes it: the same in every epoch, in memory and in the file."""
        area = index_head([len(index) for index in self.indexes]), self.area
        return kernels.StaticRecord(
            areas=[area, area],
            records=self.records,
            num_placed=self.table.num_entries,
            byte_start=self.table.byte_start,
            file=self.file.handle,
            loaded_start=self.loaded_start,
        )

    def places(self, order_index: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Returns the places of (order index, key) pairs, int64 [M] each; -1 where a pair has none."""
        places = np.full(len(keys), -1, dtype=np.int64)
        for index, buckets in enumerate(self.indexes):
            of_order = order_index == index
            if of_order.any():
                places[of_order] = kernels.find_entries(buckets, keys[of_order])
        return places

    def loads(self, places: np.ndarray) -> np.ndarray:
        """Returns bool [M]: whether the records of places, int64 [M], -1 for none, lie in memory."""
        return (places >= self.loaded_start) & (places < self.loaded_start + len(self.records))

    def read(self, order_index: np.ndarray, keys: np.ndarray, places: np.ndarray, entries: np.ndarray) -> int:
        """Reads placed entries, one read each, into entries, uint8 [M, entry_bytes], and checks them;
        returns the bytes read.

        Portable, one after the other; blocks. Raises `CorruptPageError` naming the first that is damaged or another's.
        """
        size = self.table.record_bytes
        for i, place in enumerate(places.tolist()):
            data = os.pread(self.file.fd, size, self.table.byte_start + place * size)
            record = np.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=np.uint8).reshape(1, size)
            damaged = kernels.invalidate_bad_records(record, self.table.entry_bytes, self.seed)
            trailer = record[0, -kernels.RECORD_TRAILER.itemsize :].view(kernels.RECORD_TRAILER)[0]
            if damaged or trailer["key"] != keys[i] or trailer["order_index"] != order_index[i]:
                raise CorruptPageError(fault_text(self.table.name, self.file.path, place, 0))
            entries[i] = record[0, : self.table.entry_bytes]
        return len(places) * size


def load_all_static(
    file: PlacementFile | None,
    layouts: Sequence[TableLayout],
    shares: Sequence[TableShare],
    parts: Sequence[np.ndarray],
    on_progress: OnProgress | None,
) -> list[StaticSet | None]:
    """Loads every table's static set into its part of the block. on_progress: (bytes done, bytes in all),
    in this thread."""
    if file is None:
        return [None] * len(layouts)
    total, done = sum(share.static_bytes for share in shares), 0

    def on_bytes(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if on_progress:
            on_progress(done, total)

    return [
        _load_static(file, layout, share, part, on_bytes)
        for layout, share, part in zip(layouts, shares, parts, strict=True)
    ]


def _load_static(
    file: PlacementFile, layout: TableLayout, share: TableShare, memory: np.ndarray, on_bytes: Callable[[int], None]
) -> StaticSet | None:
    """Loads a table's indexes and the records that fit its share; returns None if the placement has nothing of the
    table.

    memory: uint8, page-aligned: `static_bytes`, then `index_bytes`. on_bytes is called with bytes as they are read, in
    this thread. Blocks. Raises `FormatError` if an index is damaged.
    """
    table = file.placement.tables.get(layout.spec.name)
    if table is None or share.resident:
        return None
    start = round_up(share.static_bytes, LINE_BYTES)
    area = memory[start : start + table.index_bytes].reshape(-1, kernels.INDEX_BUCKET.itemsize)
    indexes = load_indexes(file, table, area)
    first, part = share.static_start, memory[: share.static_bytes]
    num_damaged = load_records(file, table, part, share.static_entries, layout.seed, on_bytes, first)
    records = memory[: share.static_entries * table.record_bytes].reshape(-1, table.record_bytes)
    num_left_out = sum(
        kernels.drop_bad_entries(
            buckets[at : at + CHECKED_BUCKETS], order_index, records, table.num_entries, table.entry_bytes, first
        )
        for order_index, buckets in enumerate(indexes)
        for at in range(0, len(buckets), CHECKED_BUCKETS)
    )
    if num_damaged or num_left_out:
        logger.error(
            "%s: %d placed entries of table %s are damaged and %d left out: their keys are read from pages; plan again",
            file.path, num_damaged, table.name, num_left_out,
        )  # fmt: skip
    return StaticSet(table, file, indexes, area, records, layout.seed, first)


def load_indexes(file: PlacementFile, table: PlacedTable, area: np.ndarray) -> tuple[np.ndarray, ...]:
    """Reads a table's indexes into area, uint8 [buckets, 64], back to back; returns each. Raises `FormatError`:
    one is bad."""
    indexes, at = [], 0
    for index in table.indexes:
        buckets = area[at : at + index.num_buckets]
        _load_index(file, index, buckets)
        indexes.append(buckets)
        at += index.num_buckets
    return tuple(indexes)


def index_head(num_buckets: Sequence[int]) -> np.ndarray:
    """Returns the head of an area of indexes, uint8 [128]: where each order's buckets begin and how many there are."""
    head = np.zeros(1, dtype=kernels.INDEX_HEAD)
    head["num_buckets"][0, : len(num_buckets)] = num_buckets
    head["bucket_start"][0, : len(num_buckets)] = np.cumsum([0, *num_buckets[:-1]])
    return head.view(np.uint8)


def fault_text(table_name: str, path: Path, place: int, detail: int) -> str:
    """Returns the message of a placed entry that cannot be served; detail: 0 for a wrong checksum or key,
    else an errno."""
    what = "its checksum or its key is wrong" if detail == 0 else "the file ends before it"
    if detail > 0:
        what = os.strerror(detail)
    return (
        f"placed entry {place} of table {table_name} in {path}: {what}; "
        f"plan again, or open the store with placement='none'"
    )


def _load_index(file: PlacementFile, index: PlacedIndex, buckets: np.ndarray) -> None:
    raw = buckets.reshape(-1)
    checksum = done = 0
    for start in range(0, len(raw), LOAD_BYTES):
        part = raw[start : start + LOAD_BYTES]
        done += read_up_to(file.fd, part, index.byte_start + start, _log_unread)
        checksum = kernels.crc32c(part, checksum)
    if done < index.num_bytes or checksum != index.checksum:
        raise FormatError(f"{file.path}: an index is damaged; plan again, or open the store with placement='none'")


def load_records(
    file: PlacementFile,
    table: PlacedTable,
    memory: np.ndarray,
    num_entries: int,
    seed: int,
    on_bytes: Callable[[int], None],
    first: int = 0,
) -> int:
    """Reads num_entries records from `first` on into memory, uint8 in whole units of 4,096 bytes, checked as they come.

    first: a multiple of GROUP_RECORDS. Rows that the file's `overlays` have take the place of the base's. Returns how
    many are damaged: those have a key of -1 in their trailers. on_bytes is called as `_load_static` says. Blocks.
    """
    assert first % GROUP_RECORDS == 0, "records are read in whole units"
    step = max(1, LOAD_BYTES // (table.record_bytes * GROUP_RECORDS)) * GROUP_RECORDS
    file_start = table.byte_start + first * table.record_bytes

    def load(start: int) -> tuple[int, int]:
        end = min(start + step, num_entries)
        byte_start, byte_end = start * table.record_bytes, round_up(end * table.record_bytes, UNIT_BYTES)
        part = memory[byte_start:byte_end]
        at, done = file_start + byte_start, 0
        if file.direct_fd >= 0:
            done = read_up_to(file.direct_fd, part, at, _log_unread)
        if done < len(part):
            done += read_up_to(file.fd, part[done:], at + done, _log_unread)
            os.posix_fadvise(file.fd, at, len(part), os.POSIX_FADV_DONTNEED)
        part[done:] = 0  # what could not be read must not pass for a record
        records = memory[byte_start : end * table.record_bytes].reshape(-1, table.record_bytes)
        return kernels.invalidate_bad_records(records, table.entry_bytes, seed), len(part)

    num_damaged = 0
    with joined_pool(LOAD_THREADS, "tierstore-load") as pool:
        try:
            for future in as_completed([pool.submit(load, start) for start in range(0, num_entries, step)]):
                damaged, num_bytes = future.result()
                num_damaged += damaged
                on_bytes(num_bytes)
        except BaseException:  # an interrupt does not wait for the rest
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    overlay = file.overlays.get(table.name)
    if overlay is not None:
        loaded = memory[: num_entries * table.record_bytes].reshape(-1, table.record_bytes)
        num_damaged += overlay.patch(loaded, seed)
    return num_damaged


def _log_unread(error: OSError, byte_start: int) -> None:
    logger.error("placement file: reading at byte %d: %s", byte_start, error)
