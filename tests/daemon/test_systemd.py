"""The service manager is told what the daemon does, by the datagrams that systemd's protocol has;
no manager ever stops it."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tierstore.daemon import systemd as notify
from tierstore.daemon.systemd import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A service manager's socket, and what NOTIFY_SOCKET says of it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.settimeout(10)
        if request.param == "path":
            variable = str(tmp_path / "notify")
            listener.bind(variable)
        else:
            variable = f"@tierstore-test-{os.getpid()}-{tmp_path.name}"
            listener.bind("\0" + variable[1:])
        yield listener, variable


def test_each_call_is_one_datagram_of_the_protocol(manager: tuple[socket.socket, str]) -> None:
    listener, variable = manager
    notifier = Notifier({"NOTIFY_SOCKET": variable})
    notifier.status("warming: 3 of 8 GiB")
    notifier.ready("serving v41.tier")
    notifier.stopping("asked to")
    assert [listener.recv(4096) for _ in range(3)] == [
        b"STATUS=warming: 3 of 8 GiB",
        b"READY=1\nSTATUS=serving v41.tier",
        b"STOPPING=1\nSTATUS=asked to",
    ]


def test_reloading_carries_the_monotonic_time_in_microseconds(manager: tuple[socket.socket, str]) -> None:
    listener, variable = manager
    before = time.monotonic_ns() // 1000
    Notifier({"NOTIFY_SOCKET": variable}).reloading("version 2")
    first, second, third = listener.recv(4096).split(b"\n")
    assert (first, third) == (b"RELOADING=1", b"STATUS=version 2")
    name, _, value = second.partition(b"=")
    assert name == b"MONOTONIC_USEC"
    assert before <= int(value) <= time.monotonic_ns() // 1000


def test_a_status_cannot_carry_another_assignment(manager: tuple[socket.socket, str]) -> None:
    listener, variable = manager
    Notifier({"NOTIFY_SOCKET": variable}).status("a\nMAINPID=1\r\nb \udcff")
    assert listener.recv(4096) == b"STATUS=a MAINPID=1 b \\udcff"


def test_the_watchdog_is_fed_twice_as_often_as_it_bites(manager: tuple[socket.socket, str]) -> None:
    listener, variable = manager
    notifier = Notifier({"NOTIFY_SOCKET": variable, "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())})
    assert notifier.watchdog_s == 15.0
    notifier.watchdog()
    assert listener.recv(4096) == b"WATCHDOG=1"


@pytest.mark.parametrize(
    "variables",
    [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "9", "WATCHDOG_PID": "1"}],
    ids=str,
)
def test_a_daemon_without_a_watchdog_sends_no_heartbeat(
    manager: tuple[socket.socket, str], variables: dict[str, str]
) -> None:
    listener, variable = manager
    notifier = Notifier({"NOTIFY_SOCKET": variable, **variables})
    assert notifier.watchdog_s is None
    notifier.watchdog()
    notifier.status("next")
    assert listener.recv(4096) == b"STATUS=next"


@pytest.mark.parametrize("variables", [{}, {"NOTIFY_SOCKET": ""}, {"WATCHDOG_USEC": "30000000"}], ids=str)
def test_without_a_manager_nothing_is_sent(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a socket was made")

    monkeypatch.setattr(notify.socket, "socket", fail)
    notifier = Notifier(variables)
    for tell in (notifier.ready, notifier.status, notifier.reloading, notifier.stopping):
        tell("x")
    notifier.watchdog()
    assert notifier.watchdog_s is None


@pytest.mark.parametrize("variable", ["/nowhere/notify", "/" + "x" * 200, "@" + "y" * 200], ids=lambda v: v[:12])
def test_a_manager_that_takes_nothing_is_logged_once_and_harms_nothing(
    variable: str, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": variable})
    notifier.ready("x")
    notifier.status("y")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "does not take notifications" in record.message


def test_a_manager_that_reads_nothing_holds_up_no_one_for_long(
    manager: tuple[socket.socket, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notify, "SEND_S_MAX", 0.01)
    notifier = Notifier({"NOTIFY_SOCKET": manager[1]})
    for _ in range(2000):  # more than any queue of datagrams holds
        notifier.status("x")
        if caplog.records:
            break
    assert "timed out" in caplog.text


def test_an_address_of_another_kind_is_named_and_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    Notifier({"NOTIFY_SOCKET": "vsock:2:1234"}).ready("x")
    assert "NOTIFY_SOCKET=vsock:2:1234 is neither" in caplog.text


def test_the_environment_is_read_when_a_notifier_is_made(
    manager: tuple[socket.socket, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager[1])
    Notifier().ready("x")
    assert manager[0].recv(4096) == b"READY=1\nSTATUS=x"
