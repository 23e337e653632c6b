"""A peer's queue: what goes out, in which order, and since when nothing did, by a clock that the test holds."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from support.held import open_files
from support.waiting import WAIT_S

from tierstore.daemon.admin import AdminRequests
from tierstore.daemon.peer import Peer, failure_of
from tierstore.errors import BudgetError, DaemonError
from tierstore.ipc.channel import Channel
from tierstore.ipc.messages import Failure, from_json
from tierstore.ipc.peer_log import PeerLog
from tierstore.ipc.protocol import ChannelClosed

LARGE = {"text": "x" * 900_000}  # more than the kernel takes for one socket


@pytest.fixture
def ends() -> Iterator[tuple[Peer, Channel]]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer = Peer(left, lambda: None)
    with Channel(right) as channel:
        yield peer, channel
        peer.close(None)


def read_packets(channel: Channel, count: int) -> None:
    with socket.socket(fileno=os.dup(channel.fileno())) as sock:
        for _ in range(count):
            sock.recv(1 << 16)


def test_a_peer_is_blocked_only_while_it_reads_nothing(ends: tuple[Peer, Channel]) -> None:
    peer, channel = ends
    peer.answer(LARGE, ())
    peer.send({})
    for now, read, since in ((1.0, 0, 1.0), (2.0, 0, 1.0), (3.0, 6, 3.0), (4.0, 0, 3.0), (5.0, 6, 5.0)):
        read_packets(channel, read)
        peer.flush(now)
        assert peer.blocked_since == since
    while peer.blocked_since is not None:
        read_packets(channel, 1)
        peer.flush(6.0)
    peer.flush(7.0)
    assert peer.blocked_since is None


def test_a_peer_that_reads_a_whole_message_is_not_blocked_since_it_began(ends: tuple[Peer, Channel]) -> None:
    peer, channel = ends
    peer.answer(LARGE, ())
    peer.flush(1.0)
    for _ in range(3):
        peer.send(LARGE)
    for now in (2.0, 3.0):
        while True:  # until a message is out, and the next begun
            waiting = len(peer._queue)
            read_packets(channel, 1)
            peer.flush(now)
            if len(peer._queue) < waiting:
                break
        assert peer.blocked_since == now


def test_queued_messages_are_sent_before_the_error_that_ends_a_connection(ends: tuple[Peer, Channel]) -> None:
    peer, channel = ends
    peer.send({"number": 1})
    peer.answer({"number": 0}, ())
    peer.close({"bye": "now"})
    assert [channel.receive(WAIT_S, dict)[0] for _ in range(3)] == [{"number": 0}, {"number": 1}, {"bye": "now"}]
    with pytest.raises(ChannelClosed):
        channel.receive(WAIT_S, dict)


def test_last_words_do_not_end_up_in_half_a_message(
    ends: tuple[Peer, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    peer, channel = ends
    peer.answer(LARGE, ())
    peer.flush(1.0)
    assert peer.blocked_since == 1.0
    read_packets(channel, 4)  # room for them, in the moment between the two

    monkeypatch.setattr(peer, "flush", lambda _: None)
    peer.close({"bye": "now"})
    with socket.socket(fileno=os.dup(channel.fileno())) as sock:
        while data := sock.recv(1 << 16):
            assert b"bye" not in data


def test_a_descriptor_that_is_none_is_an_error_and_leaves_nothing(ends: tuple[Peer, Channel]) -> None:
    before = open_files()
    with pytest.raises(DaemonError, match="descriptor 99999 cannot be sent: Bad file descriptor"):
        ends[0].send({}, [ends[1].fileno(), 99999])
    with pytest.raises(ValueError, match="17 descriptors cannot go with a message, the limit is 16"):
        ends[0].send({}, [ends[1].fileno()] * 17)
    assert open_files() <= before


def test_errors_are_sent_by_class_and_always_as_text() -> None:
    assert failure_of(BudgetError("1 GiB")) == Failure("BudgetError", "1 GiB")
    assert failure_of("why") == Failure("DaemonError", "why")
    path = os.fsdecode(b"/store\xff")  # a name that is not text must not keep the error from being sent
    assert failure_of(DaemonError(path)) == Failure("DaemonError", "/store?")


def test_a_request_that_took_long_leaves_time_for_the_next(ends: tuple[Peer, Channel]) -> None:
    peer, channel = ends
    peer.answer({}, ())
    peer.active_at = -1000.0  # when the request came
    requests = AdminRequests(lambda _, request: from_json(request, dict), PeerLog())
    requests.begin(peer, b'{"do":"swap"}')
    for thread in requests.threads():
        thread.join(WAIT_S)
    peer.flush(0.0)
    assert [channel.receive(WAIT_S, dict)[0] for _ in range(2)] == [{}, {"do": "swap"}]
    assert peer.active_at > 0
    assert not peer.is_answering
