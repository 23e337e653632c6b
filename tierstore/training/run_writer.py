"""Runs on their way to disk: `RunWriter`.

Input: training records and their row ids. Output: a run: written, synced and named by calls of their own, so that a
commit syncs and names several at once. Errors: `BudgetError` and `ConfigError` of a disk that is full or fails; no file
is left then.

Records go past the page cache. A buffer begins wherever in a unit of 4 KiB the last one ended: what fills no whole unit
waits in memory for the next.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from io import FileIO
from pathlib import Path
from types import TracebackType

import numpy as np

from .. import kernels
from ..causes import NEW_SUFFIX, naming
from ..errors import ConfigError
from ..formats.run import (
    ROW_IDS_OF_STRETCH,
    TRAINING_FOLDER,
    Run,
    RunLayout,
    head_bytes,
    num_stretches,
    run_file,
    seal_row_ids,
)
from ..layout import UNIT_BYTES, round_up
from ..offline.page_writer import aligned_pages, write_pages, writing

BUFFER_BYTES = 4 << 20  # of each of the two that a writer has
RECORDS_MAX = 1 << 21  # of a run that is written here: its row ids wait in memory, 8 bytes each
logger = logging.getLogger("tierstore")
KEPT = "commits that were published are kept"


class RunWriter:
    """Writes one run, past the page cache. One thread at a time uses it; `with` discards a run that is not kept."""

    def __init__(self, store: Path, number: int, layout: RunLayout, buffer_bytes: int = BUFFER_BYTES) -> None:
        """Makes the file, under a temporary name, in the store's training folder.

        number: one that `TrainingRecords.last_run` has not reached.
        """
        self.layout, self.number = layout, number
        self._store, self._file = store, run_file(number, layout.table)
        self._num_records = 0
        self._row_ids: list[np.ndarray] = []
        self._digest = hashlib.sha256()
        self._offset = 0  # bytes of the next buffer that an unfinished unit takes
        self._failed = self._is_named = self._is_kept = False
        self._opened: FileIO | None = None
        self._stack = contextlib.ExitStack()
        buffer_bytes = max(buffer_bytes, round_up(layout.stored_bytes, UNIT_BYTES) + UNIT_BYTES)
        path = store / f"{self._file}{NEW_SUFFIX}"
        try:
            with self._naming():
                (store / TRAINING_FOLDER).mkdir(exist_ok=True)
                # A file object: if an interrupt keeps it from being named, or from being closed, it closes itself.
                self._opened = FileIO(path, "xb+", opener=_open)
                self._opened.seek(UNIT_BYTES)  # the head comes last
            shape = buffer_bytes // UNIT_BYTES, UNIT_BYTES
            self._pages = self._stack.enter_context(writing(self._fd, shape))
        except BaseException:
            self.discard()
            raise

    @property
    def path(self) -> Path:
        """Where the file is now: under its temporary name until `rename`."""
        return self._store / (self._file if self._is_named else f"{self._file}{NEW_SUFFIX}")

    @property
    def is_full(self) -> bool:
        """Whether it takes no more records: what is left belongs in another run."""
        return self._num_records >= RECORDS_MAX

    def buffer(self) -> np.ndarray:
        """Returns a buffer to fill, uint8 [n, stored_bytes], n at least 1: values and state at the start of each.

        Blocks until one was written. Raises the errors of earlier ones.
        """
        assert not self.is_full, "the caller asks `is_full`"
        with self._naming():
            units = self._pages.buffer()
        size = self.layout.stored_bytes
        num = min((units.size - self._offset) // size, RECORDS_MAX - self._num_records)
        return units.reshape(-1)[self._offset : self._offset + num * size].reshape(num, size)

    def write(self, num_records: int, row_ids: np.ndarray) -> None:
        """Seals and writes the first records of the last `buffer`, which must not be touched until it is given again.

        row_ids: int64 [num_records], of these records. Hardly waits for the disk: for a buffer that is free again.
        """
        assert row_ids.shape == (num_records,), "a row id for each record"
        if num_records == 0:
            return
        records = self.buffer()[:num_records]
        numbers = np.full(num_records, self.number, dtype=np.uint32)
        records[:, self.layout.float_bytes : self.layout.record_bytes] = 0
        kernels.seal_records(records, row_ids, numbers, self.layout.record_bytes, self.layout.seed)
        self._digest.update(records[:, self.layout.record_bytes :].tobytes())
        self._row_ids.append(row_ids.astype(np.int64))
        self._num_records += num_records
        self._advance(self._offset + num_records * self.layout.stored_bytes)

    def finish(self) -> Run:
        """Writes what is left, row ids and head. Blocks until all is written; nothing is synced, the name is temporary.

        Records can be read from now on (`RunReader.add`).
        """
        assert self._num_records, "a run has records"
        row_ids = np.concatenate(self._row_ids)
        self._row_ids.clear()
        if self._offset:
            with self._naming():
                self._pages.buffer().reshape(-1)[self._offset : UNIT_BYTES] = 0
            self._advance(UNIT_BYTES)
        start = 0
        while start < len(row_ids):
            with self._naming():
                units = self._pages.buffer()
            part = row_ids[start : start + len(units) * ROW_IDS_OF_STRETCH]
            stretches = units[: num_stretches(len(part))]
            seal_row_ids(part, self.number, self.layout.seed, stretches, start // ROW_IDS_OF_STRETCH)
            self._pages.write(stretches)
            start += len(part)
        head = aligned_pages((1, UNIT_BYTES))
        head.data.cast("B")[:] = head_bytes(self.layout, self.number, self._num_records)
        with self._naming():
            self._pages.finish()
            os.lseek(self._fd, 0, os.SEEK_SET)
            write_pages(self._fd, head)
        self._stack.close()
        del self._pages  # its buffers: many finished runs may wait for a commit
        num_bytes = self.layout.run_bytes(self._num_records)
        return Run(self.number, self._file, num_bytes, self._num_records, self._digest.hexdigest())

    def sync(self) -> None:
        """Makes the content durable. Blocks on the disk. A failure is final: the run must be written anew."""
        if self._failed:
            raise ConfigError(f"{self._store / self._file}: it could not be synced before; write its rows anew; {KEPT}")
        self._failed = True
        with self._naming():
            os.fdatasync(self._fd)
        self._failed = False

    def rename(self) -> None:
        """Gives the file its name, unless it has it. It must be synced; the caller syncs the folder, once for many."""
        if not self._is_named:
            with self._naming():
                self.path.rename(self._store / self._file)
            self._is_named = True

    def keep(self) -> None:
        """Has `discard` leave the file alone: the catalog may name it from now on."""
        self._is_kept = True

    def discard(self) -> None:
        """Closes the file, and removes it unless it is kept. Any number of times."""
        self._stack.close()  # no write is under way any more
        if self._opened is not None and not self._opened.closed:
            try:
                if not self._is_kept:
                    self.path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s cannot be removed; the next training removes it: %s", self.path, error)
            finally:
                self._opened.close()

    def _advance(self, end: int) -> None:
        """Writes the whole units of the last buffer's first `end` bytes, and keeps the rest for the next one."""
        with self._naming():
            units = self._pages.buffer()
            whole = end // UNIT_BYTES
            rest = units.reshape(-1)[whole * UNIT_BYTES : end].copy()
            if whole:
                self._pages.write(units[:whole])
                if len(rest):
                    self._pages.buffer().reshape(-1)[: len(rest)] = rest
        self._offset = len(rest)

    @property
    def _fd(self) -> int:
        assert self._opened is not None, "__init__ opens it, or raises"
        return self._opened.fileno()

    def _naming(self) -> contextlib.AbstractContextManager[None]:
        file = self._store / self._file
        return naming(file, file, writing=True, note=KEPT)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def _open(file: str, flags: int) -> int:
    return os.open(file, flags | os.O_NOFOLLOW, 0o666)
