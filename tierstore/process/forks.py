"""Around a fork: signals wait, and what could not be made ready for a fork is given up in the child.

Input: `os.register_at_fork`'s calls, by way of `store.py`. Output: none. Errors: none.

Python forks even if a hook before it raises: it prints the exception and goes on. So an interrupt in the middle of
taking locks would be lost, and the locks with it. Signals that come between the hooks are therefore noted, and sent
again to the parent a moment after the fork.
"""

from __future__ import annotations

import _thread
import ctypes
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from ..errors import StoreNotReadyError

SENT_AFTER_S = 0.02  # when the hooks have ended


class DeferredSignals:
    """Keeps Python's signal handlers, which run in the main thread alone, from running between `begin` and `end`."""

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, Any], Any]] = {}
        self._noted: list[int] = []

    def begin(self) -> None:
        """Notes signals from now on, instead of calling their handlers."""
        if threading.current_thread() is not threading.main_thread():
            return
        try:
            for number in signal.valid_signals():
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._note)
        except BaseException:  # a signal that was not deferred yet
            self.end(deliver=False)
            raise

    def end(self, *, deliver: bool) -> None:
        """Puts the handlers back; deliver: sends the signals that came meanwhile again, to this process."""
        noted, self._noted = self._noted, []
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, handler)
        if deliver and noted:
            # Not now: the handler would run in the hook that calls this, where Python swallows what it raises.
            # Nor by `threading.Timer`, whose `start` waits for the new thread, and so may still be in the hook then.
            _thread.start_new_thread(_send, (noted,))

    def _note(self, number: int, _frame: object) -> None:
        self._noted.append(number)


def _send(numbers: list[int]) -> None:
    time.sleep(SENT_AFTER_S)
    main_thread = threading.main_thread().ident
    for number in numbers:
        if main_thread is not None:
            signal.pthread_kill(main_thread, number)


class LostEngine:
    """Stands in a forked child for an engine that was not made ready for the fork: it refuses every call."""

    io, version, device = "none", 0, None

    def __init__(self, engine: Any, what: str) -> None:
        # Never destroyed: its threads are the parent's, and its locks may be taken by threads that are not here.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))
        self.bad_pages = engine.bad_pages
        self._what = what

    def before_fork(self) -> None:
        """There is nothing to lock."""

    def after_fork(self, *, child: bool) -> None:
        """There is nothing to unlock."""

    def huge_page_bytes(self) -> tuple[int, int]:
        """There is no memory to look at."""
        return 0, 0

    def close(self, timeout_s: float) -> bool:  # noqa: ARG002
        """There is nothing to wait for."""
        return True

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise StoreNotReadyError(
            f"{self._what} could not be made ready when this process was forked (its parent's log says why); "
            "open it again"
        )
