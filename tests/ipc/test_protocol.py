"""Messages and descriptors cross a socket whole; whatever else crosses it is a DaemonError, and leaves nothing open."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from array import array
from collections.abc import Iterator

import pytest
from support.daemon_peers import packet
from support.held import open_files
from support.waiting import WAIT_S

from tierstore.errors import DaemonError
from tierstore.ipc.channel import Channel
from tierstore.ipc.messages import to_json
from tierstore.ipc.protocol import FDS_MAX, MESSAGE_BYTES_MAX, PART_BYTES_MAX, ChannelClosed, packets_of

Pair = tuple[Channel, socket.socket]


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with Channel(left) as one, Channel(right) as other:
        yield one, other


@pytest.fixture
def raw() -> Iterator[Pair]:
    """A channel, and the bare socket at its other end."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with Channel(left, limit=1000) as channel, right:
        yield channel, right


def message_of(num_bytes: int) -> dict[str, str]:
    """A message of so many bytes, with characters of several of them."""
    rest = num_bytes - len(b'{"text":"\xc3\xbc"}')
    return {"text": "ü" + "x" * rest}


SIZES = [13, 1000, PART_BYTES_MAX - 1, PART_BYTES_MAX, PART_BYTES_MAX + 1, 3 * PART_BYTES_MAX, MESSAGE_BYTES_MAX]


@pytest.mark.parametrize("num_bytes", SIZES)
def test_a_message_of_any_size_comes_whole(pair: tuple[Channel, Channel], num_bytes: int) -> None:
    message = message_of(num_bytes)
    assert sum(len(part) - 12 for part in packets_of(to_json(message), num_bytes)) == num_bytes
    sender = threading.Thread(target=lambda: [pair[0].send(message, timeout_s=WAIT_S) for _ in range(2)])
    sender.start()
    for _ in range(2):
        assert pair[1].receive(WAIT_S, dict) == (message, [])
    sender.join(WAIT_S)
    assert not sender.is_alive()


def test_values_come_as_they_were(pair: tuple[Channel, Channel]) -> None:
    message = {"": None, "a": [1, -(2**63), 2**63 - 1, 1.5, 1e308, True, {"b": []}], "ü\n\0😀": "\\u\"'"}
    pair[0].send(message)
    pair[0].send({})
    assert pair[1].receive(WAIT_S, dict) == (message, [])
    assert pair[1].receive(WAIT_S, dict) == ({}, [])


@pytest.mark.parametrize("num_bytes", [100, 2 * PART_BYTES_MAX])
def test_descriptors_come_with_their_message_and_close_on_exec(pair: tuple[Channel, Channel], num_bytes: int) -> None:
    before = open_files()
    files = [os.memfd_create(f"file {number}") for number in range(FDS_MAX)]
    for number, fd in enumerate(files):
        os.write(fd, bytes([number]))
    pair[0].send({"without": 1})
    pair[0].send(message_of(num_bytes), files)
    pair[0].send({"without": 2})
    for fd in files:
        os.close(fd)
    assert pair[1].receive(WAIT_S, dict) == ({"without": 1}, [])
    _, fds = pair[1].receive(WAIT_S, dict)
    assert pair[1].receive(WAIT_S, dict) == ({"without": 2}, [])
    assert [os.pread(fd, 2, 0) for fd in fds] == [bytes([number]) for number in range(FDS_MAX)]
    assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in fds)
    for fd in fds:
        os.close(fd)
    assert open_files() <= before


def test_what_is_too_large_is_not_sent(pair: tuple[Channel, Channel]) -> None:
    with pytest.raises(DaemonError, match=r"1,048,577 bytes cannot be sent, the limit is 1,048,576"):
        pair[0].send(message_of(MESSAGE_BYTES_MAX + 1))
    with pytest.raises(ValueError, match="17 descriptors cannot go with a message, the limit is 16"):
        pair[0].send({}, [0] * 17)
    with pytest.raises(DaemonError, match="not UTF-8: rename it"):
        pair[0].send({"store": os.fsdecode(b"/store\xff")})
    with pytest.raises(TypeError, match="unsupported"):
        pair[0].send({"share": object()})
    pair[0].send({"next": True})
    assert pair[1].receive(WAIT_S, dict) == ({"next": True}, [])


FOREIGN_PACKETS = {
    "no message": packet(b""),
    "a cut header": packet(b"{}")[:11],
    "one byte": b"t",
    "another magic": packet(b"{}", magic=b"tsd\0"),
    "an unknown flag": packet(b"{}", flags=2),
    "padding": packet(b"{}")[:6] + b"\1" + packet(b"{}")[7:],
    "fewer bytes than announced": packet(b"{}", 3),
    "more bytes than announced": packet(b"{} ", 2),
    "none announced": packet(b"{}", 0),
    "more to follow that cannot": packet(b"{}", 2, flags=1),
    "a first packet that is not full": packet(b"{", 2, flags=1),
    "a message over the limit": packet(b'"' + b"x" * 999 + b'"'),
    "a message announced over the limit": packet(b"x" * PART_BYTES_MAX, 2**32 - 1, flags=1),
    "a packet over the limit": packet(b"x" * (PART_BYTES_MAX + 1)),
}


