"""Shared memory: blocks that one process writes and any number of others map and read.

Input: sizes, descriptors. Output: memory. Errors: `BudgetError` if there is not enough memory, `DaemonError` for a
descriptor whose length is not sealed: reading such a block could end in a signal.

A block is a memfd, mapped writable once by its maker and then sealed (F_SEAL_FUTURE_WRITE, GROW, SHRINK, SEAL). Nobody
who has a descriptor of it, even one reopened for writing, can write it, map it writable, or change its length under its
readers. Of two kinds of blocks only the length is sealed: a client's own, and one with a writable export, a descriptor
with which a trusted process may map it writable.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Callable

import numpy as np

from .. import kernels
from ..causes import Fault, named, named_memory
from ..errors import DaemonError
from ..units import format_bytes
from .huge_pages import keep_on_huge_pages

logger = logging.getLogger("tierstore")

# Of fcntl(2); before 3.13, Python has no name for the last.
_SEAL, _SHRINK, _GROW, _FUTURE_WRITE = fcntl.F_SEAL_SEAL, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, 0x10
_FIXED_LENGTH = _SEAL | _SHRINK | _GROW
HUGE_BYTES = 2 << 20
STEP_BYTES = 64 << 20  # brought in at once, between two calls of on_bytes
BLOCK_UNIT_BYTES = 4096

OnBytes = Callable[[int], None]


class SharedBlock:
    """A block of zeros that this process alone may write.

    Attributes:
        array: The memory, uint8 [num_bytes].
        fd: A read-only descriptor, to be handed out.
        huge_pages: What brings it onto huge pages; None for a small one.
        export_fd: The writable export, for a process that is trusted to map the block writable; -1 without one.
    """

    def __init__(self, name: str, num_bytes: int, on_bytes: OnBytes | None = None, *, export: bool = False) -> None:
        """Makes the block, on huge pages if the system gives them. Blocks until all of it is there.

        Args:
            name: As /proc shows it.
            num_bytes: A multiple of 4,096.
            on_bytes: Called with the number of bytes that came since the last call.
            export: Whether to make a writable export.

        Raises:
            BudgetError: There is not enough memory.
        """
        self.fd = self.export_fd = -1
        self.huge_pages: kernels.HugePages | None = None
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, num_bytes)
            self.array: np.ndarray = kernels.map_shared(fd, num_bytes, writable=True)
            _bring_in(fd, self.array, name, on_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _FIXED_LENGTH | (0 if export else _FUTURE_WRITE))
            os.fchmod(fd, 0o400)
            self.fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
            self.huge_pages = keep_on_huge_pages(self.array)
            if export:
                self.export_fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        except OSError as error:
            what = f"{format_bytes(num_bytes)} ({num_bytes} bytes) of shared memory for {name}"
            raise named_memory(error, what, num_bytes) from error
        finally:
            os.close(fd)

    def close(self) -> None:
        """Closes the descriptors; the memory goes with the last view of `array` and the last mapping elsewhere."""
        for fd in (self.fd, self.export_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.export_fd = -1
        huge_pages, self.huge_pages = self.huge_pages, None  # it has a view of its own
        if huge_pages is not None:
            huge_pages.stop()
        self.array = np.empty(0, dtype=np.uint8)


def _bring_in(fd: int, array: np.ndarray, name: str, on_bytes: OnBytes | None) -> None:
    """Has the kernel give all pages now: later, a page that it cannot give would be a signal.

    A huge page that is touched once and collapsed costs less than 512 small ones; collapsing also works where huge
    pages of shared memory are not given by themselves.
    """
    huge_end = len(array) // HUGE_BYTES * HUGE_BYTES
    refused = 0
    for start in range(0, len(array), STEP_BYTES):
        end = min(start + STEP_BYTES, len(array))
        collapsible = min(end, huge_end) - start
        if collapsible > 0 and not refused:
            for at in range(start, start + collapsible, HUGE_BYTES):
                os.posix_fallocate(fd, at, 1)
            refused = kernels.collapse(array, start, collapsible)
        os.posix_fallocate(fd, start, end - start)  # whatever is not there yet
        if on_bytes:
            on_bytes(end - start)
    if refused:
        logger.warning(
            "%s: no huge pages (%s): small ones serve, a little slower; run 'tierstore doctor'",
            name, errno.errorcode.get(refused, refused),
        )  # fmt: skip


def make_client_block(name: str, num_bytes: int) -> tuple[int, np.ndarray]:
    """Returns a new block that a client may write: (descriptor, its memory here).
    Its length cannot be changed by anybody."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, num_bytes)
        os.posix_fallocate(fd, 0, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _FIXED_LENGTH)
        return fd, kernels.map_shared(fd, num_bytes, writable=True)
    except BaseException:
        os.close(fd)
        raise


def map_block(fd: int, num_bytes: int, what: str, *, writable: bool = False) -> np.ndarray:
    """Maps a block that another process made, uint8 [num_bytes].

    Raises `DaemonError` if it is not sealed or too short, `BudgetError` if this process may map no more.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        found_bytes = os.fstat(fd).st_size
        if seals & _SHRINK and found_bytes >= num_bytes > 0 and num_bytes % BLOCK_UNIT_BYTES == 0:
            return kernels.map_shared(fd, num_bytes, writable=writable)
    except OSError as error:
        fault = Fault(DaemonError, "it is not a daemon's block: start 'tierstore serve' again")
        raise named(error, what, needed_bytes=num_bytes, fault=fault) from error
    raise DaemonError(
        f"{what}: {found_bytes} bytes with seals {seals:#x}, expected {num_bytes} with a sealed length; "
        f"it is not a block of a daemon: start 'tierstore serve' again"
    )
