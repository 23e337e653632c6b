"""Stores that a user could pick instead, each filled with the same rows and asked for them in its own fastest way.

Input: the rows of a working set. Output: for each peer, functions that fetch rows of tokens into a buffer: with a value
a row, and, for key-value stores, with a value a key (an entry of 8 rows) too. Those in this process are here, servers
in `peer_servers`. A peer that is not installed, or will not start, is refused with `MissingPeerError`, which says why.
"""

from __future__ import annotations

import contextlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..stores import HEADS, ORDERS, ROW_BYTES, ROWS_PER_TOKEN

LOAD_CHUNK = 10_000
ENTRY_BASE = 1 << 62  # ids of entries, in a store that also holds rows
SPARE_BYTES = 64 << 20

Fetch = Callable[[np.ndarray, np.ndarray], None]  # (places of tokens, int64 [N]; out, uint8 [N, O * H, R])


class MissingPeerError(Exception):
    """A peer is not installed, or does not start here; the message says which and why."""


@dataclass(frozen=True)
class PeerRows:
    """Rows of N tokens as an embedding table, uint8 [O * H * N, R]: row h * N + n is row h of token n."""

    rows: np.ndarray
    num_tokens: int

    def row_ids(self, places: np.ndarray) -> np.ndarray:
        """Returns the ids of the rows of tokens, int64 [M, O * H]."""
        return np.arange(ROWS_PER_TOKEN) * self.num_tokens + places[:, None]

    def entry_ids(self, places: np.ndarray) -> np.ndarray:
        """Returns the ids of the entries of tokens, int64 [M, O]."""
        return np.arange(len(ORDERS)) * self.num_tokens + places[:, None]

    def entries(self, start: int, end: int) -> np.ndarray:
        """Returns entries [start, end), uint8 [end - start, H * R]."""
        ids = np.arange(start, end)
        order, place = np.divmod(ids, self.num_tokens)
        row_ids = (order[:, None] * HEADS + np.arange(HEADS)) * self.num_tokens + place[:, None]
        return self.rows[row_ids].reshape(len(ids), HEADS * ROW_BYTES)


class Peer(ABC):
    """One store, filled and open. `fetches` maps a side's name to its function."""

    name: str

    @abstractmethod
    def __init__(self, folder: Path, data: PeerRows) -> None:
        """Starts and fills it, with files only in `folder`; raises `MissingPeerError`."""

    @property
    @abstractmethod
    def fetches(self) -> dict[str, Fetch]:
        """How it is asked."""

    @abstractmethod
    def close(self) -> None:
        """Ends it."""


class KeyValuePeer(Peer):
    """A peer that maps 8-byte keys to values: rows by their id, entries by theirs plus ENTRY_BASE."""

    def fill(self, data: PeerRows) -> None:
        """Puts every row and every entry."""
        self.data = data
        for start in range(0, len(data.rows), LOAD_CHUNK):
            end = min(start + LOAD_CHUNK, len(data.rows))
            self.put(_keys(np.arange(start, end)), [row.tobytes() for row in data.rows[start:end]])
        num_entries = len(ORDERS) * data.num_tokens
        for start in range(0, num_entries, LOAD_CHUNK):
            end = min(start + LOAD_CHUNK, num_entries)
            values = [entry.tobytes() for entry in data.entries(start, end)]
            self.put(_keys(np.arange(start, end) + ENTRY_BASE), values)

    @abstractmethod
    def put(self, keys: list[bytes], values: list[bytes]) -> None:
        """Stores a batch."""

    @abstractmethod
    def get(self, keys: list[bytes]) -> list[bytes]:
        """Returns the values of a batch, in order."""

    @property
    def fetches(self) -> dict[str, Fetch]:
        """One side with a value a row, one with a value a key."""

        def by_row(places: np.ndarray, out: np.ndarray) -> None:
            values = self.get(_keys(self.data.row_ids(places).reshape(-1)))
            out[:] = np.frombuffer(b"".join(values), dtype=np.uint8).reshape(out.shape)

        def by_key(places: np.ndarray, out: np.ndarray) -> None:
            values = self.get(_keys(self.data.entry_ids(places).reshape(-1) + ENTRY_BASE))
            out[:] = np.frombuffer(b"".join(values), dtype=np.uint8).reshape(out.shape)

        return {f"{self.name}, a value a row": by_row, f"{self.name}, a value a key": by_key}


