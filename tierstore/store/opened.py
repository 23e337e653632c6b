"""What a `Store` and its tables share: the backing, the engine that answers now, a running trace; and what forks need.

Input: a backing. Output: one object that keeps the engine open as long as the store or one of its tables is in use.
Errors: `StoreNotReadyError` if it is closed, or if a forked child could not have it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from ..errors import ConfigError
from ..formats.key_trace import KeyTraceInfo
from ..process.forks import DeferredSignals, LostEngine
from ..tiers.engine import Engine
from ..tiers.faults import closed_error
from .backing import Backing
from .recorder import Recorder, RecordingEngine

if TYPE_CHECKING:
    from .table import Table

CLOSE_WAIT_S = 300.0

_open_stores: weakref.WeakSet[OpenedStore] = weakref.WeakSet()
_fork_lock = threading.Lock()  # guards `_open_stores`, `_forking`, `_not_ready`; held through a fork


class OpenedStore:
    """What a store and its tables keep open together: whoever of them is dropped last closes it. Any thread may
    call."""

    def __init__(self, backing: Backing) -> None:
        self.is_closed = True  # until everything is there
        self.backing = backing
        self.what = f"the store {backing.name}"
        self._recorder: Recorder | None = None
        self._recorder_lock = threading.Lock()  # guards `_recorder`
        self.tables: weakref.WeakSet[Table] = weakref.WeakSet()  # each has its own reference to the engine
        self.engine = backing.engine
        self.is_closed = False
        with _fork_lock:
            _open_stores.add(self)
        self.engine.subscribe(self.renew)

    def check_open(self) -> None:
        """Raises `StoreNotReadyError` if it is closed."""
        if self.is_closed:
            raise closed_error(self.what)

    def renew(self) -> None:
        """Tables take the engine's shortest way for lookups, which has become another."""
        self._use(self.engine)

    def _use(self, engine: Engine) -> None:
        self.engine = engine
        for table in list(self.tables):
            table._use(engine)

    def start_trace(self, recorder: Recorder) -> None:
        """See `Store.start_trace`."""
        with self._recorder_lock:
            self.check_open()
            if self._recorder is not None:
                raise ConfigError(f"{self.backing.name}: a trace is running, to {self._recorder.path}; stop it first")
            try:
                recorder.start()
                self._recorder = recorder
                self._use(RecordingEngine(self.engine, recorder, self.backing.specs))
            except BaseException:
                self._forget_trace()
                recorder.abandon()
                raise

    def stop_trace(self) -> KeyTraceInfo | None:
        """See `Store.stop_trace`."""
        with self._recorder_lock:
            recorder = self._recorder
            if recorder is None:
                return None
            try:
                self._pass_by()
                info = recorder.stop()
                self._recorder = None
                return info
            except BaseException:
                self._forget_trace()
                recorder.abandon()
                raise

    def unrecorded_engine(self) -> Engine:
        """Returns the engine that answers, without the recorder that may stand before it."""
        return self.engine.engine if isinstance(self.engine, RecordingEngine) else self.engine

    def _pass_by(self) -> None:
        """Sends lookups past the recorder."""
        if isinstance(self.engine, RecordingEngine):
            self._use(self.unrecorded_engine())

    def _forget_trace(self) -> None:
        self._pass_by()
        self._recorder = None

    def close(self) -> None:
        """See `Store.close`."""
        self.is_closed = True
        try:
            self.stop_trace()
        finally:
            self._close_engine()

    def _close_engine(self) -> None:
        if not self.engine.close(CLOSE_WAIT_S):
            raise TimeoutError(f"lookups did not end within {CLOSE_WAIT_S} s; the disk has stopped answering")
        self.backing.close()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:  # when this runs, sys may be gone
        if hasattr(self, "engine") and not (self.is_closed and is_finalizing()):  # `_close_all` has closed it then
            self.close()


_forking: list[OpenedStore] = []  # whose engines' locks this fork holds
_not_ready: list[OpenedStore] = []  # whose engines could not be locked: the child loses them
_fork_signals = DeferredSignals()
_fork_thread: int | None = None  # which thread holds `_fork_lock`


def _before_fork() -> None:
    """Takes all stores' locks, or none of them: what is raised here does not keep Python from forking."""
    global _fork_thread
    _fork_signals.begin()
    _fork_lock.acquire()  # two threads that fork at once would wait for each other's stores for ever
    _fork_thread = threading.get_ident()
    try:
        _not_ready[:] = sorted((store for store in _open_stores if not store.is_closed), key=id)
        for store in _not_ready:
            store.engine.before_fork()
            _forking.append(store)
        _not_ready.clear()
    except BaseException:
        while _forking:
            _forking.pop().engine.after_fork(child=False)
        raise


def _after_fork(*, child: bool) -> None:
    global _fork_lock, _fork_thread
    with contextlib.ExitStack() as stack:  # whatever one of them raises, the others are called, the last first
        stack.callback(_fork_signals.end, deliver=not child)
        if _fork_thread == threading.get_ident():
            stack.callback(_fork_lock.release)
        elif child:  # `_before_fork` did not come as far as the lock, and a thread that is not here may hold it
            _fork_lock = threading.Lock()
            _not_ready[:] = _open_stores
        _fork_thread = None
        for store in _forking:
            stack.callback(_forked, store, child=child)
        for store in _not_ready if child else ():
            stack.callback(_lose, store)
        _forking.clear()
        _not_ready.clear()


def _lose(store: OpenedStore) -> None:
    store.is_closed = True
    store._use(cast(Engine, LostEngine(store.engine, store.what)))


def _forked(store: OpenedStore, *, child: bool) -> None:
    store.engine.after_fork(child=child)
    if child:  # the thread and the file are the parent's
        store._recorder_lock = threading.Lock()
        store._forget_trace()


@atexit.register
def _close_all() -> None:
    """Ends the threads that write to buffers before the interpreter frees those.
    One that does not end keeps no other open."""
    failed: BaseException | None = None
    for store in list(_open_stores):
        try:
            store.close()
        except BaseException as error:
            failed = failed or error
    if failed is not None:
        raise failed


os.register_at_fork(
    before=_before_fork,
    after_in_parent=lambda: _after_fork(child=False),
    after_in_child=lambda: _after_fork(child=True),
)
