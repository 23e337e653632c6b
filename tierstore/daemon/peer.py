"""A peer: a process at the other end of one connection, as the daemon sees it.

Input: messages for it, from any thread, into a bounded queue; its packets, read by the server's loop. Output: the
queue, as fast as the peer reads; its messages, as bytes. Errors: a peer that does not read, or sends too often, is
dropped with a reason: nobody waits for it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ..causes import named
from ..errors import DaemonError, TierStoreError
from ..ipc.identity import process_text, user_text
from ..ipc.messages import Failure, to_json
from ..ipc.protocol import (
    CLIENT_MESSAGE_BYTES_MAX,
    FDS_MAX,
    MESSAGE_BYTES_MAX,
    MessageReader,
    close_fds,
    packets_of,
    peer_credentials,
    receive_packet,
    send_packet,
)

QUEUE_MESSAGES_MAX = 32  # that wait for one peer, each with copies of its descriptors
QUEUE_BYTES_MAX = 4 << 20
MESSAGES_A_SECOND_MAX = 200
_numbers = itertools.count(1)
SO_PEERPIDFD = 77  # Linux 6.5: the process that connected, also if another has its number by now


def failure_of(error: TierStoreError | str) -> Failure:
    """Returns what a peer gets for an error; a text is a `DaemonError`'s."""
    name = "DaemonError" if isinstance(error, str) else type(error).__name__
    return Failure(name, str(error).encode("utf-8", "replace").decode())


def _copies(fds: Sequence[int]) -> list[int]:
    copies: list[int] = []
    try:
        for fd in fds:
            copies.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0))
    except OSError as error:
        close_fds(copies)
        raise named(error, f"descriptor {fd} cannot be sent", kind=DaemonError) from error
    return copies


class _Outgoing:
    """A message in the queue: its packets that are not sent yet, and its descriptors, ours until the first is."""

    def __init__(self, message: Any, fds: Sequence[int]) -> None:
        if len(fds) > FDS_MAX:
            raise ValueError(f"{len(fds)} descriptors cannot go with a message, the limit is {FDS_MAX}")
        self.packets = deque(packets_of(to_json(message), MESSAGE_BYTES_MAX))
        self.begun = False
        self._fds = _copies(fds)

    def send_to(self, sock: socket.socket) -> None:
        while self.packets:
            send_packet(sock, self.packets[0], self._fds)
            self.begun = True
            self.packets.popleft()
            self.close()

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.packets))

    def close(self) -> None:
        fds, self._fds = self._fds, []
        close_fds(fds)