@pytest.mark.parametrize("data", FOREIGN_PACKETS.values(), ids=FOREIGN_PACKETS)
def test_what_is_no_packet_is_a_daemon_error_and_its_descriptors_are_closed(raw: Pair, data: bytes) -> None:
    before = open_files()
    raw[1].sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [raw[1].fileno()] * FDS_MAX))])
    with pytest.raises(DaemonError):
        raw[0].receive(WAIT_S, dict)
    assert open_files() <= before


def test_more_descriptors_than_may_come_are_closed(raw: Pair) -> None:
    before = open_files()
    raw[1].sendmsg([packet(b"{}")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [1] * (FDS_MAX + 1)))])
    with pytest.raises(DaemonError, match="more than 16 descriptors"):
        raw[0].receive(WAIT_S, dict)
    assert open_files() <= before


def test_packets_of_two_messages_do_not_make_one() -> None:
    whole = json.dumps(message_of(2 * PART_BYTES_MAX)).encode()
    num_bytes = len(whole)
    first = packet(whole[:PART_BYTES_MAX], num_bytes, flags=1)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [1]))]
    seconds = {
        "a message of its own": (packet(b"{}"), []),
        "another size": (packet(whole[PART_BYTES_MAX : 2 * PART_BYTES_MAX], num_bytes + 1, flags=1), []),
        "descriptors": (packet(whole[PART_BYTES_MAX : 2 * PART_BYTES_MAX], num_bytes, flags=1), rights),
        "the last too early": (packet(whole[PART_BYTES_MAX : 2 * PART_BYTES_MAX], num_bytes), []),
    }
    before = open_files()
    for name, (second, control) in seconds.items():
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with Channel(left) as channel, right:
            right.sendmsg([first], rights)
            right.sendmsg([second], control)
            with pytest.raises(DaemonError):
                pytest.fail(f"{name}: {channel.receive(WAIT_S, dict)}")
    assert open_files() <= before


def test_a_wait_that_ended_goes_on_with_the_same_message() -> None:
    before = open_files()
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    message = message_of(PART_BYTES_MAX + 5)
    first, second = packets_of(to_json(message), 1 << 20)
    with Channel(left) as channel, right:
        right.sendmsg([first], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [1]))])
        for _ in range(2):
            with pytest.raises(TimeoutError):
                channel.receive(0.01, dict)
        right.send(second)
        received, fds = channel.receive(WAIT_S, dict)
        assert received == message
        os.close(*fds)
        right.sendmsg([first], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [1]))])
        with pytest.raises(TimeoutError):
            channel.receive(0, dict)
    assert open_files() <= before, "the descriptor of half a message must close with the channel"


def test_a_peer_that_does_not_read_ends_the_channel_in_time(pair: tuple[Channel, Channel]) -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="did not take a message in time"):
        pair[0].send(message_of(MESSAGE_BYTES_MAX), timeout_s=0.2)
    assert time.monotonic() - started < WAIT_S
    with pytest.raises(ChannelClosed):
        pair[0].send({})


def test_the_end_is_a_closed_channel(pair: tuple[Channel, Channel]) -> None:
    pair[1].send({"last": 1})
    pair[1].close()
    assert pair[0].receive(WAIT_S, dict) == ({"last": 1}, [])
    with pytest.raises(ChannelClosed, match="closed the connection"):
        pair[0].receive(WAIT_S, dict)
    with pytest.raises(ChannelClosed):
        pair[0].send({})


def test_the_peers_last_message_is_read_after_a_send_fails(pair: tuple[Channel, Channel]) -> None:
    pair[0].send({"hello": 1})  # never read: the kernel then reports a reset, before what the other side sent
    pair[1].send({"error": "refused"})
    pair[1].close()
    assert pair[0].receive(WAIT_S, dict) == ({"error": "refused"}, [])
    with pytest.raises(ChannelClosed):
        pair[0].receive(WAIT_S, dict)


def test_shutdown_wakes_who_waits(pair: tuple[Channel, Channel]) -> None:
    outcome: list[Exception] = []

    def wait() -> None:
        try:
            pair[0].receive(WAIT_S, dict)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    pair[0].shutdown()
    thread.join(WAIT_S)
    assert [type(error) for error in outcome] == [ChannelClosed]


def test_messages_of_many_threads_do_not_mix(pair: tuple[Channel, Channel]) -> None:
    messages = [{"thread": number, "text": str(number) * 60_000} for number in range(6)]
    threads = [
        threading.Thread(target=lambda message=message: [pair[0].send(message, timeout_s=WAIT_S) for _ in range(5)])
        for message in messages
    ]
    for thread in threads:
        thread.start()
    received = [pair[1].receive(WAIT_S, dict)[0] for _ in range(30)]
    for thread in threads:
        thread.join(WAIT_S)
    assert all(received.count(message) == 5 for message in messages)
