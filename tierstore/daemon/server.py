"""The server of the daemon's socket: who may connect, what they may send, and that none of them can hold up the others.

Flows in: connections, and their messages. Flows out: calls of a `Handler`, which alone knows what they mean. One thread
runs all connections, so that attached clients cost nothing while they are idle; a request of an administrator, which
may take long, gets a thread of its own. Refuses other users unless they are named, other versions of the protocol, and
more connections than its limits; drops, by a named reason, whoever breaks the protocol,
sends too fast or does not read.
"""

from __future__ import annotations

import errno
import logging
import os
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Protocol

from ..causes import allow_open_files, named
from ..errors import DaemonError, TierStoreError
from ..ipc.peer_log import PeerLog
from ..ipc.protocol import PROTOCOL_VERSION, ChannelClosed
from ..ipc.socket_file import SocketFile, check_socket_path
from ..version import VERSION
from .admin import Asks
from .handshake import Door
from .peer import Peer, error_message

logger = logging.getLogger("tierstore")

CLIENTS_MAX = 64
FILES_OF_CLIENT = 8  # its connection, its blocks, and those on their way to it
ADMINS_MAX = 8
GREETINGS_MAX = 32  # connections that have not said hello; of more, the oldest of the user with the most goes
HANDSHAKE_S = 2.0  # from a connection to its hello
PEER_SEND_S = 5.0  # how long a peer may read nothing while something waits for it
ADMIN_IDLE_S = 60.0  # between an administrator's requests
CLOSE_S = 10.0
ACCEPTS_A_ROUND = 16  # half of GREETINGS_MAX: each gets a round in which its hello is read
PACKETS_A_ROUND = 8  # of one peer, before the others have their turn
ACCEPT_PAUSE_S = 1.0  # after the system had no descriptor left for a connection


