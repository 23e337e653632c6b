"""Attachments: what the daemon's clients were given, and whether they have left an epoch.

Flows in: who attaches, leaves a version, or is gone. Flows out: a block of its own for every client and version, readers of
what they reported, and waits until an epoch is left. Such a wait has an end, and whoever outlasts one is not waited for
again until it has left: a client that is stopped, or lies about where it is, delays one change and no more. Any thread may
call.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from typing import Any

import numpy as np

from .. import kernels
from ..errors import DaemonError
from ..tiers.shared import make_client_block
from .events import event

logger = logging.getLogger("tierstore.daemon")

LEAVE_WAIT_S = 2.0  # how long a change waits for clients to leave an epoch, or a version, by themselves
LEAVE_POLL_S = 0.001
LAST_READERS_MAX = 64  # of clients that are gone; of more, the reports of the first are lost


class Attachment:
    """What one client was given: a block of its own for each version that it looks up in, reports included."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.late: set[tuple[int, int]] = (
            set()
        )  # (version, parity) that it was waited for in vain, and has not left since
        self.blocks: dict[int, np.ndarray] = {}  # by version, as all of these
        self.readers: dict[int, Any] = {}
        self._fds: dict[int, int] = {}

    def give(self, version: int) -> tuple[int, np.ndarray]:
        """Makes the block for a version; returns its descriptor, which stays ours, and its memory. Raises `OSError`."""
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
        self.late = {where for where in self.late if where[0] != version}
        return [self.readers.pop(version)]

    def close(self) -> list[Any]:
        """The client is gone; returns the readers of what it reported."""
        return [reader for version in list(self.blocks) for reader in self.left(version)]

    def holds(self, version: int, epoch: int, is_last: bool) -> bool:
        """Whether it says that a lookup of its is in an epoch; is_last: or may still be. Not, where it is late already."""
        where = version, epoch % 2
        is_in = version in self.blocks and (is_last or kernels.active_lookups(self.blocks[version])[epoch % 2] > 0)
        if not is_in:
            self.late.discard(where)
        return is_in and where not in self.late


class Attachments:
    """The daemon's own attachment, `own`, for its lookups are counted like a client's, and those of all clients."""

    def __init__(self) -> None:
        self.own = Attachment(os.getpid())
        self.waiting_for: list[int] = []  # process ids that a change waits for
        self._of: dict[object, Attachment] = {}  # by who it was that attached
        self._last_readers: deque[Any] = deque(
            maxlen=LAST_READERS_MAX
        )  # of clients that are gone, not read to their end
        self.lock = threading.RLock()  # of the two above; held by who must see no client come meanwhile

    def attach(self, who: object, pid: int, version: int) -> tuple[int, np.ndarray]:
        """Gives a new client its block for a version; returns its descriptor, which stays ours, and its memory.

        Raises `DaemonError` where there is no memory or descriptor for it.
        """
        attachment = Attachment(pid)
        with self.lock:
            given = self._given(attachment, version)
            self._of[who] = attachment
            return given

    def move(self, who: object, version: int) -> tuple[int, np.ndarray] | None:
        """The same for a client that is attached to another version; None where it is gone, or has this one already."""
        with self.lock:
            attachment = self._of.get(who)
            if attachment is None or version in attachment.blocks:
                return None
            return self._given(attachment, version)

    def _given(self, attachment: Attachment, version: int) -> tuple[int, np.ndarray]:
        try:
            return attachment.give(version)
        except OSError as error:
            raise DaemonError(
                f"no block for process {attachment.pid} ({error.strerror}): raise the daemon's limits of open files and memory"
            ) from error

    def left(self, who: object, version: int) -> None:
        """A client is done with a version."""
        with self.lock:
            if who in self._of:
                self._last_readers += self._of[who].left(version)

    def detach(self, who: object) -> None:
        """A client is gone; what it held is let go."""
        with self.lock:
            attachment = self._of.pop(who, None)
            if attachment:
                self._last_readers += attachment.close()

    def clients(self) -> list[Any]:
        """Returns who is attached, as given to `attach`."""
        with self.lock:
            return list(self._of)

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

    def wait_left(self, version: int, epoch: int, *, is_last: bool) -> None:
        """Waits, a while, until nobody is in an epoch of a version; is_last: nor will be again, clients having moved on.

        Whoever still is after LEAVE_WAIT_S finds out at the end of its lookup, and reads from disk what it has copied.
        """
        deadline = time.monotonic() + LEAVE_WAIT_S
        while True:
            with self.lock:
                everybody = (self.own, *self._of.values())
                held = [each for each in everybody if each.holds(version, epoch, is_last and each is not self.own)]
                self.waiting_for = [each.pid for each in held]
            if not held:
                return
            if time.monotonic() > deadline:
                event(logger, logging.WARNING, "epoch_not_left", epoch=epoch, processes=self.waiting_for)
                for each in held:
                    each.late.add((version, epoch % 2))
            threading.Event().wait(LEAVE_POLL_S)

    def close(self) -> None:
        """Lets go of all."""
        with self.lock:
            for attachment in (self.own, *self._of.values()):
                attachment.close()
            self._of.clear()
