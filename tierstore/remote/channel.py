"""A client's connection to a server of lookups by gRPC: calls out, answers or named errors in.

Input: encoded requests, and a time by which the answer is wanted. Output: encoded answers. Errors: what the server
raised, by its class; `DaemonError` if it cannot be reached in time; `ConfigError` for a token that anybody could read
on its way. A call that meets a server which is away, or busy, is made again until its time is up.

Forks: a child cannot use its parent's grpc state. A fork waits FORK_WAIT_S at most for calls under way, and the child
makes a channel of its own when it first calls; it keeps the parent's, and never touches it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from ..errors import (
    BudgetError,
    ConfigError,
    CorruptPageError,
    DaemonError,
    FingerprintMismatchError,
    FormatError,
    StoreNotReadyError,
    TierStoreError,
)
from .access import FORK_VARIABLE, Address, load_grpc, parse_url, survives_forks
from .credentials import read_certificate, read_token
from .inside import Inside
from .messages import ERROR_TRAILER, RETRY_TRAILER, SERVICE, TOKEN_HEADER

FORK_WAIT_S = 1.0
RETRY_S_MIN, RETRY_S_MAX = 0.02, 1.0  # between tries of a call
PROBE_WAIT_S = 2.0  # that finding out why a server cannot be reached may take
REPLY_BYTES_MAX = 128 << 20
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # with an empty SETTINGS
HTTP2_SETTINGS = b"\x04"  # the type of the first frame of a server
PING_S = 30  # between pings while calls are under way, by which a host that vanished is noticed

_RAISED = {
    kind.__name__: kind
    for kind in (
        BudgetError,
        ConfigError,
        CorruptPageError,
        DaemonError,
        FingerprintMismatchError,
        FormatError,
        StoreNotReadyError,
        TierStoreError,
        KeyError,
        TimeoutError,
        TypeError,
        ValueError,
    )
}
T = TypeVar("T")


class TryAgainError(DaemonError):
    """A call that the same server may answer if it is made again: it is busy, or has another store now."""


class OverdueError(DaemonError):
    """A call that was not answered in time."""


class NotUnderstoodError(DaemonError):
    """A call that ended with an error that is not tierstore's."""


