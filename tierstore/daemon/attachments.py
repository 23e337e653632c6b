"""Attachments: what the daemon's clients were given, and whether they have left an epoch.

Flows in: who attaches, leaves a version, or is gone. Flows out: a block of its own for every client and version,
readers of what they reported, and waits until an epoch is left. Such a wait has an end, and whoever outlasts one is not
waited for again until it has left: a client that is stopped, or lies about where it is, delays one change and no more.
But for those whose GPU reads the static set, who cannot find out: while one of them has not left, nothing of that is
written over, nor when its connection is gone and its block still mapped. Any thread may call.
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from .. import kernels
from ..causes import named
from ..errors import DaemonError, TierStoreError
from ..ipc.events import event
from ..ipc.identity import own_proc, process_text
from ..tiers.shared import make_client_block

logger = logging.getLogger("tierstore.daemon")

LEAVE_WAIT_S = 2.0  # how long a change waits for clients to leave an epoch, or a version, by themselves
GPU_LEAVE_WAIT_S = 60.0  # the same of those whose GPU reads it, who make an index of each; then nothing is changed
LEAVE_POLL_S = 0.001
LOOK_S = 0.05  # between two looks, while one waits, whether who is gone still maps its block
BLOCK_NAME = "tierstore-client"
LINGERING_MAX = 64  # clients with a GPU whose connection is gone, and whose block is still mapped
LAST_READERS_MAX = 64  # of clients that are gone; of more, the reports of the first are lost


class Attachment:
    """What one client was given: a block of its own for each version that it looks up in, reports included.

    on_gpu: its kernels read the static set.
    """

    def __init__(self, pid: int, *, on_gpu: bool = False, pidfd: int | None = None) -> None:
        """pid: 0 for a process of another PID namespace. pidfd: of the process; copied. Raises `OSError`."""
        self.pid, self.on_gpu = pid, on_gpu
        # Only who lingers is looked for after its connection is gone.
        self._pidfd = fcntl.fcntl(pidfd, fcntl.F_DUPFD_CLOEXEC, 0) if pidfd is not None and on_gpu else None
        self.is_attached = True
        # (version, parity) that it was waited for in vain, and has not left since.
        self.late: set[tuple[int, int]] = set()
        self.blocks: dict[int, np.ndarray] = {}  # by version, as all of these
        self.readers: dict[int, Any] = {}
        self._fds: dict[int, int] = {}

    def give(self, version: int) -> tuple[int, np.ndarray]:
        """Makes the block for a version; returns its descriptor, which stays ours, and its memory. Raises `OSError`."""
        fd, block = make_client_block(f"{BLOCK_NAME}-{self.pid}", kernels.CLIENT_BLOCK_BYTES)
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
        pidfd, self._pidfd = self._pidfd, None
        if pidfd is not None:
            os.close(pidfd)
        return [reader for version in list(self.blocks) for reader in self.left(version)]

    def _may_run(self) -> bool:
        """Whether its process may still run; unknown counts as yes."""
        if self._pidfd is not None:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            return not poll.poll(0)
        if self.pid <= 0:
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:  # another user's
            return True
        return True

    def lingers(self) -> bool:
        """Whether its process may count in its blocks still, though its connection is gone: it runs,
        and may map one."""
        if not self._may_run():
            return False
        if self.pid <= 0 or not own_proc():  # no file of /proc is certain to be about it
            return True
        try:
            lines = Path(f"/proc/{self.pid}/maps").read_text(errors="replace").splitlines()
        except OSError:  # not ours to look at, or hidden
            return self._may_run()
        inodes = {str(os.fstat(fd).st_ino) for fd in self._fds.values()}
        return any(BLOCK_NAME in line and line.split(maxsplit=5)[4] in inodes for line in lines)

    def holds_for_gpu(self, version: int, epoch: int) -> bool:
        """Whether its GPU is in an epoch."""
        return self.on_gpu and version in self.blocks and kernels.active_pins(self.blocks[version])[epoch % 2] > 0

    def holds(self, version: int, epoch: int, is_last: bool) -> bool:
        """Whether it says that a lookup of its, or its GPU, is in an epoch; is_last: or may still be. Not, where it is
        late already, unless it is its GPU that is."""
        if self.holds_for_gpu(version, epoch):
            return True
        where, may_enter = (version, epoch % 2), is_last and self.is_attached
        is_in = version in self.blocks and (may_enter or kernels.active_lookups(self.blocks[version])[epoch % 2] > 0)
        if not is_in:
            self.late.discard(where)
        return is_in and where not in self.late


class Attachments:
    """The daemon's own attachment, `own`, for its lookups are counted like a client's, and those of all clients."""

    def __init__(self) -> None:
        self.own = Attachment(os.getpid())
        self.ending = threading.Event()  # ends all waits
        self.gpu_index_s = 0.0  # that a GPU may take to make an index of an epoch, beyond GPU_LEAVE_WAIT_S
        self._awaited: tuple[int, int, bool] | None = None  # what `wait_left` waits for, or has in vain
        self._of: dict[object, Attachment] = {}  # by who it was that attached
        self._lingering: list[Attachment] = []  # of clients with a GPU whose connection is gone
        # Of clients that are gone, not read to their end.
        self._last_readers: deque[Any] = deque(maxlen=LAST_READERS_MAX)
        self.lock = threading.RLock()  # of the four above; held by who must see no client come meanwhile

    def attach(
        self, who: object, pid: int, version: int, *, on_gpu: bool = False, pidfd: int | None = None
    ) -> tuple[int, np.ndarray]:
        """Gives a new client its block for a version; returns its descriptor, which stays ours, and its memory.

        pidfd: of its process, if there is one; copied. Raises `DaemonError` where there
        is no memory or descriptor for it.
        """
        with self.lock:
            self._forget_ended()
            if on_gpu and len(self._lingering) >= LINGERING_MAX:
                raise DaemonError(
                    f"{len(self._lingering)} clients are gone whose GPUs may still read the static set, the limit is "
                    f"{LINGERING_MAX}: end their processes, or close what they had connected"
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
            raise _no_room(attachment.pid, error) from error

    def left(self, who: object, version: int) -> None:
        """A client is done with a version."""
        with self.lock:
            if who in self._of:
                self._last_readers += self._of[who].left(version)

    def detach(self, who: object) -> None:
        """A client is gone; what it held is let go."""
        with self.lock:
            attachment = self._of.pop(who, None)
            if attachment is None:
                return
            attachment.is_attached = False
            if attachment.on_gpu:
                self._lingering.append(attachment)
            else:
                self._last_readers += attachment.close()
            self._forget_ended()

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

    def wait_left(self, version: int, epoch: int, *, is_last: bool, since: float | None = None) -> bool:
        """Waits, a while, until nobody is in an epoch of a version; is_last: nor will be again,
        clients having moved on.

        Whoever still is after LEAVE_WAIT_S finds out at the end of its lookup, and reads from disk what it has copied.
        Returns whether what only that epoch names may be written over: not, where a GPU still reads it GPU_LEAVE_WAIT_S
        and `gpu_index_s` after `since`, of `time.monotonic`, when the epoch after it was published (None: now), nor
        when `ending` is set.
        """
        started = looked = time.monotonic()
        gpu_end = (started if since is None else since) + GPU_LEAVE_WAIT_S + self.gpu_index_s
        while True:
            with self.lock:
                if time.monotonic() > looked + LOOK_S:
                    self._forget_ended()
                    looked = time.monotonic()
                self._awaited = version, epoch, is_last
                held = self._awaited_of()
                if not held:
                    self._awaited = None
                    return True
            late = [each for each in held if not each.holds_for_gpu(version, epoch)]
            if time.monotonic() - started > LEAVE_WAIT_S and late:
                event(logger, logging.WARNING, "epoch_not_left", epoch=epoch, processes=[each.pid for each in late])
                for each in late:
                    each.late.add((version, epoch % 2))
            if time.monotonic() > gpu_end and not late:
                event(logger, logging.WARNING, "epoch_read_by_gpu", epoch=epoch, processes=self.waiting_for)
                return False
            if self.ending.wait(LEAVE_POLL_S):
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
        everybody = (self.own, *self._of.values(), *self._lingering)
        return [each for each in everybody if each.holds(version, epoch, is_last and each is not self.own)]

    def _forget_ended(self) -> None:
        """Lets go of what lingered and does so no more."""
        for attachment in [each for each in self._lingering if not each.lingers()]:
            self._lingering.remove(attachment)
            self._last_readers += attachment.close()

    def close(self) -> None:
        """Lets go of all."""
        with self.lock:
            for attachment in (self.own, *self._of.values(), *self._lingering):
                attachment.close()
            self._of.clear()
            self._lingering.clear()


def _made(pid: int, *, on_gpu: bool, pidfd: int | None) -> Attachment:
    try:
        return Attachment(pid, on_gpu=on_gpu, pidfd=pidfd)
    except OSError as error:
        raise _no_room(pid, error) from error


def _no_room(pid: int, error: OSError) -> TierStoreError:
    """Returns what a client is told if the system gives the daemon no memory or descriptor for its block."""
    return named(error, f"the daemon has no block for {process_text(pid)}", kind=DaemonError)
