"""Runs on their way back: `RunReader`. `RunWriter` is in run_writer.py.

Input: which records are wanted. Output: records that were checked; the row ids of a run.
Errors: `CorruptPageError` for damage, by file, place and row; `FormatError` for a file that is not the catalog's run.
"""

from __future__ import annotations

import os
import stat
import threading
from io import FileIO
from pathlib import Path

import numpy as np

from .. import kernels
from ..causes import Fault, allow_open_files, naming
from ..errors import ConfigError, CorruptPageError, FormatError
from ..formats.run import REMEDY, ROW_IDS_OF_STRETCH, Run, RunLayout, check_head, read_row_ids
from ..layout import UNIT_BYTES
from ..tiers.nvme import choose_io, open_direct
from .run_writer import RunWriter as RunWriter

READ_BYTES = 32 << 10  # the largest read, unless a record takes more
DEPTH = 64  # reads under way for one call
CALLS = 2  # that read at the same time
RUNS_MAX = 65534  # open at once, of one table
LOADED_ROWS = 256 * ROW_IDS_OF_STRETCH  # row ids that are read at once: 1 MiB
MOVED_MAX = 4  # how often one call is read anew because a merge moved its records: merges take seconds


class RunReader:
    """The open runs of one table, by ordinals that `RowPlaces` has too. Any number of threads may read."""

    def __init__(
        self, store: Path, layout: RunLayout, io: str = "auto", depth: int = DEPTH, calls: int = CALLS
    ) -> None:
        """io: as of `tierstore.open`; all but "uring" read through the page cache. depth: reads under way for one call.
        calls: how many read at the same time; others wait."""
        self.layout = layout
        self._store = store
        self._mode = "uring" if choose_io(io).mode == "uring" else "pread"
        read_bytes = max(READ_BYTES, layout.read_bytes_max)
        self._records = kernels.RunRecords(layout.record_bytes, layout.seed, depth, read_bytes, calls, self._mode)
        self._lock = threading.Lock()  # guards the runs
        self._runs: dict[int, tuple[Run, Path, FileIO]] = {}  # by ordinal, with a file of our own

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that it takes."""
        return self._records.num_bytes

    @property
    def runs(self) -> dict[int, Run]:
        """The open runs, by ordinal."""
        with self._lock:
            return {ordinal: run for ordinal, (run, _, _) in self._runs.items()}

    def add(self, run: Run, path: Path | None = None) -> int:
        """Opens a run and checks its head; returns its ordinal, 0 or more. Raises `FormatError`.

        path: where the file is if it has not its name yet.
        """
        file = self._store / run.file
        with self._lock:
            if len(self._runs) >= RUNS_MAX:
                raise ConfigError(f"{file}: {RUNS_MAX} runs of table {self.layout.table} are open; commit and merge")
            ordinal = next(i for i in range(RUNS_MAX) if i not in self._runs)
            allow_open_files(3 * len(self._runs) + 3)
            opened = _open_run(path or file)
            check_head(file, opened.fileno(), self.layout, run)
            self._runs[ordinal] = run, file, opened  # first: what it has from here on, `close` closes
            self._add_records(ordinal, run, opened, path or file)
            return ordinal

    def _add_records(self, ordinal: int, run: Run, opened: FileIO, path: Path) -> None:
        direct = None
        try:
            direct_fd = open_direct(path) if self._mode == "uring" else -1
            direct = FileIO(direct_fd) if direct_fd >= 0 else None
            self._records.add(ordinal, run.number, opened.fileno(), direct_fd, UNIT_BYTES, run.num_records)
        except BaseException:
            self._remove(ordinal)
            raise
        finally:
            if direct is not None:
                direct.close()

    def remove(self, ordinal: int) -> None:
        """Closes a run once no read of it is under way, without waiting for that. Its ordinal may be given again."""
        with self._lock:
            self._remove(ordinal)

    def _remove(self, ordinal: int) -> None:
        """With the lock held. Each part may be done again: an interrupt may come between any two."""
        self._records.remove(ordinal)
        self._runs[ordinal][2].close()
        del self._runs[ordinal]

    def load(self, ordinal: int, places: kernels.RowPlaces) -> None:
        """Notes all rows of a run in `places`: newer than what was there. Blocks on the disk."""
        for start in range(0, self.runs[ordinal].num_records, LOADED_ROWS):
            places.put(self.row_ids(ordinal, start, LOADED_ROWS), ordinal, start)

    def row_ids(self, ordinal: int, start: int = 0, count: int | None = None) -> np.ndarray:
        """Returns the row ids of a run, int64 [count], from place `start` on. Blocks on the disk.

        start: a multiple of ROW_IDS_OF_STRETCH. count: fewer are returned at the run's end; None: all.
        """
        run, file, opened = self._runs[ordinal]
        left = max(0, run.num_records - start)
        ids = np.empty(left if count is None else min(count, left), dtype=np.int64)
        read_row_ids(file, opened.fileno(), self.layout, run, start, ids)
        return ids

    def read(
        self,
        row_ids: np.ndarray,
        runs: np.ndarray,
        places: np.ndarray,
        out: np.ndarray,
        index: kernels.RowPlaces | None = None,
    ) -> None:
        """Reads records, each checked: whole, of its run, and of the row that is asked for. Blocks on the disk.

        Places are sorted, and neighbours within some KiB are one read; many are under way at once. Order and repeats
        are the caller's. Signals are handled every 50 ms or so.

        Args:
            row_ids: int64 [n].
            runs: uint16 [n], ordinals.
            places: uint32 [n].
            out: uint8 [n, record_bytes] (without seals), contiguous in each row; undefined if it raises.
            index: Where `runs` and `places` were found: asked again if a merge has moved records meanwhile.

        Raises:
            CorruptPageError: A record is damaged or cannot be read; names file, place and row.
            TimeoutError: The disk has stopped answering.
        """
        for _ in range(MOVED_MAX):
            fault = self._records.read(row_ids, runs, places, out)
            if fault is None:
                return
            if index is None or fault[0] not in ("no run", "other row"):
                break
            runs, places, before = np.empty_like(runs), np.empty_like(places), (runs, places)
            index.find(row_ids, runs, places)
            if np.array_equal(runs, before[0]) and np.array_equal(places, before[1]):
                break
        assert fault is not None
        raise self._error(*fault)

    def _error(self, kind: str, ordinal: int, place: int, row_id: int, detail: int) -> Exception:
        if kind == "timeout":
            return TimeoutError(f"{self._store}: no record came within {detail} s; the disk has stopped answering")
        run, file, _ = self._runs.get(ordinal, (None, None, -1))
        if run is None or kind == "no run":
            return ConfigError(f"table {self.layout.table}: row {row_id} should be record {place} of run {ordinal}, "
                               f"which is not open or shorter; open the training again")  # fmt: skip
        what = f"{file}: record {place} (row {row_id} of table {self.layout.table})"
        if kind == "disk" and detail >= 0:
            return CorruptPageError(f"{what} cannot be read: {os.strerror(detail)}; check the disk; {REMEDY}")
        wrong = {
            "disk": "the file ends before it: it was cut while open",
            "damaged": "its checksum is wrong: it was damaged, or is of another table",
            "other row": "another row's record is in its place",
        }
        return CorruptPageError(f"{what}: {wrong[kind]}; {REMEDY}")

    def close(self) -> None:
        """Closes all files. Any number of times."""
        for ordinal in list(self._runs):
            self.remove(ordinal)


def _open_run(file: Path) -> FileIO:
    """Opens a run. Returns a file object: if an interrupt keeps it from being named, it is closed."""
    refused = f"{file}: it is no regular file; {REMEDY}"
    with naming(file, file, fault=Fault(FormatError, REMEDY)):
        try:
            opened = FileIO(file, opener=_open)
        except IsADirectoryError:
            raise FormatError(refused) from None
    if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
        opened.close()
        raise FormatError(refused)
    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return opened


def _open(file: str, flags: int) -> int:
    return os.open(file, flags | os.O_NONBLOCK)  # a pipe in its place would block for ever
