"""A small HTTP server for what programs of the operator fetch: GET and HEAD of a few paths, and nothing else.

Input: requests without a body, one a connection. Output: what a handler answers. Errors: whatever is not such a request
is answered with its status and a line of text.

One thread reads and writes all connections, so that idle ones cost no thread; REQUESTS_MAX others call the handler. A
connection has a fixed time in all to send its request and to take the answer. If there are too many, the oldest of the
host that has the most is cut off.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import selectors
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from http import HTTPStatus

from ..ipc.events import event
from ..ipc.peer_log import PeerLog
from ..ipc.ports import listen, network_of
from .http_messages import HEAD_BYTES_MAX, TLS_HELLO, Answer, HttpRequest, answer_bytes, parse_head, text_answer

logger = logging.getLogger("tierstore")

REQUESTS_MAX = 4  # answered at the same time, a thread each
CONNECTIONS_MAX = 64  # of all hosts together
WAITING_MAX = 64  # connections in the system's queue
ACCEPTS_A_ROUND = 16  # a quarter of CONNECTIONS_MAX: what was accepted is read before more is
RECEIVE_S_MAX = 5.0  # to send a request in
SEND_S_MAX = 5.0  # to take an answer in
CLOSE_S_MAX = 10.0
ACCEPT_AGAIN_S = 0.5  # after the system refused a connection: it is short of descriptors or memory
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: drop what is unsent when the connection is closed


class _Connection:
    """A connection; the loop's alone, but while a worker makes its answer. deadline: None while that lasts."""

    def __init__(self, sock: socket.socket, network: str, deadline: float) -> None:
        self.sock, self.network = sock, network
        self.deadline: float | None = deadline
        self.head = b""
        self.unsent = memoryview(b"")


