"""Versions: which store the daemon serves, and how another takes its place while clients look up.

Input: paths of stores. Output: open versions with engines, one of which is served. Errors: what opening a store raises;
`FingerprintMismatchError` and `ConfigError` for a store whose tables are not the same; the old version is served on
then.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from ..decisions.replan import hottest_indexes
from ..errors import BudgetError, ConfigError, DaemonError, FingerprintMismatchError
from ..ipc.events import event
from ..ipc.mapped import OpenVersion, overlay_sizes, overlays_in, same_tables, side_part, table_memories
from ..tiers.in_place import InPlaceFiles, load_side
from ..tiers.native import NativeEngine, SharedEpochs, load_table
from ..tiers.nvme import IoChoice
from ..tiers.shared import SharedBlock
from .attachments import Attachments
from .epochs import Epochs
from .placements import BegunPlacement, open_next
from .shared_tiers import Live, OnBytes, SharedTiers
from .version import Version

logger = logging.getLogger("tierstore.daemon")

TAGS = 16  # that an entry of a recency cache can bear: 4 bits

CountsOf = Callable[
    [str, np.ndarray, np.ndarray], np.ndarray
]  # table, order index, keys -> how often each was asked for
Note = Callable[[str, str, str], None]  # path, identity, path before


class Swapped(NamedTuple):
    """What a swap did: entries that were static when clients moved, and the seconds that it took."""

    num_warmed: int
    seconds: float


class Versions:
    """Makes versions and swaps them.

    previous_path: of the store that a rollback goes to. begun: the placement that the daemon began with.
    """

    def __init__(self, tiers: SharedTiers, epochs: Epochs, attachments: Attachments, choice: IoChoice) -> None:
        """choice: how the daemon reads."""
        self._tiers, self._epochs, self._attachments, self._choice = tiers, epochs, attachments, choice
        self._tags: dict[str, int] = {}  # by identity of a store; guarded by `Epochs.changes`
        self.previous_path: str | None = None
        self.begun: BegunPlacement | None = None

    def make(self, opened: OpenVersion, number: int, on_bytes: OnBytes | None) -> Version:
        """Loads resident tables, and makes the engine by which the daemon reads a version. Blocks."""
        resident, num_bytes = None, self._tiers.plan.resident_bytes + self._overlay_bytes(opened)
        try:
            if num_bytes:
                resident = SharedBlock(f"tierstore-resident-{number}", num_bytes, on_bytes)
            return self._make_engine(opened, number, resident, on_bytes)
        except BaseException:
            self._attachments.own.leave(number)
            if resident:
                resident.close()
            raise

    def _make_engine(
        self, opened: OpenVersion, number: int, resident: SharedBlock | None, on_bytes: OnBytes | None
    ) -> Version:
        tag, plan = self._tag_of(opened.image.identity), self._tiers.plan
        blocks = self._tiers.blocks_with(resident)
        # Progress counted these bytes when they were allocated; the callback may still raise to end it.
        poll = None if on_bytes is None else partial(on_bytes, 0)
        bad_pages = self._load_resident(opened, resident, poll)
        for overlay in overlays_in(opened, plan.shares, blocks.resident).values():
            overlay.load_index()
        _, block = self._attachments.own.give_block(number)
        memories = table_memories(opened, plan.shares, blocks, tag, self._tiers.caches, bad_pages)
        shared = SharedEpochs(self._tiers.control.array, number, block, reports=False)
        what = f"the store {opened.image.path}"
        engine = NativeEngine(what, opened.files, memories, self._choice, plan.staging, opened.placed, shared)
        if opened.placed is not None:
            opened.placed.overlays = engine.overlays
        for index, name in enumerate(opened.image.tables):
            if name in bad_pages:
                engine.set_resident(index, bad_pages[name])
        return Version(number, tag, opened, resident, bad_pages, engine)

    def _overlay_bytes(self, opened: OpenVersion) -> int:
        """Returns the bytes of the index of versions' rows; raises `BudgetError` if there is no room set aside."""
        image, plan = opened.image, self._tiers.plan
        needed = sum(overlay_sizes(image, plan.shares).values())
        if needed > plan.overlay_bytes:
            raise BudgetError(
                f"version {image.version} of {image.path}: the index of the {sum(image.touched.values())} rows that "
                f"its versions have takes {needed} bytes, the daemon has set {plan.overlay_bytes} aside: start it "
                f"again (with --follow it sets more aside than it needs), with more --dram, or over a store that "
                f"'tierstore compact' made"
            )
        return needed

    def _load_resident(
        self, opened: OpenVersion, resident: SharedBlock | None, poll: Callable[[], None] | None
    ) -> dict[str, dict[int, str]]:
        """Loads what a version has in its own block: whole tables; of those in place, checksums and copied planes.

        Returns the pages that could not be loaded, by table or side table.
        """
        bad_pages: dict[str, dict[int, str]] = {}
        rows = resident.array if resident else np.empty(0, dtype=np.uint8)
        for files in opened.files:
            name = files.table.spec.name
            share = self._tiers.plan.shares[name]
            if share.resident:
                bad_pages[name] = load_table(files, rows[share.resident_start :], poll)
            elif isinstance(files, InPlaceFiles):
                bad_pages |= load_side(files, side_part(rows, files.table, share), poll)
        return bad_pages

    def _tag_of(self, identity: str) -> int:
        """Returns the tag of a store's entries in the recency caches, the same as before if it is known."""
        if identity not in self._tags:
            if len(self._tags) == TAGS:  # all but the served one's are free again
                served = self._epochs.current.identity
                self._tags = {served: self._tags[served]}
            tag = self._tags[identity] = next(tag for tag in range(TAGS) if tag not in self._tags.values())
            for cache in self._tiers.caches.values():
                cache.drop_tag(tag)
        return self._tags[identity]

    def swap(
        self,
        path: str | os.PathLike[str],
        counts_of: CountsOf,
        move: Callable[[], None],
        note: Note = lambda *_: None,
    ) -> Swapped:
        """Serves another store in place of this one, for every client. Blocks until all have moved, or a while.

        Args:
            path: of the store.
            counts_of: says how often entries are asked for.
            move: sends every client the new version.
            note: keeps what is served from now on, before any client sees it.

        Raises:
            FingerprintMismatchError: the tables' hash differs. `ConfigError`: something else of the tables does.
            DaemonError: a GPU is still in the epoch before.
            TierStoreError: what `note` and opening a store raise.
        """
        epochs = self._epochs
        with epochs.changes:
            started, old = time.monotonic(), epochs.current
            epochs.require_reclaimed()  # a version that is not over may still have the tag that the new one gets
            # What is static follows from what is asked for now; the store's own placement fills what stays free later.
            opened = open_next(path, self.begun, self._choice)
            try:
                self._check_tables(opened)
                version = self.make(opened, old.number + 1, None)
            except BaseException:
                opened.close()
                raise
            try:
                live = self._warm(version, counts_of)
                self._publish_noted(version, live, note)
            except BaseException:
                self._attachments.own.leave(version.number)
                version.close()
                epochs.free_unnamed()
                raise
            num_warmed = sum(int(slots.sum()) for slots in live.values())
            event(logger, logging.INFO, "version_published", version=version.number, store=path, warmed=num_warmed)
            move()
            epochs.reclaim()
            return Swapped(num_warmed, time.monotonic() - started)

    def _warm(self, version: Version, counts_of: CountsOf) -> Live:
        """Writes a version's hottest entries while the old one is served; returns their slots.

        Half of the slots are freed first. The entries of two versions cannot share a slot, and both must be readable at
        once: the old version's until clients have moved, the new one's as soon as they do. So the old version keeps its
        hotter half, and the new one starts with the same entries in the other.
        """
        epochs, slots_of = self._epochs, self._tiers.slots
        hot = {name: self._hottest_half(name, counts_of) for name in slots_of}
        epochs.change({}, {name: np.flatnonzero(slots.live & ~hot[name]) for name, slots in slots_of.items()})
        epochs.require_reclaimed()  # only then are those slots free
        live = {}
        for name, slots in slots_of.items():
            wanted = np.flatnonzero(hot[name])[: slots.num_free]
            written = self._tiers.write(version, name, slots.order_index[wanted], slots.keys[wanted])
            live[name] = np.zeros(len(slots.keys), dtype=bool)
            live[name][written] = True
        return live

    def _publish_noted(self, version: Version, live: Live, note: Note) -> None:
        """Notes a version, then publishes it: a daemon that is killed in between must serve it when it is back.

        If it is not published after all, what was noted is taken back.
        """
        old, previous = self._epochs.current, self.previous_path
        # A rollback goes to another store, not to another version of the same.
        is_same_store = version.path == old.path and version.base_identity == old.base_identity
        next_previous = previous if is_same_store else old.path
        note(version.path, version.base_identity, next_previous or old.path)
        try:
            self._epochs.publish(version, live)
        except BaseException:
            try:
                note(old.path, old.base_identity, previous or old.path)
            except DaemonError as error:
                event(logger, logging.ERROR, "swap_not_taken_back", store=old.path, error=error)
            raise
        self.previous_path = next_previous

    def _check_tables(self, opened: OpenVersion) -> None:
        current = self._epochs.current
        ours = [layout.public_spec for layout in current.layouts.values()]
        difference = same_tables(ours, [layout.public_spec for layout in opened.image.tables.values()])
        if difference:
            kind = FingerprintMismatchError if "fingerprint" in difference else ConfigError
            raise kind(
                f"{opened.image.path} cannot take the place of {current.path}: {difference}; clients hash and decode "
                f"by the old tables: serve it by a daemon of its own"
            )

    def _hottest_half(self, name: str, counts_of: CountsOf) -> np.ndarray:
        """Returns which live slots to keep so that half of all are free, bool [S]: those asked for most."""
        slots = self._tiers.slots[name]
        hot = np.zeros(len(slots.keys), dtype=bool)
        hot[hottest_indexes(slots.counted(partial(counts_of, name)), len(slots.keys) // 2)] = True
        return hot & slots.live
