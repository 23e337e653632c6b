"""Runs on their way to disk and back: `RunWriter` and `RunReader`.

Input: training records and their row ids; or which records are wanted. Output: a run, durable once it is synced and has
its name; or records that were checked. Errors: `BudgetError` and `ConfigError` of a disk that is full or fails, with no
file left; `CorruptPageError` for damage, naming file, place and row.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np

from .. import kernels
from ..formats.run import Run, RunLayout

BUFFER_BYTES = 4 << 20


class RunWriter:
    """Writes one run, past the page cache. One thread at a time uses it; `with` discards a run that was not named."""

    def __init__(self, store: Path, number: int, layout: RunLayout, buffer_bytes: int = BUFFER_BYTES) -> None:
        """Makes the file, under a temporary name, in the store's training folder.

        number: one that `TrainingRecords.last_run` has not reached.
        """
        raise NotImplementedError

    @property
    def path(self) -> Path:
        """Where the file is now: under its temporary name until `rename`."""
        raise NotImplementedError

    def buffer(self) -> np.ndarray:
        """Returns a buffer to fill, uint8 [n, stored_bytes], n at least 1: values and state at the start of each.

        Blocks until one was written. Raises what the disk said of earlier ones.
        """
        raise NotImplementedError

    def write(self, num_records: int, row_ids: np.ndarray) -> None:
        """Seals and writes the first records of the last `buffer`, which must not be touched until it is given again.

        row_ids: int64 [num_records], of these records. Does not wait for the disk.
        """
        raise NotImplementedError

    def finish(self) -> Run:
        """Writes what is left, row ids and head. Blocks until all is written; nothing is synced, the name is temporary.

        Records can be read from now on (`RunReader.add`).
        """
        raise NotImplementedError

    def sync(self) -> None:
        """Makes the content durable. Blocks on the disk. A failure is final: the run must be written anew."""
        raise NotImplementedError

    def rename(self) -> None:
        """Gives the file its name. It must be synced; the caller syncs the folder, once for many."""
        raise NotImplementedError

    def discard(self) -> None:
        """Closes the file, and removes it if it has not its name. Any number of times."""
        raise NotImplementedError

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


class RunReader:
    """The open runs of one table, by ordinals that `RowPlaces` has too. Any number of threads may read."""

    def __init__(self, store: Path, layout: RunLayout, io: str = "auto", depth: int = 64) -> None:
        """io: "auto", "uring" or "pread". depth: reads under way for one call."""
        raise NotImplementedError

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that it takes."""
        raise NotImplementedError

    def add(self, run: Run, path: Path | None = None) -> int:
        """Opens a run and checks its head; returns its ordinal, 0 or more. Raises `FormatError`.

        path: where the file is if it has not its name yet.
        """
        raise NotImplementedError

    def remove(self, ordinal: int) -> None:
        """Closes a run, once no read of it is under way. Its ordinal may be given again."""
        raise NotImplementedError

    def load(self, ordinal: int, places: kernels.RowPlaces) -> None:
        """Notes all rows of a run in `places`: newer than what was there. Blocks on the disk."""
        raise NotImplementedError

    def row_ids(self, ordinal: int) -> np.ndarray:
        """Returns the row ids of a run, int64 [num_records], in the order of places. Blocks on the disk."""
        raise NotImplementedError

    def read(self, row_ids: np.ndarray, runs: np.ndarray, places: np.ndarray, out: np.ndarray) -> None:
        """Reads records, each checked: whole, of its run, and of the row that is asked for. Blocks on the disk.

        Places are sorted, and neighbours within some KiB are one read; many are under way at once. Order and repeats
        are the caller's. Signals are handled every 50 ms or so.

        Args:
            row_ids: int64 [n].
            runs: uint16 [n], ordinals.
            places: uint32 [n].
            out: uint8 [n, record_bytes] (without seals), contiguous in each row; undefined if it raises.

        Raises:
            CorruptPageError: A record is damaged or cannot be read; names file, place and row.
            TimeoutError: The disk has stopped answering.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Closes all files. Any number of times."""
        raise NotImplementedError
