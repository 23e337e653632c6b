"""The connections of a server of lookups by gRPC: peers without an admitted call neither stay nor crowd out others.

Input: which peers made a call that was admitted; the sockets of this process that are connections of the server's port.
Output: connections that are ended. Errors: none; if the descriptors cannot be read, it is logged.

grpc itself limits only how many connections there are of all hosts together, and does not list them. So they are found
among this process's descriptors, and shut down, which grpc takes for the end of their client.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import unquote

from ..ipc.peer_log import PeerLog
from ..ipc.ports import network_of

CONNECTIONS_MAX = 256  # of all hosts; above that, strangers go first
STRANGERS_MAX = 32  # connections of one network without an admitted call
STRANGER_S = 20.0  # from a connection to its first admitted call
LOOK_S = 0.5  # between two looks
PEERS_KNOWN = 1024  # whose addresses are not taken apart again at each call
ALL_LOOK_S = 30.0  # between two looks at all descriptors, also those that were not sockets the last time

End = tuple[str, int]  # a peer's address and port


class _Connection(NamedTuple):
    since: float  # of `time.monotonic`, when it was seen first
    inode: int  # of its socket


def end_of(peer: str) -> End:
    """Returns the address and port of what grpc calls a peer, such as "ipv4:10.0.0.1:4711" and
    "ipv6:%5B::1%5D:4711"."""
    host, _, port = unquote(peer.partition(":")[2]).rpartition(":")
    return host.strip("[]"), int(port) if port.isdecimal() else 0


@functools.lru_cache(PEERS_KNOWN)
def peer_network(peer: str) -> str:
    """Returns what limits of a peer, as grpc calls it, are counted by."""
    return network_of(end_of(peer)[0])


@functools.lru_cache(PEERS_KNOWN)
def _end_of(peer: str) -> End:
    return _same(end_of(peer))


class Connections:
    """Watches the connections of a port, by a thread of its own. Any thread may call."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._log = PeerLog()
        self._lock = threading.Lock()  # guards `_admitted`, `_kept`
        self._admitted: set[End] = set()
        self._kept: Counter[End] = Counter()
        self._seen: dict[End, _Connection] = {}  # the thread's, like all below
        self._no_sockets: set[str] = set()  # descriptors of other things
        self._all_at = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tierstore-remote-connections", daemon=True)
        self._thread.start()

    def admit(self, peer: str) -> None:
        """A call of this peer was admitted: its connection may stay."""
        with self._lock:
            self._admitted.add(_end_of(peer))

    @contextlib.contextmanager
    def kept(self, peer: str) -> Iterator[None]:
        """While this lasts, the peer's connection may stay."""
        end = _end_of(peer)
        with self._lock:
            self._kept[end] += 1
        try:
            yield
        finally:
            with self._lock:
                self._kept[end] -= 1
                if not self._kept[end]:
                    del self._kept[end]

    def stop(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(LOOK_S):
            try:
                self._look(time.monotonic())
            except Exception as error:  # no descriptor or memory is left to look by, or there is no /proc
                self._log.warn(f"port {self._port}: its connections cannot be looked at: {error}")

    def _look(self, now: float) -> None:
        """Ends the connections that are to end."""
        sockets = self._sockets(now)
        try:
            self._seen = {
                end: seen if (seen := self._seen.get(end)) and seen.inode == inode else _Connection(now, inode)
                for end, (_, inode) in sockets.items()
            }
            with self._lock:
                self._admitted &= sockets.keys()
                strangers = {
                    end: seen.since
                    for end, seen in self._seen.items()
                    if end not in self._admitted and end not in self._kept
                }
            for end, why in to_end(strangers, len(sockets), now).items():
                self._log.warn(f"port {self._port}: the connection of {end[0]}:{end[1]} is ended: {why}")
                with contextlib.suppress(OSError):  # it ended by itself
                    sockets[end][0].shutdown(socket.SHUT_RDWR)
        finally:
            for sock, _ in sockets.values():
                sock.close()

    def _sockets(self, now: float) -> dict[End, tuple[socket.socket, int]]:
        """Returns the connections of the port: by the other end, a descriptor of our own and the socket's inode."""
        if now >= self._all_at:
            self._all_at = now + ALL_LOOK_S
            self._no_sockets.clear()
        found: dict[End, tuple[socket.socket, int]] = {}
        try:
            for name in set(os.listdir("/proc/self/fd")) - self._no_sockets:
                with contextlib.suppress(OSError):  # closed meanwhile, or not connected
                    if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                        self._no_sockets.add(name)
                        continue
                    self._add(found, int(name))
        except BaseException:
            for sock, _ in found.values():
                sock.close()
            raise
        return found

    def _add(self, found: dict[End, tuple[socket.socket, int]], fd: int) -> None:
        """Adds a socket, if it is a connection of the port. What is looked at is a copy:
        `fd` may be another thing by now."""
        sock = socket.socket(fileno=os.dup(fd))
        is_ours = False
        try:
            if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.getsockname()[1] == self._port:
                end = _same(sock.getpeername()[:2])
                is_ours = end not in found
                if is_ours:
                    found[end] = sock, os.fstat(sock.fileno()).st_ino
        finally:
            if not is_ours:
                sock.close()


def _same(end: End) -> End:
    """Returns an end with an IPv4 address that is written as IPv6 as what it is, so that both spellings compare."""
    host = end[0].partition("%")[0]
    return (host.removeprefix("::ffff:") if "." in host else host), end[1]


def to_end(strangers: dict[End, float], num_all: int, now: float) -> dict[End, str]:
    """Returns which connections end, and why: late ones, and those that crowd out others.

    strangers: the other ends of connections without an admitted call, and since when they are there. num_all:
    connections of all kinds.
    """
    ended = {
        end: f"it made no admitted call within {STRANGER_S:g} s"
        for end, since in strangers.items()
        if now - since >= STRANGER_S
    }
    by_network: dict[str, list[End]] = {}
    for end in sorted(strangers.keys() - ended.keys(), key=lambda end: strangers[end], reverse=True):
        by_network.setdefault(network_of(end[0]), []).append(
            end
        )  # newest first, so that the oldest are taken off the end
    for network, ends in by_network.items():
        while len(ends) > STRANGERS_MAX:
            ended[ends.pop()] = f"{network} has more than {STRANGERS_MAX} without an admitted call"
    while num_all - len(ended) > CONNECTIONS_MAX and any(by_network.values()):
        largest = max(by_network.values(), key=len)
        ended[largest.pop()] = f"there are more than {CONNECTIONS_MAX}, and its host has the most without a call"
    return ended
