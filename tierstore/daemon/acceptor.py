"""The acceptor: takes connections at the daemon's socket, and rests while the system has no room for one.

Input: the listening socket, the server's selector. Output: accepted sockets, non-blocking. Errors: a system that is
short of descriptors or memory is logged and tried again after ACCEPT_PAUSE_S. Runs in the server's loop only.
"""

from __future__ import annotations

import errno
import selectors
import socket
import time
from collections.abc import Callable

from ..causes import named
from ..ipc.peer_log import PeerLog

ACCEPTS_A_ROUND = 16  # half of the server's HANDSHAKES_MAX: each gets a round in which its hello is read
ACCEPT_PAUSE_S = 1.0  # after the system had no descriptor left for a connection


class Acceptor:
    """Accepts from when it is made until the selector is closed.

    resumes_at: of `time.monotonic`; None while it accepts.
    """

    def __init__(
        self,
        listener: socket.socket,
        selector: selectors.BaseSelector,
        add: Callable[[socket.socket], None],
        what: str,
        log: PeerLog,
    ) -> None:
        """add: takes an accepted socket over. what: names the socket in the log."""
        self._listener, self._selector, self._add = listener, selector, add
        self._what, self._log = what, log
        self.resumes_at: float | None = None
        self._register()

    def _register(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _accept(self, _: int) -> None:
        for _ in range(ACCEPTS_A_ROUND):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ECONNABORTED:
                    self._pause(error)
                    return
                continue
            sock.setblocking(False)
            self._add(sock)

    def _pause(self, error: OSError) -> None:
        """The system has no descriptor or memory for a connection: to accept at once again would only spin."""
        self._log.warn(str(named(error, f"{self._what}: a connection cannot be accepted")))
        self._selector.unregister(self._listener)
        self.resumes_at = time.monotonic() + ACCEPT_PAUSE_S

    def resume(self, now: float) -> None:
        """Accepts again if the pause is over."""
        if self.resumes_at is not None and now >= self.resumes_at:
            self.resumes_at = None
            self._register()
