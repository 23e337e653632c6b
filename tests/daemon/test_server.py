"""The socket's server lets in whom it should, serves them side by side, and says by name why it does not."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemon_peers import WAIT_S, NotingHandler, open_descriptors

from tierstore.daemon.client_socket import ask, dial
from tierstore.daemon.protocol import PROTOCOL_VERSION, Channel, ChannelClosed
from tierstore.daemon.server import SocketServer
from tierstore.errors import BudgetError, DaemonError
from tierstore.version import VERSION

NOBODY = 65534
HELLO = {"hello": PROTOCOL_VERSION, "role": "client", "pid": 1, "release": "0"}
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")


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


def connect(path: Path, role: str = "client") -> Channel:
    """An attached client, or administrator, that has read what came first."""
    channel, _, fds = dial(path, role, WAIT_S)  # type: ignore[arg-type]
    for fd in fds:
        os.close(fd)
    if role == "client":
        assert channel.receive(WAIT_S) == ({"early": True}, [])
    return channel


def bare(path: Path) -> Channel:
    """A connection that has not said hello."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(WAIT_S)
    sock.connect(os.fspath(path))
    return Channel(sock)


def last_words(channel: Channel) -> str:
    """Why a channel was ended, and that it was."""
    message, _ = channel.receive(WAIT_S)
    assert message["error"] == "DaemonError"
    with pytest.raises(ChannelClosed):
        channel.receive(WAIT_S)
    channel.close()
    return str(message["message"])


def as_nobody(act: Callable[[], str]) -> str:
    """Returns what `act` returns in a process of the user nobody."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:  # whatever happens, the child must not go on with the tests
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.write(write, act().encode())
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.usefixtures("serving")
def test_a_client_attaches_sends_is_sent_and_is_detached(path: Path, handler: NotingHandler) -> None:
    channel, answer, fds = dial(path)
    assert (answer, fds) == ({"hello": PROTOCOL_VERSION, "release": VERSION, "pid": os.getpid(), "version": 1}, [])
    attached, _ = handler.next("attach")
    assert (attached.pid, attached.uid, attached.gid) == (os.getpid(), os.geteuid(), os.getegid())
    assert (attached.role, attached.release) == ("client", VERSION)
    assert channel.receive(WAIT_S) == ({"early": True}, []), "what is sent while attaching follows the answer"
    channel.send({"echo": [1, "ü"]})
    assert handler.next("message") == (attached, {"echo": [1, "ü"]})
    assert channel.receive(WAIT_S) == ({"echo": [1, "ü"]}, [])
    attached.send({"text": "x" * 900_000})
    assert len(channel.receive(WAIT_S)[0]["text"]) == 900_000
    channel.close()
    assert handler.next("detach") == (attached, None)
    attached.send({"into": "the void"})
    assert handler.calls.empty()


@pytest.mark.usefixtures("serving")
def test_descriptors_go_to_the_client_and_stay_with_the_handler(path: Path, handler: NotingHandler) -> None:
    handler.fds = [os.memfd_create("a"), os.memfd_create("b")]
    before = open_descriptors()
    channel, _, fds = dial(path)
    attached, _ = handler.next("attach")
    os.write(handler.fds[1], b"b")
    assert [os.pread(fd, 9, 0) for fd in fds] == [b"", b"b"]
    attached.send({"more": 1}, handler.fds[1:])
    assert channel.receive(WAIT_S) == ({"early": True}, [])
    _, more = channel.receive(WAIT_S)
    assert os.pread(more[0], 9, 0) == b"b"
    for fd in (*fds, *more):
        os.close(fd)
    channel.close()
    handler.next("detach")
    assert open_descriptors() == before
    for fd in handler.fds:
        os.close(fd)


@pytest.mark.usefixtures("serving")
def test_an_administrator_is_answered_and_errors_keep_their_class(path: Path) -> None:
    assert ask(path, {"do": "stat"}) == {"ok": True, "did": "stat", "padding": ""}
    assert len(ask(path, {"do": "stat", "bytes": 900_000})["padding"]) == 900_000
    with pytest.raises(BudgetError, match="2 GiB asked, 1 GiB there"):
        ask(path, {"do": "fail", "how": "budget"})
    with pytest.raises(DaemonError, match=r"failed with this request \(KeyError\); its log says more"):
        ask(path, {"do": "fail", "how": "mistake"})
    with pytest.raises(DaemonError, match="cannot be sent, the limit is 1,048,576"):
        ask(path, {"do": "stat", "bytes": 1 << 20})
    with pytest.raises(DaemonError, match=r"cannot be sent, the limit is 65,536"):
        ask(path, {"do": "x" * 70_000})
    with connect(path, "admin") as channel:
        for number in range(3):
            channel.send({"do": str(number)})
            assert channel.receive(WAIT_S)[0]["did"] == str(number)


@pytest.mark.usefixtures("serving")
def test_a_long_request_holds_up_nobody(path: Path, handler: NotingHandler) -> None:
    waiting = [connect(path, "admin") for _ in range(2)]
    for channel in waiting:
        channel.send({"do": "wait"})
        assert handler.asking.acquire(timeout=WAIT_S)
    assert ask(path, {"do": "stat"})["ok"]
    with connect(path) as client:
        client.send({"echo": 1})
        assert client.receive(WAIT_S) == ({"echo": 1}, [])
    waiting[1].send({"do": "stat"})
    assert "ask one at a time" in last_words(waiting[1])
    handler.go_on.set()
    assert waiting[0].receive(WAIT_S)[0]["did"] == "wait"
    waiting[0].close()