class Handler(Protocol):
    """What the daemon does with its peers. All but `ask` come from the server's thread, one at a time,
    and must be quick.

    An exception from any of them costs that peer its connection and no other;
    a `TierStoreError`'s message is passed on to it.
    """

    def attach(self, peer: Peer, /) -> tuple[dict[str, Any], Sequence[int]]:
        """A client said hello: returns the answer, and descriptors to copy to it.
        What is sent meanwhile follows the answer."""

    def message(self, peer: Peer, message: dict[str, Any], /) -> None:
        """An attached client sent a message, of which only the form is checked."""

    def detach(self, peer: Peer, /) -> None:
        """An attached client is gone: once for each `attach` that returned."""

    def ask(self, peer: Peer, message: dict[str, Any], /) -> dict[str, Any]:
        """Returns the answer to an administrator's request. Comes from any thread, several at once; may take long."""


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
        """Takes the path; who connects waits for `start`. allowed_users:
        ids that may attach beside our own user and root.

        Raises `DaemonError` where another daemon serves there, `ConfigError` where the path cannot be a socket's.
        """
        self._handler = handler
        self._clients_max = clients_max
        self.path = check_socket_path(path)
        self._door = Door(self.path, allowed_users)
        self._peers: dict[int, Peer] = {}  # by descriptor; the thread's alone
        self._refused = 0
        self._selector: selectors.BaseSelector  # from `start` on
        self._wake_fd = -1  # likewise
        self._wake_lock = threading.Lock()  # of the descriptor's closing
        self._accept_again_at: float | None = None
        self._log = PeerLog()
        self._asks = Asks(handler.ask, self._log)
        self._end_reason: str | None = None
        self._thread = threading.Thread(target=self._run, name="tierstore-socket", daemon=True)
        self._file = SocketFile(self.path, 0o666 if self._door.open_to_others else 0o600)

    def start(self) -> None:
        """Begins to serve, in a thread."""
        assert self._end_reason is None, "it is closed"
        allow_open_files(FILES_OF_CLIENT * self._clients_max)
        self._selector = selectors.DefaultSelector()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread.start()

    def note_starting(self, state: str) -> None:
        """Notes beside the socket how far the start is, for those who ask before `start`."""
        self._file.note(state)

    def counts(self) -> dict[str, int]:
        """Returns clients "attached", "max" of them, and "refused": connections that got no answer to their hello."""
        attached = sum(peer.role == "client" for peer in list(self._peers.values()))
        return {"attached": attached, "max": self._clients_max, "refused": self._refused}

    def close(self, timeout_s: float = CLOSE_S, reason: str = "the daemon ends") -> bool:
        """Says goodbye to all, detaches them, removes the socket. Blocks; returns whether all threads ended in time."""
        deadline = time.monotonic() + timeout_s
        self._end_reason = self._end_reason or reason
        if self._thread.ident is None:
            self._file.close()
        self._wake()
        threads = [self._thread, *self._asks.threads()]
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        late = [thread.name for thread in threads if thread.is_alive()]
        if late:
            logger.error("%s: %s did not end within %s s; left behind", self.path, ", ".join(late), timeout_s)
        return not late

    def __enter__(self) -> SocketServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wake(self) -> None:
        with self._wake_lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def _run(self) -> None:
        """The thread."""
        try:
            self._register(self._wake_fd, lambda _: os.eventfd_read(self._wake_fd))
            self._register(self._listener, self._accept)
            while self._end_reason is None:
                for key, events in self._selector.select(self._seconds_left()):
                    key.data(events)
                self._attend()
        except BaseException:
            logger.critical("%s: the daemon serves no longer; restart it", self.path, exc_info=True)
            raise
        finally:
            self._end()

    @property
    def _listener(self) -> socket.socket:
        assert self._file.listener is not None
        return self._file.listener

    def _register(self, file: int | socket.socket, act: Callable[[int], object]) -> None:
        self._selector.register(file, selectors.EVENT_READ, act)

    def _end(self) -> None:
        self._file.close()
        for peer in list(self._peers.values()):
            self._remove(peer, {"bye": self._end_reason or "the daemon failed; its log says more"})
        self._selector.close()
        with self._wake_lock:
            fd, self._wake_fd = self._wake_fd, -1
        if fd >= 0:
            os.close(fd)

    # Connections

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
            self._add(Peer(sock, self._wake))

    def _pause(self, error: OSError) -> None:
        """The system has no descriptor or memory for a connection: asking at once again would only spin."""
        self._log.warn(str(named(error, f"{self.path}: a connection cannot be accepted")))
        self._selector.unregister(self._listener)
        self._accept_again_at = time.monotonic() + ACCEPT_PAUSE_S

    def _add(self, peer: Peer) -> None:
        self._peers[peer.sock.fileno()] = peer
        try:
            self._register(peer.sock, partial(self._on_socket, peer))
            if peer.pidfd is not None:
                self._register(peer.pidfd, partial(self._on_exit, peer))
            self._door.check_user(peer.pid, peer.uid)
            strangers = [other for other in self._peers.values() if other.role is None]
            if len(strangers) > GREETINGS_MAX:
                reason = (
                    f"{len(strangers)} connections have not said hello, the limit is {GREETINGS_MAX}: say it sooner"
                )
                counts = Counter(other.uid for other in strangers)
                most = max(counts.values())
                oldest = next(other for other in strangers if counts[other.uid] == most)
                self._drop(oldest, DaemonError(reason))
        except Exception as error:
            self._drop(peer, error)

    def _on_socket(self, peer: Peer, events: int) -> None:
        """A peer can be read or written. Whatever goes wrong with it ends it alone."""
        now = time.monotonic()
        try:
            if events & selectors.EVENT_WRITE:
                peer.flush(now)
            for _ in range(PACKETS_A_ROUND if events & selectors.EVENT_READ else 0):
                try:
                    message = peer.receive(now)
                except BlockingIOError:
                    return
                if message is not None and peer.dropped_for is None:
                    self._take(peer, message)
        except Exception as error:
            self._drop(peer, error)

    def _on_exit(self, peer: Peer, _: int) -> None:
        """Its process is gone, though a fork of it may hold the socket open; what it sent last is still read."""
        self._on_socket(peer, selectors.EVENT_READ)
        self._drop(peer, ChannelClosed("its process ended"))

    def _drop(self, peer: Peer, error: Exception) -> None:
        """Ends a connection, and says why: to the peer, and to the log where it is not just gone."""
        if peer.sock.fileno() < 0:  # already
            return None
        if isinstance(error, ChannelClosed):
            return self._remove(peer, None)
        self._refused += peer.role is None
        if isinstance(error, TierStoreError):
            self._log.warn(f"{self.path}: {peer} is dropped: {error}")
            return self._remove(peer, error_message(error))
        self._log.warn(f"{self.path}: {peer} is dropped: the daemon failed with its message", error)
        return self._remove(peer, error_message("the daemon failed with this message; its log says more"))

    def _remove(self, peer: Peer, last: dict[str, Any] | None) -> None:
        fd = peer.sock.fileno()
        if fd < 0:
            return
        del self._peers[fd]
        for file in (peer.sock, peer.pidfd):
            if file is not None and file in self._selector.get_map():
                self._selector.unregister(file)
        peer.close(last)
        if peer.role == "client":
            try:
                self._handler.detach(peer)
            except Exception as error:
                self._log.warn(f"{self.path}: {peer} was not detached in order", error)

    # Rounds

    def _seconds_left(self) -> float | None:
        """How long the thread may sleep; None: until something comes."""
        ends = [end for peer in self._peers.values() for end, _ in _deadlines(peer)]
        if self._accept_again_at is not None:
            ends.append(self._accept_again_at)
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _attend(self) -> None:
        """After each round: sends what was queued, drops who is to be dropped or is late."""
        now = time.monotonic()
        for peer in list(self._peers.values()):
            try:
                peer.flush(now)
            except TierStoreError as error:
                self._drop(peer, error)
                continue
            reason = peer.dropped_for or next((reason for end, reason in _deadlines(peer) if now >= end), None)
            if reason is not None:
                self._drop(peer, DaemonError(reason))
            else:
                self._watch(peer)
        if self._accept_again_at is not None and now >= self._accept_again_at:
            self._accept_again_at = None
            self._register(self._listener, self._accept)

    def _watch(self, peer: Peer) -> None:
        """Waits for room to write only where something waits to be written."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.blocked_since is not None else 0)
        key = self._selector.get_key(peer.sock)
        if key.events != events:
            self._selector.modify(peer.sock, events, key.data)

    # Messages

    def _take(self, peer: Peer, message: dict[str, Any]) -> None:
        if peer.role is None:
            self._greet(peer, message)
        elif peer.role == "client":
            self._handler.message(peer, message)
        else:
            self._asks.begin(peer, message)

    def _greet(self, peer: Peer, hello: dict[str, Any]) -> None:
        role, peer.release = self._door.check_hello(peer.uid, hello)
        peer.on_gpu = hello.get("on_gpu") is True
        self._check_room(role)
        answer, fds = self._handler.attach(peer) if role == "client" else ({}, ())
        peer.role = role
        peer.answer({"hello": PROTOCOL_VERSION, "release": VERSION, "pid": os.getpid(), **answer}, fds)

    def _check_room(self, role: str) -> None:
        limit = self._clients_max if role == "client" else ADMINS_MAX
        if sum(peer.role == role for peer in self._peers.values()) < limit:
            return
        if role == "client":
            raise DaemonError(
                f"{limit} clients are attached, the limit is {limit} (--clients): end some, "
                "or restart the daemon with more"
            )
        raise DaemonError(f"{limit} administrators are connected, the limit is {limit}: end some of their commands")


def _deadlines(peer: Peer) -> list[tuple[float, str]]:
    """Returns (when, why) a peer is dropped unless something comes of it first."""
    found = []
    if peer.role is None:
        found.append((peer.since + HANDSHAKE_S, f"no hello came within {HANDSHAKE_S} s of the connection"))
    elif peer.role == "admin" and not peer.asking:
        found.append(
            (peer.active_at + ADMIN_IDLE_S, f"no request came within {ADMIN_IDLE_S} s: connect again for the next")
        )
    if peer.blocked_since is not None:
        found.append(
            (peer.blocked_since + PEER_SEND_S, f"nothing was read within {PEER_SEND_S} s, though messages wait")
        )
    return found
