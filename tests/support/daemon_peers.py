"""What tests of the daemon's socket share: a handler that notes its calls, peers of all kinds,
processes of other users."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from support.waiting import WAIT_S

from tierstore.daemon.peer import Peer
from tierstore.daemon.server import SocketServer
from tierstore.errors import BudgetError, DaemonError
from tierstore.ipc.channel import Channel
from tierstore.ipc.client_socket import dial
from tierstore.ipc.messages import from_json
from tierstore.ipc.protocol import PROTOCOL_VERSION, ChannelClosed

NOBODY = 65534
HELLO = {"hello": PROTOCOL_VERSION, "role": "client", "pid": 1, "release": "0"}
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")


@contextlib.contextmanager
def noted_warnings() -> Iterator[queue.Queue[str]]:
    """What is logged meanwhile, line by line, as it is."""
    lines: queue.Queue[str] = queue.Queue()

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.put(record.getMessage())

    noting = Lines()
    logging.getLogger("tierstore").addHandler(noting)
    yield lines
    logging.getLogger("tierstore").removeHandler(noting)


class NotingHandler:
    """Answers, and puts ("attach" | "message" | "detach", peer, message) on `calls`. Messages choose what it does."""

    def __init__(self) -> None:
        self.calls: queue.Queue[tuple[str, Peer, dict[str, Any] | None]] = queue.Queue()
        self.layout: Any = {"version": 1}
        self.fds: Sequence[int] = ()
        self.fault: Exception | None = None
        self.go_on = threading.Event()  # what {"do": "wait"} waits for
        self.asking = threading.Semaphore(0)  # released as each of them begins

    def attach(self, peer: Peer) -> tuple[dict[str, Any], Sequence[int]]:
        if self.fault is not None:
            raise self.fault
        peer.send({"early": True})  # must not come before the answer
        self.calls.put(("attach", peer, None))
        return self.layout, self.fds

    def message(self, peer: Peer, data: bytes) -> None:
        message = from_json(data, dict)
        self.calls.put(("message", peer, message))
        if message.get("raise") == "DaemonError":
            raise DaemonError("table layers.9: the store has none; name one of its own")
        if message.get("raise"):
            raise BlockingIOError("a mistake of the daemon's")
        if "drop" in message:
            peer.drop(message["drop"])
        if "echo" in message:
            peer.send({"echo": message["echo"]})

    def detach(self, peer: Peer) -> None:
        self.calls.put(("detach", peer, None))

    def answer(self, _: Peer, request: bytes) -> dict[str, Any]:
        message = from_json(request, dict)
        if message["do"] == "wait":
            self.asking.release()
            assert self.go_on.wait(WAIT_S)
        if message["do"] == "fail":
            raise {"budget": BudgetError("2 GiB asked, 1 GiB there"), "mistake": KeyError("x")}[message["how"]]
        return {"ok": True, "did": message["do"], "padding": "x" * message.get("bytes", 0)}

    def next(self, kind: str) -> tuple[Peer, dict[str, Any] | None]:
        """The next call, which must be of that kind."""
        found, peer, message = self.calls.get(timeout=WAIT_S)
        assert found == kind, (found, message)
        return peer, message


def packet(part: bytes, num_bytes: int | None = None, *, flags: int = 0, magic: bytes = b"tsd\n") -> bytes:
    """A packet, drawn by hand as the protocol's table says."""
    return magic + bytes([flags, 0, 0, 0]) + struct.pack("<I", len(part) if num_bytes is None else num_bytes) + part


def connect(path: Path, role: Literal["client", "admin"] = "client") -> Channel:
    """An attached client, or administrator, that has read what came first."""
    channel, _, fds = dial(path, role, WAIT_S)
    for fd in fds:
        os.close(fd)
    if role == "client":
        assert channel.receive(WAIT_S, dict) == ({"early": True}, [])
    return channel


def bare_socket(path: Path) -> socket.socket:
    """A connection that has not said hello."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(WAIT_S)
    sock.connect(os.fspath(path))
    return sock


def last_words(channel: Channel) -> str:
    """Why a channel was ended, and that it was."""
    message, _ = channel.receive(WAIT_S, dict)
    assert message["error"] == "DaemonError"
    with pytest.raises(ChannelClosed):
        channel.receive(WAIT_S, dict)
    channel.close()
    return str(message["message"])


def become(user: int | None) -> None:
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)


def in_child(
    act: Callable[[], str], user: int | None = None, *, before_reaping: Callable[[], None] = lambda: None
) -> str:
    """What `act` returns in a forked process, of another user where one is given; "Class: message" where it raises.

    before_reaping: called when the process has ended and its number is still its own.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:  # whatever happens, the child must not go on with the tests
            become(user)
            os.write(write, act().encode())
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as pipe:
        said = pipe.read()
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    before_reaping()
    os.waitpid(child, 0)
    return said


class ServingChild:
    """A forked process that serves a path, of another user where one is given, until it is killed."""

    def __init__(self, path: Path, user: int | None = None) -> None:
        read, write = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                become(user)
                opened = SocketServer(path, NotingHandler())
                opened.start()
                os.write(write, b"serving")
                signal.pause()
            finally:
                os._exit(1)
        os.close(write)
        with open(read) as pipe:
            assert pipe.read(7) == "serving"

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
