"""Requests of administrators, each in a thread of its own, since they may take long and others are served meanwhile.

Input: a peer and its request. Output: the answer, or the error by its name, to that peer. Errors: a second request
before the answer to the first is refused, and so are more than REQUESTS_MAX at once, those of peers that went away
included.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from ..errors import DaemonError, TierStoreError
from ..ipc.peer_log import PeerLog
from .peer import Peer, failure_of

REQUESTS_MAX = 8


class AdminRequests:
    """Starts and counts the threads. `begin` comes from one thread, `threads` from any."""

    def __init__(self, answer: Callable[[Peer, bytes], Any], log: PeerLog) -> None:
        """answer: makes the answer; called in many threads."""
        self._answer = answer
        self._log = log
        self._lock = threading.Lock()  # guards `_threads`
        self._threads: set[threading.Thread] = set()

    def threads(self) -> list[threading.Thread]:
        """Returns those that still run."""
        with self._lock:
            return list(self._threads)

    def begin(self, peer: Peer, request: bytes) -> None:
        """Starts to answer; raises `DaemonError` if a limit is reached."""
        if peer.is_answering:
            raise DaemonError("a request came before the answer to the one before it: ask one at a time")
        thread = threading.Thread(target=self._run, args=(peer, request), name="tierstore-request", daemon=True)
        with self._lock:
            if len(self._threads) >= REQUESTS_MAX:
                raise DaemonError(f"{REQUESTS_MAX} requests are under way, which is the limit: ask when some are done")
            peer.is_answering = True
            thread.start()
            # The thread takes the lock to remove itself, so it cannot do that before it is in the set.
            self._threads.add(thread)

    def _run(self, peer: Peer, request: bytes) -> None:
        try:
            answer = self._answer(peer, request)
        except TierStoreError as error:
            answer = failure_of(error)
        except Exception as error:
            self._log.warn(f"a request of {peer} failed", error)
            answer = failure_of(f"the daemon failed with this request ({type(error).__name__}); its log says more")
        with self._lock:
            self._threads.discard(threading.current_thread())
        peer.active_at = time.monotonic()
        peer.is_answering = False  # before the answer is out: the next request may follow it at once
        try:
            peer.send(answer)
        except Exception as error:
            peer.drop(f"the answer cannot be sent: {error}")