class Peer:
    """A connected process. `send` and `drop` may come from any thread and never block; the rest is the server's loop's.

    pid, uid, gid: as the kernel noted them when it connected; pid 0 is a process of another PID namespace. pidfd:
    becomes readable when that process ends, None if the kernel gives none, and when the peer is gone. role: "client" or
    "admin", None until its hello. release: of tierstore, as it says. on_gpu: whether it says that its GPU would read
    the static set. number: of the connection, never given twice in this process. since: of `time.monotonic`, when it
    connected.
    """

    def __init__(self, sock: socket.socket, on_change: Callable[[], None]) -> None:
        """sock: becomes the peer's own.

        on_change: called, from any thread, when there is something for the loop to do.
        """
        self.sock = sock
        self.number = next(_numbers)
        self.pid, self.uid, self.gid = peer_credentials(sock)
        self.pidfd = _pidfd_of(sock, self.pid)
        self.role: str | None = None
        self.release = ""
        self.on_gpu = False
        self.since = time.monotonic()
        self.blocked_since: float | None = None  # it does not read since then
        self.active_at = self.since  # when it last sent a message, or was sent an answer
        self.dropped_for: str | None = None
        # An administrator's request is being answered. One writer at a time: the loop, then the request's thread.
        self.is_answering = False
        self._on_change = on_change
        self._reader = MessageReader(CLIENT_MESSAGE_BYTES_MAX)
        self._second, self._in_second = 0, 0
        self._lock = threading.Lock()  # guards `_queue`, `_answered`, `_closed`
        self._queue: deque[_Outgoing] = deque()
        self._answered = False  # its hello: nothing goes out before the answer to it
        self._closed = False

    def __repr__(self) -> str:
        return f"{self.role or 'connection'} of {process_text(self.pid)}, {user_text(self.uid)}"

    def send(self, message: Any, fds: Sequence[int] = ()) -> None:
        """Queues a message, a struct of `ipc.messages`, with copies of descriptors. Does not block.

        A peer that is gone gets nothing, one whose queue is full is dropped. Raises `DaemonError` if the message is too
        large or descriptors cannot be copied.
        """
        self._put(_Outgoing(message, fds))

    def answer(self, message: Any, fds: Sequence[int]) -> None:
        """Queues the answer to its hello, before all else. Raises what `send` raises."""
        self._put(_Outgoing(message, fds), first=True)

    def _put(self, outgoing: _Outgoing, first: bool = False) -> None:
        with self._lock:
            num_bytes = sum(waiting.num_bytes for waiting in self._queue)
            full = len(self._queue) >= QUEUE_MESSAGES_MAX or num_bytes > QUEUE_BYTES_MAX
            taken = not self._closed and not full
            if taken:
                self._answered |= first
                (self._queue.appendleft if first else self._queue.append)(outgoing)
        if not taken:
            outgoing.close()
        if full:
            self.drop(f"{len(self._queue)} messages of {num_bytes:,} bytes wait for you, which is the limit: read them")
        else:
            self._on_change()

    def drop(self, reason: str) -> None:
        """Ends the connection soon; the peer gets the reason if it reads. The handler's `detach` follows."""
        self.dropped_for = self.dropped_for or reason
        self._on_change()

    def flush(self, now: float) -> None:
        """Sends what the kernel takes. Raises `ChannelClosed`, `DaemonError`."""
        with self._lock:
            advanced = False
            while self._queue and self._answered:
                head = self._queue[0]
                num_left = len(head.packets)
                try:
                    head.send_to(self.sock)
                except BlockingIOError:
                    advanced |= len(head.packets) < num_left
                    if advanced or self.blocked_since is None:
                        self.blocked_since = now
                    return
                self._queue.popleft()
                advanced = True
            self.blocked_since = None

    def receive(self, now: float) -> bytes | None:
        """Returns a whole message, None if a packet only continued one.

        Raises `BlockingIOError` if no packet waits, `ChannelClosed`, and `DaemonError` if what came is not of the
        protocol, or too much.
        """
        taken = self._reader.take(*receive_packet(self.sock, 0))
        if taken is None:
            return None
        if int(now) != self._second:
            self._second, self._in_second = int(now), 0
        self._in_second += 1
        if self._in_second > MESSAGES_A_SECOND_MAX:
            raise DaemonError(
                f"more than {MESSAGES_A_SECOND_MAX} messages came within a second, which is the limit: send fewer"
            )
        self.active_at = now
        return taken[0]

    def close(self, last: Any) -> None:
        """Sends what waits and `last`, None for nothing, as far as the kernel takes it at once, and closes the
        connection."""
        with contextlib.suppress(OSError, TierStoreError):  # it hears the reason if it can
            self.flush(0.0)
            with self._lock:
                half_sent = bool(self._queue) and self._queue[0].begun
            if last is not None and not half_sent:
                _Outgoing(last, ()).send_to(self.sock)
        with self._lock:
            self._closed = True
            for outgoing in self._queue:
                outgoing.close()
            self._queue.clear()
        self._reader.close()
        self.sock.close()
        pidfd, self.pidfd = self.pidfd, None
        if pidfd is not None:
            os.close(pidfd)


def _pidfd_of(sock: socket.socket, pid: int) -> int | None:
    try:
        return sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:  # the process has ended, and another may have its number by now
            return None
    try:  # an older kernel
        return os.pidfd_open(pid) if pid > 0 else None
    except OSError:
        return None
