"""The server of the daemon's socket: who may connect, what they may send, and that none of them can hold up the others.

Input: connections, and whole messages of theirs, as bytes. Output: calls of a `Handler`, which alone knows what they
mean. Errors: other users unless they are named, other versions of the protocol, and more connections than the limits
are refused; whoever breaks the protocol, sends too fast or does not read is dropped, with a reason.

One thread runs all connections, so that attached clients cost nothing while they are idle; a request of an
administrator, which may take long, gets a thread of its own.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import msgspec

from ..causes import allow_open_files
from ..ipc.messages import Welcome
from ..ipc.peer_log import PeerLog
from ..ipc.protocol import PROTOCOL_VERSION
from ..ipc.socket_file import SocketFile, check_socket_path
from ..version import VERSION
from . import limits
from .admin import AdminRequests
from .connections import Connections
from .handshake import AccessPolicy
from .peer import Peer
from .record import ClientInfo, ClientsInfo

logger = logging.getLogger("tierstore")

CLIENTS_MAX = 64
FILES_OF_CLIENT = 8  # its connection, its blocks, and those on their way to it
CLOSE_S = 10.0


class Handler(Protocol):
    """What the daemon does with its peers. All but `answer` come from the server's thread, one at a time, and must be
    quick.

    An exception from any of them costs that peer its connection and no other; a `TierStoreError`'s message is passed on
    to it.
    """

    def attach(self, peer: Peer, /) -> tuple[Any, Sequence[int]]:
        """A client sent its hello: returns the answer, a struct, and descriptors to copy to it.

        Anything sent meanwhile follows.
        """

    def message(self, peer: Peer, data: bytes, /) -> None:
        """An attached client sent a message, of which nothing is checked but its length."""

    def detach(self, peer: Peer, /) -> None:
        """An attached client is gone: once for each `attach` that returned."""

    def answer(self, peer: Peer, request: bytes, /) -> Any:
        """Returns the answer to an administrator's request, a struct.

        Comes from any thread, several at once; may take long.
        """


class SocketServer:
    """Serves one socket from `start` to `close`; also a context manager."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        handler: Handler,
        *,
        clients_max: int = CLIENTS_MAX,
        allowed_users: Collection[int] = (),
    ) -> None:
        """Takes the path; connections wait for `start`.

        Args:
            path: of the socket.
            handler: does the work.
            clients_max: attached at once.
            allowed_users: ids that may attach beside our own user and root.

        Raises:
            DaemonError: another daemon serves there.
            ConfigError: the path cannot be a socket's.
        """
        self._handler = handler
        self._clients_max = clients_max
        self.path = check_socket_path(path)
        self._access = AccessPolicy(self.path, allowed_users)
        self._log = PeerLog()
        self._connections = Connections(self.path, self._access, self._take, self._detach, self._log)
        self._requests = AdminRequests(handler.answer, self._log)
        self._end_reason: str | None = None
        self._thread = threading.Thread(target=self._run, name="tierstore-socket", daemon=True)
        self._file = SocketFile(self.path, 0o666 if self._access.is_open_to_others else 0o600)

    def start(self) -> None:
        """Begins to serve, in a thread."""
        assert self._end_reason is None, "it is closed"
        allow_open_files(FILES_OF_CLIENT * self._clients_max)
        self._connections.open()
        self._thread.start()

    def note_starting(self, state: str) -> None:
        """Notes beside the socket how far the start is, for those who connect before `start`."""
        self._file.note(state)

    def info(self, clients: tuple[ClientInfo, ...] = ()) -> ClientsInfo:
        """Returns how many clients are attached, and how many connections were refused.

        clients: what is known of each.
        """
        attached, refused = (
            sum(peer.role == "client" for peer in self._connections.peers),
            self._connections.num_refused,
        )
        return ClientsInfo(attached=attached, max=self._clients_max, refused=refused, list=clients)

    def close(self, timeout_s: float = CLOSE_S, reason: str = "the daemon ends") -> bool:
        """Says goodbye to all, detaches them, removes the socket. Blocks; returns whether all threads ended in time."""
        deadline = time.monotonic() + timeout_s
        self._end_reason = self._end_reason or reason
        if self._thread.ident is None:
            self._file.close()
        self._connections.wake()
        threads = [self._thread, *self._requests.threads()]
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        running = [thread.name for thread in threads if thread.is_alive()]
        if running:
            logger.error("%s: %s did not end within %s s; left behind", self.path, ", ".join(running), timeout_s)
        return not running

    def __enter__(self) -> SocketServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        """The thread."""
        assert self._file.listener is not None
        try:
            self._connections.run(self._file.listener, lambda: self._end_reason is None)
        except BaseException:
            logger.critical("%s: the daemon serves no longer; restart it", self.path, exc_info=True)
            raise
        finally:
            self._file.close()
            self._connections.end(self._end_reason or "the daemon failed; its log says more")

    def _take(self, peer: Peer, data: bytes) -> None:
        if peer.role is None:
            self._shake_hands(peer, data)
        elif peer.role == "client":
            self._handler.message(peer, data)
        else:
            self._requests.begin(peer, data)

    def _shake_hands(self, peer: Peer, data: bytes) -> None:
        role, hello = self._access.check_hello(peer.uid, data)
        peer.release, peer.on_gpu = hello.release, hello.on_gpu
        limits.check_room(role, self._connections.peers, self._clients_max)
        layout, fds = self._handler.attach(peer) if role == "client" else ({}, ())
        peer.role = role  # from here on, `detach` follows
        welcome = msgspec.to_builtins(Welcome(PROTOCOL_VERSION, VERSION, os.getpid()))
        peer.answer(welcome | msgspec.to_builtins(layout), fds)

    def _detach(self, peer: Peer) -> None:
        if peer.role == "client":
            try:
                self._handler.detach(peer)
            except Exception as error:
                self._log.warn(f"{self.path}: {peer} was not detached in order", error)
