"""The newest record of every row, rounded and in ascending order: the records are read once, front to back.

Input: a stream of records, oldest first, in any order of rows; of two records of one row the later one counts. Output:
`TouchedRows`. Errors: `BudgetError`; `OSError` of the disk, which the caller names.

Row ids come first: sorted, they say which records are the newest, and where each belongs. Then the stream passes by, a
few MiB at once, and every newest record is rounded into its place in memory: rows of a codec, a quarter of their
records, and no copy of the records themselves. Pieces of the stream have places of their own, so threads share them:
while one waits for the disk, others round. If memory has no room for the rows of the whole table, a pass before cuts
the table into stretches that fit, and appends every record to the file of its stretch; then each file is such a
stream. Nothing is written at random places.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from ...errors import BudgetError
from ...process.workers import joined_pool
from ...units import format_bytes
from .record_streams import READ_BYTES, RecordPiece, RecordStream, Stoppable, Stretch, append, partition
from .touched_rows import ROW_IDS, ROWS, TouchedRows

BINS_MAX = 1 << 16  # of row ids, that are counted to cut the table into stretches
STRETCH_BYTES_MIN = 1 << 20
BUFFER_BYTES_MIN = 4096
PASSING_BYTES = 4 * READ_BYTES  # of memory for a thread: records as read, their values, rows before and after
ORDERING_BYTES = 48  # of a record in memory while row ids are sorted: ids twice, order, and places
PLACING_BYTES = 16  # of a record in memory from then on, beside what becomes of it: row id and place


class Rounding(Protocol):
    """What becomes of records: some arrays by name, among them `ROWS`. Any number of threads may call it at once."""

    @property
    def widths(self) -> Mapping[str, int]:
        """Bytes of a row of each array."""

    def fill_before(self, row_ids: np.ndarray, rows: np.ndarray) -> None:
        """Fills rows, uint8 [n, width of `ROWS`], with the rows before, if rounding asks for them.

        row_ids: int64 [n], ascending. Blocks on the disk.
        """

    def __call__(self, records: np.ndarray, before: np.ndarray) -> Mapping[str, np.ndarray]:
        """Returns what is kept of records, uint8 [n, record_bytes]: contiguous [n, ...] by name. Only computes.

        before: uint8 [n, width of `ROWS`], as `fill_before` left them.
        """


def memory_to_sort(num_records: int, widths: Mapping[str, int], threads: int = 1) -> int:
    """Returns the bytes of memory in which so many records are sorted without being cut. widths: of a `Rounding`."""
    return num_records * _kept_bytes(widths) + threads * PASSING_BYTES


def _kept_bytes(widths: Mapping[str, int]) -> int:
    """Returns the bytes of memory that a record takes while its stretch is sorted."""
    return max(ORDERING_BYTES, PLACING_BYTES + sum(widths.values()))


def sort_touched_rows(
    stream: RecordStream,
    num_rows: int,
    folder: Path,
    memory_bytes: int,
    rounding: Rounding,
    stop: threading.Event,
    threads: int = 1,
) -> TouchedRows:
    """Rounds the newest record of each row, and keeps the rows in ascending order. Blocks on the disk.

    Args:
        stream: The records.
        num_rows: Of the table.
        folder: A new folder for the files; it is made.
        memory_bytes: What sorting may take.
        rounding: Makes rows of records.
        stop: Set by another thread that does not want the rows any more.
        threads: That read and round, if memory has room for what they hold.

    Raises:
        StoppedError: `stop` was set.
        BudgetError: So little memory would cut the table into too many stretches.
    """
    folder.mkdir(parents=True)
    stream = Stoppable(stream, stop)
    threads = max(1, min(threads, memory_bytes // (2 * PASSING_BYTES)))
    room = max(memory_bytes // 2, memory_bytes - threads * PASSING_BYTES)
    borders = _borders(stream, num_rows, memory_bytes, max(1, room // _kept_bytes(rounding.widths)))
    num_touched = 0
    if not len(borders):
        num_touched = _sort_stretch(stream, folder, rounding, threads)
    else:
        partition(stream, borders, folder, memory_bytes)
        for number in range(len(borders) + 1):
            stretch = Stretch(folder, number, stream.record_bytes)
            num_touched += _sort_stretch(Stoppable(stretch, stop), folder, rounding, threads)
            stretch.remove()
    return TouchedRows(folder, num_touched, rounding.widths)


def _sort_stretch(stream: RecordStream, folder: Path, rounding: Rounding, threads: int) -> int:
    """Appends the rows of a stream that fits in memory to the files of the table; returns how many there are."""
    row_ids, slots = _slots(stream)
    if not len(row_ids):
        return 0
    kept = {name: np.empty((len(row_ids), width), dtype=np.uint8) for name, width in rounding.widths.items()}
    ends = [len(row_ids) * (part + 1) // threads for part in range(threads)]

    def fill_before(part: int, give_up: threading.Event) -> None:
        del give_up  # one call is all that a thread has
        share = slice(ends[part - 1] if part else 0, ends[part])
        rounding.fill_before(row_ids[share], kept[ROWS][share])

    pieces = _Pieces(stream, slots)

    def round_pieces(part: int, give_up: threading.Event) -> None:
        del part  # whoever is free takes the next piece
        buffer = np.empty(0, dtype=np.uint8)
        while not give_up.is_set() and (found := pieces.take()) is not None:
            piece, slot = found
            if len(buffer) < len(slot) * stream.record_bytes:
                buffer = np.empty(len(slot) * stream.record_bytes, dtype=np.uint8)
            records = buffer[: len(slot) * stream.record_bytes].reshape(len(slot), stream.record_bytes)
            piece.read(records)
            _round_piece(records, slot, kept, rounding)

    _together(threads, fill_before)
    try:
        _together(threads, round_pieces)
    finally:
        pieces.close()
    append(folder / ROW_IDS, row_ids)
    for name, rows in kept.items():
        append(folder / name, rows)
    return len(row_ids)


def _round_piece(records: np.ndarray, slot: np.ndarray, kept: Mapping[str, np.ndarray], rounding: Rounding) -> None:
    """Rounds the newest ones of some records into their places. slot: int64 [n], -1: it is not the newest."""
    is_newest = slot >= 0
    if not is_newest.all():
        slot, records = slot[is_newest], records[is_newest]
    for name, made in rounding(records, kept[ROWS].take(slot, axis=0)).items():
        kept[name][slot] = made.view(np.uint8).reshape(len(slot), -1)


def _together(threads: int, work: Callable[[int, threading.Event], None]) -> None:
    """Calls work(part, give_up) in so many threads; raises an error of one, when all have ended.

    give_up: set as soon as one has failed.
    """
    give_up = threading.Event()
    if threads == 1:
        work(0, give_up)
        return

    def guarded(part: int) -> None:
        try:
            work(part, give_up)
        except BaseException:
            give_up.set()
            raise

    with joined_pool(threads, "tierstore-round") as pool:
        try:
            for task in [pool.submit(guarded, part) for part in range(threads)]:
                task.result()
        except BaseException:
            give_up.set()
            raise


@dataclass
class _Pieces:
    """The pieces of a stream, for threads to take in turn, each with the places of its records."""

    stream: RecordStream
    slots: np.ndarray
    _lock: threading.Lock = field(default_factory=threading.Lock)  # guards what follows
    _place: int = 0
    _iterator: Iterator[RecordPiece] | None = None

    def take(self) -> tuple[RecordPiece, np.ndarray] | None:
        """Returns the next piece, and int64 [n], as of `_slots`; None at the end."""
        with self._lock:
            if self._iterator is None:
                self._iterator = iter(self.stream.pieces())
            piece = next(self._iterator, None)
            if piece is None:
                return None
            start, self._place = self._place, self._place + len(piece.row_ids)
            return piece, self.slots[start : self._place]

    def close(self) -> None:
        """Closes the stream's files. No thread may be reading a piece any more."""
        close = getattr(self._iterator, "close", None)
        if close is not None:
            close()


