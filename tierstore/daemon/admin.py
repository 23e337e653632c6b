"""Requests of administrators under way, each in a thread of its own,
since they may take long and others are served meanwhile.

Flows in: a peer and its request. Flows out: the answer, or the error by its name, to that peer. Refuses a second
request before the answer to the first, and more than ASKS_MAX at once, those of peers that went away included.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from ..errors import DaemonError, TierStoreError
from ..ipc.peer_log import PeerLog
from .peer import Peer, error_message

ASKS_MAX = 8


class Asks:
    """Starts and counts the threads. `begin` comes from one thread, `threads` from any."""

    def __init__(self, ask: Callable[[Peer, dict[str, Any]], dict[str, Any]], log: PeerLog) -> None:
        """ask: makes the answer; called in many threads."""
        self._ask = ask
        self._log = log
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()

    def threads(self) -> list[threading.Thread]:
        """Returns those that still run."""
        with self._lock:
            return list(self._threads)

    def begin(self, peer: Peer, message: dict[str, Any]) -> None:
        """Starts to answer; raises `DaemonError` where a limit is reached."""
        if peer.asking:
            raise DaemonError("a request came before the answer to the one before it: ask one at a time")
        thread = threading.Thread(target=self._answer, args=(peer, message), name="tierstore-ask", daemon=True)
        with self._lock:
            if len(self._threads) >= ASKS_MAX:
                raise DaemonError(f"{ASKS_MAX} requests are under way, which is the limit: ask when some are done")
            peer.asking = True
            thread.start()
            self._threads.add(thread)  # before it can be removed: for that it takes the lock

    def _answer(self, peer: Peer, message: dict[str, Any]) -> None:
        try:
            answer = self._ask(peer, message)
        except TierStoreError as error:
            answer = error_message(error)
        except Exception as error:
            self._log.warn(f"a request of {peer} failed", error)
            answer = error_message(f"the daemon failed with this request ({type(error).__name__}); its log says more")
        with self._lock:
            self._threads.discard(threading.current_thread())
        peer.active_at = time.monotonic()
        peer.asking = False  # before the answer is out: the next request may follow it at once
        try:
            peer.send(answer)
        except Exception as error:
            peer.drop(f"the answer cannot be sent: {error}")
