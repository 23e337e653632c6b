"""The lookup path in NumPy: serves where there is no compiler, and is the oracle that the C++ one is compared with.

Flows in and out: what the engine contract says. One lock guards each table's cache; reads go through the page cache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from .. import kernels
from ..decisions.budget import DramPlan
from ..errors import StoreNotReadyError
from ..layout import TableLayout
from ..process.progress import OnProgress
from .dram import EntryCache, ResidentTable
from .engine import READ_WAIT_S, Engine, Request
from .nvme import IoChoice, TableFiles, load_rows, read_pages
from .placed import PlacementFile, StaticSet, load_all_static

SUBMIT_THREADS = 2


class PortableEngine(Engine):
    """See `Engine`."""

    io = "pread"

    def __init__(
        self,
        what: str,
        files: Sequence[TableFiles],
        plan: DramPlan,
        choice: IoChoice,  # noqa: ARG002
        placed: PlacementFile | None,
        on_progress: OnProgress | None,
    ) -> None:
        """`what` names the store in errors. Blocks while resident tables and static sets load."""
        self._what = what
        self._state = threading.Condition()
        self._in_use = 0
        self._closed = False
        self._pool: ThreadPoolExecutor | None = None
        self._staging = StagingPool(plan.staging.num_readers, plan.staging.reader_bytes)
        self._lock = threading.Lock()
        self._totals = dict.fromkeys(
            ("batches", "zero_miss_batches", "sentinels", "rows", "pages_read", "entries_read", "bytes_read"), 0
        )
        self._tables = []
        shares = [plan.shares[file.table.spec.name] for file in files]
        parts = [np.empty(share.static_bytes + share.index_bytes, dtype=np.uint8) for share in shares]
        statics = load_all_static(placed, [file.table for file in files], shares, parts, on_progress)
        for file, share, static in zip(files, shares, statics, strict=True):
            with self._staging.buffer() as scratch:
                self._tables.append(_Table(file, share.num_sets, static, scratch))
        self.bad_pages = {
            (index, page): text
            for index, table in enumerate(self._tables)
            if table.resident is not None
            for page, text in table.resident.bad_pages.items()
        }
        self.try_lookup = lambda index, keys, out: False  # noqa: ARG005

    def check(self, outcome: Any) -> None:
        assert outcome is None, "lookups raise by themselves"

    def lookup(self, index: int, keys: np.ndarray, out: np.ndarray) -> None:
        with self._using():
            self._fetch_all(self._gather([self._of_tokens(index, keys, out)]))

    def submit(self, requests: Sequence[Request]) -> PortablePending | None:
        return self._submit(lambda: [self._of_tokens(*request) for request in requests])

    def submit_pairs(self, index: int, keys: np.ndarray, pairs: np.ndarray, out: np.ndarray) -> PortablePending | None:
        def make() -> list[_Fetch]:
            table = self._tables[index]
            return [_Fetch(table, keys, pairs.astype(np.int64) % len(table.layout.spec.orders), out)]

        return self._submit(make)

    def _submit(self, make: Callable[[], list[_Fetch]]) -> PortablePending | None:
        with self._using():
            fetches = self._gather(make())
            if not fetches:
                return None
            with self._state:
                self._in_use += 1
                self._pool = self._pool or ThreadPoolExecutor(SUBMIT_THREADS, thread_name_prefix="tierstore")
            return PortablePending(self._pool.submit(self._finish, fetches))

    def is_resident(self, index: int) -> bool:
        return self._tables[index].resident is not None

    def rows(self, index: int, row_ids: np.ndarray, out: np.ndarray) -> None:
        with self._using():
            table, row_ids = self._tables[index], row_ids.reshape(-1)
            with self._lock:
                self._totals["rows"] += len(row_ids)
            if table.resident is not None:
                table.resident.copy_rows(row_ids, out)
                return
            out[row_ids < 0] = 0
            which = np.flatnonzero(row_ids >= 0)
            which = which[np.argsort(row_ids[which], kind="stable")]
            rows_per_page = table.layout.rows_per_page
            page_numbers, firsts = np.unique(row_ids[which] // rows_per_page, return_index=True)
            bounds = np.append(firsts, len(which))
            with self._staging.buffer() as staging:
                pages_per_batch = len(staging) // table.layout.page_bytes
                for start in range(0, len(page_numbers), pages_per_batch):
                    batch_pages = page_numbers[start : start + pages_per_batch]
                    rows = self._read_rows(table, batch_pages, staging)
                    batch = which[bounds[start] : bounds[start + len(batch_pages)]]
                    page_index = np.searchsorted(batch_pages, row_ids[batch] // rows_per_page)
                    out[batch] = rows[page_index * rows_per_page + row_ids[batch] % rows_per_page]

    def read_pages(self, index: int, page_numbers: np.ndarray, out: np.ndarray) -> None:
        with self._using():
            read_pages(self._tables[index].files, page_numbers, out)
            self._count_pages(len(page_numbers), out.shape[1])

    def locate(self, index: int, keys: np.ndarray, sources: np.ndarray) -> None:
        with self._using():
            table = self._tables[index]
            pairs, found = keys.reshape(-1), np.zeros(keys.size, dtype=np.uint8)
            places = np.flatnonzero(pairs >= 0)
            order_index = places % keys.shape[1]
            if table.resident is not None:
                found[places] = kernels.SOURCES.index("resident")
            else:
                assert table.cache is not None
                stored = table.places(order_index, pairs[places])
                found[places] = np.where(stored < 0, kernels.SOURCES.index("pages"), kernels.SOURCES.index("record"))
                cached = table.cache.holds(order_index, pairs[places])
                found[places[cached]] = kernels.SOURCES.index("recency")
                found[places[table.loads(stored)]] = kernels.SOURCES.index("static")
            sources[...] = found.reshape(sources.shape)

    def counters(self) -> dict[str, Any]:
        with self._lock:
            counts = [(t.hits.tolist(), t.static_hits.tolist(), t.misses.tolist()) for t in self._tables]
            return self._totals | {"tables": counts}

    def close(self, timeout_s: float) -> bool:
        with self._state:
            self._closed = True
            if not self._state.wait_for(lambda: self._in_use == 0, timeout=timeout_s):
                return False
            pool, self._pool = self._pool, None
        if pool:
            pool.shutdown(wait=True)
        for table in self._tables:  # counts stay, memory goes
            table.resident = table.cache = table.static = None
        self._staging.release()
        return True

    def before_fork(self) -> None:
        self._state.acquire()
        self._lock.acquire()
        for table in self._tables:
            if table.cache is not None:
                table.cache.lock.acquire()

    def after_fork(self, *, child: bool) -> None:
        for table in self._tables:
            if table.cache is not None:
                table.cache.lock.release()
        self._lock.release()
        self._state.release()
        if child:  # the parent's other threads are not here: nothing is in flight, and nothing they held is held
            self._state = threading.Condition()
            self._in_use = 0
            self._pool = None
            self._staging.after_fork()

    @contextmanager
    def _using(self) -> Iterator[None]:
        """Keeps the engine from closing under a lookup."""
        with self._state:
            if self._closed:
                raise StoreNotReadyError(f"{self._what} is closed, as it is when nobody holds it; open it again")
            self._in_use += 1
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        with self._state:
            self._in_use -= 1
            self._state.notify_all()

    def _finish(self, fetches: list[_Fetch]) -> None:
        try:
            self._fetch_all(fetches)
        finally:
            self._release()

    def _of_tokens(self, index: int, keys: np.ndarray, out: np.ndarray) -> _Fetch:
        num_orders = keys.shape[1]
        order_index = np.tile(np.arange(num_orders), len(keys))
        return _Fetch(self._tables[index], keys.reshape(-1), order_index, out)

    def _gather(self, fetches: Sequence[_Fetch]) -> list[_Fetch]:
        """Counts what was copied as the fetches were made; returns those that must be fetched."""
        missing = [fetch for fetch in fetches if len(fetch.keys)]
        with self._lock:
            self._totals["batches"] += 1
            self._totals["zero_miss_batches"] += not missing
            for fetch in fetches:
                fetch.table.hits += fetch.hits
                fetch.table.static_hits += fetch.static_hits
                fetch.table.misses += fetch.misses
                self._totals["sentinels"] += fetch.num_sentinels
        return missing

    def _fetch_all(self, fetches: list[_Fetch]) -> None:
        for fetch in fetches:
            self._fetch(fetch.table, fetch)

    def _fetch(self, table: _Table, fetch: _Fetch) -> None:
        """Reads the missing entries in read batches that fit a staging buffer, and offers them to the cache."""
        layout, spec = table.layout, table.layout.spec
        assert table.cache is not None
        with self._staging.buffer() as staging:
            keys_per_wave = len(staging) // (spec.rows_per_key * layout.page_bytes + spec.entry_bytes)
            for start in range(0, len(fetch.keys), keys_per_wave):
                end = min(start + keys_per_wave, len(fetch.keys))
                order_index, keys = fetch.order_index[start:end], fetch.keys[start:end]
                entries, pages = staging[: len(keys) * spec.entry_bytes], staging[keys_per_wave * spec.entry_bytes :]
                entries = entries.reshape(len(keys), spec.entry_bytes)
                stored = fetch.stored[start:end]
                self._read_placed(table, order_index, keys, stored, entries)
                paged = np.flatnonzero(stored < 0)
                row_ids = spec.row_ids_of_order(order_index[paged], keys[paged]).reshape(-1)
                page_numbers, page_index = np.unique(row_ids // layout.rows_per_page, return_inverse=True)
                rows = self._read_rows(table, page_numbers, pages)
                at = page_index * layout.rows_per_page + row_ids % layout.rows_per_page
                entries[paged] = rows[at].reshape(len(paged), spec.entry_bytes)
                places = fetch.places[fetch.starts[start] : fetch.starts[end]]
                fetch.entries_out[places] = np.repeat(entries, np.diff(fetch.starts)[start:end], axis=0)
                table.cache.offer(order_index, keys, entries)

    def _read_placed(
        self, table: _Table, order_index: np.ndarray, keys: np.ndarray, stored: np.ndarray, entries: np.ndarray
    ) -> None:
        """Reads those of a read batch's entries that lie in the placement file."""
        which = np.flatnonzero(stored >= 0)
        if len(which):
            assert table.static is not None
            part = np.empty((len(which), entries.shape[1]), dtype=np.uint8)
            num_bytes = table.static.read(order_index[which], keys[which], stored[which], part)
            entries[which] = part
            with self._lock:
                self._totals["entries_read"] += len(which)
                self._totals["bytes_read"] += num_bytes

    def _read_rows(self, table: _Table, page_numbers: np.ndarray, staging: np.ndarray) -> np.ndarray:
        """Reads checked pages, ascending, into staging; returns their rows, uint8 [P * rows_per_page, row_bytes]."""
        layout = table.layout
        pages = staging[: len(page_numbers) * layout.page_bytes].reshape(-1, layout.page_bytes)
        read_pages(table.files, page_numbers, pages)
        self._count_pages(len(page_numbers), layout.page_bytes)
        return layout.shape.rows_of(pages).reshape(-1, layout.spec.row_bytes)

    def _count_pages(self, num_pages: int, page_bytes: int) -> None:
        with self._lock:
            self._totals["pages_read"] += num_pages
            self._totals["bytes_read"] += num_pages * page_bytes