def _slots(stream: RecordStream) -> tuple[np.ndarray, np.ndarray]:
    """Returns the row ids of a stream, int64 [m] ascending; and for every record, int64 [n], which of these it is the
    newest of, or -1."""
    row_ids = np.concatenate([np.empty(0, dtype=np.int64), *stream.row_ids()])
    order = np.argsort(row_ids, kind="stable")
    row_ids = row_ids[order]
    is_last = np.ones(len(row_ids), dtype=bool)
    is_last[:-1] = row_ids[1:] != row_ids[:-1]
    row_ids, newest = row_ids[is_last], order[is_last]
    slots = np.full(len(order), -1, dtype=np.int64)
    slots[newest] = np.arange(len(newest))
    return row_ids, slots


def _borders(stream: RecordStream, num_rows: int, memory_bytes: int, stretch_records: int) -> np.ndarray:
    """Returns where stretches of so many records end, int64 ascending: row ids, but for the last one's end."""
    bin_rows = -(-num_rows // min(num_rows, BINS_MAX))
    counts = np.zeros(-(-num_rows // bin_rows), dtype=np.int64)
    for row_ids in stream.row_ids():
        counts += np.bincount(row_ids // bin_rows, minlength=len(counts))
    borders, in_stretch = [], 0
    for number, count in enumerate(counts.tolist()):
        if in_stretch and in_stretch + count > stretch_records:
            borders.append(number * bin_rows)
            in_stretch = 0
        in_stretch += count
    if memory_bytes < STRETCH_BYTES_MIN or (len(borders) + 1) * BUFFER_BYTES_MIN > memory_bytes:
        needed = max(STRETCH_BYTES_MIN, (len(borders) + 1) * BUFFER_BYTES_MIN)
        raise BudgetError(
            f"{format_bytes(memory_bytes)} ({memory_bytes} bytes) of memory to sort {int(counts.sum())} records of "
            f"{stream.record_bytes} bytes, at least {format_bytes(needed)} ({needed} bytes) are needed; raise --dram"
        )
    return np.array(borders, dtype=np.int64)
