"""The connections of the daemon's socket: one loop that reads and writes all peers, and drops those that misbehave.

Input: accepted sockets, their packets. Output: whole messages, one peer after the other. Errors: whatever goes wrong
with a peer ends that peer alone: it gets the reason if it reads, and the log has it.

All but `wake` belongs to the thread that calls `run`.
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from ..errors import DaemonError, TierStoreError
from ..ipc.messages import Goodbye
from ..ipc.peer_log import PeerLog
from ..ipc.protocol import ChannelClosed
from . import limits
from .acceptor import Acceptor
from .handshake import AccessPolicy
from .peer import Peer, failure_of

PACKETS_A_ROUND = 8  # of one peer, before the others have their turn


class Connections:
    """The peers of one socket, from `open` until `end`.

    num_refused: connections that were dropped before their hello.
    """

    def __init__(
        self,
        path: str,
        access: AccessPolicy,
        take: Callable[[Peer, bytes], None],
        gone: Callable[[Peer], None],
        log: PeerLog,
    ) -> None:
        """path: names the socket in the log. take: gets each message. gone: gets each peer that was removed."""
        self._path, self._access, self._take, self._gone, self._log = path, access, take, gone, log
        self._peers: dict[int, Peer] = {}  # by descriptor
        self.num_refused = 0
        self._selector: selectors.BaseSelector
        self._acceptor: Acceptor
        self._wake_lock = threading.Lock()  # guards `_wake_fd`: nobody writes to it once it is closed
        self._wake_fd = -1

    def open(self) -> None:
        """Takes the descriptors that the loop needs."""
        self._selector = selectors.DefaultSelector()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def wake(self) -> None:
        """Has the loop make a round. Any thread may call, at any time."""
        with self._wake_lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    @property
    def peers(self) -> Collection[Peer]:
        """The connected peers; a copy, so that any thread may look."""
        return list(self._peers.values())

    def run(self, listener: socket.socket, goes_on: Callable[[], bool]) -> None:
        """Makes rounds while goes_on() is true. Comes after `open`, and once."""
        self._register(self._wake_fd, lambda _: os.eventfd_read(self._wake_fd))
        self._acceptor = Acceptor(listener, self._selector, self._add, self._path, self._log)
        while goes_on():
            for key, events in self._selector.select(self.seconds_left()):
                key.data(events)
            self._attend()

    def end(self, reason: str) -> None:
        """Says goodbye to all and closes everything. `peers` is empty then."""
        for peer in self.peers:
            self._remove(peer, Goodbye(reason))
        self._selector.close()
        with self._wake_lock:
            fd, self._wake_fd = self._wake_fd, -1
        if fd >= 0:
            os.close(fd)

    def _register(self, file: int | socket.socket, act: Callable[[int], object]) -> None:
        self._selector.register(file, selectors.EVENT_READ, act)

    # Peers

    def _add(self, sock: socket.socket) -> None:
        peer = Peer(sock, self.wake)
        self._peers[sock.fileno()] = peer
        try:
            self._register(sock, partial(self._on_socket, peer))
            if peer.pidfd is not None:
                self._register(peer.pidfd, partial(self._on_exit, peer))
            self._access.check_user(peer.pid, peer.uid)
            superfluous = limits.superfluous(self._peers.values())
            if superfluous is not None:
                self._drop(*superfluous)
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
                    data = peer.receive(now)
                except BlockingIOError:
                    return
                if data is not None and peer.dropped_for is None:
                    self._take(peer, data)
        except Exception as error:
            self._drop(peer, error)

    def _on_exit(self, peer: Peer, _: int) -> None:
        """Its process is gone, though a fork may keep the socket open; what it sent last is still read."""
        self._on_socket(peer, selectors.EVENT_READ)
        self._drop(peer, ChannelClosed("its process ended"))

    def _drop(self, peer: Peer, error: Exception) -> None:
        """Ends a connection, and says why: to the peer, and to the log unless the peer is just gone."""
        if peer.sock.fileno() < 0:  # already
            return None
        if isinstance(error, ChannelClosed):
            return self._remove(peer, None)
        self.num_refused += peer.role is None
        if isinstance(error, TierStoreError):
            self._log.warn(f"{self._path}: {peer} is dropped: {error}")
            return self._remove(peer, failure_of(error))
        self._log.warn(f"{self._path}: {peer} is dropped: the daemon failed with its message", error)
        return self._remove(peer, failure_of("the daemon failed with this message; its log says more"))

    def _remove(self, peer: Peer, last: Any) -> None:
        fd = peer.sock.fileno()
        if fd < 0:
            return
        del self._peers[fd]
        for file in (peer.sock, peer.pidfd):
            if file is not None and file in self._selector.get_map():
                self._selector.unregister(file)
        peer.close(last)
        self._gone(peer)

    # Rounds

    def seconds_left(self) -> float | None:
        """Returns how long the loop may sleep; None: until something comes."""
        ends = [end for peer in self._peers.values() for end, _ in limits.deadlines(peer)]
        if self._acceptor.resumes_at is not None:
            ends.append(self._acceptor.resumes_at)
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _attend(self) -> None:
        """After each round: sends what was queued, drops peers that are to be dropped or whose time is over."""
        now = time.monotonic()
        for peer in self.peers:
            try:
                peer.flush(now)
            except TierStoreError as error:
                self._drop(peer, error)
                continue
            reason = peer.dropped_for or next((reason for end, reason in limits.deadlines(peer) if now >= end), None)
            if reason is not None:
                self._drop(peer, DaemonError(reason))
            else:
                self._watch(peer)
        self._acceptor.resume(now)

    def _watch(self, peer: Peer) -> None:
        """Waits for room to write only if something waits to be written."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.blocked_since is not None else 0)
        key = self._selector.get_key(peer.sock)
        if key.events != events:
            self._selector.modify(peer.sock, events, key.data)
