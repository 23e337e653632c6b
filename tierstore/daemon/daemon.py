"""The daemon as a whole: tiers, learning, the socket, and what else it serves by.

Input: options; messages of clients, requests of administrators. Output: attached clients, answers, the stat record that
metrics, `stat` and `top` show. Errors: whatever its parts raise. One `Daemon` is one store served at one socket, until
`close`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Sequence

import msgspec

from ..errors import TierStoreError
from ..ipc.events import event
from ..ipc.messages import (
    FromClient,
    Layout,
    SwapRequest,
    from_json,
    request_from_json,
)
from ..process.progress import OnProgress
from ..version import VERSION
from .administration import Administration
from .following import Follower
from .host import Host
from .learning import REPLAN_S, Learner
from .metrics import MetricsServer
from .peer import Peer
from .record import HEALTHY, DaemonInfo, State, StatRecord
from .remembered import RememberedSwap
from .remote_lookups import Remote, RemoteLookups
from .server import CLIENTS_MAX, SocketServer
from .stat import counters_of, epoch_info, memory_of, plan_info, store_info
from .swap_file import SwapFile

logger = logging.getLogger("tierstore.daemon")

DRAIN_S = 10.0


class Daemon:
    """Serves a store from `start` to `close`. Implements the socket server's `Handler`."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        socket: str | os.PathLike[str],
        dram_bytes: int,
        *,
        io: str = "auto",
        placement: int | str | None = None,
        clients_max: int = CLIENTS_MAX,
        allowed_users: Collection[int] = (),
        replan_s: float | None = REPLAN_S,
        gpu_clients: bool = False,
        forget_swap: bool = False,
        follow: bool = False,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Takes the socket's path, opens the store and warms its tiers; blocks.

        Args:
            path: of the store.
            socket: its path.
            dram_bytes: all memory that it may take, but for what a Python process takes by itself.
            io: how pages are read, as in `tierstore.open`.
            placement: as in `tierstore.open`; "none": also none that is made meanwhile, or that a store has which is
                served later.
            clients_max: attached at once.
            allowed_users: ids that may attach beside our own user and root.
            replan_s: seconds between automatic replans, None for none.
            gpu_clients: whether clients' GPUs may read the static set in place; see `SharedTiers`.
            forget_swap: serve `path` also if a daemon at this socket served another store in its place before.
            follow: serve each version of the store's rows that is published meanwhile, within seconds.
            on_progress: called with (bytes warmed, bytes in all).

        Raises:
            DaemonError: another daemon serves at the socket.
            TierStoreError: what opening the store raises.
        """
        self._started_at = time.time()
        self._state: State = "warming"
        self._server = SocketServer(socket, self, clients_max=clients_max, allowed_users=allowed_users)
        try:
            self._swap_memory = RememberedSwap(SwapFile(self.path), path, forget=forget_swap)
            if self._swap_memory.is_other and placement != "none":
                placement = None  # an epoch's number is of the command line's store
            self._server.note_starting("warming")
            progress = self._noting(on_progress)
            self._host = Host(
                self._swap_memory.serves, dram_bytes, io, placement, progress, gpu_clients=gpu_clients, follows=follow
            )
        except BaseException:
            self._server.close()
            raise
        self._host.versions.previous_path = self._swap_memory.previous
        self._swap_memory.begun(self._host.epochs.current.base_identity)
        self._learner = Learner(self._host, replan_s)
        replanner, note = self._learner.replanner, self._swap_memory.note
        self._administration = Administration(self._host, replanner, note, self._reload_certificates)
        self._follower = Follower(self._host, self._administration) if follow else None
        self._metrics: MetricsServer | None = None
        self._remote: RemoteLookups | None = None
        self._io = io

    def _noting(self, on_progress: OnProgress | None) -> OnProgress:
        """Returns on_progress, which also notes beside the socket how far warming is: nobody is answered until it
        ends."""

        def note(done: int, total: int) -> None:
            self._server.note_starting(f"warming, {100 * done // max(total, 1)} %")
            if on_progress is not None:
                on_progress(done, total)

        return note

    @property
    def path(self) -> str:
        """The socket's path."""
        return os.fspath(self._server.path)

    @property
    def store_path(self) -> str:
        """The path of the store that is served now."""
        return self._host.epochs.current.path

    @property
    def state(self) -> State:
        """What it does now."""
        return self._state

    @property
    def dram_bytes(self) -> int:
        """Bytes that all parts of the tiers take together."""
        return self._host.tiers.plan.dram_bytes

    @property
    def metrics_address(self) -> str | None:
        """Where metrics are served."""
        return self._metrics.address if self._metrics else None

    @property
    def remote_address(self) -> str | None:
        """Where remote lookups are served."""
        return self._remote.address if self._remote else None

    def start(self, *, metrics: str | None = None, remote: Remote | None = None) -> None:
        """Begins to serve: at the socket, and at the addresses that are given. Raises `ConfigError` for bad ones."""
        self._learner.start()
        if self._follower:
            self._follower.start()
        self._state = "serving"
        self._server.note_starting("")
        self._server.start()
        if metrics is not None:
            self._metrics = MetricsServer(metrics, self.stat)
        if remote is not None:
            self._remote = RemoteLookups(remote, self.path, self._io, lambda: self._state in HEALTHY)

    def close(self) -> bool:
        """Says goodbye to clients, who go on by themselves, and ends. Blocks; returns whether all ended in time."""
        self._state = "draining"
        self._host.end_waits()
        if self._metrics:
            self._metrics.close()
        if self._remote:
            self._remote.close(DRAIN_S)
        ended = self._server.close(DRAIN_S) & self._learner.close()
        ended &= self._follower is None or self._follower.close()
        self._host.close()
        return ended

    def reload(self) -> None:
        """Reads again what may have changed on disk: certificates, and the store's placement."""
        self._administration.reload()

    def _reload_certificates(self) -> None:
        if self._remote:
            self._remote.reload()

    # What the socket server calls

    def attach(self, peer: Peer) -> tuple[Layout, Sequence[int]]:
        """A client has attached: gives it the tiers."""
        event(logger, logging.INFO, "attached", pid=peer.pid, uid=peer.uid, release=peer.release)
        return self._host.clients.attach(peer)

    def message(self, peer: Peer, data: bytes) -> None:
        """A client reports its counters, or that it has left a version."""
        report = from_json(data, FromClient)
        if report.counters is not None:
            self._host.clients.count(peer, report.counters)
        if report.left is not None:
            self._host.clients.leave(peer, report.left)

    def detach(self, peer: Peer) -> None:
        """A client is gone."""
        self._host.clients.detach(peer)
        event(logger, logging.INFO, "detached", pid=peer.pid, why=peer.dropped_for or "it ended")

    def answer(self, peer: Peer, request: bytes) -> msgspec.Struct:
        """Answers an administrator."""
        wanted = request_from_json(request)
        name = str(wanted.__struct_config__.tag)
        if name == "stat":
            return self.stat()
        store = wanted.store if isinstance(wanted, SwapRequest) else None
        event(logger, logging.INFO, "requested", what=name, store=store, pid=peer.pid, uid=peer.uid)
        self._state = "changing"
        try:
            return self._administration.carry_out(wanted)
        except (TierStoreError, OSError) as error:
            event(logger, logging.WARNING, "refused", what=name, error=error)
            raise
        finally:
            self._state = "serving" if self._state == "changing" else self._state

    def stat(self) -> StatRecord:
        """Returns the stat record."""
        counters, latency = counters_of(self._host)
        return StatRecord(
            daemon=DaemonInfo(
                pid=os.getpid(),
                started_at=self._started_at,
                state=self._state,
                socket=self.path,
                release=VERSION,
            ),
            store=store_info(self._host),
            counters=counters,
            latency=latency,
            memory=memory_of(self._host),
            epochs=epoch_info(self._host),
            plan=plan_info(self._host),
            learning=self._learner.info(),
            feed=self._learner.feed_info(),
            clients=self._server.info(self._host.clients.infos()),
            remote=self._remote.info() if self._remote else None,
        )
