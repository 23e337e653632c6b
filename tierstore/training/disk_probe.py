"""What the disk of a store can carry, measured with the reads and writes that training makes.

Input: a store's folder. Output: `DiskRates`. Errors: `ConfigError` and `BudgetError` of a disk that is full or may not
be written. A file of made-up records is written, synced, read at random, and removed; it takes a few seconds at most.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from ..causes import naming
from ..decisions.training_estimate import DiskRates
from ..errors import BudgetError
from ..formats.run import TRAINING_FOLDER, Run, RunLayout
from ..units import format_bytes
from .run_writer import RunWriter
from .runs import RunReader

FILE_BYTES = 256 << 20
FILE_BYTES_MIN = 16 << 20
WRITE_SECONDS = 2.0  # after which the file is long enough
READ_SECONDS = 1.0  # of each kind of reads
BATCH = 2048  # reads that are under way for one call
NEIGHBOURS = 8  # records that lie side by side: those of one n-gram


def probe_disk(store: str | os.PathLike[str], dim: int, state_floats: int, io: str = "auto") -> DiskRates:
    """Measures random reads of one record and of eight neighbours, and synced writes, on a store's disk.

    Blocks for at most some five seconds. dim, state_floats: of a record. io: as of `tierstore.open`.
    """
    folder = Path(store)
    free = shutil.disk_usage(folder).free
    file_bytes = min(FILE_BYTES, free // 4)
    if file_bytes < FILE_BYTES_MIN:
        raise BudgetError(
            f"{folder}: a probe of the disk writes {format_bytes(FILE_BYTES_MIN)} ({FILE_BYTES_MIN} bytes), a quarter "
            f"of what is free at most; {format_bytes(free)} ({free} bytes) are; free some, or leave the probe out"
        )
    layout = RunLayout("probe", dim, state_floats, 0)
    with naming(folder, folder, writing=True), tempfile.TemporaryDirectory(prefix=".probe-", dir=folder) as name:
        (Path(name) / TRAINING_FOLDER).mkdir()
        run, path, write_rate = _write(Path(name), layout, file_bytes)
        with contextlib.closing(RunReader(Path(name), layout, io, calls=1)) as reader:
            ordinal = reader.add(run, path)
            return DiskRates(
                _read_rate(reader, ordinal, run.num_records, 1, path),
                _read_rate(reader, ordinal, run.num_records, NEIGHBOURS, path),
                write_rate,
            )


def _write(store: Path, layout: RunLayout, file_bytes: int) -> tuple[Run, Path, float]:
    """Writes and syncs a run; returns it, its file, and bytes a second."""
    num_records = file_bytes // layout.stored_bytes
    with RunWriter(store, 1, layout) as writer:
        started, done = time.monotonic(), 0
        while done < num_records and time.monotonic() - started < WRITE_SECONDS:
            buffer = writer.buffer()
            count = min(len(buffer), num_records - done)
            buffer[:count] = 0
            buffer[:count, :8] = np.arange(done, done + count).view(np.uint8).reshape(-1, 8)
            writer.write(count, np.arange(done, done + count))
            done += count
        run = writer.finish()
        writer.sync()
        rate = run.num_bytes / (time.monotonic() - started)
        writer.rename()
        writer.keep()
        return run, writer.path, rate


def _read_rate(reader: RunReader, ordinal: int, num_records: int, neighbours: int, path: Path) -> float:
    """Returns how many reads a second, of so many neighbouring records each, the disk gives."""
    rng = np.random.default_rng(0)
    out = np.empty((BATCH * neighbours, reader.layout.record_bytes), dtype=np.uint8)
    _drop_cache(path)
    started, reads = time.monotonic(), 0
    while (elapsed := time.monotonic() - started) < READ_SECONDS:
        first = rng.integers(0, num_records - neighbours + 1, BATCH)
        row_ids = (first[:, None] + np.arange(neighbours)).reshape(-1)
        places = row_ids.astype(np.uint32)
        reader.read(row_ids, np.full(len(row_ids), ordinal, dtype=np.uint16), places, out)
        reads += BATCH
    return reads / elapsed


def _drop_cache(path: Path) -> None:
    """Takes the file out of the page cache, for ways of reading that go through it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