class Connection:
    """One server, reached by one channel, which is made when it is needed. Any thread may call."""

    def __init__(
        self,
        url: str,
        *,
        token_file: str | os.PathLike[str] | None = None,
        ca_file: str | os.PathLike[str] | None = None,
    ) -> None:
        """Connects nowhere yet. Raises `ConfigError` for a malformed URL, unfit files, and a token without TLS."""
        self.url = url
        self._grpc = load_grpc()
        self._address: Address = parse_url(url)
        if not self._address.tls and (ca_file is not None or not self._address.is_loopback):
            raise ConfigError(
                f"{url}: {'a ca_file is of TLS' if ca_file else 'beyond this machine lookups need TLS'}; write grpcs://"
            )
        self._metadata = () if token_file is None else ((TOKEN_HEADER, f"Bearer {read_token(token_file)}"),)
        self._ca_file = ca_file
        self.is_probed = True  # whether a fault waits to find out why
        self._roots = None if ca_file is None else read_certificate(ca_file, "certificate of the authority")
        self.rpc_error: type[Exception] = self._grpc.RpcError
        self._inside = Inside()
        self._lock = threading.Lock()  # guards `_channel`, `_methods`, `_forked`, `_of_parents`
        self._channel: Any = None
        self._methods: dict[tuple[str, bool], Any] = {}
        self._forked = False
        self._of_parents: list[Any] = []  # channels that must neither be used nor be freed here
        self._closed = threading.Event()

    def unary(self, method: str, request: bytes, until: float, *, patient: bool = True) -> bytes:
        """Returns the answer of a method of one answer, asked once; raises what the server raised.

        until: monotonic seconds. patient: waits so long for a server that is away. Raises `TryAgainError` where it is
        away or busy, other `DaemonError`s if it does not answer in time, and then takes PROBE_WAIT_S more to find out
        why, unless `is_probed` is off.
        """
        with self._inside.of_thread():
            try:
                call = self._method(method, streams=False)
                reply: bytes = call(request, timeout=_left(until), metadata=self._metadata, wait_for_ready=patient)
                return reply
            except self._grpc.RpcError as error:
                raise self.fault(error) from None

    def stream(self, method: str, request: bytes, until: float, take: Callable[[bytes], None]) -> None:
        """Hands each answer of a stream to `take`, in order; raises like `unary`, and what `take` raises."""
        with self.of_thread():
            replies = self.begin(method, request, until)
            try:
                while (reply := replies.next()) is not None:
                    take(reply)
            finally:
                replies.cancel()

    def of_thread(self) -> AbstractContextManager[Any]:
        """Returns what a thread is in while it has a stream: a fork waits until it has left."""
        return self._inside.of_thread()

    def begin(self, method: str, request: bytes, until: float, *, patient: bool = True) -> Stream:
        """Sends the request of a method that streams, and returns at once. No fork may come until the
        stream was cancelled: the caller is within `of_thread`, or sees to it otherwise. patient: as of `unary`."""
        call = self._method(method, streams=True)
        return Stream(self, call(request, timeout=_left(until), metadata=self._metadata, wait_for_ready=patient))

    def tried(self, attempt: Callable[[], T], until: float) -> T:
        """Returns what `attempt` does, which is made again while the server is busy or away, until `until`."""
        pause_s = RETRY_S_MIN
        while True:
            try:
                return attempt()
            except TryAgainError as error:
                if time.monotonic() + pause_s >= until or self._closed.wait(pause_s):
                    raise DaemonError(str(error)) from error
                pause_s = min(2 * pause_s, RETRY_S_MAX)

    def close(self) -> None:
        """Closes the channel; calls under way end with an error."""
        self._closed.set()
        with self._lock:
            channel, self._channel = self._channel, None
            self._methods.clear()
        if channel is not None:
            channel.close()

    def before_fork(self) -> None:
        """Waits for calls under way, and holds new ones up."""
        self._inside.close_for_fork(FORK_WAIT_S)
        self._lock.acquire()

    def after_fork(self, *, child: bool) -> None:
        """Lets calls go on; the child's make a channel of their own."""
        if child:
            self._of_parents.append((self._channel, self._methods))
            self._channel, self._methods, self._forked = None, {}, True
            self._lock, self._inside = threading.Lock(), Inside()
        else:
            self._lock.release()
            self._inside.open_after_fork()

    def _method(self, name: str, *, streams: bool) -> Any:
        if method := self._methods.get((name, streams)):  # as long as it is open, nearly always
            return method
        with self._lock:
            if self._closed.is_set():
                raise StoreNotReadyError(f"{self.url} is closed; connect again")
            if self._channel is None:
                self._channel = self._make_channel()
            if (name, streams) not in self._methods:
                make = self._channel.unary_stream if streams else self._channel.unary_unary
                self._methods[name, streams] = make(f"/{SERVICE}/{name}")
            return self._methods[name, streams]

    def _make_channel(self) -> Any:
        if self._forked and not survives_forks():
            raise DaemonError(
                f"{self.url}: this process was forked, and its grpc was loaded without {FORK_VARIABLE}=1; set that in "
                "the environment before anything imports grpc, or start processes by spawn"
            )
        from grpc import experimental

        options = [
            ("grpc.max_receive_message_length", REPLY_BYTES_MAX),
            ("grpc.max_send_message_length", -1),
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 1000),
            ("grpc.keepalive_time_ms", PING_S * 1000),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
            (experimental.ChannelOptions.SingleThreadedUnaryStream, 1),
        ]
        if not self._address.tls:
            return self._grpc.insecure_channel(str(self._address), options)
        return self._grpc.secure_channel(str(self._address), self._grpc.ssl_channel_credentials(self._roots), options)

    def fault(self, error: Any) -> Exception:
        """Returns the error that a failed call stands for."""
        code, text = error.code(), error.details() or ""
        trailers = dict(error.trailing_metadata() or ())
        if RETRY_TRAILER in trailers or (
            code is self._grpc.StatusCode.RESOURCE_EXHAUSTED and ERROR_TRAILER not in trailers
        ):
            return TryAgainError(f"{self.url}: {text}")
        if ERROR_TRAILER in trailers:
            return _RAISED.get(trailers[ERROR_TRAILER], DaemonError)(text)
        if code is self._grpc.StatusCode.UNAVAILABLE:
            return TryAgainError(f"{self.url} cannot be reached: {self._why(text) if self.is_probed else text}")
        if code is self._grpc.StatusCode.DEADLINE_EXCEEDED:
            there = "it is there, but slow; allow a longer timeout_s"
            why = self._why(there) if self.is_probed else "it is slow, or gone"
            return OverdueError(f"{self.url} did not answer in time: {why}")
        if self._closed.is_set():
            return StoreNotReadyError(f"{self.url} is closed; connect again")
        if code is self._grpc.StatusCode.CANCELLED:
            return TryAgainError(f"{self.url} gave the call up: {text.lower()}; it is ending, or this client too slow")
        return NotUnderstoodError(f"{self.url}: {code.name.lower()}: {text}")

    def _why(self, otherwise: str) -> str:
        """Returns, in words, why a server cannot be reached, by trying; `otherwise` if it can."""
        host, port = self._address.host, self._address.port
        try:
            if not self._address.tls:
                return _why_not_plain(host, port) or otherwise
            with socket.create_connection((host, port), timeout=PROBE_WAIT_S) as plain:
                context = ssl.create_default_context(cafile=None if self._ca_file is None else os.fspath(self._ca_file))
                with context.wrap_socket(plain, server_hostname=host):
                    return otherwise
        except ssl.SSLCertVerificationError as error:
            return f"its certificate is refused: {error.verify_message}; renew it, or give the ca_file that signed it"
        except ssl.SSLError as error:
            return f"it does not speak TLS ({error.reason}); write grpc://, or start it with --tls-cert and --tls-key"
        except OSError as error:
            return f"{error.strerror or error}; check the address, and that tierstore serve runs there with --listen"


