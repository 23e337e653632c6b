"""The protocol: messages with descriptors over a connected AF_UNIX SOCK_SEQPACKET socket.

Flows in: a socket, messages as dicts. Flows out: the same on the other side. A message is one JSON object, cut into
packets of at most 32 KiB, of which all but the last are full; its descriptors go with the first. A packet is

    magic 4s | flags u8 (1: more packets follow) | 3 zero bytes | bytes of the whole
    message u32 | its part of the message

Refuses, by `DaemonError` and nothing else, whatever is not that: foreign packets, messages over the limit, descriptors
where none belong, JSON that another reader would see otherwise (a key twice, NaN, half a character).
Every wait is bounded.
"""

from __future__ import annotations

import array
import json
import math
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from ..errors import DaemonError

PROTOCOL_VERSION = 1
PACKET_BYTES_MAX = 32 << 10
MESSAGE_BYTES_MAX = 1 << 20  # of a message of the daemon
CLIENT_MESSAGE_BYTES_MAX = 64 << 10  # of a message to the daemon
FDS_MAX = 16  # descriptors that go with a message
DEPTH_MAX = 32  # objects and lists within each other
DIGITS_MAX = 19  # of an integer, which is within 64 bits
SEND_S = 5.0  # how long a message waits for a peer that does not read

_HEADER = struct.Struct("<4sB3xI")
_MAGIC = b"tsd\n"
_MORE = 1
PART_BYTES_MAX = PACKET_BYTES_MAX - _HEADER.size


class ChannelClosed(DaemonError):
    """The other side closed the channel, or is gone."""


def close_fds(fds: Iterable[int]) -> None:
    """Closes descriptors."""
    for fd in fds:
        os.close(fd)


def peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Returns (pid, uid, gid) of who connected, or of who listens, as the kernel noted them;
    a pid of 0 is out of our sight."""
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return pid, uid & 0xFFFFFFFF, gid & 0xFFFFFFFF


def encode(message: dict[str, Any], limit: int) -> list[bytes]:
    """Returns the packets of a message.

    Raises `DaemonError` where it has more than `limit` bytes, or a path in it is no text; `TypeError` and `ValueError`
    where it is not JSON, which is the caller's mistake.
    """
    assert isinstance(message, dict)
    text = json.dumps(message, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise DaemonError(
            f"a message holds {text[error.start : error.end]!r}, which is not UTF-8: rename it"
        ) from error
    if len(data) > limit:
        raise DaemonError(f"a message of {len(data):,} bytes cannot be sent, the limit is {limit:,}: ask for less")
    starts = range(0, len(data), PART_BYTES_MAX)
    return [
        _HEADER.pack(_MAGIC, _MORE if start != starts[-1] else 0, len(data)) + data[start : start + PART_BYTES_MAX]
        for start in starts
    ]


def decode(data: bytes) -> dict[str, Any]:
    """Returns the message that bytes of JSON say; raises `DaemonError`, see the module."""
    try:
        message = json.loads(
            data.decode(),
            object_pairs_hook=_unique_keys,
            parse_constant=_no_number,
            parse_int=_small_integer,
            parse_float=_finite,
        )
        if b"\\u" in data:  # half of a surrogate pair is text to Python's parser and to nobody else
            json.dumps(message, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DaemonError(f"a message of {len(data):,} bytes is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise DaemonError(f"a message is a JSON {type(message).__name__}, expected an object")
    _check_depth(message)
    return message


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _small_integer(digits: str) -> int:
    if len(digits) <= DIGITS_MAX + 1 and -(2**63) <= int(digits) < 2**63:
        return int(digits)
    raise ValueError(f"an integer of {len(digits)} characters is not within 64 bits")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"a number of {len(digits)} characters is beyond a double")
    return value


def _check_depth(message: dict[str, Any]) -> None:
    level: list[Any] = [message]
    for _ in range(DEPTH_MAX):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise DaemonError(f"a message has objects within each other more than {DEPTH_MAX} deep")


def receive_packet(sock: socket.socket, fds_max: int) -> tuple[bytes, list[int]]:
    """Returns a packet and its descriptors, which close when the process executes another; never blocks.

    fds_max: so many descriptors are taken; of 0, none ever enters this process. Raises `BlockingIOError` where no
    packet waits, `ChannelClosed` at the end (an empty packet is one),
    `DaemonError` where the packet or its descriptors are too many.
    """
    space = socket.CMSG_SPACE(4 * fds_max) if fds_max else 0
    try:
        packet, control, flags, _ = _receive(sock, space)
    except BlockingIOError:
        raise
    except OSError as error:
        raise ChannelClosed(f"the connection broke: {error.strerror}") from error
    fds = array.array("i")
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    if packet and not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        return packet, fds.tolist()
    close_fds(fds)
    if flags & socket.MSG_TRUNC:
        raise DaemonError(f"a packet has more than {PACKET_BYTES_MAX:,} bytes: it is none of this protocol")
    if flags & socket.MSG_CTRUNC:
        raise DaemonError(
            f"a packet came with more than {fds_max} descriptors, or more than this process may have open"
        )
    raise ChannelClosed("the other side closed the connection")


def _receive(sock: socket.socket, space: int) -> tuple[bytes, list[tuple[int, int, bytes]], int, Any]:
    flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    try:
        return sock.recvmsg(PACKET_BYTES_MAX, space, flags)
    except ConnectionResetError:
        # The other side went without reading all. The kernel says so once, before what was sent last,
        # such as a refusal.
        return sock.recvmsg(PACKET_BYTES_MAX, space, flags)


def send_packet(sock: socket.socket, packet: bytes, fds: Sequence[int]) -> None:
    """Sends a packet with descriptors; never blocks. Raises `BlockingIOError`, `ChannelClosed`, `DaemonError`."""
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        sock.sendmsg([packet], control, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except BlockingIOError:
        raise
    except (BrokenPipeError, ConnectionError) as error:
        raise ChannelClosed(f"the other side closed the connection: {error.strerror}") from error
    except OSError as error:
        raise DaemonError(
            f"a packet of {len(packet):,} bytes with {len(fds)} descriptors cannot be sent: {error}"
        ) from error


class MessageReader:
    """Puts the messages of one socket together from packets, at most `limit` bytes each. For one thread at a time."""

    def __init__(self, limit: int) -> None:
        """limit: bytes of a message."""
        self.limit = limit
        self._data = bytearray()
        self._num_bytes = 0  # of the message begun
        self._fds: list[int] = []  # that came with it

    def take(self, packet: bytes, fds: list[int]) -> tuple[dict[str, Any], list[int]] | None:
        """Takes a packet; returns a message and its descriptors, now the caller's, once it is whole.

        Raises `DaemonError`, see the module; the descriptors are closed then, and nothing sound can follow.
        """
        first = not self._data
        self._fds += fds
        try:
            if self._add(packet, first, bool(fds)):
                return None
            message, taken = decode(bytes(self._data)), self._fds
        except BaseException:
            self.close()
            raise
        self._data, self._fds = bytearray(), []
        return message, taken

    def _add(self, packet: bytes, first: bool, has_fds: bool) -> bool:
        """Adds a packet after its checks; returns whether more follow."""
        if len(packet) <= _HEADER.size:
            raise DaemonError(f"a packet of {len(packet)} bytes is none of this protocol: it has no message")
        magic, flags, num_bytes = _HEADER.unpack_from(packet)
        if magic != _MAGIC or flags & ~_MORE or any(packet[5:8]):
            raise DaemonError(f"a packet begins with {packet[:8]!r}: it is none of this protocol")
        if num_bytes > self.limit:
            raise DaemonError(f"a message announces {num_bytes:,} bytes, the limit is {self.limit:,}: ask for less")
        if not first and (num_bytes != self._num_bytes or has_fds):
            raise DaemonError("a packet does not belong to the message that the one before it began")
        part_bytes = min(num_bytes - len(self._data), PART_BYTES_MAX)
        more = len(self._data) + part_bytes < num_bytes
        if len(packet) - _HEADER.size != part_bytes or bool(flags & _MORE) != more:
            raise DaemonError(
                f"a packet has {len(packet) - _HEADER.size:,} bytes of a message of {num_bytes:,}, "
                f"expected {part_bytes:,}"
            )
        self._num_bytes = num_bytes
        self._data += packet[_HEADER.size :]
        return more

    def close(self) -> None:
        """Closes the descriptors of a message that is not whole; nothing can be taken afterwards that continues it."""
        fds, self._fds, self._data = self._fds, [], bytearray()
        close_fds(fds)


class Channel:
    """A connected socket as messages. Any threads may send, one at a time may receive.
    `close` comes after all of them."""

    def __init__(
        self, sock: socket.socket, limit: int = MESSAGE_BYTES_MAX, *, send_limit: int = MESSAGE_BYTES_MAX
    ) -> None:
        """sock: becomes the channel's own. limit, send_limit: bytes of a message received and sent."""
        self._sock = sock
        self._reader = MessageReader(limit)
        self._send_limit = send_limit
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """The descriptor, for polling."""
        return self._sock.fileno()

    def send(self, message: dict[str, Any], fds: Sequence[int] = (), timeout_s: float = SEND_S) -> None:
        """Sends a message with copies of descriptors; blocks until the kernel has it.

        Raises `TimeoutError` where the other side does not read in time, after which the channel is shut down: half a
        message may be under way. `ChannelClosed` where it is gone, `DaemonError` where the message is too large.
        """
        if len(fds) > FDS_MAX:
            raise ValueError(f"{len(fds)} descriptors cannot go with a message, the limit is {FDS_MAX}")
        packets = encode(message, self._send_limit)
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

    def receive(self, timeout_s: float) -> tuple[dict[str, Any], list[int]]:
        """Returns the next message and its descriptors, which are the caller's to close; blocks.

        Raises `TimeoutError`, after which the next call goes on with the same message; `ChannelClosed`; `DaemonError`
        where what came is none of this protocol, after which nothing sound can come: close it.
        """
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
        """Closes this process's hold of the socket; a fork's other side keeps its own. Closing twice is harmless."""
        self._reader.close()
        self._sock.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
