"""The shared tiers: the memory that a daemon keeps for all processes of its host. Only the daemon writes it.

Input: the layouts of a store's tables, a division of the budget (`SharedPlan`); versions of that store to read. Output:
blocks that clients map, the static slots and recency caches in them, entries read into either. Errors: `BudgetError` if
there is not so much memory; entries that cannot be read are counted, logged and left out.

All versions of a store have tables of one shape, so the blocks stay when another version is served. Slots are written
by whoever holds `Epochs.changes`; reading may come from any thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from .. import kernels
from ..decisions.budget import CACHE_WAYS
from ..decisions.shared_budget import SharedPlan
from ..errors import CorruptPageError
from ..formats.placement import Placement
from ..ipc.events import event
from ..ipc.mapped import Blocks, OpenVersion, recency_part, static_parts
from ..layout import UNIT_BYTES, TableLayout, round_up
from ..tiers.huge_pages import bytes_on_huge_pages
from ..tiers.placed import index_head, load_indexes, load_records
from ..tiers.shared import SharedBlock
from ..tiers.slots import StaticSlots
from .version import Version

logger = logging.getLogger("tierstore.daemon")

RECENCY_SAMPLE_SETS = 4096  # that are looked at to say how full a recency cache is
STATIC = kernels.SOURCES.index("static")
READ_ENTRIES_MAX = 1536  # read at once: a few MiB of rows

OnBytes = Callable[[int], None]
Live = dict[str, np.ndarray]  # bool [S] by table: the slots that an epoch names


class SharedTiers:
    """Blocks of shared memory, divided among the tables of a store. `close` gives the descriptors back.

    slots: the static set of each table that is not resident; caches: its recency cache.
    """

    def __init__(
        self, tables: Mapping[str, TableLayout], plan: SharedPlan, on_bytes: OnBytes, *, gpu_clients: bool
    ) -> None:
        """Makes the blocks. Blocks until all memory is there.

        Args:
            tables: layouts, whose shapes all versions share.
            plan: what each table gets.
            on_bytes: called with bytes as they come.
            gpu_clients: whether clients that ask for it get the static set writable, as drivers need that lock it for a
                GPU.

        Raises:
            BudgetError: there is not so much memory.
        """
        self.tables, self.plan = tables, plan
        self.num_read_errors = 0
        self._blocks: list[SharedBlock] = []
        try:
            self.control = self._make_block("control", kernels.CONTROL_BYTES, None)
            self.static = self._make_block("static", plan.static_bytes, on_bytes, export=gpu_clients)
            self.recency = self._make_block("recency", plan.recency_bytes, on_bytes)
            cached = {name: share for name, share in plan.shares.items() if not share.resident}
            self.caches = {
                name: kernels.EntryCache(
                    recency_part(self.recency.array, tables[name], share),
                    num_sets=share.num_sets, entry_bytes=tables[name].spec.entry_bytes, is_new=True,
                )
                for name, share in cached.items()
            }  # fmt: skip
            self.slots = {name: self._make_slots(name) for name in cached}
        except BaseException:
            self.close()
            raise

    def _make_block(self, name: str, num_bytes: int, on_bytes: OnBytes | None, *, export: bool = False) -> SharedBlock:
        block = SharedBlock(f"tierstore-{name}", max(num_bytes, UNIT_BYTES), on_bytes, export=export)
        self._blocks.append(block)
        return block

    def _make_slots(self, name: str) -> StaticSlots:
        share, layout = self.plan.shares[name], self.tables[name]
        parts, spec = static_parts(self.static.array, layout, share), layout.spec
        return StaticSlots(parts.records, parts.heads, parts.areas, len(spec.orders), spec.entry_bytes, share.capacity)

    def blocks_with(self, resident: SharedBlock | None) -> Blocks:
        """Returns the memory of one version: the shared blocks and, if it has resident tables, its own."""
        rows = resident.array if resident else np.empty(0, dtype=np.uint8)
        return Blocks(self.control.array, self.static.array, self.recency.array, rows)

    def load_placement(self, opened: OpenVersion, placement: Placement | None, on_bytes: OnBytes) -> Live:
        """Fills the slots with a placement's hottest entries; returns those slots. Comes before the first epoch."""
        live = {}
        for name, slots in self.slots.items():
            placed = placement.tables.get(name) if placement else None
            if placed and opened.placed:
                layout, share = self.tables[name], self.plan.shares[name]
                parts = static_parts(self.static.array, layout, share)
                load_indexes(opened.placed, placed, parts.file_area)
                parts.file_head[:] = index_head([index.num_buckets for index in placed.indexes])
                num_loaded = min(placed.num_entries, slots.capacity)
                end = share.records_start + round_up(num_loaded * placed.record_bytes, UNIT_BYTES)
                memory = self.static.array[share.records_start : end]
                load_records(opened.placed, placed, memory, num_loaded, layout.seed, lambda _: on_bytes(0))
                slots.adopt(num_loaded)
            live[name] = slots.keys >= 0
        return live

    def write(self, version: Version, name: str, order_index: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Reads entries of a version into free slots. Blocks on the disk.

        Args:
            version: to read from.
            name: of the table.
            order_index: uint8 [n]; no more than there are free slots.
            keys: int64 [n].

        Returns:
            The slots, int64, of the entries that could be read.
        """
        written = [np.empty(0, dtype=np.int64)]
        for at in pieces(len(keys)):
            good, entries = self.read(version, name, order_index[at], keys[at])
            seed = version.layouts[name].seed
            written.append(self.slots[name].write(order_index[at][good], keys[at][good], entries, seed))
        return np.concatenate(written)

    def read(
        self, version: Version, name: str, order_index: np.ndarray, keys: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Looks up entries; what comes from NVMe is offered to the recency cache on the way. Blocks on the disk.

        Args:
            version: to read from.
            name: of the table.
            order_index: uint8 [n], n at most READ_ENTRIES_MAX.
            keys: int64 [n].

        Returns:
            Which could be read, int64 [m], and those entries, uint8 [m, entry_bytes].
        """
        entry_bytes = self.tables[name].spec.entry_bytes
        entries = np.empty((len(keys), entry_bytes), dtype=np.uint8)
        pairs = order_index.astype(np.int32)  # single pairs of a table: see `Engine.submit_pairs`
        try:
            pending = version.engine.submit_pairs(version.index_of(name), np.ascontiguousarray(keys), pairs, entries)
            if pending is not None:
                pending.wait(None)
            return np.arange(len(keys)), entries
        except (CorruptPageError, TimeoutError) as error:
            self.num_read_errors += 1
            event(logger, logging.ERROR, "read_failed", table=name, keys=len(keys), why=str(error))
            # A disk that does not answer would cost each half as long again.
            if len(keys) == 1 or isinstance(error, TimeoutError):
                return np.empty(0, dtype=np.int64), np.empty((0, entry_bytes), dtype=np.uint8)
        middle = len(keys) // 2  # one bad page costs its own entries only
        first, second = (
            self.read(version, name, order_index[half], keys[half]) for half in (np.s_[:middle], np.s_[middle:])
        )
        return np.concatenate([first[0], second[0] + middle]), np.concatenate([first[1], second[1]])

    def are_static(self, version: Version, name: str, order_index: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Returns which (order index, key) pairs, [n] each, are static in a version's newest epoch, bool [n]."""
        each = np.arange(len(keys))
        tokens = np.full((len(keys), len(self.tables[name].spec.orders)), -1, dtype=np.int64)
        tokens[each, order_index] = keys
        sources = np.empty(tokens.shape, dtype=np.uint8)
        version.engine.locate(version.index_of(name), tokens, sources)
        found: np.ndarray = sources[each, order_index] == STATIC
        return found

    def recency_entries(self) -> dict[str, int]:
        """Returns about how many entries the recency cache of each table holds: counted in a sample of its sets."""
        counted = {}
        for name in self.caches:
            share = self.plan.shares[name]
            memory = recency_part(self.recency.array, self.tables[name], share)
            sets = memory[: share.num_sets * kernels.CACHE_SET_BYTES].reshape(-1, kernels.CACHE_SET_BYTES)
            sample = sets[:: max(1, share.num_sets // RECENCY_SAMPLE_SETS), : 8 * CACHE_WAYS].copy().view(np.int64)
            counted[name] = round(float((sample >= 0).mean()) * share.num_sets * CACHE_WAYS)
        return counted

    def huge_page_bytes(self, resident: SharedBlock | None) -> tuple[int, int]:
        """Returns bytes of the blocks, and of a version's own, that were in memory at the last look, and those of them
        on huge pages."""
        blocks = [*self._blocks, *([resident] if resident else [])]
        return bytes_on_huge_pages([block.huge_pages for block in blocks])

    def close(self) -> None:
        """Closes the descriptors. Clients keep what they mapped."""
        for block in self._blocks:
            block.close()


def pieces(num_entries: int) -> Iterator[slice]:
    """Cuts a number of entries into slices of at most READ_ENTRIES_MAX."""
    return (slice(start, start + READ_ENTRIES_MAX) for start in range(0, num_entries, READ_ENTRIES_MAX))
