"""The host's tiers: what a daemon keeps in shared memory, and the only one who writes there.

Flows in: a store; which entries should be static; another version of the store. Flows out: shared blocks that clients map,
an engine that reads missed entries into the recency cache, and epochs. An epoch is published when its entries and its index
lie in memory; what only the epoch before it used is written over when clients have left that, or a while later: who is in it
still, reads from disk what it has copied. So two epochs are alive at most, and nobody holds up a change for long. Refuses a
version whose tables are not the same.

`changes` is held by whoever changes static sets or versions; everything else may come from any thread.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import kernels
from ..decisions.shared_budget import SharedPlan, divide_shared
from ..embedded import check_available, open_placement
from ..errors import ConfigError, CorruptPageError, DaemonError, FingerprintMismatchError
from ..formats.placement import UNIT_BYTES, Placement, round_up
from ..tiers.native import READ_WAIT_S, NativeEngine, SharedEpochs, load_table
from ..tiers.nvme import choose_io
from ..tiers.placed import OnProgress, index_head, load_indexes, load_records
from ..tiers.shared import SharedBlock, make_client_block
from ..tiers.slots import StaticSlots
from .events import event
from .mapped import Blocks, OpenVersion, pairs_as_tokens, recency_part, same_tables, static_parts, table_memories

logger = logging.getLogger("tierstore.daemon")

TAGS = 16
LEAVE_WAIT_S = 2.0  # how long a change waits for clients to leave an epoch, or a version, by themselves
LEAVE_POLL_S = 0.001
LAST_READERS_MAX = 64  # of clients that are gone; of more, the reports of the first are lost
READ_TOKENS_MAX = 512  # packed keys of a lookup by which entries are read: a few MiB of rows

Pairs = tuple[np.ndarray, np.ndarray]  # order index uint8 [n], keys int64 [n]


@dataclass(eq=False)
class Version:
    """A store that the daemon serves, or served last. number: 1, 2, ...; tag: of its entries in the recency caches."""

    number: int
    tag: int
    opened: OpenVersion
    resident: SharedBlock | None
    bad_pages: Mapping[str, Mapping[int, str]]  # of resident tables
    engine: NativeEngine
    epoch: int = 0  # the last one that was published of it

    @property
    def path(self) -> str:
        """The store's path."""
        return str(self.opened.image.path)

    def close(self) -> None:
        """Closes engine and files; the daemon's own lookups must have ended."""
        self.engine.close(READ_WAIT_S)
        self.opened.close()
        if self.resident:
            self.resident.close()