class HttpServer:
    """Serves `handler` from an address until it is closed. `address` is what was bound, also if port 0 was given."""

    def __init__(self, address: str, handler: Callable[[HttpRequest], Answer], what: str) -> None:
        """handler: called in REQUESTS_MAX threads; raises nothing. what: names the option.

        Raises `ConfigError` for what is not an address, or cannot be bound.
        """
        self._handler, self._log, self._closing = handler, PeerLog(), threading.Event()
        self._listener = listen(address, what, WAITING_MAX)
        self._listener.setblocking(False)
        host, port = self._listener.getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        # Only the loop uses the three below; the two queues after them are how it and the workers talk.
        self._connections: set[_Connection] = set()
        self._selector = selectors.DefaultSelector()
        self._accept_at = 0.0  # of `time.monotonic`, from when on connections are accepted
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._requests: queue.SimpleQueue[_Connection | None] = queue.SimpleQueue()  # whole ones; None ends a worker
        self._answered: deque[_Connection] = deque()
        self._threads = [
            threading.Thread(target=self._work, name=f"tierstore-http-{index}", daemon=True)
            for index in range(REQUESTS_MAX)
        ]
        self._threads.append(threading.Thread(target=self._run, name="tierstore-http", daemon=True))
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends it: no more connections, those under way are cut. Blocks for CLOSE_S_MAX at most; twice is harmless."""
        if self._closing.is_set():
            return
        self._closing.set()
        os.eventfd_write(self._wake_fd, 1)
        for _ in range(REQUESTS_MAX):
            self._requests.put(None)
        deadline = time.monotonic() + CLOSE_S_MAX
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            event(logger, logging.WARNING, "http_close_timed_out", address=self.address, waited_s=CLOSE_S_MAX)
        else:
            os.close(self._wake_fd)

    def __enter__(self) -> HttpServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The workers

    def _work(self) -> None:
        """A thread: makes answers."""
        while (connection := self._requests.get()) is not None:
            try:
                answer = self._answer(connection.head)
            except Exception as error:  # whatever it is, the others must be answered
                event(logger, logging.ERROR, "http_answer_failed", address=self.address, error=error)
                answer = answer_bytes(
                    text_answer(HTTPStatus.INTERNAL_SERVER_ERROR, "it failed; the daemon's log says why")
                )
            connection.unsent = memoryview(answer)
            self._answered.append(connection)
            os.eventfd_write(self._wake_fd, 1)

    def _answer(self, head: bytes) -> bytes:
        """Returns the answer to a request's head, or to what is not one."""
        if head.startswith(TLS_HELLO):
            self._log.warn(f"a client speaks TLS to http://{self.address}, which is plain HTTP: have it use http://")
        parsed = parse_head(head)
        if isinstance(parsed, Answer):
            return answer_bytes(parsed)
        method, request = parsed
        return answer_bytes(self._handler(request), with_body=method != "HEAD")

    # The loop

    def _run(self) -> None:
        """The thread of all connections."""
        self._selector.register(self._wake_fd, selectors.EVENT_READ, None)
        try:
            while not self._closing.is_set():
                try:
                    self._round(time.monotonic())
                except Exception as error:  # short of memory, for one; all connections depend on this thread
                    event(logger, logging.ERROR, "http_failed", address=self.address, error=error)
                    self._closing.wait(ACCEPT_AGAIN_S)
        finally:
            for connection in list(self._connections):
                self._end(connection, reset=False)
            self._listener.close()
            self._selector.close()

    def _round(self, now: float) -> None:
        """Waits for something to happen and deals with it: connections that are there before new ones."""
        self._watch_listener(now)
        accepts = False
        for key, _ in self._selector.select(self._seconds_left(now)):
            if key.fd == self._listener.fileno():
                accepts = True
            elif key.data is None:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake_fd)
            elif key.data.deadline is not None:
                self._go_on(key.data)
        while self._answered:
            self._begin_to_send(self._answered.popleft())
        now = time.monotonic()
        for connection in [each for each in self._connections if each.deadline is not None and each.deadline <= now]:
            self._end(connection, reset=True)
        if accepts:
            self._accept()

    def _seconds_left(self, now: float) -> float | None:
        ends = [each.deadline for each in self._connections if each.deadline is not None]
        ends += [self._accept_at] if self._accept_at > now else []
        return max(0.0, min(ends) - now) if ends else None

    def _watch_listener(self, now: float) -> None:
        watched, wanted = self._listener.fileno() in self._selector.get_map(), self._accept_at <= now
        if wanted and not watched:
            self._selector.register(self._listener, selectors.EVENT_READ, None)
        elif watched and not wanted:
            self._selector.unregister(self._listener)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_A_ROUND):
            try:
                sock, address = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                event(logger, logging.WARNING, "http_accept_failed", address=self.address, error=error)
                self._accept_at = time.monotonic() + ACCEPT_AGAIN_S
                return
            sock.setblocking(False)
            connection = _Connection(sock, network_of(address[0]), time.monotonic() + RECEIVE_S_MAX)
            self._connections.add(connection)
            self._selector.register(sock, selectors.EVENT_READ, connection)
            if len(self._connections) > CONNECTIONS_MAX:
                self._make_room()

    def _make_room(self) -> None:
        """Cuts off the oldest connection of the network that has the most; none whose answer is being made."""
        idle = [each for each in self._connections if each.deadline is not None]
        counts = Counter(each.network for each in idle)
        most = max(counts.values())
        oldest = min((each for each in idle if counts[each.network] == most), key=lambda each: each.deadline or 0.0)
        self._log.warn(
            f"http://{self.address}: more than {CONNECTIONS_MAX} connections; the oldest of the {most} from "
            f"{oldest.network} is cut off"
        )
        self._end(oldest, reset=True)

    def _go_on(self, connection: _Connection) -> None:
        """Receives what came of a request, or sends what can be sent of an answer."""
        try:
            if connection.unsent:
                self._send(connection)
            else:
                self._receive(connection)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:  # the client has left: that is not a fault of ours
            logger.debug("a request to %s ended early: %s", self.address, error)
            self._end(connection, reset=True)

    def _receive(self, connection: _Connection) -> None:
        part = connection.sock.recv(HEAD_BYTES_MAX - len(connection.head))
        if not part:
            raise ConnectionResetError("closed before the request was whole")
        connection.head += part
        head = connection.head
        if b"\r\n\r\n" in head or len(head) >= HEAD_BYTES_MAX or head.startswith(TLS_HELLO):
            self._selector.unregister(connection.sock)
            connection.deadline = None
            self._requests.put(connection)

    def _send(self, connection: _Connection) -> None:
        connection.unsent = connection.unsent[connection.sock.send(connection.unsent) :]
        if not connection.unsent:
            connection.sock.shutdown(socket.SHUT_WR)
            self._end(connection, reset=False)

    def _begin_to_send(self, connection: _Connection) -> None:
        connection.deadline = time.monotonic() + SEND_S_MAX
        self._selector.register(connection.sock, selectors.EVENT_WRITE, connection)
        self._go_on(connection)

    def _end(self, connection: _Connection, *, reset: bool) -> None:
        """Closes a connection. reset: nor shall the system keep what was not read."""
        self._connections.discard(connection)
        if connection.sock.fileno() in self._selector.get_map():
            self._selector.unregister(connection.sock)
        with contextlib.suppress(OSError):
            if reset:
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        connection.sock.close()
