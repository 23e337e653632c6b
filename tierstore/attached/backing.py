"""A client of a daemon: the same `Store`, over tiers that all processes of the host share.

Input: the path of a daemon's socket. Output: rows, copied from shared memory that is mapped read-only, or read from the
shards by this process itself. A lookup asks the daemon nothing; what was looked up is reported afterwards, and a report
may be lost. While the daemon is gone, lookups go on with what is mapped. Errors: `DaemonError` if there is no daemon or
it refuses, `FingerprintMismatchError` if it serves other tables than before.

`dialer`: from a socket to a link · `link`: one version, mapped · `engine`: lookups through the newest link · `session`:
the thread that stays attached · `reports`: counters for the daemon · `hbm`, `static_pin`: a GPU's tier above it all.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import TierStoreError
from ..ipc.client_socket import DIAL_S
from ..store.backing import Backing
from ..store.options import HbmOptions, check_options, check_readers, check_threads
from ..store.store import Store
from ..tiers.engine import Engine
from ..units import parse_bytes
from .dialer import Dialer
from .engine import AttachedEngine
from .link import warn_of_other_version
from .session import END_WAIT_S, Session

if TYPE_CHECKING:
    from .hbm import AttachedHbm

logger = logging.getLogger("tierstore")


def attach(
    socket: str | os.PathLike[str],
    *,
    io: str = "auto",
    threads: int | None = None,
    readers: int | None = None,
    staging: int | str = "16MiB",
    timeout_s: float = DIAL_S,
    hbm: int | str | None = None,
    device: str | None = None,
) -> Store:
    """Attaches this process to a daemon (`tierstore serve`); `tierstore.connect` of a path does it. Blocks.

    Args:
        socket: The path of the daemon's socket.
        io: How this process reads what the daemon's memory does not hold, as in `tierstore.open`.
        threads: That copy the rows of a large lookup in this process, as in `tierstore.open`.
        readers: Lookups that may read pages at once, at most; fewer if `staging` is small. As in `tierstore.open`.
        staging: Bytes that reads under way may take. With `hbm`, as many bytes of host memory are page-locked besides.
        timeout_s: How long to try to connect, in seconds. Filling HBM takes its time on top.
        hbm: Bytes of GPU memory for a tier of this process above the daemon's, as in `tierstore.open`. If the daemon
            was started with --gpu-clients, the GPU reads its static set in place.
        device: The GPU, as in `tierstore.open`.

    Returns:
        The attached store. All tiers but hbm are the daemon's.

    Raises:
        DaemonError: There is no daemon, it refuses, or it speaks another version of the protocol.
        ConfigError: an option does not fit.
        BudgetError: `hbm` is too small, or more than the GPU has.
    """
    options = check_options(io, hbm, device)
    dialer = Dialer(
        os.fspath(socket), io, check_threads(threads), check_readers(readers), parse_bytes(staging, "staging")
    )
    return Store(AttachedBacking(dialer, timeout_s, options))


class AttachedBacking(Backing):
    """The backing of an attached store: its engine, its hbm tier if it has one, and its session with the daemon."""

    def __init__(self, dialer: Dialer, timeout_s: float, hbm: HbmOptions | None) -> None:
        """Attaches, and fills the hbm tier if there is one; raises what `attach` raises."""
        self._dialer = dialer
        channel, link = dialer.dial(timeout_s, on_gpu=hbm is not None, writable_static=hbm is not None)
        self.name = f"{link.opened.image.path} (attached by {dialer.socket})"
        self.specs, self.attachments = link.specs, link.attachments
        self._attached = AttachedEngine(link, self._attach_child)
        self.engine: Engine = self._attached
        self._hbm: AttachedHbm | None = None
        self._session = Session(self.name, dialer, channel, self._attached)
        if hbm is not None:
            try:
                self._add_hbm(hbm)
            except BaseException:
                self.engine.close(END_WAIT_S)
                self.close()
                raise
        self._session.start()

    @property
    def build(self) -> str:
        return self._attached.link.identity

    @property
    def common_build(self) -> str:
        return self._attached.link.opened.image.common_identity

    def placed_keys(self, index: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        opened = self._attached.link.opened
        if opened.placed is None:
            return super().placed_keys(index, start, count)
        return opened.placed.keys(opened.files[index].table, start, count)

    def _add_hbm(self, options: HbmOptions) -> None:
        """Puts a tier of this process above what is attached, and fills it. Comes before `start`."""
        from .hbm import AttachedHbm  # loads torch and triton

        self._hbm = AttachedHbm(self.name, self._attached, self._dialer.staging_bytes, options)
        self._session.hbm = self._hbm
        self.engine = self._hbm.engine
        self._hbm.fill()
        self._hbm.pin_static()

    def _attach_child(self) -> None:
        """In a forked child: attaches it by itself. Without a daemon, it goes on with what is mapped."""
        self._session.abandon_in_child()
        self._hbm = None  # a forked child has no device
        channel = None
        try:
            channel, link = self._dialer.dial(DIAL_S)
        except (TierStoreError, OSError) as error:
            logger.warning("%s: a forked child is not attached: %s", self.name, error)
            link = self._attached.link.alone()
        warn_of_other_version(self.name, self._attached.link, link)
        self._session = Session(self.name, self._dialer, channel, self._attached)
        old = self._attached.move_to(link)
        self._attached.forget(old)
        if old.opened is not link.opened:
            old.opened.close()  # its engine was closed by the fork
        self._session.start()  # last: the thread may move to a newer link, and the move above must not undo that

    def details(self) -> dict[str, Any]:
        """See `Backing`. The memory is the daemon's, but for staging and hbm."""
        link = self._attached.link
        hbm = {} if self._hbm is None else self._hbm.memory()
        return {
            "io": self.engine.io,
            "memory": link.memory | hbm,
            "placement": {"epoch": link.opened.placed.placement.epoch if link.opened.placed else None},
            "attached": {
                "socket": self._dialer.socket,
                "now": self._session.channel is not None,
                "version": link.version,
            },
        }

    def close(self) -> None:
        self._session.close()
        self._attached.link.opened.close()
