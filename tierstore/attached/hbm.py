"""An hbm tier of this process above an attached store: filled from the placement, and moved along with the daemon.

Input: links as they come, and the daemon's epochs. Output: an engine with an hbm tier, whose kernels read the daemon's
static set in place if the daemon exports it. Errors: of making the tier as `put_above` raises. A tier that cannot be
filled later stays empty, and a static set that cannot be followed stays as it is: both cost speed only, and are logged.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from ..errors import FormatError, StoreNotReadyError
from ..store.embedded import open_placement
from ..store.options import HbmOptions
from ..tiers.hbm.device import DramPart
from ..tiers.hbm.opening import put_above
from .engine import AttachedEngine
from .link import Link
from .static_pin import PinnedStaticSet

if TYPE_CHECKING:
    from ..tiers.hbm.engine import HbmEngine

logger = logging.getLogger("tierstore")

FOLLOW_RETRY_S = 1.0  # after the device could not be moved to the newest epoch
END_WAIT_S = 10.0


class AttachedHbm:
    """The hbm tier of an attached store. Any thread may call. Not for a forked child, which has no device."""

    def __init__(self, name: str, attached: AttachedEngine, staging_bytes: int, options: HbmOptions) -> None:
        """Makes an empty tier; `fill` and `pin_static` come next.

        Args:
            name: The store, as log lines call it.
            attached: The engine below; its link's static block must be mapped writable, if the daemon exports it.
            staging_bytes: Bytes of host memory that are page-locked for what the device asks of the host.
            options: The tier's bytes and device.
        """
        self._name, self._attached = name, attached
        self._ended = threading.Event()
        # Guards `_static` and what it pins. Reentrant: a store may be garbage-collected, and so closed, by a thread
        # that holds it.
        self._lock = threading.RLock()
        self._static: PinnedStaticSet | None = None  # if a device reads the daemon's
        link, dram = attached.link, [DramPart() for _ in attached.layouts]
        if link.is_exported:
            self._static = PinnedStaticSet(link)
            dram = self._static.parts
        else:
            logger.warning(
                "%s: the daemon's static set goes to %s by way of the host; 'tierstore serve --gpu-clients' lets it be "
                "read where it lies, by clients that are trusted as the daemon is",
                name, options.device,
            )  # fmt: skip
        try:
            self.engine: HbmEngine = put_above(name, attached, dram, options.num_bytes, staging_bytes, options.device)
        finally:
            link.protect_static()  # page-locking wanted to write to it, nothing else may
        if not self.engine.reads_records:
            self._static = None
        self._follow_at = 0.0  # of `time.monotonic`: no try to follow before
        self._follow_fault = ""  # the newest that was logged

    @property
    def reads_static(self) -> bool:
        """Whether kernels read the daemon's static set in place."""
        return self._static is not None

    def memory(self) -> dict[str, int]:
        """Returns how much of the device's memory was asked for, and how much is used."""
        return self.engine.memory()

    def move_to(self, link: Link) -> Link:
        """Sends lookups through another link, from the device too; returns the old one. The tier is empty then."""

        def move() -> Link:
            with self._lock:
                if self._static is not None:
                    self._static.unpin()  # no kernel reads it now: the engine has cleared the tier
            return self._attached.move_to(link)

        return self.engine.move(move)

    def fill(self) -> None:
        """Fills the tier from the current placement of the attached store. Blocks on disk and device."""
        image = self._attached.link.opened.image
        now, placed = open_placement(image.path, None, image.version, direct=False)
        if placed is None:
            logger.warning(
                "%s: hbm stays empty: no placement says what belongs there; run 'tierstore plan'", self._name
            )
            return
        try:
            if now.identity != image.identity:
                raise FormatError(f"{image.path} was built anew since the daemon opened it: restart the daemon")
            self.engine.change_entries(placed)
        finally:
            placed.close()

    def refill(self) -> None:
        """Fills the tier after a move, then pins the static set. A failure leaves the tier empty, and is logged."""
        try:
            self.fill()
        except Exception as error:  # whatever it is: an empty tier costs speed, not answers
            logger.warning("%s: hbm stays empty: %s", self._name, error)
        self.pin_static()

    def pin_static(self) -> None:
        """Has the device read the static set of the version that this process is attached to, if it reads any.

        Comes after the tier is filled, never before: filling may take minutes, and the daemon cannot reclaim the slots
        of a pinned epoch, so that its own changes would wait for us.
        """
        with self._lock:
            if self._static is None or self._ended.is_set():
                return
            if not self._static.pin(self._attached.link):
                self._static = None
        self.follow_static()

    def follow_static(self) -> None:
        """Has the device read the newest epoch of the daemon's static set, if it reads any. Blocks on the device."""
        if self._static is None or time.monotonic() < self._follow_at or self.engine.is_quiet:
            return
        if not self._lock.acquire(blocking=False):
            return
        try:
            if not self._ended.is_set() and self._static is not None and self._static.is_behind():
                self._static.follow(self.engine.name_records)
                self._follow_fault = ""
        except StoreNotReadyError:  # it is being closed
            pass
        except RuntimeError as error:  # torch's: for example, a graph is being captured
            self._follow_at = time.monotonic() + FOLLOW_RETRY_S
            if str(error) != self._follow_fault:
                self._follow_fault = str(error)
                logger.warning(
                    "%s: the device still reads an older epoch of the daemon's static set: %s", self._name, error
                )
        finally:
            self._lock.release()

    def end(self) -> None:
        """Pins nothing from now on. What is pinned stays so while kernels may read it: until the engine is closed."""
        self._ended.set()
        if not self._lock.acquire(timeout=END_WAIT_S):
            return
        try:
            if self._static is not None and self.engine.device is None:
                self._static.unpin()
        finally:
            self._lock.release()
