"""The packets of the daemon's socket: whole messages with descriptors over a connected AF_UNIX SOCK_SEQPACKET socket.

Input: bytes of a message, descriptors. Output: the same on the other side. A message is cut into packets of at most
32 KiB, of which all but the last are full; its descriptors go with the first. A packet is

    magic 4s | flags u8 (1: more packets follow) | 3 zero bytes | bytes of the whole message u32 | its part of the
    message

Errors: `DaemonError` and nothing else for whatever is not that: foreign packets, messages over the limit, descriptors
that do not belong to a message. What a message says is read in `messages`. Every wait is bounded.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import DaemonError

PROTOCOL_VERSION = 1
PACKET_BYTES_MAX = 32 << 10
MESSAGE_BYTES_MAX = 1 << 20  # of a message of the daemon
CLIENT_MESSAGE_BYTES_MAX = 64 << 10  # of a message to the daemon
FDS_MAX = 16  # descriptors that go with a message

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
    """Returns (pid, uid, gid) of who connected, or of who listens, as the kernel noted them; a pid of 0 is out of our
    sight."""
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return pid, uid & 0xFFFFFFFF, gid & 0xFFFFFFFF


def packets_of(data: bytes, limit: int) -> list[bytes]:
    """Cuts a message into its packets. Raises `DaemonError` if it has more than `limit` bytes."""
    if len(data) > limit:
        raise DaemonError(f"a message of {len(data):,} bytes cannot be sent, the limit is {limit:,}: ask for less")
    starts = range(0, len(data), PART_BYTES_MAX)
    return [
        _HEADER.pack(_MAGIC, _MORE if start != starts[-1] else 0, len(data)) + data[start : start + PART_BYTES_MAX]
        for start in starts
    ]


def receive_packet(sock: socket.socket, fds_max: int) -> tuple[bytes, list[int]]:
    """Returns a packet and its descriptors, which close when the process executes another; never blocks.

    fds_max: so many descriptors are taken; of 0, none ever enters this process. Raises `BlockingIOError` if no
    packet waits, `ChannelClosed` at the end (an empty packet is one), `DaemonError` if the packet or its descriptors
    are too many.
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
        raise DaemonError(f"a packet has more than {PACKET_BYTES_MAX:,} bytes: it is not of this protocol")
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
        # The other side went without reading all. The kernel says so once, before what was sent last, such as a
        # refusal.
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

    def take(self, packet: bytes, fds: list[int]) -> tuple[bytes, list[int]] | None:
        """Takes a packet; returns a message and its descriptors, now the caller's, once it is whole.

        Raises `DaemonError`, see the module; the descriptors are closed then, and nothing sound can follow.
        """
        first = not self._data
        self._fds += fds
        try:
            if self._add(packet, first, bool(fds)):
                return None
        except BaseException:
            self.close()
            raise
        message, taken = bytes(self._data), self._fds
        self._data, self._fds = bytearray(), []
        return message, taken

    def _add(self, packet: bytes, first: bool, has_fds: bool) -> bool:
        """Adds a packet after its checks; returns whether more follow."""
        if len(packet) <= _HEADER.size:
            raise DaemonError(f"a packet of {len(packet)} bytes is not of this protocol: it has no message")
        magic, flags, num_bytes = _HEADER.unpack_from(packet)
        if magic != _MAGIC or flags & ~_MORE or any(packet[5:8]):
            raise DaemonError(f"a packet begins with {packet[:8]!r}: it is not of this protocol")
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
