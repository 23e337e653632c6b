"""The standard health service says whether a server serves, without a token,
and nobody can take it away from the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from support.remote_servers import serving
from support.served import MIB
from support.served import serving as daemon_serving
from support.waiting import eventually

from tierstore.daemon.record import HEALTHY
from tierstore.daemon.remote_lookups import Remote, RemoteLookups
from tierstore.remote import health as remote_health
from tierstore.remote.messages import SERVICE

SERVES, SERVES_NOT, KNOWS_NOT = b"\x08\x01", b"\x08\x02", b"\x08\x03"  # HealthCheckResponse, as protobuf writes it
HEALTH = "/grpc.health.v1.Health"


def named(service: str) -> bytes:
    """A HealthCheckRequest, as protobuf writes it."""
    return b"\x0a" + bytes([len(service)]) + service.encode() if service else b""


def check(channel: grpc.Channel, service: str = "") -> bytes:
    answer: bytes = channel.unary_unary(f"{HEALTH}/Check")(named(service), timeout=20)
    return answer


def watch(channel: grpc.Channel, service: str = "") -> Iterator[bytes]:
    answers: Iterator[bytes] = channel.unary_stream(f"{HEALTH}/Watch")(named(service), timeout=60)
    return answers


@pytest.mark.parametrize("service", ["", SERVICE, "grpc.health.v1.Health"])
def test_a_server_that_serves_says_so_without_a_token(built: Path, tmp_path: Path, service: str) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    with serving(built, token_file=token) as server, grpc.insecure_channel(server.address) as channel:
        assert check(channel, service) == SERVES
        assert next(watch(channel, service)) == SERVES


def test_a_service_that_there_is_not_is_not_found_and_can_be_watched(built: Path) -> None:
    with serving(built) as server, grpc.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            check(channel, "other")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert SERVICE in caught.value.details()
        assert next(watch(channel, "other")) == KNOWS_NOT


def test_watchers_are_told_of_every_change_and_of_the_end(built: Path) -> None:
    healthy = threading.Event()
    with serving(built, is_healthy=healthy.is_set) as server, grpc.insecure_channel(server.address) as channel:
        told = watch(channel)
        assert next(told) == SERVES_NOT
        assert check(channel) == SERVES_NOT
        healthy.set()
        assert next(told) == SERVES
        closing = threading.Thread(target=server.close, args=(20,))
        started = time.monotonic()
        closing.start()
        assert list(told) == [SERVES_NOT]
        closing.join(20)
        assert time.monotonic() - started < 10  # nobody waits for watchers


def test_watchers_are_limited_and_make_room_when_they_go(built: Path) -> None:
    with serving(built) as server, grpc.insecure_channel(server.address) as channel:
        watchers = [watch(channel) for _ in range(remote_health.WATCHERS_OF_PEER_MAX)]
        assert [next(each) for each in watchers] == [SERVES] * len(watchers)
        with pytest.raises(grpc.RpcError, match="4 of one host; end some, or call Check"):
            next(watch(channel))
        watchers[0].cancel()  # type: ignore[attr-defined]
        eventually(lambda: not server._health._watchers or server._health._watchers.total() < len(watchers))
        assert next(watch(channel)) == SERVES


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\xff", bytes(5000)], ids=["cut", "longer", "long"])
def test_what_is_no_request_is_refused(built: Path, data: bytes) -> None:
    with serving(built) as server, grpc.insecure_channel(server.address) as channel:
        for make, method in ((channel.unary_unary, "Check"), (channel.unary_stream, "Watch")):
            with pytest.raises(grpc.RpcError) as caught:
                list(make(f"{HEALTH}/{method}")(data, timeout=20))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_checks_of_one_host_are_limited_in_rate(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_health, "REQUESTS_A_SECOND_MAX", 2.0)
    with serving(built) as server, grpc.insecure_channel(server.address) as channel:
        assert [check(channel), check(channel)] == [SERVES] * 2
        with pytest.raises(grpc.RpcError, match=r"more than 2 requests a second from 127\.0\.0\.1"):
            check(channel)


def test_the_daemon_says_whether_it_serves(built: Path, tmp_path: Path) -> None:
    with daemon_serving(built, tmp_path / "socket", 16 * MIB) as daemon:
        remote = Remote("127.0.0.1:0", None, None, None)
        daemon._remote = RemoteLookups(remote, daemon.path, "auto", lambda: daemon._state in HEALTHY)
        assert daemon.remote_address is not None
        with grpc.insecure_channel(daemon.remote_address) as channel:
            assert check(channel) == SERVES
            daemon._state = "draining"
            assert check(channel) == SERVES_NOT
