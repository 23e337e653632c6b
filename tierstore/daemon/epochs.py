"""Epochs: numbered static sets, of which the newest serves, and how one takes the place of another under its readers.

Input: which entries should enter and which leave. Output: published epochs. Errors: `DaemonError` while a GPU still
reads what only the epoch before names; nothing is changed then.

    write entries into free slots -> index them for the next epoch's parity -> publish -> grace period -> reclaim

The grace period ends when no client looks up in the epoch before, or after a bounded wait: a lookup notices afterwards
that its epoch is over, and then reads from disk what it has copied. Reclaiming frees the slots that the newest epoch
does not name. So at most two epochs are alive, and no client but one whose GPU reads the static set can hold up a
change for long.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from functools import partial

import numpy as np

from .. import kernels
from ..errors import DaemonError
from ..ipc.identity import process_text
from .attachments import Attachments
from .shared_tiers import Live, SharedTiers
from .version import Version

Pairs = tuple[np.ndarray, np.ndarray]  # order index uint8 [n], keys int64 [n]


class Epochs:
    """The epochs of one host. Reading attributes may come from any thread; all else needs `changes`.

    newest: the number of the newest epoch. reclaimed: that of the newest one before which nothing is kept. num_changes:
    epochs published since the start.
    """

    def __init__(self, tiers: SharedTiers, attachments: Attachments) -> None:
        """Nothing is published yet: `publish` must follow before anybody attaches."""
        self._tiers, self._attachments = tiers, attachments
        # Guards the tiers' slots and all attributes here, against two changes at a time. Reentered by a swap's steps.
        self.changes = threading.RLock()
        self.newest = 0
        self.reclaimed = 0
        self.num_changes = 0
        self.current: Version  # the newest epoch is one of it
        self._published_at = 0.0  # of `time.monotonic`
        self._retiring: Version | None = None  # served before `current`; its clients are moving

    @property
    def versions(self) -> list[Version]:
        """The versions that are open: the one that is served, and one whose clients are moving."""
        return [self.current, *([self._retiring] if self._retiring else [])]

    def publish(self, version: Version, live: Live) -> None:
        """Publishes the next epoch.

        Args:
            version: that it is an epoch of; if it is another than before, that one retires.
            live: the slots that it names. Only one epoch may be alive.
        """
        slots_of, epoch = self._tiers.slots, self.newest + 1
        # First the index, then the number: whoever sees the number reads a whole index. The index of this parity is
        # free, since the epoch before the last is reclaimed.
        for name, slots in slots_of.items():
            slots.index(epoch, live[name])
        # Under the lock by which clients attach: a client that comes now either is among those that are sent the new
        # version, or gets it at once. Between the two it would keep a version that is over.
        with self._attachments.lock:
            for name, slots in slots_of.items():  # nothing fails from here on
                slots.live = live[name]
            self.newest = version.epoch = epoch
            kernels.publish_epoch(self._tiers.control.array, version.number, epoch)
            self._published_at = time.monotonic()
            before = getattr(self, "current", version)
            if before is not version:
                self._retiring = before
            self.current = version
        self.num_changes += 1

    def change(self, enter: Mapping[str, Pairs], leave: Mapping[str, np.ndarray]) -> int:
        """Writes entries into free slots, lets others go, and publishes that as the next epoch.

        Blocks: reads, and waits a while for the epoch before to be left. Entries that cannot be read are left out.

        Args:
            enter: by table, no more than it has free slots.
            leave: by table, slots, int64.

        Returns:
            How many entered.

        Raises:
            DaemonError: a GPU is still in the epoch before.
        """
        with self.changes:
            self.require_reclaimed()
            live, num_entered = {}, 0
            try:
                for name, slots in self._tiers.slots.items():
                    live[name] = slots.live.copy()
                    if name in leave:
                        live[name][leave[name]] = False
                    if name in enter and len(enter[name][1]):
                        written = self._tiers.write(self.current, name, *enter[name])
                        live[name][written] = True
                        num_entered += len(written)
                self.publish(self.current, live)
            except BaseException:
                self.free_unnamed()
                raise
            self.reclaim()
            return num_entered

    def require_reclaimed(self) -> None:
        """Reclaims what was changed before; raises `DaemonError` if that cannot be."""
        if self.reclaim():
            return
        if self._attachments.ending.is_set():
            raise DaemonError("the daemon ends; nothing is changed any more")
        processes = ", ".join(map(process_text, self._attachments.waiting_for))
        raise DaemonError(
            f"the GPU of {processes} still pins epoch {self.newest - 1}, {time.monotonic() - self._published_at:.0f} s "
            f"after epoch {self.newest} was published; nothing more is changed: end that process, or let it go on, "
            f"then ask again"
        )

    def reclaim(self) -> bool:
        """Waits for the grace period, then frees what only the epoch before names, and a version that retires.

        Returns whether that was done: not while a GPU reads what only the epoch before names.
        """
        if self.reclaimed == self.newest:
            return True
        wait = partial(self._attachments.wait_for_grace_period, since=self._published_at)
        if self._retiring:
            if not self._retire(self._retiring, wait):
                return False
        elif not wait(self.current.number, self.newest - 1, is_last=False):
            return False
        # Readers must know that the epoch before is over before its slots are written: they check that after they
        # copied.
        kernels.reclaim_epochs_before(self._tiers.control.array, self.current.number, self.newest)
        for slots in self._tiers.slots.values():
            slots.free_dead()
        self.reclaimed = self.newest
        return True

    def _retire(self, old: Version, wait: partial[bool]) -> bool:
        """Closes a version once its clients have moved; returns whether they have."""
        if not wait(old.number, old.epoch, is_last=True):
            return False
        kernels.reclaim_version(self._tiers.control.array, old.number)
        # Once more: a GPU may have pinned it between the wait and its end, and none can any more.
        if not wait(old.number, old.epoch, is_last=False):
            return False
        self._retiring = None
        self._attachments.own.leave(old.number)
        old.close()
        return True

    def free_unnamed(self) -> None:
        """Frees slots that were written for an epoch that was not published after all.

        While the epoch before is not reclaimed, slots that only it names are still read, so none is freed then.
        """
        if self.reclaimed == self.newest:
            for slots in self._tiers.slots.values():
                slots.free_dead()
