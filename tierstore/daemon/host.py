"""What a daemon shares with the processes of its host: tiers, epochs, versions and clients, made and closed together.

Input: a store and a budget. Output: the parts, filled and with a first epoch published. Errors: as `tierstore.open`.
"""

from __future__ import annotations

import contextlib
import logging
import os

from ..decisions.shared_budget import divide_shared
from ..ipc.events import event
from ..process.progress import OnProgress
from ..store.embedded import check_available
from ..tiers.nvme import choose_io
from .attachments import Attachments
from .clients import Clients
from .epochs import Epochs
from .placements import BegunPlacement, open_version
from .shared_tiers import SharedTiers
from .versions import Versions

logger = logging.getLogger("tierstore.daemon")

CLOSE_WAIT_S = 60.0  # for a change that is under way
GPU_INDEX_S = (
    4e-6  # for each slot, that a client may take to make its GPU's index of an epoch: five times what it takes
)


class Host:
    """The parts, until `close`; clients keep what they mapped."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        dram_bytes: int,
        io: str = "auto",
        placement: int | str | None = None,
        on_progress: OnProgress | None = None,
        *,
        gpu_clients: bool = False,
        follows: bool = False,
    ) -> None:
        """Makes the tiers and warms them; blocks.

        Args:
            path: of the store.
            dram_bytes: the budget of all parts together.
            io: how pages are read, as in `tierstore.open`.
            placement: as in `tierstore.open`.
            on_progress: called with (bytes there, bytes in all).
            gpu_clients: see `SharedTiers`.
            follows: whether versions that are published later are served too.
        """
        choice = choose_io(io)
        self._placement = placement
        with contextlib.ExitStack() as undo:
            opened = open_version(path, placement, choice)
            undo.callback(opened.close)
            heading = opened.placed.placement if opened.placed else None
            image = opened.image
            plan = divide_shared(image.tables, dram_bytes, heading, image.touched, follows=follows)
            check_available(plan.dram_bytes)
            progress = _Progress(on_progress, plan.static_bytes + plan.recency_bytes + plan.resident_bytes)
            self.tiers = SharedTiers(image.tables, plan, progress.add, gpu_clients=gpu_clients)
            undo.callback(self.tiers.close)
            self.attachments = Attachments(GPU_INDEX_S * sum(len(slots.keys) for slots in self.tiers.slots.values()))
            undo.callback(self.attachments.close)
            self.epochs = Epochs(self.tiers, self.attachments)
            self.versions = Versions(self.tiers, self.epochs, self.attachments, choice)
            version = self.versions.make(opened, 1, progress.add)
            self.epochs.publish(version, self.tiers.load_placement(opened, heading, progress.add))
            self.versions.begun = BegunPlacement.of(opened)
            self.epochs.reclaim()
            self.clients = Clients(self.tiers, self.epochs, self.attachments)
            undo.pop_all()

    @property
    def has_no_placement(self) -> bool:
        """Whether no placement is to be served, whatever the store has."""
        return self._placement == "none"

    def end_waits(self) -> None:
        """Ends all waits for clients: what would be changed is given up."""
        self.attachments.ending.set()

    def close(self) -> None:
        """Ends the daemon's own lookups and closes files and descriptors."""
        self.end_waits()
        if not self.epochs.changes.acquire(timeout=CLOSE_WAIT_S):
            event(logger, logging.ERROR, "change_does_not_end", seconds=CLOSE_WAIT_S)
            return
        try:
            for version in self.epochs.versions:
                version.close()
        finally:
            self.epochs.changes.release()
        self.attachments.close()
        self.tiers.close()


class _Progress:
    """Adds up bytes for a callback of (bytes done, bytes in all)."""

    def __init__(self, on_progress: OnProgress | None, total: int) -> None:
        self._on_progress, self._total, self._done = on_progress, total, 0

    def add(self, num_bytes: int) -> None:
        """Counts more bytes."""
        self._done += num_bytes
        if self._on_progress:
            self._on_progress(min(self._done, self._total), self._total)
