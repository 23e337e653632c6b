"""The clients of a daemon: what each is given to map the tiers, and what each has counted.

Input: peers that attach, report and go. Output: layouts with descriptors, counters summed over all clients, those that
are gone included. Errors: `DaemonError` for counters of another shape, and if there is no memory for a client's block.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import msgspec
import numpy as np

from ..errors import DaemonError
from ..ipc.messages import EngineCounters, Layout
from ..stats import add_counters
from .attachments import Attachments
from .epochs import Epochs
from .peer import Peer
from .record import ClientInfo
from .shared_tiers import SharedTiers
from .version import Version


class Clients:
    """The attached clients. Any thread may call."""

    def __init__(self, tiers: SharedTiers, epochs: Epochs, attachments: Attachments) -> None:
        """Comes after the first epoch was published."""
        self._tiers, self._epochs, self._attachments = tiers, epochs, attachments
        self._lock = threading.Lock()  # guards `_counters`, `_gone`
        self._counters: dict[Peer, Any] = {}  # what each client reported last
        self._nothing = epochs.current.engine.counters()  # zeros, of the shape that clients' counters must have
        self._gone: Any = self._nothing  # of clients that are gone

    def attach(self, peer: Peer) -> tuple[Layout, list[int]]:
        """Returns what a new client needs to map the tiers, and descriptors, which stay ours.

        Raises `DaemonError` if there is no memory or descriptor for its block.
        """
        # The end of a process of another PID namespace (0) shows in its pidfd only.
        is_watched = peer.pid > 0 or peer.pidfd is not None
        on_gpu = peer.on_gpu and self._tiers.static.export_fd >= 0 and is_watched
        with self._attachments.lock:  # no other version is published in between: see `Epochs.publish`
            version = self._epochs.current
            given = self._attachments.attach(peer, peer.pid, version.number, on_gpu=on_gpu, pidfd=peer.pidfd)
        return self._layout(version, *given, on_gpu=on_gpu)

    def move(self, peer: Peer) -> tuple[Layout, list[int]] | None:
        """The same for a client that is to move to the version served now; None if it is gone, or has moved."""
        version = self._epochs.current
        given, on_gpu = self._attachments.move(peer, version.number), self._attachments.is_on_gpu(peer)
        return None if given is None else self._layout(version, *given, on_gpu=on_gpu)

    def _layout(self, version: Version, block_fd: int, block: np.ndarray, *, on_gpu: bool) -> tuple[Layout, list[int]]:
        tiers, resident = self._tiers, version.resident
        blocks = [tiers.control.array, tiers.static.array, tiers.recency.array, block]
        layout = Layout(
            is_exported=on_gpu,
            store=version.path,
            identity=version.identity,
            version=version.number,
            tag=version.tag,
            placement=version.placement.epoch if version.placement else None,
            sizes=tuple(map(len, [*blocks, *([resident.array] if resident else [])])),
            tables=dict(tiers.plan.shares),
            bad_pages={name: dict(bad) for name, bad in version.bad_pages.items()},
            budget_bytes=tiers.plan.budget_bytes,
            dram_bytes=tiers.plan.dram_bytes,
            published=version.published,
            folded=version.folded,
        )
        static_fd = tiers.static.export_fd if on_gpu else tiers.static.fd
        return layout, [tiers.control.fd, static_fd, tiers.recency.fd, block_fd, *([resident.fd] if resident else [])]

    def leave(self, peer: Peer, version: int) -> None:
        """A client reports that it looks nothing up in a version any more."""
        if version != self._epochs.current.number:
            self._attachments.leave(peer, version)

    def count(self, peer: Peer, reported: EngineCounters) -> None:
        """A client reports its counters. Raises `DaemonError` if they are not of the store's tables."""
        try:
            counters = add_counters(self._nothing, msgspec.to_builtins(reported))
        except (AttributeError, TypeError, ValueError) as error:
            raise DaemonError(
                f"counters of another shape ({error}): the client is dropped; is it of another release?"
            ) from error
        with self._lock:
            self._counters[peer] = counters

    def detach(self, peer: Peer) -> None:
        """A client is gone; its counts stay."""
        with self._lock:
            self._gone = add_counters(self._gone, self._counters.pop(peer, None))
        self._attachments.detach(peer)

    def attached(self) -> list[Peer]:
        """Returns the clients."""
        return self._attachments.clients()

    def counters(self) -> Any:
        """Returns the sum of what all clients have counted, those that are gone included."""
        with self._lock:
            total, reported = self._gone, list(self._counters.values())
        for counters in reported:
            total = add_counters(total, counters)
        return total

    def infos(self) -> tuple[ClientInfo, ...]:
        """Returns what the stat record says of each client."""
        with self._lock:
            reported = dict(self._counters)
        now = time.monotonic()
        return tuple(self._info(peer, reported.get(peer), now) for peer in self.attached())

    def _info(self, peer: Peer, counters: Any, now: float) -> ClientInfo:
        hits = sum(sum(table[0]) for table in counters["tables"]) if counters else 0
        misses = sum(sum(table[2]) for table in counters["tables"]) if counters else 0
        return ClientInfo(
            id=peer.number,
            pid=peer.pid,
            uid=peer.uid,
            attached_s=now - peer.since,
            version=max(self._attachments.versions_of(peer), default=0),
            on_gpu=self._attachments.is_on_gpu(peer),
            has_hbm=peer.on_gpu,
            keys=hits + misses,
            dram_hits=hits,
            nvme_hits=misses,
            batches=counters["batches"] if counters else 0,
        )