class Lmdb(KeyValuePeer):
    """LMDB in this process, through one read transaction and a cursor's getmulti."""

    name = "LMDB"

    def __init__(self, folder: Path, data: PeerRows) -> None:
        lmdb = imported("lmdb", "lmdb")
        map_bytes = 8 * data.rows.nbytes + SPARE_BYTES
        self._environment = lmdb.open(str(folder / "lmdb"), map_size=map_bytes, sync=False, readahead=False)
        self.fill(data)
        self._transaction = self._environment.begin(buffers=True)
        self._cursor = self._transaction.cursor()
        for _ in self._cursor:  # every page of its map is touched once: faults are no part of a warm read
            continue

    def put(self, keys: list[bytes], values: list[bytes]) -> None:
        with self._environment.begin(write=True) as transaction, transaction.cursor() as cursor:
            cursor.putmulti(list(zip(keys, values, strict=True)), append=False)

    def get(self, keys: list[bytes]) -> list[bytes]:
        return [value for _, value in self._cursor.getmulti(keys)]

    def close(self) -> None:
        self._cursor.close()
        self._transaction.abort()
        self._environment.close()


class RocksDb(KeyValuePeer):
    """RocksDB in this process through rocksdict, raw bytes, its multi-get; options as they come, compacted."""

    name = "RocksDB"

    def __init__(self, folder: Path, data: PeerRows) -> None:
        rocksdict = imported("rocksdict", "rocksdict")
        self._db = rocksdict.Rdict(str(folder / "rocksdb"), options=self.options(rocksdict, data))
        self._new_batch: Callable[[], Any] = lambda: rocksdict.WriteBatch(raw_mode=True)
        self.fill(data)
        self._db.flush()
        self._db.compact_range(None, None)

    def options(self, rocksdict: Any, data: PeerRows) -> Any:  # noqa: ARG002
        """Returns what it is opened with."""
        return rocksdict.Options(raw_mode=True)

    def put(self, keys: list[bytes], values: list[bytes]) -> None:
        batch = self._new_batch()
        for key, value in zip(keys, values, strict=True):
            batch.put(key, value)
        self._db.write(batch)

    def get(self, keys: list[bytes]) -> list[bytes]:
        return list(self._db.get(keys))

    def close(self) -> None:
        self._db.close()


class TunedRocksDb(RocksDb):
    """RocksDB with a block cache that holds all of it."""

    name = "RocksDB, all in its block cache"

    def options(self, rocksdict: Any, data: PeerRows) -> Any:
        options = super().options(rocksdict, data)
        table = rocksdict.BlockBasedOptions()
        table.set_block_cache(rocksdict.Cache(4 * data.rows.nbytes + SPARE_BYTES))
        options.set_block_based_table_factory(table)
        return options


@contextlib.contextmanager
def opened(kind: type[Peer], folder: Path, data: PeerRows) -> Iterator[Peer]:
    """Opens a peer, and closes it whatever happens."""
    peer = kind(folder, data)
    try:
        yield peer
    finally:
        peer.close()


def _keys(ids: np.ndarray) -> list[bytes]:
    raw = ids.astype(">i8").tobytes()
    return [raw[start : start + 8] for start in range(0, len(raw), 8)]


def imported(module: str, distribution: str) -> Any:
    """Returns a module, or raises `MissingPeerError` that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPeerError(f"not installed ({error}); pip install {distribution}") from error
