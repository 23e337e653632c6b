"""A channel: a connected socket over which messages go, blocking, for the client's side and for tests.

Input: a socket; messages and descriptors to send. Output: messages of the expected kind, and their descriptors. Errors:
`ChannelClosed` at the end, `DaemonError` for what is not of the protocol, `TimeoutError`. Every wait is bounded.
"""

from __future__ import annotations

import math
import select
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any, TypeVar

from .messages import from_json, to_json
from .protocol import FDS_MAX, MESSAGE_BYTES_MAX, MessageReader, close_fds, packets_of, receive_packet, send_packet

SEND_S = 5.0  # how long a message waits for a peer that does not read
T = TypeVar("T")


class Channel:
    """A connected socket as messages.

    Any threads may send, one at a time may receive. `close` comes after all of them.
    """

    def __init__(
        self, sock: socket.socket, limit: int = MESSAGE_BYTES_MAX, *, send_limit: int = MESSAGE_BYTES_MAX
    ) -> None:
        """sock: becomes the channel's own. limit, send_limit: bytes of a message received and sent."""
        self._sock = sock
        self._reader = MessageReader(limit)
        self._send_limit = send_limit
        self._sending = threading.Lock()  # guards the order of packets: one message at a time

    def fileno(self) -> int:
        """The descriptor, for polling."""
        return self._sock.fileno()

    def send(self, message: Any, fds: Sequence[int] = (), timeout_s: float = SEND_S) -> None:
        """Sends a message, a struct of `messages`, with copies of descriptors; blocks until the kernel has it.

        Raises:
            TimeoutError: the other side does not read in time. The channel is shut down then: half a message may be
                under way.
            ChannelClosed: the other side is gone.
            DaemonError: the message is too large, or holds a text that is not UTF-8.
        """
        if len(fds) > FDS_MAX:
            raise ValueError(f"{len(fds)} descriptors cannot go with a message, the limit is {FDS_MAX}")
        packets = packets_of(to_json(message), self._send_limit)
        deadline = time.monotonic() + timeout_s
        if not self._sending.acquire(timeout=timeout_s):
            raise TimeoutError(f"another message was not taken within {timeout_s} s")
        try:
            for number, packet in enumerate(packets):
                self._send_packet(packet, () if number else fds, deadline)
        except TimeoutError:
            self.shutdown()
            raise
        finally:
            self._sending.release()

    def _send_packet(self, packet: bytes, fds: Sequence[int], deadline: float) -> None:
        while True:
            try:
                return send_packet(self._sock, packet, fds)
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)

    def receive(self, timeout_s: float, kind: type[T]) -> tuple[T, list[int]]:
        """Returns the next message, of a kind, and its descriptors, which are the caller's to close; blocks.

        Raises:
            TimeoutError: no message came; the next call goes on with the same message.
            ChannelClosed: the other side has ended the connection.
            DaemonError: what came is not of the protocol, or not of that kind. Close the channel: nothing sound can
                follow.
        """
        data, fds = self.receive_bytes(timeout_s)
        try:
            return from_json(data, kind), fds
        except BaseException:
            close_fds(fds)
            raise

    def receive_bytes(self, timeout_s: float) -> tuple[bytes, list[int]]:
        """The same for a message that the caller decodes."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                packet, fds = receive_packet(self._sock, FDS_MAX)
            except BlockingIOError:
                self._wait(select.POLLIN, deadline)
                continue
            taken = self._reader.take(packet, fds)
            if taken is not None:
                return taken

    def _wait(self, events: int, deadline: float) -> None:
        left_s = deadline - time.monotonic()
        poll = select.poll()
        poll.register(self._sock, events)
        if left_s <= 0 or not poll.poll(math.ceil(left_s * 1000)):
            doing = "take a message" if events == select.POLLOUT else "send one"
            raise TimeoutError(f"the other side did not {doing} in time")

    def shutdown(self) -> None:
        """Ends the connection for both sides: threads that wait on it get `ChannelClosed`. From any thread."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:  # it is ended or closed already
            return

    def close(self) -> None:
        """Closes this process's descriptor of the socket; the other side of a fork keeps its own.

        Closing twice is harmless.
        """
        self._reader.close()
        self._sock.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