class Stream:
    """The answers of one call, as they come. Of one thread."""

    def __init__(self, connection: Connection, replies: Any) -> None:
        self.connection, self._replies = connection, replies

    def next(self) -> bytes | None:
        """Returns the next answer, None behind the last; blocks on the network. Raises like `Connection.unary`."""
        try:
            reply: bytes | None = next(self._replies, None)
            return reply
        except Exception as error:
            if not isinstance(error, self.connection.rpc_error):
                raise
            raise self.connection.fault(error) from None

    def cancel(self) -> None:
        """Ends the call, whether answers are still on their way or not."""
        self._replies.cancel()


def _why_not_plain(host: str, port: int) -> str | None:
    """Returns what a server speaks if not gRPC in plain text; None if it is, or sends nothing. Raises `OSError`."""
    until = time.monotonic() + PROBE_WAIT_S
    with socket.create_connection((host, port), timeout=PROBE_WAIT_S) as peer:
        peer.sendall(HTTP2_PREFACE)
        with contextlib.suppress(OSError):  # it may just close
            peer.settimeout(_left(until))
            try:
                answer = peer.recv(16)
            except TimeoutError:  # what speaks TLS would have refused by now
                return None
            if answer[3:4] == HTTP2_SETTINGS:
                return None
            if answer.startswith(b"HTTP/1."):
                return "it speaks HTTP/1, and no gRPC; give the address of --listen, not that of --metrics"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # only whether it speaks TLS is asked
    with contextlib.suppress(OSError):
        peer = socket.create_connection((host, port), timeout=_left(until))
        with peer, context.wrap_socket(peer):
            return "it speaks TLS; write grpcs://"
    return None


def _left(until: float) -> float:
    return max(0.001, until - time.monotonic())
