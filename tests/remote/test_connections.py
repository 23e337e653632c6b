"""Connections that make no admitted call end in time, and keep nobody else out; those that did stay."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from support.held import open_files
from support.remote_servers import serving, serving_process
from support.stores import Model, random_keys
from support.waiting import WAIT_S, eventually

from tierstore.remote import connections as remote_connections
from tierstore.remote import server as remote_server
from tierstore.remote.client import connect_remote
from tierstore.remote.connections import CONNECTIONS_MAX, STRANGER_S, STRANGERS_MAX, end_of, peer_network, to_end
from tierstore.remote.limits import InFlight, Refusal
from tierstore.remote.server import RemoteServer

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("peer", "end", "network"),
    [
        ("ipv4:10.0.0.1:4711", ("10.0.0.1", 4711), "10.0.0.1"),
        ("ipv6:%5B::1%5D:4711", ("::1", 4711), "::/64"),
        ("ipv6:[2001:db8:1:2:3::4]:5", ("2001:db8:1:2:3::4", 5), "2001:db8:1:2::/64"),
        ("ipv6:%5B::ffff:10.0.0.1%5D:5", ("::ffff:10.0.0.1", 5), "10.0.0.1"),
        ("unix:", ("", 0), ""),
    ],
)
def test_what_grpc_calls_a_peer_is_an_address_and_is_counted_by_its_network(
    peer: str, end: tuple[str, int], network: str
) -> None:
    assert end_of(peer) == end
    assert peer_network(peer) == network


def test_a_connection_without_a_call_in_time_is_closed() -> None:
    ended = to_end({("10.0.0.1", 1): 0.0, ("10.0.0.1", 2): 5.0}, 2, STRANGER_S)
    assert list(ended) == [("10.0.0.1", 1)]
    assert "no admitted call within 20 s" in ended["10.0.0.1", 1]


def test_connections_over_a_networks_limit_close_its_oldest_only() -> None:
    strangers = {("10.0.0.1", port): float(port) for port in range(STRANGERS_MAX + 3)}
    strangers |= {("10.0.0.2", 9): 0.0}
    ended = to_end(strangers, len(strangers), STRANGERS_MAX / 2)
    assert {end for end, why in ended.items() if "more than 32" in why} == {("10.0.0.1", port) for port in range(3)}


def test_connections_over_the_limit_are_closed_in_the_networks_with_the_most() -> None:
    strangers = {(f"10.0.0.{host}", port): 1.0 for host in range(20) for port in range(20)}
    strangers |= {("10.0.1.1", 1): 0.5}
    ended = to_end(strangers, CONNECTIONS_MAX + 100, 1.0)
    assert len(ended) == 100
    assert ("10.0.1.1", 1) not in ended
    assert to_end({("10.0.0.1", 1): 1.0}, 10 * CONNECTIONS_MAX, 1.0) != {}  # those that were admitted stay


@pytest.fixture
def token(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text("0123456789abcdef")
    file.chmod(0o600)
    return file


@contextlib.contextmanager
def opened(address: str, count: int, source: str = "127.0.0.2") -> Iterator[list[socket.socket]]:
    """Connections of another host of loopback, that say what HTTP/2 begins with and then nothing."""
    host, port = address.rsplit(":", 1)
    with contextlib.ExitStack() as stack:
        peers = []
        for _ in range(count):
            peer = stack.enter_context(socket.create_connection((host, int(port)), WAIT_S, source_address=(source, 0)))
            with contextlib.suppress(ConnectionError):
                peer.sendall(PREFACE)
            peers.append(peer)
        yield peers


def has_ended(peer: socket.socket, within_s: float = WAIT_S) -> bool:
    """Whether the other side ends a connection in time."""
    deadline = time.monotonic() + within_s
    with contextlib.suppress(ConnectionError):
        while select.select([peer], [], [], max(0.0, deadline - time.monotonic()))[0]:
            if not peer.recv(65536):
                return True
        return False
    return True


def test_idle_connections_without_the_token_end_and_a_client_with_it_stays(
    built: Path, model: Model, token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_connections, "LOOK_S", 0.05)
    monkeypatch.setattr(remote_connections, "STRANGER_S", 3.0)
    keys = random_keys(np.random.default_rng(1), 5)
    with serving(built, token_file=token) as server, grpc.insecure_channel(server.address) as rejected:
        store = connect_remote(f"grpc://{server.address}", token_file=token)
        states: list[Any] = []
        rejected.subscribe(states.append, try_to_connect=True)
        with store, opened(server.address, 5) as peers:
            with pytest.raises(grpc.RpcError):  # it calls, and is not admitted
                rejected.unary_unary("/tierstore.v1.Lookups/Describe")(b"", timeout=20)
            assert all(has_ended(peer) for peer in peers)
            eventually(lambda: grpc.ChannelConnectivity.IDLE in states[1:])
            (kept,) = server._connections._admitted
            np.testing.assert_array_equal(store["layers.1"].lookup(keys), model.expected("layers.1", keys))
            assert server._connections._admitted == {kept}  # its connection was not made anew


def test_hundreds_of_idle_connections_keep_no_new_client_out(built: Path, model: Model) -> None:
    keys = random_keys(np.random.default_rng(2), 5)
    with serving_process(built) as address, opened(address, 400):
        store = connect_remote(f"grpc://{address}", timeout_s=WAIT_S)
        with store:
            np.testing.assert_array_equal(store["layers.1"].lookup(keys), model.expected("layers.1", keys))


def test_a_host_keeps_its_newest_connections_only(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_connections, "STRANGERS_MAX", 4)
    monkeypatch.setattr(remote_connections, "LOOK_S", 0.05)
    with serving(built) as server, opened(server.address, 4) as old:
        eventually(lambda: len(server._connections._seen) == 4)  # so that these are older
        with opened(server.address, 4) as new, opened(server.address, 1, "127.0.0.3") as other:
            assert all(has_ended(peer) for peer in old)
            assert not any(has_ended(peer, 0.2) for peer in (*new, *other))


def test_a_watcher_of_health_may_stay(built: Path, token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_connections, "LOOK_S", 0.05)
    monkeypatch.setattr(remote_connections, "STRANGER_S", 3.0)
    with serving(built, token_file=token) as server, grpc.insecure_channel(server.address) as channel:
        told = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=WAIT_S)
        assert next(told) == b"\x08\x01"
        with opened(server.address, 1) as (idle,):
            assert has_ended(idle)
        assert told.is_active()


def test_a_client_whose_idle_connection_ended_goes_on(
    built: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_server, "IDLE_S", 1)
    monkeypatch.setattr(remote_connections, "LOOK_S", 0.05)
    keys = random_keys(np.random.default_rng(3), 5)
    with serving(built) as server, connect_remote(f"grpc://{server.address}") as store:
        eventually(lambda: server._connections._admitted)
        eventually(lambda: not server._connections._seen)  # grpc ended it
        np.testing.assert_array_equal(store["layers.1"].lookup(keys), model.expected("layers.1", keys))


def test_watching_connections_leaves_no_descriptor_and_no_thread(built: Path) -> None:
    with serving(built) as server, connect_remote(f"grpc://{server.address}") as store:
        store["layers.1"].lookup(np.ones((1, 3), dtype=np.int64))
        connections = server._connections
        connections._look(time.monotonic())
        before = open_files()
        for _ in range(50):
            connections._look(time.monotonic())
        assert open_files() <= before
    assert not connections._thread.is_alive()


def test_one_host_cannot_take_all_calls_or_all_bytes() -> None:
    limits = InFlight(calls_max=4, bytes_max=100)
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(limits.call("a"))
        with pytest.raises(Refusal, match="3 calls of a are under way, at most 3 of one host may be") as caught:
            stack.enter_context(limits.call("a"))
        assert caught.value.retry
        stack.enter_context(limits.call("b"))
        stack.enter_context(limits.holding(60, "a"))
        with pytest.raises(Refusal, match="20 bytes, with the 60 that other calls of a hold, are more than the 75"):
            stack.enter_context(limits.holding(20, "a"))
        stack.enter_context(limits.holding(40, "b"))
    assert limits.num_calls == 0
    with limits.holding(100, "a"):  # alone, it may
        pass


def pinged(server: RemoteServer, every_s: float, for_s: float) -> list[Any]:
    """States of a real client's connection that pings without calls, after its first call."""
    options = [
        ("grpc.keepalive_time_ms", int(every_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),  # no limit, as clients in Go have none
    ]
    with grpc.insecure_channel(server.address, options) as channel:
        channel.unary_unary("/tierstore.v1.Lookups/Describe")(b"", timeout=20)
        states: list[Any] = []
        channel.subscribe(states.append)
        time.sleep(for_s)
        return states


def test_a_client_may_ping_twice_as_seldom_as_the_server_allows(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_server, "PING_S_MIN", 0.2)
    with serving(built) as server:
        assert pinged(server, every_s=0.4, for_s=5) == [grpc.ChannelConnectivity.READY]  # two too many would end it


@pytest.mark.skipif(os.environ.get("TIERSTORE_SOAK") != "1", reason="takes a minute: TIERSTORE_SOAK=1")
def test_a_client_that_pings_every_ten_seconds_is_not_turned_away(built: Path) -> None:
    with serving(built) as server:
        assert pinged(server, every_s=10, for_s=65) == [grpc.ChannelConnectivity.READY]


def test_pings_every_ten_seconds_are_within_what_the_server_allows() -> None:
    assert remote_server.PING_S_MIN <= 10 / 2  # a network delays one ping more than the next
