"""Attachments: what the daemon's clients were given, and which epochs they still read.

Input: who attaches, leaves a version, or is gone. Output: a block of its own for every client and version, readers of
what it reported, and waits for grace periods. Errors: `DaemonError` if there is no memory or descriptor for a block.

A grace period is bounded. A client that outlasts one has timed out and is not waited for again until it has left that
epoch: a client that is stopped, or reports a wrong epoch, delays one change and no more. A GPU that reads the static
set in place cannot check afterwards what it copied, so it pins its epoch: nothing of that is overwritten until the pin
is released. This also holds for an orphan, whose connection is gone while a process still maps its block. Any thread
may call.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from typing import Any

import numpy as np

from ..causes import named
from ..errors import DaemonError, TierStoreError
from ..ipc.events import event
from ..ipc.identity import process_text
from .attachment import Attachment

logger = logging.getLogger("tierstore.daemon")

GRACE_PERIOD_S = 2.0  # how long a change waits for clients to leave an epoch, or a version, by themselves
PIN_WAIT_S = 60.0  # the same for pins of GPUs, whose clients make an index of each epoch; then nothing is changed
POLL_S = 0.001
ORPHANS_POLL_S = 0.05  # between two looks, during a wait, whether an orphan's block is still mapped
ORPHANS_MAX = 64  # clients with a GPU whose connection is gone, and whose block is still mapped
LAST_READERS_MAX = 64  # of clients that are gone; of more, the reports of the first are lost


class Attachments:
    """The daemon's own attachment, `own`, for its lookups are counted like a client's, and those of all clients."""

    def __init__(self, gpu_index_s: float = 0.0) -> None:
        """gpu_index_s: how long a GPU may take to make an index of an epoch, beyond PIN_WAIT_S."""
        self.own = Attachment(os.getpid())
        self.ending = threading.Event()  # ends all waits
        self._gpu_index_s = gpu_index_s
        # Guards `_awaited`, `_of`, `_orphans`, `_last_readers` and the attachments in them. Also held to publish an
        # epoch of another version, so that no client attaches meanwhile.
        self.lock = threading.RLock()
        self._awaited: tuple[int, int, bool] | None = None  # what `wait_for_grace_period` waits for, or has in vain
        self._of: dict[object, Attachment] = {}  # by who it was that attached
        self._orphans: list[Attachment] = []  # of clients with a GPU whose connection is gone
        # Of clients that are gone, not read to their end.
        self._last_readers: deque[Any] = deque(maxlen=LAST_READERS_MAX)

    def attach(
        self, who: object, pid: int, version: int, *, on_gpu: bool = False, pidfd: int | None = None
    ) -> tuple[int, np.ndarray]:
        """Gives a new client its block for a version; returns its descriptor, which stays ours, and its memory.

        pidfd: of its process, if there is one; copied. Raises `DaemonError` if there is no memory or descriptor for it.
        """
        with self.lock:
            self._forget_unmapped()
            if on_gpu and len(self._orphans) >= ORPHANS_MAX:
                raise DaemonError(
                    f"{len(self._orphans)} clients are gone whose GPUs may still read the static set, the limit is "
                    f"{ORPHANS_MAX}: end their processes, or close what they had connected"
                )
            attachment = _made(pid, on_gpu=on_gpu, pidfd=pidfd)
            try:
                given = self._given(attachment, version)
            except BaseException:
                attachment.close()
                raise
            self._of[who] = attachment
            return given

    def move(self, who: object, version: int) -> tuple[int, np.ndarray] | None:
        """The same for a client that is attached to another version; None if it is gone, or has this one already."""
        with self.lock:
            attachment = self._of.get(who)
            if attachment is None or version in attachment.blocks:
                return None
            return self._given(attachment, version)

    def _given(self, attachment: Attachment, version: int) -> tuple[int, np.ndarray]:
        try:
            return attachment.give_block(version)
        except OSError as error:
            raise _no_room(attachment.pid, error) from error

    def leave(self, who: object, version: int) -> None:
        """A client is done with a version."""
        with self.lock:
            if who in self._of:
                self._last_readers += self._of[who].leave(version)

    def detach(self, who: object) -> None:
        """A client is gone: closes what it was given, or keeps it as an orphan's if a GPU may still read."""
        with self.lock:
            attachment = self._of.pop(who, None)
            if attachment is None:
                return
            attachment.is_attached = False
            if attachment.on_gpu:
                self._orphans.append(attachment)
            else:
                self._last_readers += attachment.close()
            self._forget_unmapped()

    def clients(self) -> list[Any]:
        """Returns who is attached, as given to `attach`."""
        with self.lock:
            return list(self._of)

    def is_on_gpu(self, who: object) -> bool:
        """Whether a client's kernels read the static set."""
        with self.lock:
            return who in self._of and self._of[who].on_gpu

    def versions_of(self, who: object) -> list[int]:
        """Returns the numbers of the versions that a client may look up in."""
        with self.lock:
            return list(self._of[who].blocks) if who in self._of else []

    def readers(self) -> list[Any]:
        """Returns the readers of all clients' reports."""
        with self.lock:
            return [reader for each in self._of.values() for reader in each.readers.values()]

    def take_last_readers(self) -> list[Any]:
        """Returns, once, the readers of clients that are gone: what those reported last is still to be read."""
        with self.lock:
            taken = list(self._last_readers)
            self._last_readers.clear()
            return taken

    def wait_for_grace_period(self, version: int, epoch: int, *, is_last: bool, since: float | None = None) -> bool:
        """Waits, a while, until nobody reads an epoch of a version.

        A client that still does after GRACE_PERIOD_S finds out at the end of its lookup, and reads from disk what it
        has copied.

        Args:
            version: its number.
            epoch: the epoch that is to be left.
            is_last: also waits until nobody can enter it again, clients having moved to another version.
            since: of `time.monotonic`, when the epoch after it was published; None: now.

        Returns:
            Whether what only that epoch names may be overwritten. Not if a GPU still pins it PIN_WAIT_S and
            `gpu_index_s` after
            `since`, nor if `ending` is set.
        """
        started = looked = time.monotonic()
        pins_end = (started if since is None else since) + PIN_WAIT_S + self._gpu_index_s
        while True:
            with self.lock:
                if time.monotonic() > looked + ORPHANS_POLL_S:
                    self._forget_unmapped()
                    looked = time.monotonic()
                self._awaited = version, epoch, is_last
                delaying = self._awaited_of()
                if not delaying:
                    self._awaited = None
                    return True
            without_pin = [each for each in delaying if not each.pins(version, epoch)]
            if time.monotonic() - started > GRACE_PERIOD_S and without_pin:
                pids = [each.pid for each in without_pin]
                event(logger, logging.WARNING, "grace_period_timed_out", epoch=epoch, processes=pids)
                with self.lock:
                    for each in without_pin:
                        each.timed_out.add((version, epoch % 2))
            if time.monotonic() > pins_end and not without_pin:
                event(logger, logging.WARNING, "epoch_pinned_by_gpu", epoch=epoch, processes=self.waiting_for)
                return False
            if self.ending.wait(POLL_S):
                return False

    @property
    def waiting_for(self) -> list[int]:
        """Process ids that a change waits for, or has waited for in vain and that have not left since."""
        with self.lock:
            return [each.pid for each in self._awaited_of()]

    def _awaited_of(self) -> list[Attachment]:
        if self._awaited is None:
            return []
        version, epoch, is_last = self._awaited
        everybody = (self.own, *self._of.values(), *self._orphans)
        return [each for each in everybody if each.delays(version, epoch, is_last and each is not self.own)]

    def _forget_unmapped(self) -> None:
        """Closes what orphans were given whose blocks nobody maps any more."""
        for attachment in [each for each in self._orphans if not each.is_mapped()]:
            self._orphans.remove(attachment)
            self._last_readers += attachment.close()

    def close(self) -> None:
        """Closes all."""
        with self.lock:
            for attachment in (self.own, *self._of.values(), *self._orphans):
                attachment.close()
            self._of.clear()
            self._orphans.clear()


def _made(pid: int, *, on_gpu: bool, pidfd: int | None) -> Attachment:
    try:
        return Attachment(pid, on_gpu=on_gpu, pidfd=pidfd)
    except OSError as error:
        raise _no_room(pid, error) from error


def _no_room(pid: int, error: OSError) -> TierStoreError:
    """Returns the error for a client if the system gives the daemon no memory or descriptor for its block."""
    return named(error, f"the daemon has no block for {process_text(pid)}", kind=DaemonError)
