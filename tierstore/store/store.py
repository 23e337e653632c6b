"""The store: all tiers as one object, wherever they are: in this process, in a daemon's shared memory, across a
network.

Input: keys (or row ids) of batches of tokens. Output: rows: a lookup returns the checkpoint's bytes or raises. Errors:
named ones, for arguments, damaged pages and closed stores. What the store stands on is a `Backing`; its engine does the
work (`tiers/engine.py`); `table` checks what callers give.

Shapes: N tokens, O orders, H rows per key.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from ..formats.key_trace import KeyTraceInfo, TracedTable
from ..stats import stats_of
from ..tiers.engine import Engine
from ..units import format_bytes
from .backing import Backing
from .device_side import DeviceSide
from .opened import OpenedStore
from .recorder import Recorder
from .table import Table
from .ticket import Ticket, handed_out


class Store(DeviceSide):
    """An open store. `tables` maps names to `Table`s, and `store[name]` is the same. Close it, or use `with`.

    It closes itself when neither it nor one of its tables is held any more. It is of one process: a forked child has it
    too; a worker that is spawned opens its own.
    """

    def __init__(self, backing: Backing) -> None:
        """`tierstore.open` and `tierstore.connect` are the ways in."""
        self._opened = OpenedStore(backing)
        self._tables = {
            spec.name: Table(backing.engine, index, spec, self._opened) for index, spec in enumerate(backing.specs)
        }
        self._opened.tables.update(self._tables.values())
        self._opened.renew()  # the engine may have become another one meanwhile

    @property
    def _engine(self) -> Engine:
        return self._opened.engine

    @property
    def _backing(self) -> Backing:
        return self._opened.backing

    @property
    def _closed(self) -> bool:
        return self._opened.is_closed

    @property
    def name(self) -> str:
        """What errors call it: a path or an address."""
        return self._backing.name

    @property
    def build(self) -> str:
        """The digest of all that decides the store's rows, hexadecimal; empty if it is not known."""
        return self._backing.build

    @property
    def common_build(self) -> str:
        """The digest that all slices of one store share at one version, hexadecimal; empty if it is not known."""
        return self._backing.common_build

    def placed_keys(self, name: str, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns which entries of a table its placement has: `count` from `start` on, 0 being the hottest.

        Blocks on the disk. Returns indices of orders, uint8 [n], and keys, int64 [n]: fewer at the end, none without a
        placement. Raises `KeyError` for a table that is not there.
        """
        return self._backing.placed_keys(self[name].index, start, count)

    @property
    def version(self) -> int:
        """A number that grows whenever another version answers (a daemon's swap or return); -1 while it changes.

        Lookups between two equal numbers, neither of them -1, are of one version. `stats` has the daemon's number.
        """
        return self._engine.version

    @property
    def attachments(self) -> Mapping[str, bytes]:
        """The records that the adapter put in the catalog at build time, by name."""
        return self._backing.attachments

    @property
    def tables(self) -> Mapping[str, Table]:
        """The tables by name, read-only."""
        return MappingProxyType(self._tables)

    def __getitem__(self, name: str) -> Table:
        if name not in self._tables:
            raise KeyError(f"{self._backing.name} has no table {name!r}; it has {', '.join(self._tables)}")
        return self._tables[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tables

    def __iter__(self) -> Iterator[str]:
        return iter(self._tables)

    def __len__(self) -> int:
        return len(self._tables)

    def attachment(self, name: str) -> bytes:
        """Returns a record that the adapter put in the catalog at build time; raises `KeyError` if there is not one."""
        return self._backing.attachments[name]

    def submit(self, requests: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Ticket:
        """Starts a lookup in several tables at once: {name: (keys [N, O] int64, out [N, O * H, row_bytes] uint8)}.

        What memory holds is copied before this returns, and the reads of the rest are in flight; a thread of the store
        finishes them, whether anybody waits or not. keys are copied. The lookup holds out until its rows are there;
        leave out alone until `Ticket.wait` returns. Where an out is not contiguous, this waits for its rows. Wrong
        arguments raise here, as in `Table.lookup`; failed reads raise in `wait`. If this raises, by a signal handler
        too, nothing is written to out afterwards (by `connect` over gRPC, an answer on its way still is). Beyond 256
        tickets under way it waits for one to end.
        """
        self._opened.check_open()
        checked = []
        strided = []
        for name, (keys, out) in requests.items():
            if out is None:
                raise TypeError(f"submit: table {name} has no out; give a uint8 buffer for its rows")
            table = self[name]
            keys, out = table.checked(keys, out)
            if out.flags.c_contiguous:
                checked.append((table.index, keys, out))
            else:
                flat = np.empty(out.shape, dtype=np.uint8)
                checked.append((table.index, keys, flat))
                strided.append((flat, out))
        pending = self._engine.submit(checked)
        if pending is None:
            for flat, out in strided:
                out[...] = flat
            return Ticket(None)
        try:
            if strided:
                pending.wait(None)
            for flat, out in strided:
                out[...] = flat
            return handed_out(pending)
        except BaseException:  # nobody has the ticket
            pending.cancel()
            raise

    def stats(self) -> dict[str, Any]:
        """Returns counters since opening: keys, hits by tier, batches, pages and bytes read, by table and order."""
        specs = [table.spec.local for table in self._tables.values()]
        return stats_of(self._engine.counters(), specs) | self._backing.details()

    def start_trace(self, path: str | os.PathLike[str], share: float = 1 / 16) -> None:
        """Starts to record a trace of keys at `path`, until `stop_trace` or `close`; the file bears its name only then.

        share: of all keys, above 0, at most 1 (a sample can be profiled; to plan a placement from it, record all: 1);
        every access of those keys is recorded: lookups, submits, and rows by id where
        they are read by key. A thread writes it; what that has no time for is counted and not recorded. Raises
        `ConfigError` (a trace is running, the path is no file's), `ValueError` (share),
        `StoreNotReadyError` (closed), `OSError`.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}, expected above 0 and at most 1")
        tables = [TracedTable(t.spec.name, t.spec.fingerprint, tuple(t.spec.orders)) for t in self._tables.values()]
        self._opened.start_trace(Recorder(path, tables, share))

    def stop_trace(self) -> KeyTraceInfo | None:
        """Ends the trace that is running and returns what it is about; None if no trace is running. Blocks on the disk.

        Raises `OSError` where the trace could not be written; no trace is left then, nor if this is interrupted.
        """
        return self._opened.stop_trace()

    def close(self) -> None:
        """Waits for lookups in flight, then gives back memory, threads and files. Closing twice is harmless.

        A trace that is running is ended; where it cannot be written, that is raised after all else is done. Raises
        `TimeoutError` where a lookup does not end within CLOSE_WAIT_S; the store then stays half closed: no new
        lookups, files open.
        """
        self._opened.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError(
            f"an open store, of {self.name}, cannot be pickled, as starting a process by spawn or forkserver does; "
            f"open the store in each worker, or start workers by fork, which share its memory"
        )

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{format_bytes(self._backing.details()['memory']['dram_bytes'])} of DRAM"
        return f"<tierstore.Store {self._backing.name}: {', '.join(self._tables)}; {state}>"