class Attachment:
    """What one client was given: a block of its own for each version that it looks up in, reports included."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.blocks: dict[int, np.ndarray] = {}  # by version, as all of these
        self.readers: dict[int, Any] = {}
        self._fds: dict[int, int] = {}

    def give(self, version: int) -> tuple[int, np.ndarray]:
        """Makes the block for a version; returns its descriptor, which stays ours, and its memory."""
        fd, block = make_client_block(f"tierstore-client-{self.pid}", kernels.CLIENT_BLOCK_BYTES)
        kernels.init_client_block(block)
        self.readers[version] = kernels.ReportReader(block)
        self.blocks[version], self._fds[version] = block, fd
        return fd, block

    def left(self, version: int) -> list[Any]:
        """The client is done with a version; returns the reader of what it reported of that, if there was one."""
        if version not in self._fds:
            return []
        os.close(self._fds.pop(version))
        del self.blocks[version]
        return [self.readers.pop(version)]

    def close(self) -> list[Any]:
        """The client is gone; returns the readers of what it reported."""
        return [reader for version in list(self.blocks) for reader in self.left(version)]


class Host:
    """The tiers of one host. Blocks while they are made and warmed; `close` ends them, clients keep what they mapped."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        dram_bytes: int,
        io: str = "auto",
        placement: int | str | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        """As `tierstore.open`, whose errors it raises too. on_progress: (bytes there, bytes in all)."""
        if not kernels.native:
            raise ConfigError("a daemon needs the compiled kernels: install gcc or clang, then tierstore again")
        self.changes = threading.RLock()
        self._choice = choose_io(io)
        self._attachments: dict[object, Attachment] = {}
        self._attachments_lock = threading.Lock()  # of the dict, and of the readers
        self._last_readers: deque[Any] = deque(
            maxlen=LAST_READERS_MAX
        )  # of clients that are gone, not read to their end
        self._tags: dict[str, int] = {}  # identities of versions -> tags
        self.epoch = 0  # the newest
        self.num_changes = 0
        self._retiring: Version | None = None  # its clients are moving
        self.num_read_errors = 0
        self.waiting_for: list[int] = []  # process ids that a change waits for
        opened = self._open(path, placement)
        blocks: list[SharedBlock] = []
        try:
            heading = opened.placed.placement if opened.placed else None
            self.plan: SharedPlan = divide_shared(opened.image.tables, dram_bytes, heading)
            check_available(self.plan.dram_bytes)
            progress = _Progress(
                on_progress, self.plan.static_bytes + self.plan.recency_bytes + self.plan.resident_bytes
            )
            self._control = SharedBlock("tierstore-control", kernels.CONTROL_BYTES)
            blocks.append(self._control)
            self._static = SharedBlock("tierstore-static", max(self.plan.static_bytes, UNIT_BYTES), progress.add)
            blocks.append(self._static)
            self._recency = SharedBlock("tierstore-recency", max(self.plan.recency_bytes, UNIT_BYTES), progress.add)
            blocks.append(self._recency)
            layouts = opened.image.tables
            cached = {name: share for name, share in self.plan.shares.items() if not share.resident}
            self.caches = {
                name: kernels.EntryCache(
                    recency_part(self._recency.array, layouts[name], share),
                    num_sets=share.num_sets, entry_bytes=layouts[name].spec.entry_bytes, is_new=True,
                )
                for name, share in cached.items()
            }  # fmt: skip
            self.slots: dict[str, StaticSlots] = {}
            for name, share in cached.items():
                parts, spec = static_parts(self._static.array, layouts[name], share), layouts[name].spec
                self.slots[name] = StaticSlots(
                    parts.records, parts.heads, parts.areas, len(spec.orders), spec.entry_bytes, share.capacity
                )
            self._own = Attachment(os.getpid())  # the daemon's lookups are counted like a client's
            self.current = self._make_version(opened, 1, progress.add)
            self.previous_path: str | None = None
            self._load_placement(opened, heading)
        except BaseException:
            opened.close()
            for block in blocks:
                block.close()
            raise

    def _open(self, path: str | os.PathLike[str], placement: int | str | None) -> OpenVersion:
        direct = self._choice.mode == "uring"
        image, placed = open_placement(Path(path).absolute(), placement, direct=direct)  # clients work in other folders
        return OpenVersion(image, placed, direct=direct)

    def _make_version(self, opened: OpenVersion, number: int, on_bytes: Callable[[int], None] | None) -> Version:
        """Loads resident tables, and makes the engine by which the daemon reads a version."""
        identity = opened.image.identity
        self._tag(identity)
        resident, bad_pages = None, {}
        if self.plan.resident_bytes:
            resident = SharedBlock(f"tierstore-resident-{number}", self.plan.resident_bytes, on_bytes)
            for files in opened.files:
                share, name = self.plan.shares[files.table.spec.name], files.table.spec.name
                if share.resident:
                    bad_pages[name] = load_table(files, resident.array[share.resident_start :])
        _, block = self._own.give(number)
        blocks = self._blocks(resident)
        memories = table_memories(opened, self.plan.shares, blocks, self._tags[identity], self.caches)
        shared = SharedEpochs(self._control.array, number, block, reports=False)
        what = f"the store {opened.image.path}"
        engine = NativeEngine(what, opened.files, memories, self._choice, self.plan.staging, opened.placed, shared)
        for index, name in enumerate(opened.image.tables):
            if name in bad_pages:
                engine.set_resident(index, bad_pages[name])
        return Version(number, self._tags[identity], opened, resident, bad_pages, engine)

    def _tag(self, identity: str) -> None:
        """Gives a store's entries in the recency caches a tag of their own, the same as before where it is known."""
        if identity in self._tags:
            return
        if len(self._tags) == TAGS:
            served = self.current.opened.image.identity
            self._tags = {served: self._tags[served]}
        self._tags[identity] = next(tag for tag in range(TAGS) if tag not in self._tags.values())
        for cache in self.caches.values():
            cache.drop_tag(self._tags[identity])

    def _blocks(self, resident: SharedBlock | None) -> Blocks:
        empty = np.empty(0, dtype=np.uint8)
        rows = resident.array if resident else empty
        return Blocks(self._control.array, self._static.array, self._recency.array, rows)

    def _load_placement(self, opened: OpenVersion, placement: Placement | None) -> None:
        """Fills the slots with the placement's hottest entries, and publishes the first epoch."""
        live = {}
        for name, slots in self.slots.items():
            placed = placement.tables.get(name) if placement else None
            num_loaded = 0
            if placed and opened.placed:
                layout, share = opened.image.tables[name], self.plan.shares[name]
                parts = static_parts(self._static.array, layout, share)
                load_indexes(opened.placed, placed, parts.file_area)
                parts.file_head[:] = index_head([index.num_buckets for index in placed.indexes])
                num_loaded = min(placed.num_entries, slots.capacity)
                end = share.records_start + round_up(num_loaded * placed.record_bytes, UNIT_BYTES)
                memory = self._static.array[share.records_start : end]
                load_records(opened.placed, placed, memory, num_loaded, layout.seed, lambda _: None)
                slots.adopt(num_loaded)
            live[name] = slots.keys >= 0
        self._publish(self.current, live)

    # Clients

    def attach(self, who: object, pid: int) -> tuple[dict[str, Any], list[int]]:
        """Returns what a client needs to map the tiers: a message, and descriptors, which stay ours."""
        with self._attachments_lock:
            attachment = self._attachments[who] = Attachment(pid)
            return self._layout_for(attachment, self.current)

    def _layout_for(self, attachment: Attachment, version: Version) -> tuple[dict[str, Any], list[int]]:
        block_fd, block = attachment.give(version.number)
        image, resident = version.opened.image, version.resident
        layout = {
            "store": version.path,
            "identity": image.identity,
            "version": version.number,
            "tag": version.tag,
            "placement": version.opened.placed.placement.epoch if version.opened.placed else None,
            "sizes": [len(self._control.array), len(self._static.array), len(self._recency.array), len(block)]
            + ([len(resident.array)] if resident else []),
            "tables": {name: share.as_record() for name, share in self.plan.shares.items()},
            "bad_pages": {
                name: {str(page): text for page, text in bad.items()} for name, bad in version.bad_pages.items()
            },
            "budget_bytes": self.plan.budget_bytes,
            "dram_bytes": self.plan.dram_bytes,
        }
        shared = [self._control.fd, self._static.fd, self._recency.fd]
        return layout, [*shared, block_fd, *([resident.fd] if resident else [])]

    def left(self, who: object, version: int) -> None:
        """A client says that it looks nothing up in a version any more."""
        with self._attachments_lock:
            if who in self._attachments and version != self.current.number:
                self._last_readers += self._attachments[who].left(version)

    def detach(self, who: object) -> None:
        """A client is gone; what it held is let go."""
        with self._attachments_lock:
            attachment = self._attachments.pop(who, None)
            if attachment:
                self._last_readers += attachment.close()

    def clients(self) -> list[Any]:
        """Returns who is attached, as given to `attach`."""
        with self._attachments_lock:
            return list(self._attachments)

    def versions_of(self, who: object) -> list[int]:
        """Returns the numbers of the versions that a client may look up in."""
        with self._attachments_lock:
            return list(self._attachments[who].blocks) if who in self._attachments else []

    def readers(self) -> list[Any]:
        """Returns the readers of all clients' reports."""
        with self._attachments_lock:
            return [reader for each in self._attachments.values() for reader in each.readers.values()]

    def take_last_readers(self) -> list[Any]:
        """Returns, once, the readers of clients that are gone: what those reported last is still to be read."""
        with self._attachments_lock:
            taken = list(self._last_readers)
            self._last_readers.clear()
            return taken

    # Epochs

    def _publish(self, version: Version, live: Mapping[str, np.ndarray]) -> None:
        """Publishes the next epoch, whose static sets are the slots of `live`, bool [S] by table; only one may be alive."""
        for name, slots in self.slots.items():
            slots.index(self.epoch + 1, live[name])
        self.epoch += 1
        version.epoch = self.epoch
        kernels.publish_epoch(self._control.array, version.number, self.epoch)
        self.num_changes += 1

    def _wait_left(self, epoch: int, version: Version, is_last: bool) -> None:
        """Waits, a while, until nobody is in an epoch of a version; is_last: nor will be again, clients having moved on.

        Whoever still is after LEAVE_WAIT_S finds out at the end of its lookup, and reads from disk what it has copied.
        """
        deadline = time.monotonic() + LEAVE_WAIT_S
        while True:
            with self._attachments_lock:
                self.waiting_for = [
                    each.pid
                    for each in (self._own, *self._attachments.values())
                    if version.number in each.blocks
                    and (
                        kernels.active_lookups(each.blocks[version.number])[epoch % 2]
                        or (is_last and each is not self._own)
                    )
                ]
            if not self.waiting_for:
                return
            if time.monotonic() > deadline:
                event(logger, logging.WARNING, "epoch_not_left", epoch=epoch, processes=self.waiting_for)
                self.waiting_for = []
                return
            threading.Event().wait(LEAVE_POLL_S)

    def change(self, enter: Mapping[str, Pairs], leave: Mapping[str, np.ndarray]) -> int:
        """Writes entries into free slots, lets others go, and publishes that as the next epoch; returns how many entered.

        enter: by table, no more than it has free slots; leave: slots, int64, by table. Blocks: reads, and waits a while for the
        epoch before to be left. Entries that cannot be read are left out.
        """
        with self.changes:
            self._settle()
            live, num_entered = {}, 0
            for name, slots in self.slots.items():
                live[name] = slots.live.copy()
                if name in leave:
                    live[name][leave[name]] = False
                if name in enter and len(enter[name][1]):
                    written = self._write(self.current, name, *enter[name])
                    live[name][written] = True
                    num_entered += len(written)
            self._publish(self.current, live)
            self._settle()
            return num_entered

    def _settle(self) -> None:
        """Lets only the newest epoch be read, and frees what it does not name, and a version that is not served any more."""
        if self._retiring:
            old, self._retiring = self._retiring, None
            self._wait_left(old.epoch, old, True)
            kernels.forget_version(self._control.array, old.number)
            self._own.left(old.number)
            old.close()
        else:
            self._wait_left(self.epoch - 1, self.current, False)
        kernels.forget_before(self._control.array, self.current.number, self.epoch)
        for slots in self.slots.values():
            slots.free_dead()

    def _write(self, version: Version, name: str, order_index: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Reads entries of a version and writes them into free slots; returns the slots, of those that could be read."""
        layout = version.opened.image.tables[name]
        written = [np.empty(0, dtype=np.int64)]
        for at in batches(order_index, len(layout.spec.orders)):
            good, entries = self.read(version, name, order_index[at], keys[at])
            written.append(self.slots[name].write(order_index[at][good], keys[at][good], entries, layout.seed))
        return np.concatenate(written)

    def read(self, version: Version, name: str, order_index: np.ndarray, keys: np.ndarray) -> Pairs:
        """Looks up entries of one of `batches`; what comes from NVMe is offered to the recency cache on the way.

        Returns which could be had, int64 [m], and those entries, uint8 [m, entry_bytes]. Blocks on the disk.
        """
        spec = version.opened.image.tables[name].spec
        tokens, places = pairs_as_tokens(order_index, keys, len(spec.orders))
        out = np.empty((len(tokens), spec.num_heads, spec.row_bytes), dtype=np.uint8)
        try:
            version.engine.lookup(list(version.opened.image.tables).index(name), tokens, out)
            return np.arange(len(keys)), out.reshape(-1, spec.entry_bytes)[places]
        except (CorruptPageError, TimeoutError) as error:
            self.num_read_errors += 1
            event(logger, logging.ERROR, "read_failed", table=name, keys=len(keys), why=str(error))
        if len(keys) == 1:
            return np.empty(0, dtype=np.int64), np.empty((0, spec.entry_bytes), dtype=np.uint8)
        middle = len(keys) // 2  # one bad page costs its own entries only
        first, second = (
            self.read(version, name, order_index[half], keys[half]) for half in (np.s_[:middle], np.s_[middle:])
        )
        return np.concatenate([first[0], second[0] + middle]), np.concatenate([first[1], second[1]])

    # Versions

    def swap(
        self,
        path: str | os.PathLike[str],
        counts_of: Callable[[str, np.ndarray, np.ndarray], np.ndarray],
        move: Callable[[Callable[[object], tuple[dict[str, Any], list[int]]]], None],
    ) -> dict[str, Any]:
        """Serves another store in place of this one, for every client; returns what was done. Blocks until all have moved.

        Half of the static slots go to the new version's hottest entries while clients still look up in the old; then they move.
        counts_of: (table, order index, keys) -> how often each is asked for; move: is called with a function that makes
        the message, and descriptors, that tell a client of the new version. Raises what opening a store raises, and
        `FingerprintMismatchError` where the tables are not the same; the old version is then still served.
        """
        with self.changes:
            started, old = time.monotonic(), self.current
            opened = self._open(
                path, "none"
            )  # static is what is asked for now; its own packed entries wait for a restart
            try:
                self._check_tables(opened)
                version = self._make_version(opened, old.number + 1, None)
            except BaseException:
                opened.close()
                raise
            try:
                self._settle()
                hot = self._hottest_half(counts_of)
                self.change({}, {name: np.flatnonzero(slots.live & ~hot[name]) for name, slots in self.slots.items()})
                live, num_warmed = {}, 0
                for name, slots in self.slots.items():
                    wanted = np.flatnonzero(hot[name])[: slots.num_free]
                    written = self._write(version, name, slots.order_index[wanted], slots.keys[wanted])
                    live[name] = np.zeros(len(slots.keys), dtype=bool)
                    live[name][written] = True
                    num_warmed += len(written)
            except BaseException:
                self._own.left(version.number)
                version.close()
                for slots in self.slots.values():
                    slots.free_dead()
                raise
            with self._attachments_lock:  # who attaches from here on gets the new version
                self._publish(version, live)
                self.current, self.previous_path, self._retiring = version, old.path, old
            event(logger, logging.INFO, "version_published", version=version.number, store=path, warmed=num_warmed)
            move(self._move_message)
            self._settle()
            return {
                "version": version.number,
                "store": version.path,
                "warmed": num_warmed,
                "seconds": time.monotonic() - started,
            }

    def _move_message(self, who: object) -> tuple[dict[str, Any], list[int]]:
        with self._attachments_lock:
            attachment = self._attachments.get(who)
            if attachment is None or self.current.number in attachment.blocks:
                raise DaemonError("the client is gone, or has moved")
            return self._layout_for(attachment, self.current)

    def _check_tables(self, opened: OpenVersion) -> None:
        ours = [layout.spec for layout in self.current.opened.image.tables.values()]
        difference = same_tables(ours, [layout.spec for layout in opened.image.tables.values()])
        if difference:
            kind = FingerprintMismatchError if "fingerprint" in difference else ConfigError
            raise kind(
                f"{opened.image.path} cannot take the place of {self.current.path}: {difference}; clients hash and "
                f"decode by the old tables: serve it by a daemon of its own"
            )

    def _hottest_half(self, counts_of: Callable[[str, np.ndarray, np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
        """Returns which live slots to keep so that half of all are free, bool [S] by table: those asked for most."""
        hot = {}
        for name, slots in self.slots.items():
            live = np.flatnonzero(slots.live)
            order = np.argsort(
                -counts_of(name, slots.order_index[live], slots.keys[live]).astype(np.int64), kind="stable"
            )
            hot[name] = np.zeros(len(slots.keys), dtype=bool)
            hot[name][live[order[: len(slots.keys) // 2]]] = True
        return hot

    def close(self) -> None:
        """Ends the daemon's own lookups and closes files and descriptors. Clients keep what they mapped."""
        with self.changes:
            for version in filter(None, (self._retiring, self.current)):
                version.close()
        with self._attachments_lock:
            for attachment in (self._own, *self._attachments.values()):
                attachment.close()
            self._attachments.clear()
        for block in (self._control, self._static, self._recency):
            block.close()


def batches(order_index: np.ndarray, num_orders: int) -> Iterator[np.ndarray]:
    """Cuts pairs into parts of at most READ_TOKENS_MAX of any order, few tokens when packed; yields places, int64."""
    rank = np.empty(len(order_index), dtype=np.int64)
    for order in range(num_orders):
        mine = np.flatnonzero(order_index == order)
        rank[mine] = np.arange(len(mine))
    by_rank = np.argsort(rank, kind="stable")
    ends = np.searchsorted(rank[by_rank], np.arange(0, rank.max(initial=-1) + 1 + READ_TOKENS_MAX, READ_TOKENS_MAX))
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        if end > start:
            yield by_rank[start:end]


class _Progress:
    """Adds up bytes for a callback of (bytes done, bytes in all)."""

    def __init__(self, on_progress: OnProgress | None, total: int) -> None:
        self._on_progress, self._total, self._done = on_progress, total, 0

    def add(self, num_bytes: int) -> None:
        """Counts more bytes."""
        self._done += num_bytes
        if self._on_progress:
            self._on_progress(min(self._done, self._total), self._total)
