"""A small HTTP server for what programs of the operator fetch: GET and HEAD of a few paths, and nothing else.

Flows in: requests without a body. Flows out: what a handler answers. A fixed number of threads takes one connection each, one
request a connection; whoever is slow, in asking or in reading, is cut off after a fixed time in all, so that clients can make
it neither grow nor hang: the others wait in the system's queue, which has a limit too.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from types import TracebackType
from typing import NamedTuple

from ..causes import Fault, named
from ..errors import ConfigError
from .events import event

logger = logging.getLogger("tierstore")

REQUESTS_MAX = 4  # answered at the same time, a thread each
WAITING_MAX = 16  # connections in the system's queue
HEAD_BYTES_MAX = 8192  # of a request
RECEIVE_S_MAX = 5.0  # to send a request in
SEND_S_MAX = 5.0  # to take an answer in
CLOSE_S_MAX = 10.0
ACCEPT_AGAIN_S = 0.5  # after the system refused a connection: it is short of descriptors or memory
_ADDRESS = Fault(ConfigError, "give an address of this host and a free port, or port 0")
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: drop what is unsent when the connection is closed


class Answer(NamedTuple):
    """What a handler gives back: a status, and a body of a type."""

    status: HTTPStatus
    body: bytes
    content_type: str = "text/plain; charset=utf-8"


def text_answer(status: HTTPStatus, text: str) -> Answer:
    """Returns an answer of one line."""
    return Answer(status, f"{text}\n".encode("utf-8", "backslashreplace"))


def parse_address(address: str, what: str) -> tuple[str, int]:
    """Returns (host, port) of "HOST:PORT"; IPv6 in brackets. `what` names the option. Raises `ConfigError`."""
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not (host and colon and port.isascii() and port.isdecimal() and int(port) <= 65535):
        raise ConfigError(
            f"{what} {address!r}: that is no HOST:PORT with a port of 0 to 65535; write one such as 127.0.0.1:9464 or [::1]:9464"
        )
    return host, int(port)


class WebServer:
    """Serves `handler` from an address until it is closed. `address` tells what was bound, also where port 0 was asked."""

    def __init__(self, address: str, handler: Callable[[str], Answer], what: str) -> None:
        """handler: of a path without its query; called in REQUESTS_MAX threads; raises nothing. what: names the option.

        Raises `ConfigError` where the address is none, or cannot be bound.
        """
        self._handler = handler
        self._listener = _listen(address, what)
        host, port = self._listener.getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._closing = threading.Event()
        self._lock = threading.Lock()  # of the connections under way
        self._connections: set[socket.socket] = set()
        self._threads = [
            threading.Thread(target=self._serve, name=f"tierstore-web-{index}", daemon=True)
            for index in range(REQUESTS_MAX)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends it: no more connections, those under way are cut. Blocks for CLOSE_S_MAX at most; twice is harmless."""
        with self._lock:
            self._closing.set()
            for connection in self._connections:
                _shut(connection)
        _shut(self._listener)  # wakes the threads that wait for a connection
        deadline = time.monotonic() + CLOSE_S_MAX
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._listener.close()
        if any(thread.is_alive() for thread in self._threads):
            event(logger, logging.WARNING, "web_close_late", address=self.address, waited_s=CLOSE_S_MAX)

    def __enter__(self) -> WebServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _serve(self) -> None:
        """A thread: takes a connection, answers it, closes it."""
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if not self._closing.is_set():
                    event(logger, logging.WARNING, "web_accept_failed", address=self.address, error=error)
                    self._closing.wait(ACCEPT_AGAIN_S)
                continue
            with connection:
                self._converse(connection)

    def _converse(self, connection: socket.socket) -> None:
        with self._lock:
            if self._closing.is_set():
                return
            self._connections.add(connection)
        try:
            method, answer = self._answer(_receive_head(connection))
            connection.settimeout(SEND_S_MAX)  # of `sendall` as a whole
            connection.sendall(_as_bytes(answer, with_body=method != "HEAD"))
            connection.shutdown(socket.SHUT_WR)
        except OSError as error:  # who asked is slow, or has left: that is no fault of ours
            logger.debug("a request to %s ended early: %s", self.address, error)
            with contextlib.suppress(OSError):  # nor shall the system keep what was not read
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        finally:
            with self._lock:
                self._connections.discard(connection)

    def _answer(self, head: bytes | None) -> tuple[str, Answer]:
        """Returns the method and the answer to a request's head; None: it was too long."""
        if head is None:
            return "", text_answer(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"a head has {HEAD_BYTES_MAX} bytes at most"
            )
        words = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
        if len(words) != 3 or not words[1].startswith("/") or not words[2].startswith("HTTP/1."):
            return "", text_answer(HTTPStatus.BAD_REQUEST, "that is no request of HTTP/1")
        method, target, _ = words
        if method not in ("GET", "HEAD"):
            return method, text_answer(HTTPStatus.METHOD_NOT_ALLOWED, "GET and HEAD only")
        return method, self._handler(target.partition("?")[0])


def _listen(address: str, what: str) -> socket.socket:
    host, port = parse_address(address, what)
    try:
        family, _, _, _, bound = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(bound)
            listener.listen(WAITING_MAX)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise named(error, f"{what} {address}: it cannot be listened at", fault=_ADDRESS) from error
    except UnicodeError as error:
        raise ConfigError(f"{what} {address}: it cannot be listened at ({error}); {_ADDRESS.remedy}") from error
    return listener


def _receive_head(connection: socket.socket) -> bytes | None:
    """Returns a request up to its empty line, which must come within RECEIVE_S_MAX; None where it is too long."""
    deadline = time.monotonic() + RECEIVE_S_MAX
    head = b""
    while b"\r\n\r\n" not in head:
        if len(head) >= HEAD_BYTES_MAX:
            return None
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"no whole request within {RECEIVE_S_MAX} s")
        connection.settimeout(left_s)
        part = connection.recv(HEAD_BYTES_MAX - len(head))
        if not part:
            raise ConnectionResetError("closed before the request was whole")
        head += part
    return head


def _as_bytes(answer: Answer, *, with_body: bool) -> bytes:
    lines = [
        f"HTTP/1.1 {answer.status.value} {answer.status.phrase}",
        f"Content-Type: {answer.content_type}",
        f"Content-Length: {len(answer.body)}",
        "Connection: close",
    ]
    if answer.status == HTTPStatus.METHOD_NOT_ALLOWED:
        lines.append("Allow: GET, HEAD")
    head = "".join(f"{line}\r\n" for line in lines) + "\r\n"
    return head.encode("latin-1") + (answer.body if with_body else b"")


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is over already
        connection.shutdown(socket.SHUT_RDWR)
