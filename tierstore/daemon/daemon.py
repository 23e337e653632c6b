"""The daemon as a whole: tiers, learning, the socket, and what else it was asked to serve by.

Flows in: options; what clients and administrators say. Flows out: attached clients, answers, the stat record that
metrics, `stat` and `top` show. One `Daemon` is one store served at one socket, until `close`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from .. import kernels
from ..attached.backing import attach
from ..decisions.budget import CACHE_WAYS
from ..errors import ConfigError, DaemonError, TierStoreError
from ..ipc.events import event
from ..process.progress import OnProgress
from ..stats import add_counters, expected_of, stats_of
from ..store.embedded import open_placement
from ..store.store import Store
from ..tiers.placed import PlacementFile, load_indexes
from ..version import VERSION
from .learning import REPLAN_S, Learner
from .metrics import MetricsServer
from .peer import Peer
from .record import HEALTHY
from .remembered import RememberedSwap
from .server import CLIENTS_MAX, SocketServer
from .shared_tiers import Host
from .swap_file import SwapFile

if TYPE_CHECKING:
    from ..remote.server import RemoteServer

logger = logging.getLogger("tierstore.daemon")

DRAIN_S = 10.0
REMOTE_STAGING_BYTES = 4 << 20  # of the reads that remote lookups need


@dataclass(frozen=True)
class Remote:
    """Where and how to serve lookups by gRPC."""

    address: str
    tls_cert: Path | None
    tls_key: Path | None
    token_file: Path | None

    def check(self) -> None:
        """Raises `ConfigError` where it cannot be served like that, which is better known before minutes of warming."""
        from ..remote.access import check_options

        check_options(self.address, self.token_file, self.tls_cert, self.tls_key)


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
        on_progress: OnProgress | None = None,
    ) -> None:
        """Takes the socket's path, opens the store and warms its tiers; blocks. Raises what those raise.

        dram_bytes: all memory that it may take, but for what a Python process takes by itself. replan_s: between
        automatic replans, None for none. gpu_clients: see `Host`. forget_swap: serves `path` also if a daemon at this
        socket served another store in its place before.
        """
        self._started_at = time.time()
        self._state = "warming"
        self._server = SocketServer(socket, self, clients_max=clients_max, allowed_users=allowed_users)
        try:
            self._swap_memory = RememberedSwap(SwapFile(self.path), path, forget=forget_swap)
            if self._swap_memory.is_other and placement != "none":
                placement = None  # an epoch's number is of the command line's store
            self._server.note_starting("warming")
            progress = self._noting(on_progress)
            self._host = Host(self._swap_memory.serves, dram_bytes, io, placement, progress, gpu_clients=gpu_clients)
        except BaseException:
            self._server.close()
            raise
        self._host.previous_path = self._swap_memory.previous
        self._swap_memory.begun(self._host.current.opened.image.identity)
        self._learner = Learner(self._host, replan_s)
        self._lock = threading.Lock()  # of the counters below
        self._counters: dict[Peer, Any] = {}  # what each client told last
        self._nothing = self._host.current.engine.counters()  # zeros, of the shape that clients' counters must have
        self._gone: Any = self._nothing  # of clients that are gone
        self._metrics: MetricsServer | None = None
        self._remote: RemoteServer | None = None
        self._remote_store: Store | None = None
        self._io = io

    def _noting(self, on_progress: OnProgress | None) -> OnProgress:
        """Returns on_progress, which also notes beside the socket how far warming is:
        nobody is answered until it ends."""

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
        return self._host.current.path

    @property
    def state(self) -> str:
        """One of "warming", "serving", "changing", "draining"."""
        return self._state

    @property
    def dram_bytes(self) -> int:
        """Bytes that all parts of the tiers take together."""
        return self._host.plan.dram_bytes

    def start(self, *, metrics: str | None = None, remote: Remote | None = None) -> None:
        """Begins to serve: at the socket, and at the addresses that are given. Raises `ConfigError` for bad ones."""
        self._learner.start()
        self._state = "serving"
        self._server.note_starting("")
        self._server.start()
        if metrics is not None:
            self._metrics = MetricsServer(metrics, self.stat)
        if remote is not None:
            self._serve_remote(remote)

    def _serve_remote(self, remote: Remote) -> None:
        """Serves by gRPC from a store that is attached like any other client's, and so counted like it."""
        from ..remote.server import RemoteServer

        store = attach(self.path, io=self._io, staging=REMOTE_STAGING_BYTES)
        try:
            self._remote = RemoteServer(
                store, remote.address,
                token_file=remote.token_file, tls_cert=remote.tls_cert, tls_key=remote.tls_key,
                is_healthy=lambda: self._state in HEALTHY,
            )  # fmt: skip
        except BaseException:
            store.close()
            raise
        self._remote_store = store

    @property
    def metrics_address(self) -> str | None:
        """Where metrics are served."""
        return self._metrics.address if self._metrics else None

    @property
    def remote_address(self) -> str | None:
        """Where remote lookups are served."""
        return self._remote.address if self._remote else None

    def close(self) -> bool:
        """Says goodbye to clients, who go on by themselves, and ends. Blocks; returns whether all ended in time."""
        self._state = "draining"
        self._host.end_waits()
        if self._metrics:
            self._metrics.close()
        if self._remote:
            self._remote.close(DRAIN_S)
        if self._remote_store:
            self._remote_store.close()
        ended = self._server.close(DRAIN_S) & self._learner.close()
        self._host.close()
        return ended

    def reload(self) -> None:
        """Reads again what may have changed on disk: certificates, and the store's placement,
        whose hottest become static."""
        try:
            if self._remote:
                self._remote.reload()
        finally:  # a bad certificate does not keep a good placement out
            self._learner.adopt(self._placed())

    def _placed(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Returns what the placement that the served store has now says of each table: order index and key,
        hottest first."""
        version = self._host.current
        image, placed = open_placement(version.path, None, direct=False)
        if placed is None:
            return {}
        try:
            if image.identity != version.opened.image.identity:
                raise ConfigError(
                    f"{version.path} is another store now than the one that is served; use 'tierstore swap' to serve it"
                )
            return {name: _hottest(placed, name) for name in placed.placement.tables if name in self._host.slots}
        finally:
            placed.close()

    # What the socket server calls

    def attach(self, peer: Peer) -> tuple[dict[str, Any], Sequence[int]]:
        """A client is there: gives it the tiers."""
        event(logger, logging.INFO, "attached", pid=peer.pid, uid=peer.uid, release=peer.release)
        return self._host.attach(peer, peer.pid, on_gpu=peer.on_gpu, pidfd=peer.pidfd)

    def message(self, peer: Peer, message: dict[str, Any]) -> None:
        """A client tells its counters, or that it has left a version."""
        if "counters" in message:
            try:
                counters = add_counters(self._nothing, message["counters"])
            except (AttributeError, TypeError, ValueError) as error:
                raise DaemonError(
                    f"counters that are none ({error}): the client is dropped; is it of another release?"
                ) from error
            with self._lock:
                self._counters[peer] = counters
        elif type(message.get("left")) is int:
            self._host.left(peer, message["left"])
        else:
            raise DaemonError(f"a message of {', '.join(map(str, message))[:100]}: a client tells 'counters' or 'left'")

    def detach(self, peer: Peer) -> None:
        """A client is gone."""
        with self._lock:
            self._gone = add_counters(self._gone, self._counters.pop(peer, None))
        self._host.attachments.detach(peer)
        event(logger, logging.INFO, "detached", pid=peer.pid, why=peer.dropped_for or "it ended")

    def ask(self, peer: Peer, message: dict[str, Any]) -> dict[str, Any]:
        """Answers an administrator."""
        asked = message.get("do")
        if asked == "stat":
            return self.stat()
        event(logger, logging.INFO, "asked", what=str(asked), store=message.get("store"), pid=peer.pid, uid=peer.uid)
        self._state = "changing"
        try:
            if asked == "replan":
                return {"ok": True, **self._learner.replan()}
            if asked == "reload":
                self.reload()
                return {"ok": True}
            if asked == "swap" and isinstance(message.get("store"), str):
                return self._swap(message["store"])
            if asked == "rollback":
                previous = self._host.previous_path
                if previous is None:
                    raise ConfigError("nothing to roll back to: no version was swapped in since the daemon began")
                return self._swap(previous)
        except (TierStoreError, OSError) as error:
            event(logger, logging.WARNING, "refused", what=str(asked), error=error)
            raise
        finally:
            self._state = "serving" if self._state == "changing" else self._state
        raise DaemonError(f"{asked!r} cannot be asked; there are stat, replan, reload, swap with a store, and rollback")

    def _swap(self, path: str) -> dict[str, Any]:
        done = self._host.swap(Path(path), self._learner.counts_of, self._move_all, self._swap_memory.note)
        filled = 0
        try:
            filled += self._learner.replan()["entered"]  # the slots that the old version had
            filled += self._learner.adopt(self._placed(), only_free=True)["entered"]
        except TierStoreError as error:
            # A damaged placement, or a GPU in the version before: the new one is served all the same.
            event(logger, logging.WARNING, "not_refilled", error=error)
        return {"ok": True, **done, "filled": filled}

    def _move_all(self) -> None:
        """Tells all clients of the version served now."""
        for peer in self._host.attachments.clients():
            try:
                message = self._host.move(peer)
                if message is not None:
                    peer.send({"move": message[0]}, message[1])
            except (TierStoreError, OSError) as error:  # gone, not reading, or out of descriptors: it attaches anew
                event(logger, logging.WARNING, "not_moved", pid=peer.pid, error=error)
                peer.drop(f"it could not be told of a version: {error}")

    # What is shown

    def stat(self) -> dict[str, Any]:
        """Returns the stat record."""
        host, plan = self._host, self._host.plan
        with self._lock:
            told = dict(self._counters)
            total = self._gone
        for counters in told.values():
            total = add_counters(total, counters)
        layouts = host.current.opened.image.tables
        stats = stats_of(total, [layout.spec for layout in layouts.values()])
        latency = stats.pop("latency")
        now = time.monotonic()
        return {
            "daemon": {
                "pid": os.getpid(),
                "started_at": self._started_at,
                "state": self._state,
                "socket": self.path,
                "release": VERSION,
            },
            "store": {
                "path": host.current.path,
                "version": host.current.number,
                "previous": host.previous_path,
                "tables": {
                    name: {
                        "orders": list(layout.spec.orders),
                        "rows_per_key": layout.spec.rows_per_key,
                        "row_bytes": layout.spec.row_bytes,
                        "num_rows": layout.spec.num_rows,
                        "resident": plan.shares[name].resident,
                    }
                    for name, layout in layouts.items()
                },
            },
            "counters": stats,
            "latency": latency,
            "memory": {
                "budget_bytes": plan.budget_bytes,
                "used_bytes": plan.dram_bytes,
                "static_bytes": plan.static_bytes - plan.index_bytes,
                "index_bytes": plan.index_bytes,
                "recency_bytes": plan.recency_bytes,
                "resident_bytes": plan.resident_bytes,
                "staging_bytes": plan.staging.num_bytes,
                "counts_bytes": plan.counts_bytes,
                "work_bytes": plan.work_bytes,
                "process_bytes": psutil.Process().memory_info().rss,
            },
            "epochs": {
                "current": host.epoch,
                "alive": 1 if host.settled_epoch == host.epoch else 2,
                "changes": host.num_changes,
                "waiting_for": list(host.attachments.waiting_for),
                "static_entries": {name: slots.num_live for name, slots in host.slots.items()},
                "static_slots": {name: len(slots.keys) for name, slots in host.slots.items()},
                "recency_entries": host.recency_entries(),
                "recency_slots": {name: plan.shares[name].num_sets * CACHE_WAYS for name in host.slots},
            },
            "plan": self._expected(),
            **self._learner.stat(),
            "clients": self._server.counts()
            | {"list": [self._client(peer, told.get(peer), now) for peer in self._host.attachments.clients()]},
            "remote": self._remote.record() if self._remote else None,
        }

    def _expected(self) -> dict[str, Any] | None:
        """Returns the epoch of the placement that the store was opened with,
        and the hit rates that its plan expected."""
        placed = self._host.current.opened.placed
        expected = None if placed is None else expected_of(placed.placement.details)
        if placed is None or expected is None:
            return None
        return {"epoch": placed.placement.epoch, "hit_rates": expected}

    def _client(self, peer: Any, counters: Any, now: float) -> dict[str, Any]:
        hits = sum(sum(table[0]) for table in counters["tables"]) if counters else 0
        misses = sum(sum(table[2]) for table in counters["tables"]) if counters else 0
        return {
            "pid": peer.pid,
            "uid": peer.uid,
            "attached_s": now - peer.since,
            "version": max(self._host.attachments.versions_of(peer), default=0),
            "on_gpu": self._host.attachments.is_on_gpu(peer),
            "has_hbm": peer.on_gpu,
            "keys": hits + misses,
            "dram_hits": hits,
            "nvme_hits": misses,
            "batches": counters["batches"] if counters else 0,
        }


def _hottest(placed: PlacementFile, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns a table's placed (order index, key) pairs, hottest first, as the indexes of a placement file have them.

    Raises `FormatError` for a damaged one.
    """
    table = placed.placement.tables[name]
    area = np.empty((sum(index.num_buckets for index in table.indexes), kernels.INDEX_BUCKET.itemsize), dtype=np.uint8)
    order_index, keys, places = [], [], []
    for order, loaded in enumerate(load_indexes(placed, table, area)):
        buckets = loaded.view(kernels.INDEX_BUCKET)[:, 0]
        there = buckets["keys"] >= 0
        keys.append(buckets["keys"][there])
        places.append(buckets["places"][there])
        order_index.append(np.full(len(keys[-1]), order, dtype=np.uint8))
    by_place = np.argsort(np.concatenate(places))
    return np.concatenate(order_index)[by_place], np.concatenate(keys)[by_place]