class PortablePending:
    """A lookup that a thread of the pool finishes; it holds the buffers."""

    def __init__(self, reads: Future[None]) -> None:
        self._reads = reads

    def cancel(self) -> None:
        """See `Pending`: reads that are on their way still write to the buffers."""

    def detach(self) -> None:
        """See `Pending`: it ends by itself."""

    def done(self) -> bool:
        """Whether it has ended."""
        return self._reads.done()

    def wait(self, timeout_s: float | None) -> None:
        """Blocks until it has ended; raises what it raised, or `TimeoutError`."""
        self._reads.result(timeout_s)


class _Table:
    """A table's files, what of it lies in memory, and its counts by order."""

    def __init__(self, files: TableFiles, num_sets: int, static: StaticSet | None, scratch: np.ndarray) -> None:
        self.files = files
        self.static = static
        self.layout: TableLayout = files.table
        spec = self.layout.spec
        self.resident: ResidentTable | None = None
        self.cache: EntryCache | None = None
        self.hits = np.zeros(len(spec.orders), np.int64)
        self.static_hits = np.zeros(len(spec.orders), np.int64)
        self.misses = np.zeros(len(spec.orders), np.int64)
        if num_sets:
            self.cache = EntryCache(num_sets, spec.entry_bytes)
        else:
            self.resident = ResidentTable(spec.num_rows, spec.row_bytes, self.layout.rows_per_page)
            self.resident.bad_pages = load_rows(files, self.resident.rows, scratch)

    def loads(self, places: np.ndarray) -> np.ndarray:
        """Returns which of the places, int64 [M], -1 for none, are of placed entries that lie in memory."""
        return self.static.loads(places) if self.static else np.zeros(len(places), dtype=bool)

    def places(self, order_index: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Returns the places of pairs in the placement file, int64 [M]; -1 where they have none."""
        return self.static.places(order_index, keys) if self.static else np.full(len(keys), -1, dtype=np.int64)


class _Fetch:
    """One table's part of a request: hits are copied when it is made; the distinct pairs that no cache held remain.

    keys, order_index: int64 [M], distinct pairs; stored: int64 [M], their places in the placement file, -1 for none;
    places[starts[i]:starts[i + 1]]: which entries of the output pair i fills.
    """

    def __init__(self, table: _Table, pairs: np.ndarray, order_of_pair: np.ndarray, out: np.ndarray) -> None:
        """pairs: keys of all pairs asked for, int64, -1 for zero rows, and the index of each one's order."""
        spec = table.layout.spec
        self.table = table
        num_orders = len(spec.orders)
        places = np.flatnonzero(pairs >= 0)
        order_index = order_of_pair[places]
        self.entries_out = out.reshape(len(pairs), spec.entry_bytes)
        if table.resident is not None:
            row_ids = spec.row_ids_of_order(order_of_pair, pairs)
            table.resident.copy_rows(row_ids.reshape(-1), out.reshape(-1, spec.row_bytes))
            found = np.ones(len(places), dtype=bool)
            stored, static = np.full(len(places), -1, dtype=np.int64), np.zeros(len(places), dtype=bool)
        else:
            assert table.cache is not None
            self.entries_out[pairs < 0] = 0
            stored = table.places(order_index, pairs[places])
            static = table.loads(stored)
            if table.static is not None:
                loaded = stored[static] - table.static.loaded_start
                self.entries_out[places[static]] = table.static.records[loaded, : spec.entry_bytes]
            found = static.copy()
            found[~static] = table.cache.copy_hits(
                order_index[~static], pairs[places[~static]], self.entries_out, places[~static]
            )
        self.static_hits = np.bincount(order_index[static], minlength=num_orders)
        self.hits = np.bincount(order_index[found], minlength=num_orders)
        self.misses = np.bincount(order_index[~found], minlength=num_orders)
        self.num_sentinels = len(pairs) - len(places)
        missed = places[~found]
        by_pair = np.lexsort((pairs[missed], order_index[~found]))
        order_index, missed_keys = order_index[~found][by_pair], pairs[missed][by_pair]
        first = np.ones(len(missed), dtype=bool)
        first[1:] = (missed_keys[1:] != missed_keys[:-1]) | (order_index[1:] != order_index[:-1])
        self.starts = np.append(np.flatnonzero(first), len(missed))
        self.order_index, self.keys, self.places = order_index[first], missed_keys[first], missed[by_pair]
        self.stored = stored[~found][by_pair][first]


class StagingPool:
    """A fixed number of equal buffers for pages on their way; a thread that finds none free waits for one."""

    def __init__(self, num_buffers: int, buffer_bytes: int) -> None:
        self._buffers = [np.empty(buffer_bytes, dtype=np.uint8) for _ in range(num_buffers)]
        self._free = list(self._buffers)
        self._changed = threading.Condition()

    @contextmanager
    def buffer(self) -> Iterator[np.ndarray]:
        """Lends a buffer, uint8 [buffer_bytes]. Raises `TimeoutError` where none comes free within READ_WAIT_S."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._free, timeout=READ_WAIT_S):
                raise TimeoutError(
                    f"no staging buffer came free within {READ_WAIT_S} s: the disk has stopped answering"
                )
            buffer = self._free.pop()
        try:
            yield buffer
        finally:
            with self._changed:
                self._free.append(buffer)
                self._changed.notify()

    def release(self) -> None:
        """Gives the memory of all buffers back; nobody holds one any more."""
        self._buffers.clear()
        self._free.clear()

    def after_fork(self) -> None:
        """Takes back, in a forked child, the buffers that the parent's other threads held."""
        self._free = list(self._buffers)
        self._changed = threading.Condition()
