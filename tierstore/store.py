"""The store: one door to all tiers of a built store, opened in process.

Flows in: keys (or row ids) of batches of tokens. Flows out: rows, from the dram tier where they are there, else from checked
pages of the nvme tier, offered to the dram tier on the way. A lookup returns the checkpoint's bytes or raises.

Shapes: N tokens, O orders, H rows per key. A request is flattened to N * O (order index, key) pairs, each one Entry.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np

from .decisions.budget import STAGING_BUFFERS, DramPlan, divide_dram
from .errors import BudgetError, ConfigError, CorruptPageError, StoreNotReadyError
from .formats.catalog import CatalogImage, TableLayout, read_catalog
from .spec import TableSpec
from .stats import Counters
from .tiers.dram import EntryCache, ResidentTable
from .tiers.memory import available_memory
from .tiers.nvme import PageReader, PreadReader, StagingPool, TableFiles
from .units import format_bytes, parse_bytes

logger = logging.getLogger("tierstore")

SUBMIT_THREADS = 2
TICKETS_MAX = 256  # beyond so many unfinished tickets, submit does the reads itself before it returns
CLOSE_WAIT_S = 300.0
IO_MODES = ("auto", "uring", "mmap", "pread")

_open_stores: weakref.WeakSet[Store] = weakref.WeakSet()


def open_store(
    path: str | os.PathLike[str],
    dram: int | str = "2GiB",
    io: str = "auto",
    hbm: int | str | None = None,
    device: str | None = None,
    placement: int | str | None = None,
) -> Store:
    """Opens a built store in this process; also `tierstore.open`.

    dram: bytes of memory that it may take, all included ("2GiB"); tables that fit are loaded whole, others get a cache of
    entries. io: how pages are read: "pread", or "auto", which picks; "uring" and "mmap" are not in this version and fall
    back to "pread", saying so. hbm, device, placement: for tiers and placements that this version does not have yet.

    Blocks while resident tables load. Raises `StoreNotReadyError` (no finished store), `FormatError` (foreign, damaged,
    newer), `BudgetError` (too small, or more than the machine has), `ConfigError` (an option). A damaged page does not keep
    a store from opening: lookups of its rows raise.
    """
    if io not in IO_MODES:
        raise ConfigError(f"io: {io!r} is not one of {', '.join(IO_MODES)}")
    if hbm is not None or device is not None:
        raise ConfigError(f"hbm={hbm!r}, device={device!r}: this version has no hbm tier; leave both out")
    if placement not in (None, "none"):
        raise ConfigError(f"placement: {placement!r} does not exist, the store has none; pass None or 'none'")
    image = read_catalog(path)
    plan = divide_dram(image.tables, parse_bytes(dram, "dram"))
    available, limit = available_memory()
    if plan.dram_bytes > available:
        raise BudgetError(
            f"dram: {format_bytes(plan.dram_bytes)} ({plan.dram_bytes} bytes) would be used, the {limit} has "
            f"{format_bytes(available)} ({available} bytes) left; ask for less"
        )
    if io in ("uring", "mmap"):
        logger.warning("io=%r is not in this version: pages are read with pread", io)
    return Store(image, plan, PreadReader())


class Ticket:
    """A lookup that was started early. Dropping it without `wait` leaks nothing: the reads end by themselves."""

    def __init__(self, reads: Future[None] | None) -> None:
        self._reads = reads

    def wait(self, timeout_s: float | None = None) -> None:
        """Blocks until every row is in its buffer; raises what the lookup raises.

        Raises `TimeoutError` after timeout_s seconds; the lookup goes on, and `wait` may be called again. May be called
        from any thread, and more than once.
        """
        if self._reads is not None:
            self._reads.result(timeout_s)


class Table:
    """One table of an open store. Lookups may come from any number of threads at once."""

    def __init__(self, store: Store, layout: TableLayout, files: TableFiles) -> None:
        self._store = store
        self._layout = layout
        self._files = files
        self._resident: ResidentTable | None = None
        self._cache: EntryCache | None = None

    @property
    def spec(self) -> TableSpec:
        """What the table is: rows, codec, address map, fingerprint. Frozen."""
        return self._layout.spec

    def lookup(self, keys: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Returns the rows of keys: int64 [N, O] -> uint8 [N, O * H, row_bytes]; key -1 gives zero rows.

        keys may be strided; out, if given, is filled and returned (any strides). Blocks on the disk for what no tier
        holds. Raises `TypeError` (not int64), `ValueError` (shape, keys below -1), `CorruptPageError`,
        `StoreNotReadyError` (closed); after an error, out is undefined.
        """
        with self._store._using():
            keys, out = self._checked(keys, out)
            self._store._lookup({self.spec.name: (keys, out)})
        return out

    def rows(self, row_ids: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Returns rows by row id: int64 [...] -> uint8 [..., row_bytes]; row id -1 gives a zero row.

        Where the last axis holds all row ids of a token ([..., O * H]), tokens whose ids belong together go through the
        caches by their keys, which the ids give back; other ids are read one by one. Blocks and raises like `lookup`.
        """
        with self._store._using():
            spec = self.spec
            row_ids = _checked_ids(row_ids, "row_ids")
            if row_ids.size and not -1 <= row_ids.min() <= row_ids.max() < spec.num_rows:
                bad = row_ids[(row_ids < -1) | (row_ids >= spec.num_rows)][0]
                raise ValueError(f"table {spec.name}: row id {bad} is outside -1 to {spec.num_rows - 1}")
            out = _checked_out(out, (*row_ids.shape, spec.row_bytes))
            flat = out if out.flags.c_contiguous else np.empty(out.shape, dtype=np.uint8)
            self._store._rows(self, np.ascontiguousarray(row_ids), flat)
            if flat is not out:
                out[...] = flat
        return out

    def _checked(self, keys: np.ndarray, out: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Checks a request; returns its keys, contiguous, and the buffer for its rows."""
        spec = self.spec
        keys = _checked_ids(keys, "keys")
        if keys.ndim != 2 or keys.shape[1] != len(spec.orders):
            raise ValueError(
                f"table {spec.name}: keys are {list(keys.shape)}, expected [N, {len(spec.orders)}]: one for each order"
            )
        if keys.size and keys.min() < -1:
            raise ValueError(
                f"table {spec.name}: key {keys.min()} is below -1; keys are 0 to 2^63 - 1, or -1 for zero rows"
            )
        if spec.is_plain and keys.size and keys.max() >= spec.num_rows:
            raise ValueError(f"table {spec.name}: key {keys.max()} is outside its {spec.num_rows} rows")
        out = _checked_out(out, (len(keys), spec.num_heads, spec.row_bytes))
        return np.ascontiguousarray(keys), out

    def _load(self) -> ResidentTable:
        """Reads all rows front to back, through one staging buffer; a page that is bad costs its own rows only."""
        layout = self._layout
        resident = ResidentTable(self.spec.num_rows, self.spec.row_bytes, layout.rows_per_page)
        with self._store._staging.buffer() as staging:
            pages_per_chunk = len(staging) // layout.page_bytes
            for page_start in range(0, layout.num_pages, pages_per_chunk):
                page_end = min(page_start + pages_per_chunk, layout.num_pages)
                try:
                    self._load_pages(resident, page_start, page_end, staging)
                except CorruptPageError:
                    for page_number in range(page_start, page_end):
                        try:
                            self._load_pages(resident, page_number, page_number + 1, staging)
                        except CorruptPageError as error:
                            resident.bad_pages[page_number] = str(error)
        if resident.bad_pages:
            first = next(iter(resident.bad_pages.values()))
            logger.error("%d pages of table %s will not be served: %s", len(resident.bad_pages), self.spec.name, first)
        return resident

    def _load_pages(self, resident: ResidentTable, page_start: int, page_end: int, staging: np.ndarray) -> None:
        layout = self._layout
        pages = staging[: (page_end - page_start) * layout.page_bytes].reshape(-1, layout.page_bytes)
        self._store._reader.read(self._files, np.arange(page_start, page_end), pages)
        row_start = page_start * layout.rows_per_page
        rows = layout.shape.rows_of(pages).reshape(-1, self.spec.row_bytes)
        part = resident.rows[row_start : row_start + len(rows)]
        part[:] = rows[: len(part)]


class _Misses:
    """The pairs of one request that no cache held: order index, key and place in the flattened output, each int64 [M]."""

    def __init__(self, order_index: np.ndarray, keys: np.ndarray, places: np.ndarray) -> None:
        by_pair = np.lexsort((keys, order_index))
        order_index, keys = order_index[by_pair], keys[by_pair]
        first = np.ones(len(keys), dtype=bool)
        first[1:] = (keys[1:] != keys[:-1]) | (order_index[1:] != order_index[:-1])
        self.starts = np.append(np.flatnonzero(first), len(keys))  # where each distinct pair's places begin
        self.order_index = order_index[first]
        self.keys = keys[first]
        self.places = places[by_pair]
        self.counts = np.diff(self.starts)

    def __len__(self) -> int:
        return len(self.keys)


class Store:
    """An open store. `tables` maps names to `Table`s, and `store[name]` is the same. Close it, or use `with`."""

    def __init__(self, image: CatalogImage, plan: DramPlan, reader: PageReader) -> None:
        """Opens the shards and loads resident tables; `open_store` is the way in."""
        self._image = image
        self._plan = plan
        self._reader = reader
        self._staging = StagingPool(STAGING_BUFFERS, plan.staging_bytes)
        self._counters = Counters(image.tables)
        self._state = threading.Condition()
        self._in_use = 0
        self._tickets = 0
        self._closed = False
        self._pool: ThreadPoolExecutor | None = None
        self._tables: dict[str, Table] = {}
        try:
            for name, layout in image.tables.items():
                self._tables[name] = self._open_table(layout)
        except BaseException:
            self.close()
            raise
        _open_stores.add(self)

    def _open_table(self, layout: TableLayout) -> Table:
        table = Table(self, layout, TableFiles(self._image, layout))
        share = self._plan.shares[layout.spec.name]
        try:
            if share.resident:
                table._resident = table._load()
            else:
                table._cache = EntryCache(share.num_sets, layout.spec.entry_bytes)
        except BaseException:
            table._files.close()
            raise
        return table

    @property
    def tables(self) -> Mapping[str, Table]:
        """The tables by name, read-only."""
        return MappingProxyType(self._tables)

    def __getitem__(self, name: str) -> Table:
        if name not in self._tables:
            raise KeyError(f"{self._image.path} has no table {name!r}; it has {', '.join(self._tables)}")
        return self._tables[name]

    def attachment(self, name: str) -> bytes:
        """Returns a record that the adapter put in the catalog at build time; raises `KeyError` where there is none."""
        return self._image.attachments[name]

    def submit(self, requests: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Ticket:
        """Starts a lookup in several tables at once: {name: (keys [N, O] int64, out [N, O * H, row_bytes] uint8)}.

        What a cache holds is copied before this returns; the rest is read by a thread of the store, whether anybody waits
        or not. keys are copied; out must live, untouched, until `Ticket.wait` returns. Wrong arguments raise here, as in
        `Table.lookup`; failed reads raise in `wait`.
        """
        with self._using():
            checked = {}
            for name, (keys, out) in requests.items():
                if out is None:
                    raise TypeError(f"submit: table {name} has no out; give a uint8 buffer for its rows")
                checked[name] = self[name]._checked(keys, out)
            fetches = self._gather(checked)
            if not fetches:
                return Ticket(None)
            with self._state:
                inline = self._tickets >= TICKETS_MAX
                if not inline:
                    self._tickets += 1
                    self._in_use += 1
                    pool = self._pool = self._pool or ThreadPoolExecutor(SUBMIT_THREADS, thread_name_prefix="tierstore")
            if inline:
                reads: Future[None] = Future()
                try:
                    self._fetch_all(fetches)
                    reads.set_result(None)
                except Exception as error:
                    reads.set_exception(error)
                return Ticket(reads)
            return Ticket(pool.submit(self._finish_ticket, fetches))

    def stats(self) -> dict[str, Any]:
        """Returns counters since opening: keys, hits by tier in keys, batches, pages and bytes read, by table and order."""
        memory = {
            "budget_bytes": self._plan.budget_bytes,
            "dram_bytes": self._plan.dram_bytes,
            "staging_bytes": STAGING_BUFFERS * self._plan.staging_bytes,
            "resident_tables": [name for name, share in self._plan.shares.items() if share.resident],
        }
        return self._counters.as_dict() | {"io": self._reader.name, "memory": memory}

    def close(self) -> None:
        """Waits for lookups in flight, then gives back memory, threads and files. Closing twice is harmless.

        Raises `TimeoutError` where a lookup does not end within CLOSE_WAIT_S; the store then stays half closed: no new
        lookups, files open.
        """
        with self._state:
            self._closed = True
            if not self._state.wait_for(lambda: self._in_use == 0, timeout=CLOSE_WAIT_S):
                raise TimeoutError(
                    f"{self._in_use} lookups did not end within {CLOSE_WAIT_S} s; the disk has stopped answering"
                )
            pool, self._pool = self._pool, None
        if pool:
            pool.shutdown(wait=True)
        for table in self._tables.values():
            table._files.close()
            table._resident = table._cache = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{format_bytes(self._plan.dram_bytes)} of DRAM"
        return f"<tierstore.Store {self._image.path}: {', '.join(self._tables)}; {state}>"

    @contextmanager
    def _using(self) -> Iterator[None]:
        """Keeps the store from closing under a lookup."""
        with self._state:
            if self._closed:
                raise StoreNotReadyError(f"the store {self._image.path} is closed; open it again")
            self._in_use += 1
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        with self._state:
            self._in_use -= 1
            self._state.notify_all()

    def _finish_ticket(self, fetches: list[_Fetch]) -> None:
        try:
            self._fetch_all(fetches)
        finally:
            with self._state:
                self._tickets -= 1
            self._release()

    def _lookup(self, checked: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        self._fetch_all(self._gather(checked))

    def _gather(self, checked: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> list[_Fetch]:
        """Copies all that the dram tier holds, and zero rows; returns what must be fetched, nothing where all was there."""
        fetches = []
        num_misses = 0
        for name, (keys, out) in checked.items():
            table = self._tables[name]
            flat = out if out.flags.c_contiguous else np.empty(out.shape, dtype=np.uint8)
            misses = self._gather_table(table, keys, flat)
            num_misses += len(misses)
            if len(misses) or flat is not out:
                fetches.append(_Fetch(table, misses, flat, out))
        self._counters.count_batch(num_misses)
        return fetches

    def _gather_table(self, table: Table, keys: np.ndarray, out: np.ndarray) -> _Misses:
        spec = table.spec
        pairs = keys.reshape(-1)
        places = np.flatnonzero(pairs >= 0)
        order_index = places % len(spec.orders)
        entries = out.reshape(len(pairs), spec.entry_bytes)
        if table._resident is not None:
            table._resident.copy_rows(spec.row_ids(keys).reshape(-1), out.reshape(-1, spec.row_bytes))
            hits = np.ones(len(places), dtype=bool)
        else:
            assert table._cache is not None
            entries[pairs < 0] = 0
            hits = table._cache.copy_hits(order_index, pairs[places], entries, places)
        self._counters.count_keys(spec.name, order_index, hits, len(pairs) - len(places))
        missed = places[~hits]
        return _Misses(order_index[~hits], pairs[missed], missed)

    def _fetch_all(self, fetches: list[_Fetch]) -> None:
        for fetch in fetches:
            if len(fetch.misses):
                self._fetch(fetch.table, fetch.misses, fetch.flat)
            if fetch.flat is not fetch.out:
                fetch.out[...] = fetch.flat

    def _fetch(self, table: Table, misses: _Misses, out: np.ndarray) -> None:
        """Reads the missing entries in waves that fit a staging buffer, and offers them to the cache."""
        spec, layout = table.spec, table._layout
        assert table._cache is not None
        entries_out = out.reshape(-1, spec.entry_bytes)
        with self._staging.buffer() as staging:
            keys_per_wave = len(staging) // (spec.rows_per_key * layout.page_bytes + spec.entry_bytes)
            for start in range(0, len(misses), keys_per_wave):
                wave = slice(start, min(start + keys_per_wave, len(misses)))
                order_index, keys = misses.order_index[wave], misses.keys[wave]
                entries, pages = staging[: len(keys) * spec.entry_bytes], staging[keys_per_wave * spec.entry_bytes :]
                entries = entries.reshape(len(keys), spec.entry_bytes)
                row_ids = spec.row_ids_of_order(order_index, keys).reshape(-1)
                page_numbers, page_index = np.unique(row_ids // layout.rows_per_page, return_inverse=True)
                rows = self._read_pages(table, page_numbers, pages)
                at = page_index * layout.rows_per_page + row_ids % layout.rows_per_page
                np.take(rows, at, axis=0, out=entries.reshape(-1, spec.row_bytes), mode="clip")
                places = misses.places[misses.starts[wave.start] : misses.starts[wave.stop]]
                entries_out[places] = np.repeat(entries, misses.counts[wave], axis=0)
                table._cache.offer(order_index, keys, entries)

    def _read_pages(self, table: Table, page_numbers: np.ndarray, staging: np.ndarray) -> np.ndarray:
        """Reads checked pages, ascending, into staging; returns their rows, uint8 [P * rows_per_page, row_bytes]."""
        layout = table._layout
        pages = staging[: len(page_numbers) * layout.page_bytes].reshape(-1, layout.page_bytes)
        self._reader.read(table._files, page_numbers, pages)
        self._counters.count_pages(len(page_numbers), layout.page_bytes)
        return layout.shape.rows_of(pages).reshape(-1, table.spec.row_bytes)

    def _rows(self, table: Table, row_ids: np.ndarray, out: np.ndarray) -> None:
        """Answers `Table.rows`: whole tokens by their keys, other ids one by one."""
        spec = table.spec
        flat_ids = row_ids.reshape(-1)
        flat_out = out.reshape(-1, spec.row_bytes)
        if table._resident is not None:
            table._resident.copy_rows(flat_ids, flat_out)
            self._counters.count_rows(len(flat_ids))
            return
        whole = np.zeros(0, dtype=bool)
        if spec.is_plain or (row_ids.ndim and row_ids.shape[-1] == spec.num_heads):
            tokens = flat_ids.reshape(-1, spec.num_heads)
            keys, whole = spec.keys_of_row_ids(tokens)
            token_out = out.reshape(-1, spec.num_heads, spec.row_bytes)
            if whole.all():
                self._lookup({spec.name: (keys, token_out)})
                return
            if whole.any():
                part = np.empty((int(whole.sum()), *token_out.shape[1:]), dtype=np.uint8)
                self._lookup({spec.name: (keys[whole], part)})
                token_out[whole] = part
        single = np.flatnonzero(~np.repeat(whole, spec.num_heads)) if len(whole) else np.arange(len(flat_ids))
        self._fetch_rows(table, flat_ids, single, flat_out)

    def _fetch_rows(self, table: Table, row_ids: np.ndarray, which: np.ndarray, out: np.ndarray) -> None:
        """Reads the rows of row_ids[which] into out[which], past the cache of entries, each page once."""
        rows_per_page = table._layout.rows_per_page
        out[which[row_ids[which] < 0]] = 0
        which = which[row_ids[which] >= 0]
        which = which[np.argsort(row_ids[which], kind="stable")]
        self._counters.count_rows(len(which))
        page_numbers, firsts = np.unique(row_ids[which] // rows_per_page, return_index=True)
        bounds = np.append(firsts, len(which))
        with self._staging.buffer() as staging:
            pages_per_wave = len(staging) // table._layout.page_bytes
            for start in range(0, len(page_numbers), pages_per_wave):
                wave_pages = page_numbers[start : start + pages_per_wave]
                rows = self._read_pages(table, wave_pages, staging)
                wave = which[bounds[start] : bounds[start + len(wave_pages)]]
                page_index = np.searchsorted(wave_pages, row_ids[wave] // rows_per_page)
                out[wave] = rows[page_index * rows_per_page + row_ids[wave] % rows_per_page]

    def _before_fork(self) -> None:
        self._state.acquire()
        for table in self._tables.values():
            if table._cache is not None:
                table._cache.lock.acquire()

    def _after_fork(self, *, child: bool) -> None:
        for table in self._tables.values():
            if table._cache is not None:
                table._cache.lock.release()
        self._state.release()
        if child:  # the parent's other threads are not here: nothing is in flight, and nothing they held is held
            self._state = threading.Condition()
            self._in_use = self._tickets = 0
            self._pool = None
            self._staging.after_fork()
            self._counters.after_fork()


class _Fetch:
    """What one table of a request still needs: misses, and the copy from `flat` to a strided `out`."""

    def __init__(self, table: Table, misses: _Misses, flat: np.ndarray, out: np.ndarray) -> None:
        self.table, self.misses, self.flat, self.out = table, misses, flat, out


def _checked_ids(ids: np.ndarray, what: str) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.dtype != np.int64:
        raise TypeError(f"{what} are {ids.dtype}, expected int64; convert them: {what}.astype(numpy.int64)")
    return ids


def _checked_out(out: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    if out is None:
        return np.empty(shape, dtype=np.uint8)
    if not isinstance(out, np.ndarray) or out.dtype != np.uint8:
        found = out.dtype if isinstance(out, np.ndarray) else type(out).__name__
        raise TypeError(f"out is {found}, expected a NumPy array of uint8 (of a tensor: tensor.numpy())")
    if out.shape != shape:
        raise ValueError(f"out is {list(out.shape)}, the rows are {list(shape)}")
    if not out.flags.writeable:
        raise ValueError("out is read-only; give a buffer that can be written")
    return out


_forking: list[Store] = []


def _before_fork() -> None:
    _forking[:] = sorted(_open_stores, key=id)
    for store in _forking:
        store._before_fork()


def _after_fork(*, child: bool) -> None:
    for store in _forking:
        store._after_fork(child=child)
    _forking.clear()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=lambda: _after_fork(child=False),
    after_in_child=lambda: _after_fork(child=True),
)
