"""The engine of an attached store: that of the newest link, and another one when a new link comes.

Input: what the engine contract says. Output: the same rows. Errors: those of the contract. Lookups never wait for the
daemon: each asks the engine that is there, and asks again if another took its place meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from .. import kernels
from ..errors import StoreNotReadyError
from ..ipc.identity import this_process
from ..layout import TableLayout
from ..stats import add_counters, counters_since
from ..tiers.engine import HostEngine, Pending, Request, RowRange, VersionChangedError, in_one_version
from ..tiers.native import NativeEngine
from ..tiers.overlay import Patches
from .link import Link

logger = logging.getLogger("tierstore")

_T = TypeVar("_T")


class AttachedEngine(HostEngine):
    """The engine of the version that this process is attached to now. A lookup has one from its start to its end."""

    def __init__(self, link: Link, relink: Callable[[], None]) -> None:
        """relink: moves a child that was forked off to a link of its own; it is called there,
        before its first lookup."""
        self._link = link
        self._relink = relink
        self._process = this_process()
        self._closed = False
        self._renewed: list[weakref.WeakMethod[Callable[[], Any]]] = []
        self._past: Any = None  # counters of engines that are gone
        self._leaving: list[Link] = []  # moved away from, and not closed yet
        # Guards `_link`, `_closed`, `_past` and `_leaving` against writers; lookups read `_link` without it. Reentrant,
        # because a store may be collected, and so closed, while this thread is in here.
        self._lock = threading.RLock()
        self._child_lock = threading.Lock()  # guards `_process`: one thread of a forked child attaches it, others wait
        self.bad_pages = {}
        self._number = self.version = link.version
        self._take(link)

    @property
    def link(self) -> Link:
        """What lookups go through now."""
        return self._link

    @property
    def layouts(self) -> list[TableLayout]:  # type: ignore[override]
        return list(self._link.opened.image.tables.values())

    @property
    def native(self) -> kernels.Engine:
        return self._link.engine.native

    def _take(self, link: Link) -> None:
        self._link = link
        self.io, self.try_lookup = link.engine.io, link.engine.try_lookup

    def subscribe(self, renewed: Callable[[], Any]) -> None:
        # A thread holds this engine, and must not hold the store by it.
        self._renewed.append(weakref.WeakMethod(renewed))

    def move_to(self, link: Link) -> Link:
        """Sends lookups that begin from now on through another link; returns the old one,
        whose lookups may be under way.

        Raises `StoreNotReadyError`, and closes the link, if the store was closed meanwhile.
        """
        with self._lock:
            old, closed = self._link, self._closed
            if not closed:
                # First: rows may be of either version until every table has the new engine's `try_lookup`.
                self.version = -1
                self._take(link)
                self._leaving.append(old)
        if closed:
            link.close(0)
            raise StoreNotReadyError("the store was closed; open it again")
        try:
            for reference in self._renewed:
                renewed = reference()
                if renewed:
                    renewed()
        finally:  # a table that still has the old way in goes on by the new one as soon as the old engine is closed
            self._number = self.version = max(self._number + 1, link.version)  # never one that was, of whatever daemon
        return old

    def retire(self, old: Link, timeout_s: float) -> bool:
        """Closes a link that was moved away from, and keeps its counts."""
        ended = old.close(timeout_s)
        with self._lock:
            self._leaving.remove(old)
            self._past = add_counters(self._past, old.engine.counters())
        return ended

    def forget(self, old: Link) -> None:
        """Lets go of a link that was moved away from and was a parent's, with its counts."""
        with self._lock:
            self._leaving.remove(old)

    def _now(self) -> NativeEngine:
        if self._process != this_process():
            self._relink_child()
        return self._link.engine

    def _relink_child(self) -> None:
        """In a forked child: attaches it, since the block in which lookups are counted is its parent's."""
        with self._child_lock:
            if self._process != this_process() and not self._closed:
                self._relink()
                self._process = this_process()

    def _with_engine(self, act: Callable[[NativeEngine], _T]) -> _T:
        """Calls act with the newest engine; again with the next one if it was closed because another took its place."""

        def answer() -> _T:
            engine = self._now()
            try:
                return act(engine)
            except StoreNotReadyError as error:
                if self._closed or (engine is self._link.engine and self._process == this_process()):
                    raise
                raise VersionChangedError(str(error)) from error

        # One native engine answers all of a call, so what it answers is of one version, also if that is replaced
        # meanwhile.
        return in_one_version(self._link.engine, answer, f"the store {self._link.path} (of a daemon)")

    def lookup(
        self,
        index: int,
        keys: np.ndarray,
        out: np.ndarray,
        sources: np.ndarray | None = None,
        timeout_s: float | None = None,
    ) -> None:
        self._with_engine(lambda engine: engine.lookup(index, keys, out, sources, timeout_s))

    def submit(self, requests: Sequence[Request]) -> Pending | None:
        return self._with_engine(lambda engine: engine.submit(requests))

    def submit_pairs(self, index: int, keys: np.ndarray, pairs: np.ndarray, out: np.ndarray) -> Pending | None:
        return self._with_engine(lambda engine: engine.submit_pairs(index, keys, pairs, out))

    @property
    def overlays(self) -> Mapping[str, Patches]:
        return self._link.engine.overlays

    def is_resident(self, index: int) -> bool:
        return self._link.engine.is_resident(index)

    def rows(
        self, index: int, row_ids: np.ndarray, out: np.ndarray, within: RowRange | None, timeout_s: float | None
    ) -> None:
        self._with_engine(lambda engine: engine.rows(index, row_ids, out, within, timeout_s))

    def submit_rows(self, index: int, row_ids: np.ndarray, out: np.ndarray, within: RowRange | None) -> Pending | None:
        return self._with_engine(lambda engine: engine.submit_rows(index, row_ids, out, within))

    def locate(self, index: int, keys: np.ndarray, sources: np.ndarray) -> None:
        self._with_engine(lambda engine: engine.locate(index, keys, sources))

    def counters(self) -> dict[str, Any]:
        with self._lock:
            total: dict[str, Any] = self._past
            for link in (*self._leaving, self._link):
                total = add_counters(total, link.engine.counters())
        return total if self._process == this_process() else counters_since(total, total)

    def close(self, timeout_s: float) -> bool:
        with self._lock:  # so that no other link comes after this one
            self._closed = True
            links = [*self._leaving, self._link]
        deadline = time.monotonic() + timeout_s
        ended = [link.engine.close(max(0.0, deadline - time.monotonic())) for link in links]
        return all(ended)

    def before_fork(self) -> None:
        with contextlib.ExitStack() as stack:  # all of it, or nothing
            stack.enter_context(self._lock)
            self._link.engine.before_fork()
            stack.pop_all()  # `after_fork` gives it back

    def after_fork(self, *, child: bool) -> None:
        self._link.engine.after_fork(child=child)
        self._lock.release()
        if child:  # what the parent counted is the parent's, and who held this lock is not here
            self._past, self._leaving = None, []
            self._child_lock = threading.Lock()
