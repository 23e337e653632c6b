"""Keeps a client's own static set: fills it, drops it when another version answers, and fills it anew by a thread.

Input: a cluster, and a budget. Output: the set to use now, if there is one. Errors: none from the thread, which logs
them and tries again later; filling at first raises what lookups raise.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..errors import ConfigError, StoreNotReadyError, TierStoreError
from ..tiers.engine import Request
from . import messages
from .client_set import ClientSet, Keys, check_budget, entry_bytes_of, fill, hottest
from .member import Member
from .parts import Divided
from .replies import decoded
from .requests import Call
from .wire import encode

logger = logging.getLogger("tierstore")

KEYS_MAX = 16384  # asked for at a time
CALL_S = 30.0  # of one call while the set is filled
PAUSE_S = 5.0  # between fillings
FILLS_MAX = 4  # tries of one filling, if versions change meanwhile


class Asking(Protocol):
    """What it needs of a `Cluster`."""

    members: Sequence[Member]
    tables: Sequence[Divided]

    def look_up_for_set(self, request: Request, until: float) -> str:
        """Fills a request's buffer without the set; returns what the version that answered has in common."""


class SetKeeper:
    """Any thread may call. `current` is the set to use now, or None."""

    def __init__(self, cluster: Asking, budget_bytes: int) -> None:
        """budget_bytes: 0: never a set. Raises `BudgetError` if it holds nothing."""
        check_budget([divided.spec for divided in cluster.tables], budget_bytes)
        self.current: ClientSet | None = None
        self.budget_bytes = budget_bytes
        self._cluster = cluster
        self._lock = threading.Lock()  # guards `_thread`, `_next_at`, `_closed`, and changes of `current`
        self._thread: threading.Thread | None = None
        self._next_at = 0.0
        self._closed = False

    def fill(self) -> None:
        """Makes a set of the servers' placements now. Blocks on the network; raises what lookups raise."""
        found = self._made()
        with self._lock:
            if not self._closed:
                self.current = found

    def drop(self, stale: ClientSet) -> None:
        """Uses a set no more, since another version answers."""
        with self._lock:
            if self.current is stale:
                self.current = None

    def wake(self) -> None:
        """Has a thread make a set if it is missing; a lookup has just been answered."""
        if self.current is not None or not self.budget_bytes or time.monotonic() < self._next_at:
            return
        with self._lock:
            if self._closed or self.current is not None or (self._thread is not None and self._thread.is_alive()):
                return
            self._next_at = time.monotonic() + PAUSE_S
            self._thread = threading.Thread(target=self._run, name="tierstore-client-set", daemon=True)
            self._thread.start()

    def close(self, timeout_s: float) -> bool:
        """Ends the thread; the set's memory goes with it. The connections are closed already."""
        with self._lock:
            self._closed, self.current = True, None
            thread = self._thread
        if thread is not None:
            thread.join(max(0.0, timeout_s))
        return thread is None or not thread.is_alive()

    def before_fork(self) -> None:
        """As of `Engine`."""
        self._lock.acquire()

    def after_fork(self, *, child: bool) -> None:
        """As of `Engine`; a child has the parent's set."""
        if child:
            self._lock, self._thread = threading.Lock(), None
        else:
            self._lock.release()

    def _run(self) -> None:
        try:
            self.fill()
        except (TierStoreError, TimeoutError) as error:
            if not self._closed:
                logger.warning("the client's own set was not filled: %s; it is tried again", error)
        except MemoryError:
            logger.error("the client's own set was not filled: there is not enough memory; give connect a smaller dram")

    def _made(self) -> ClientSet | None:
        """Returns a new set; None without a budget, or if no server has placed an entry."""
        if not self.budget_bytes:
            return None
        for _ in range(FILLS_MAX):
            self._next_at = time.monotonic() + PAUSE_S
            builds: set[str] = set()

            def look_up(index: int, keys: np.ndarray, out: np.ndarray) -> None:
                if self._closed:
                    raise StoreNotReadyError("the store was closed")
                builds.add(self._cluster.look_up_for_set((index, keys, out), time.monotonic() + CALL_S))  # noqa: B023

            tables = [
                None if keys is None else fill(divided.spec, index, keys, look_up)
                for index, (divided, keys) in enumerate(zip(self._cluster.tables, self._keys(), strict=True))
            ]
            if not builds:
                return None
            if len(builds) == 1:
                return ClientSet(tables, builds.pop())
        raise StoreNotReadyError(f"another version came {FILLS_MAX} times while the client's own set was filled")

    def _keys(self) -> list[Keys | None]:
        """Returns of each table the keys that a set has room for; None of tables that nobody placed anything of."""
        ranked = [self._ranked(divided) for divided in self._cluster.tables]
        num_placed = sum(any(len(keys) for _, keys in of_table) for of_table in ranked)
        found: list[Keys | None] = []
        for divided, of_table in zip(self._cluster.tables, ranked, strict=True):
            share = self.budget_bytes / max(1, num_placed) - 2 * 64 * len(divided.spec.orders)
            count = max(1, int(share / entry_bytes_of(divided.spec)))
            keys = hottest(of_table, len(divided.spec.orders), count)
            found.append(keys if any(len(of_order) for of_order in keys) else None)
        return found

    def _ranked(self, divided: Divided) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns of each server the orders and keys of a table's placed entries, as many as the budget could hold."""
        if not divided.has_heads:
            return []
        count = int(self.budget_bytes / entry_bytes_of(divided.spec))
        return [
            # Of a key that is in several columns, a server has placed as many entries.
            self._of_member(member, divided.spec.name, columns, count * int(np.bincount(columns).max()))
            for member, part in zip(self._cluster.members, divided.parts, strict=True)
            for columns in [part.columns]
            if len(columns)
        ]

    def _of_member(self, member: Member, name: str, columns: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        orders, keys, num_found = [np.empty(0, dtype=np.uint8)], [np.empty(0, dtype=np.int64)], 0
        while num_found < count:
            asked = min(KEYS_MAX, count - num_found)
            request = encode(messages.PlacedRequest(member.requests.identity, name, num_found, asked))

            def ask(call: Call) -> messages.PlacedReply:
                return decoded(messages.PlacedReply, call("Placed", request, 0), member.url)  # noqa: B023

            reply = member.answered(ask, time.monotonic() + CALL_S)
            own = np.frombuffer(reply.order_index, dtype=np.uint8)
            if len(own) * 8 != len(reply.keys) or len(own) > asked or (len(own) and own.max() >= len(columns)):
                raise ConfigError(f"{member.url} answered {len(own)} placed keys of {asked}: update client and server")
            orders.append(columns[own].astype(np.uint8))
            keys.append(np.frombuffer(reply.keys, dtype="<i8").astype(np.int64))
            num_found += asked
            if not len(own):
                break
        return np.concatenate(orders), np.concatenate(keys)
