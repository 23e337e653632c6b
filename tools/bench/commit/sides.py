"""The sides of `tierstore bench commit`: each makes the same rows durable in its own way.

Input: rows, uint8 [n, bytes], and row ids, int64 [n]. Output: callables that return once the rows are durable.
Errors: `MissingPeerError` for libraries that are not installed; those of the libraries.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tierstore.durable import sync_folder
from tierstore.formats.catalog_records import CATALOG_FILE, as_json, write_records
from tierstore.formats.run import Run, RunLayout
from tierstore.training.commits import Commit, create_training, publish_commit
from tierstore.training.run_writer import RunWriter

from .. import page_cache
from ..peers.stores import MissingPeerError, imported

COPY, LMDB, ROCKSDB = "cp and sync", "LMDB, one transaction", "RocksDB, WAL and sync"
MAP_FACTOR = 8  # of LMDB's map, for each byte of rows: it writes pages anew
LOAD_ROWS = 50_000  # at once, when a peer is filled
COPY_TIMEOUT_S = 600

Side = Callable[[np.ndarray], None]


@contextlib.contextmanager
def skippable(side: str, skipped: dict[str, str]) -> Iterator[None]:
    """Notes a side whose library is not installed."""
    try:
        yield
    except MissingPeerError as error:
        skipped[side] = str(error)


def made_store(path: Path, layout: RunLayout) -> Path:
    """A store with nothing but a training of one table."""
    path.mkdir()
    write_records(path / CATALOG_FILE, {"format": as_json({"format_version": 1})})
    create_training(path, {"layouts": {layout.table: layout.to_dict()}})
    return path


class Commits:
    """The commits of a training, through its run writer."""

    def __init__(self, store: Path, layout: RunLayout, num_rows: int) -> None:
        """num_rows: of a first commit."""
        self.store, self.layout = store, layout
        self._next_run, self._runs, self._writers = 1, list[Run](), list[RunWriter]()
        for start in range(0, num_rows, LOAD_ROWS * 10):
            ids = np.arange(start, min(start + LOAD_ROWS * 10, num_rows))
            self.add(ids, np.zeros((len(ids), layout.float_bytes), dtype=np.uint8))
        if num_rows:
            self.publish()
        self._first = list(self._runs)

    def add(self, row_ids: np.ndarray, rows: np.ndarray) -> None:
        """Writes rows to a run."""
        writer, start = RunWriter(self.store, self._next_run, self.layout), 0
        self._next_run += 1
        while start < len(rows):
            buffer = writer.buffer()
            part = rows[start : start + len(buffer)]
            buffer[: len(part), : part.shape[1]] = part
            writer.write(len(part), row_ids[start : start + len(part)])
            start += len(part)
        self._runs.append(writer.finish())
        self._writers.append(writer)

    def publish(self) -> Commit:
        """Publishes what was added."""
        commit = publish_commit(
            self.store,
            step=self._next_run,
            payload=b"",
            runs={self.layout.table: self._runs},
            unnamed=self._writers,
            optimizer={},
        )
        for writer in self._writers:
            writer.discard()
        self._writers.clear()
        return commit

    def commit(self, row_ids: np.ndarray, rows: np.ndarray) -> None:
        """A commit of these rows and of the first ones."""
        self._runs = list(self._first)
        self.add(row_ids, rows)
        self.publish()

    def drop_cache(self) -> None:
        """Drops the runs from the page cache."""
        page_cache.drop(self.store / run.file for run in self._runs)


def copied(work: Path, rows: np.ndarray) -> Side:
    """A copy of a file of these bytes, by cp without sharing blocks, and syncs of it and of its folder."""
    source, target = work / "rows", work / "copy"
    source.write_bytes(rows.tobytes())
    command = ["cp", "--reflink=never", str(source), str(target)]

    def copy(_: np.ndarray) -> None:
        target.unlink(missing_ok=True)
        subprocess.run(command, check=True, timeout=COPY_TIMEOUT_S)
        fd = os.open(target, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        sync_folder(work)

    return copy


def lmdb_side(work: Path, num_rows: int, rows: np.ndarray) -> Side:
    """One transaction of LMDB with its sync."""
    lmdb = imported("lmdb", "lmdb")
    environment = lmdb.open(str(work / "lmdb"), map_size=MAP_FACTOR * num_rows * rows.shape[1] + (1 << 26))
    value = bytes(rows.shape[1])
    for start in range(0, num_rows, LOAD_ROWS):
        with environment.begin(write=True) as transaction, transaction.cursor() as cursor:
            keys = _keys(np.arange(start, min(start + LOAD_ROWS, num_rows)))
            cursor.putmulti([(key, value) for key in keys], append=True)
    values = [row.tobytes() for row in rows]

    def put(ids: np.ndarray) -> None:
        with environment.begin(write=True) as transaction, transaction.cursor() as cursor:
            cursor.putmulti(list(zip(_keys(ids), values, strict=True)))

    return put


def rocksdb_side(work: Path, num_rows: int, rows: np.ndarray) -> Side:
    """One batch of RocksDB, with its log and a sync."""
    rocksdict = imported("rocksdict", "rocksdict")
    database = rocksdict.Rdict(str(work / "rocksdb"), options=rocksdict.Options(raw_mode=True))
    synced = rocksdict.WriteOptions()
    synced.sync = True
    value = bytes(np.random.default_rng(3).integers(0, 256, rows.shape[1], dtype=np.uint8))
    for start in range(0, num_rows, LOAD_ROWS):
        keys = _keys(np.arange(start, min(start + LOAD_ROWS, num_rows)))
        database.write(_batch(rocksdict, keys, [value] * len(keys)))
    database.flush()
    database.compact_range(None, None)  # none of it while commits are timed
    values = [row.tobytes() for row in rows]

    def put(ids: np.ndarray) -> None:
        database.write(_batch(rocksdict, _keys(ids), values), write_opt=synced)

    return put


def _batch(rocksdict: object, keys: list[bytes], values: list[bytes]) -> object:
    batch = rocksdict.WriteBatch(raw_mode=True)  # type: ignore[attr-defined]
    for key, value in zip(keys, values, strict=True):
        batch.put(key, value)
    return batch


def _keys(ids: np.ndarray) -> list[bytes]:
    """Row ids as keys that sort as they do."""
    return [key.tobytes() for key in ids.astype(">i8")]
