"""One daemon at a time listens at a path, for its own user, root, and who is named;
whatever else is there stays as it was."""

from __future__ import annotations

import os
import queue
import signal
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.daemon_peers import (
    NOBODY,
    NotingHandler,
    ServingChild,
    as_root,
    connect,
    in_child,
    noted_warnings,
)
from support.held import open_files
from support.waiting import WAIT_S, eventually

from tierstore.daemon.daemon import Daemon
from tierstore.daemon.server import SocketServer
from tierstore.errors import ConfigError, DaemonError
from tierstore.ipc import client_socket
from tierstore.ipc.client_socket import ask, dial
from tierstore.ipc.messages import from_json
from tierstore.ipc.protocol import ChannelClosed
from tierstore.ipc.socket_file import starting_state
from tierstore.tools.cli import run


@pytest.fixture
def handler() -> NotingHandler:
    return NotingHandler()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "socket"


@pytest.fixture
def serving(path: Path, handler: NotingHandler) -> Iterator[SocketServer]:
    with SocketServer(path, handler, clients_max=3) as opened:
        opened.start()
        yield opened


@pytest.fixture
def warnings() -> Iterator[queue.Queue[str]]:
    with noted_warnings() as lines:
        yield lines


@pytest.fixture
def open_path() -> Iterator[Path]:
    """The path of a socket in a folder that all users may enter and write to."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder) / "socket"


@pytest.mark.parametrize("umask", [0, 0o022, 0o277])
def test_the_socket_is_private_whatever_the_umask(path: Path, handler: NotingHandler, umask: int) -> None:
    before = os.umask(umask)
    try:
        for users, mode in (((), 0o600), ((os.geteuid(), 0), 0o600), ((NOBODY,), 0o666)):
            with SocketServer(path, handler, allowed_users=users):
                assert stat.S_IMODE(path.stat().st_mode) == mode
                assert stat.S_IMODE(Path(f"{path}.lock").stat().st_mode) & 0o077 == 0
    finally:
        os.umask(before)


def test_the_socket_is_private_before_it_is_opened_to_others(
    path: Path, handler: NotingHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes, change, before = [], os.chmod, os.umask(0)

    def noting(file: str, mode: int) -> None:
        modes.append(stat.S_IMODE(path.stat().st_mode))
        change(file, mode)

    monkeypatch.setattr(os, "chmod", noting)
    try:
        with SocketServer(path, handler, allowed_users=[NOBODY]):
            assert modes == [0o600]
    finally:
        os.umask(before)


@as_root
def test_another_user_is_refused_by_name(open_path: Path, handler: NotingHandler, warnings: queue.Queue[str]) -> None:
    with SocketServer(open_path, handler) as opened:
        opened.start()
        said = in_child(lambda: str(dial(open_path)), NOBODY)
        assert said.startswith("DaemonError: ")
        assert f"permission denied to user {NOBODY}: restart the daemon with --allow-user {NOBODY}" in said
        open_path.chmod(0o666)  # the file's mode is only the first of two checks
        for act in (lambda: str(dial(open_path)), lambda: str(ask(open_path, {"do": "stat"}, dict))):
            said = in_child(act, NOBODY)
            assert said.startswith(f"DaemonError: user {NOBODY} (process ")
            assert said.endswith(f"users 0 may: restart it with --allow-user {NOBODY}, or connect as one of them")
            assert f"user {NOBODY}" in warnings.get(timeout=WAIT_S)
        assert opened.info().refused == 2
    assert handler.calls.empty()


@as_root
def test_a_named_user_may_attach_and_not_administer(open_path: Path, handler: NotingHandler) -> None:
    with SocketServer(open_path, handler, allowed_users=[NOBODY]) as opened:
        opened.start()
        assert in_child(lambda: str(from_json(dial(open_path)[1], dict)["version"]), NOBODY) == "1"
        attached, _ = handler.next("attach")
        assert (attached.uid, attached.gid) == (NOBODY, NOBODY)
        handler.next("detach")
        said = in_child(lambda: str(ask(open_path, {"do": "stat"}, dict)), NOBODY)
        assert f"user {NOBODY} may attach to the daemon at {open_path} and not administer it" in said
        assert in_child(lambda: str(dial(open_path)), NOBODY - 1).startswith(f"DaemonError: user {NOBODY - 1} ")


@as_root
def test_a_daemon_of_another_user_is_not_trusted_unless_named(open_path: Path) -> None:
    child = ServingChild(open_path, NOBODY)
    try:
        with pytest.raises(
            DaemonError, match=rf"process {child.pid}\) belongs to user {NOBODY}, only daemons of users 0 are"
        ):
            dial(open_path)
        assert ask(open_path, {"do": "stat"}, dict, trusted_uids=[NOBODY])["ok"], "root may administer every daemon"
    finally:
        child.kill()


def test_a_second_daemon_is_refused_and_the_first_unharmed(
    path: Path, handler: NotingHandler, serving: SocketServer
) -> None:
    with pytest.raises(DaemonError, match=rf"{path}: a daemon \(process {os.getpid()}\) serves there already"):
        SocketServer(path, handler)
    soft, hard = path.with_name("soft"), path.with_name("hard")
    soft.symlink_to(path)
    with pytest.raises(ConfigError, match="a file that is no socket"):
        SocketServer(soft, handler)
    os.link(path, hard)
    with pytest.raises(DaemonError, match="another program listens there"):
        SocketServer(hard, handler)
    assert ask(path, {"do": "stat"}, dict)["ok"]
    assert serving.close()
    assert sorted(file.name for file in path.parent.iterdir()) == ["hard", "soft"]


def test_a_killed_daemons_socket_is_replaced(path: Path, handler: NotingHandler) -> None:
    child = ServingChild(path)
    channel = connect(path)
    child.kill()
    with pytest.raises(ChannelClosed):
        channel.receive(WAIT_S, dict)
    channel.close()
    with pytest.raises(DaemonError, match=r"nothing listens there, its daemon was killed; start it: tierstore serve"):
        dial(path)
    with SocketServer(path, handler) as opened:
        opened.start()
        assert ask(path, {"do": "stat"}, dict)["ok"]
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("looks_before", [0, 1])
def test_a_stale_socket_that_a_starting_daemon_removes_meanwhile_is_a_daemon_that_is_not_there(
    path: Path, monkeypatch: pytest.MonkeyPatch, looks_before: int
) -> None:
    ServingChild(path).kill()
    real_stat, looks = os.stat, []

    def removed_after(file: str, **options: bool) -> os.stat_result:
        if len(looks) == looks_before:
            path.unlink()
        looks.append(file)
        return real_stat(file, **options)

    monkeypatch.setattr(client_socket.os, "stat", removed_after)
    with pytest.raises(DaemonError, match="nothing listens there"):
        dial(path)


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("turn", range(5))
def test_one_of_several_daemons_started_at_once_serves_the_socket(path: Path, stale: bool, turn: int) -> None:
    if stale:
        ServingChild(path).kill()
    start, won = os.pipe(), os.pipe()
    children = []
    for _ in range(4 + turn):
        child = os.fork()
        if not child:
            try:
                os.close(start[1])
                os.read(start[0], 1)  # until all are there
                opened = SocketServer(path, NotingHandler())
                opened.start()
                os.write(won[1], b"1")
                signal.pause()
            except DaemonError as error:
                os.write(won[1], b"0" if "serves there already" in str(error) else b"x")
            finally:
                os._exit(0)
        children.append(child)
    os.close(start[1])
    outcomes = b"".join(os.read(won[0], 1) for _ in children)
    assert sorted(outcomes) == sorted(b"1" + b"0" * (len(children) - 1))
    assert ask(path, {"do": "stat"}, dict)["ok"]
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    for fd in (start[0], *won):
        os.close(fd)


def test_daemons_that_come_and_go_never_serve_side_by_side(path: Path) -> None:
    def come_and_go() -> str:
        served = 0
        while served < 30:
            try:
                opened = SocketServer(path, NotingHandler())
            except DaemonError:
                continue
            os.close(os.open(f"{path}.busy", os.O_CREAT | os.O_EXCL))  # fails where another serves
            os.unlink(f"{path}.busy")
            served += opened.close()
        return "alone"

    said: list[str] = []
    threads = [threading.Thread(target=lambda: said.append(in_child(come_and_go))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * WAIT_S)
    assert said == ["alone"] * 4
    assert not list(path.parent.iterdir())


def test_a_path_that_cannot_be_a_sockets_is_refused(tmp_path: Path, handler: NotingHandler) -> None:
    before = open_files()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    long = os.fspath(tmp_path / "x").ljust(108, "x")
    refused = {
        os.fspath(tmp_path / "file"): "a file that is no socket; remove it",
        os.fspath(tmp_path / "link"): "a file that is no socket",
        os.fspath(tmp_path): "a file that is no socket",
        os.fspath(tmp_path / "none" / "socket"): r"there is no folder .*/none; make it: mkdir -p -m 700 ",
        long: "a path of 108 bytes, a socket's has 107 at most",
        "": "no path of a socket",
        "\0abstract": "no path of a socket",
    }
    for path, says in refused.items():
        with pytest.raises(ConfigError, match=says):
            SocketServer(path, handler)
    with pytest.raises(ConfigError, match="a path of 108 bytes"):
        dial(long)
    with SocketServer(long[:-1], handler) as opened:
        opened.start()
        assert ask(long[:-1], {"do": "stat"}, dict)["ok"]
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "link"]
    eventually(lambda: open_files() <= before)  # the connection's thread ends by itself


def test_another_programs_socket_is_left_alone(path: Path, handler: NotingHandler) -> None:
    for kind, says in (
        (socket.SOCK_STREAM, "it is another program's socket"),
        (socket.SOCK_SEQPACKET, "does not answer within 0.05 s; it may be stopped"),
    ):
        with socket.socket(socket.AF_UNIX, kind) as other:
            other.bind(os.fspath(path))
            other.listen()
            with pytest.raises(DaemonError, match="another program listens there"):
                SocketServer(path, handler)
            with pytest.raises(DaemonError, match=says):
                dial(path, timeout_s=0.05)
        path.unlink()


def test_closing_removes_only_our_own_file(path: Path, handler: NotingHandler) -> None:
    opened = SocketServer(path, handler)
    opened.start()
    path.unlink()
    path.write_text("another's")
    assert opened.close()
    assert path.read_text() == "another's"


def test_dialling_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, says in (
        (tmp_path / "none", "there is no socket; start a daemon: tierstore serve STORE --socket"),
        (Path("nowhere.example:7070"), "a server by gRPC is grpc://nowhere.example:7070"),
        (tmp_path / "file" / "socket", "a folder of this path is a file"),
        (tmp_path / "file", "that is not a socket"),
    ):
        with pytest.raises(DaemonError, match=says):
            dial(path)
        with pytest.raises(DaemonError, match=says):
            ask(path, {"do": "stat"}, dict)


def test_a_daemon_that_takes_no_connection_is_given_up_in_time(
    path: Path, handler: NotingHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_socket, "RETRY_S", 0.001)
    with SocketServer(path, handler):  # which has not started
        with pytest.raises(DaemonError, match=r"does not answer within 0.05 s; it may be stopped"):
            dial(path, timeout_s=0.05)
        waiting = []
        for _ in range(1000):  # as many as may wait
            waiting.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK))
            if waiting[-1].connect_ex(os.fspath(path)):
                break
        with pytest.raises(DaemonError, match=r"takes no connection within 0.05 s"):
            dial(path, timeout_s=0.05)
        for sock in waiting:
            sock.close()


def test_a_starting_daemon_reports_its_progress(path: Path, handler: NotingHandler) -> None:
    with SocketServer(path, handler, clients_max=3) as server:
        server.note_starting("warming, 7 %")
        assert starting_state(path) == "warming, 7 %"
        with pytest.raises(DaemonError, match=r"within 0.05 s; it is starting \(warming, 7 %\): ask again"):
            ask(path, {"do": "stat"}, dict, timeout_s=0.05)
        with pytest.raises(DaemonError, match=f"process {os.getpid()}\\) serves there already"):
            SocketServer(path, handler, clients_max=3)
        server.note_starting("")
        assert starting_state(path) == ""
        server.start()
        assert ask(path, {"do": "stat"}, dict, timeout_s=WAIT_S)
    assert starting_state(path) == ""


def test_stat_says_how_far_warming_is(
    placed: Path, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tierstore.tools.stat.command.STARTING_S_MAX", 0.05)
    said = []

    def look(_done: int, _total: int) -> None:
        assert run(["stat", str(path)]) == 1
        said.append(capsys.readouterr().err)

    Daemon(placed, path, 900 << 10, on_progress=look).close()
    assert said
    assert all("it is starting (warming, " in each for each in said)
