"""An attachment: what one client was given, and what it reports of the epochs that it reads.

Input: a process; versions that it looks up in. Output: a block of its own for each, which the client writes and is not
trusted with. Errors: `OSError` if there is no memory or descriptor for a block. The owner's lock guards all of it.
"""

from __future__ import annotations

import fcntl
import os
import select
from pathlib import Path
from typing import Any

import numpy as np

from .. import kernels
from ..ipc.identity import own_proc
from ..tiers.shared import make_client_block

BLOCK_NAME = "tierstore-client"


class Attachment:
    """What one client was given: a block of its own for each version that it looks up in, reports included.

    on_gpu: its kernels read the static set.
    """

    def __init__(self, pid: int, *, on_gpu: bool = False, pidfd: int | None = None) -> None:
        """pid: 0 for a process of another PID namespace. pidfd: of the process; copied. Raises `OSError`."""
        self.pid, self.on_gpu = pid, on_gpu
        # Only a client with a GPU may become an orphan, whose process is watched after its connection is gone.
        self._pidfd = fcntl.fcntl(pidfd, fcntl.F_DUPFD_CLOEXEC, 0) if pidfd is not None and on_gpu else None
        self.is_attached = True
        # (version, parity of epoch) at which it has timed out, and which it has not left since.
        self.timed_out: set[tuple[int, int]] = set()
        self.blocks: dict[int, np.ndarray] = {}  # by version, as all of these
        self.readers: dict[int, Any] = {}
        self._fds: dict[int, int] = {}

    def give_block(self, version: int) -> tuple[int, np.ndarray]:
        """Makes the block for a version; returns its descriptor, which stays ours, and its memory. Raises `OSError`."""
        fd, block = make_client_block(f"{BLOCK_NAME}-{self.pid}", kernels.CLIENT_BLOCK_BYTES)
        kernels.init_client_block(block)
        self.readers[version] = kernels.ReportReader(block)
        self.blocks[version], self._fds[version] = block, fd
        return fd, block

    def leave(self, version: int) -> list[Any]:
        """The client is done with a version; returns the reader of what it reported of that, if there was one."""
        if version not in self._fds:
            return []
        os.close(self._fds.pop(version))
        del self.blocks[version]
        self.timed_out = {at for at in self.timed_out if at[0] != version}
        return [self.readers.pop(version)]

    def close(self) -> list[Any]:
        """The client is gone; returns the readers of what it reported."""
        pidfd, self._pidfd = self._pidfd, None
        if pidfd is not None:
            os.close(pidfd)
        return [reader for version in list(self.blocks) for reader in self.leave(version)]

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

    def is_mapped(self) -> bool:
        """Whether its process may still count in its blocks, though its connection is gone: it runs, and may map
        one."""
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

    def pins(self, version: int, epoch: int) -> bool:
        """Whether its GPU reads an epoch in place."""
        return self.on_gpu and version in self.blocks and kernels.active_pins(self.blocks[version])[epoch % 2] > 0

    def delays(self, version: int, epoch: int, is_last: bool) -> bool:
        """True if the client reports an active lookup, or a GPU pin, in this epoch.

        is_last: also true if it may still enter it. Clients that timed out before do not count, GPU pins always do.
        """
        if self.pins(version, epoch):
            return True
        at, may_enter = (version, epoch % 2), is_last and self.is_attached
        is_in = version in self.blocks and (may_enter or kernels.active_lookups(self.blocks[version])[epoch % 2] > 0)
        if not is_in:
            self.timed_out.discard(at)
        return is_in and at not in self.timed_out
