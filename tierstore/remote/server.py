"""Lookups by gRPC (lookup.proto), for clients that cannot map this host's memory: other hosts, other languages.

Input: calls. Output: what `answers` makes of their requests. Errors: calls without the token, beyond the limits, or
past their time end with a status (`failures`). Nothing of a message is read before its call is admitted.

Serves any `Store`: opened here, attached to a daemon, or itself reached by gRPC. Threads: grpc's own, one for each call
under way; at most `workers` of them look up at a time, the others wait for the network.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from ..errors import ConfigError
from ..ipc.ports import check_ports
from ..store.store import Store
from . import messages
from .access import check_options, load_grpc
from .answers import AnswerLimits, Answers
from .connections import CONNECTIONS_MAX, Connections, peer_network
from .credentials import ServerCredentials
from .failures import abort
from .health import WATCHERS_MAX, Health
from .limits import Deadline, Deadlines, InFlight, Rates
from .lookup_request import RequestReader
from .messages import SERVICE
from .wire import decode

MESSAGE_BYTES_MAX = 64 << 20
TOKENS_MAX = 32768
IN_FLIGHT_MAX = 64
IN_FLIGHT_BYTES_MAX = 512 << 20
SPARE_THREADS = 4  # that turn calls away while all others are taken
SOCKETS_MAX = 2 * CONNECTIONS_MAX  # that grpc takes; beyond CONNECTIONS_MAX, those without a call are ended
STREAMS_MAX = 128  # calls at a time by one connection
HANDSHAKE_WAIT_S = 10
IDLE_S = 300  # without a call, after which a connection ends; a client makes another when it calls
PING_S_MIN = 5  # that a client must leave between pings: half of the 10 s that clients use at the most
CANCEL_WAIT_S = 5.0  # that calls may take to end after they were cancelled


class RemoteServer:
    """Serves a store by gRPC from its making to `close`. Any thread may call."""

    def __init__(
        self,
        store: Store | Callable[[], Store],
        address: str,
        *,
        token_file: str | os.PathLike[str] | None = None,
        tls_cert: str | os.PathLike[str] | None = None,
        tls_key: str | os.PathLike[str] | None = None,
        message_bytes_max: int = MESSAGE_BYTES_MAX,
        tokens_max: int = TOKENS_MAX,
        in_flight_max: int = IN_FLIGHT_MAX,
        in_flight_bytes_max: int = IN_FLIGHT_BYTES_MAX,
        requests_per_second: float | None = None,
        workers: int = 4,
        is_healthy: Callable[[], bool] = lambda: True,
    ) -> None:
        """Listens on an address, and serves at once.

        Args:
            store: The store, or a function that returns the one to serve now; a call keeps the one that it began with.
            address: "HOST:PORT"; port 0: a free one.
            token_file: A file with the token that calls must bear. On a loopback address it may be left out, and TLS
                too.
            tls_cert, tls_key: PEM files.
            message_bytes_max, tokens_max: Of one request.
            in_flight_max, in_flight_bytes_max: Calls at a time, and the bytes that they may take.
            requests_per_second: Of one client's host; None: no limit.
            workers: Lookups at a time.
            is_healthy: What the health service reports; must be quick.

        Raises:
            ConfigError: grpcio is missing, the address is taken or malformed, a file is unfit, or the limits contradict
                the tables.
        """
        self._grpc = load_grpc()
        wanted = check_options(address, token_file, tls_cert, tls_key)
        self._credentials = ServerCredentials(self._grpc, token_file, tls_cert, tls_key)
        self._message_bytes_max = message_bytes_max
        self._in_flight = InFlight(in_flight_max, in_flight_bytes_max)
        self._rates = Rates(requests_per_second)
        self._answers = Answers(
            store if callable(store) else lambda: store,
            AnswerLimits(message_bytes_max, tokens_max, workers),
            self._in_flight,
            self.record,
        )
        self._counts = {"calls": 0, "errors": 0, "bytes_sent": 0}
        self._counts_lock = threading.Lock()  # guards `_counts`
        self._closed = False
        self._health = Health(self._grpc, is_healthy)
        self._server = self._make_server(in_flight_max)
        port = self._listen(str(wanted))
        self.address = f"{str(wanted).rpartition(':')[0]}:{port}"
        self._connections = Connections(port)
        self._deadlines = Deadlines()
        self._health.begin(self._connections, self._deadlines)
        self._server.start()

    def _make_server(self, in_flight_max: int) -> Any:
        options = {
            "grpc.max_receive_message_length": self._message_bytes_max,
            "grpc.max_send_message_length": -1,
            "grpc.max_concurrent_streams": STREAMS_MAX,
            "grpc.max_allowed_incoming_connections": SOCKETS_MAX,
            "grpc.max_connection_idle_ms": IDLE_S * 1000,
            "grpc.server_handshake_timeout_ms": HANDSHAKE_WAIT_S * 1000,
            "grpc.http2.min_ping_interval_without_data_ms": int(PING_S_MIN * 1000),
            "grpc.http2.max_ping_strikes": 2,
            "grpc.keepalive_permit_without_calls": 1,
            "grpc.keepalive_time_ms": 60_000,
            "grpc.keepalive_timeout_ms": 20_000,
            "grpc.so_reuseport": 0,
        }
        num_threads = in_flight_max + SPARE_THREADS + WATCHERS_MAX
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="tierstore-remote")
        server = self._grpc.server(self._threads, options=list(options.items()), maximum_concurrent_rpcs=num_threads)
        # Requests of one message are taken as streams, which is the same on the wire:
        # grpc would else read the message first.
        one, many = self._grpc.stream_unary_rpc_method_handler, self._grpc.stream_stream_rpc_method_handler
        answers, read_lookup = self._answers, RequestReader().read
        methods = {
            "Describe": one(self._one(answers.describe, partial(decode, messages.DescribeRequest))),
            "Lookup": one(self._one(answers.lookup, read_lookup)),
            "LookupStream": many(self._many(answers.lookup_stream, read_lookup)),
            "Rows": many(self._many(answers.rows, partial(decode, messages.RowsRequest))),
            "Locate": one(self._one(answers.locate, partial(decode, messages.LocateRequest))),
            "Placed": one(self._one(answers.placed, partial(decode, messages.PlacedRequest))),
            "Stats": one(self._one(answers.stats, partial(decode, messages.StatsRequest))),
        }
        lookups = self._grpc.method_handlers_generic_handler(SERVICE, methods)
        server.add_generic_rpc_handlers((lookups, self._health.handler()))
        return server

    def _listen(self, address: str) -> int:
        try:
            credentials = self._credentials.for_server()
            if credentials is None:
                return int(self._server.add_insecure_port(address))
            return int(self._server.add_secure_port(address, credentials))
        except RuntimeError as error:
            self._server.stop(None)
            check_ports([("address", address)])  # which says why, if it is the address
            raise ConfigError(f"{address} cannot be listened at: {error}; give another address") from error

    def reload(self) -> None:
        """Reads token and certificate again, for new calls and connections; `ConfigError` keeps the old ones."""
        self._credentials.reload()

    def record(self) -> dict[str, Any]:
        """Returns address, calls, errors, bytes_sent (of rows) since the start, and calls in_flight."""
        with self._counts_lock:
            return {"address": self.address, **self._counts, "in_flight": self._in_flight.num_calls}

    def close(self, timeout_s: float = 30.0) -> bool:
        """Turns new calls away, waits for those under way, then cancels them.
        Returns whether all ended by themselves."""
        if self._closed:
            return True
        self._closed = True
        self._health.end()
        ended = self._server.stop(timeout_s)
        clean = ended.wait(timeout_s)
        ended.wait(CANCEL_WAIT_S)
        self._threads.shutdown(wait=False)
        self._deadlines.stop()
        self._connections.stop()
        return clean

    # The two below are what each call pays for: generators as context managers, and a function for each step, took a
    # tenth of a call's time.

    def _one(self, answer: Callable[..., bytes], read: Callable[[bytes], Any]) -> Callable[..., Any]:
        """A method of one answer, as grpc calls it."""

        def behaviour(requests: Iterator[bytes], context: Any) -> bytes:
            reply = b""
            try:
                peer = self._admit(context)
                with self._in_flight.call(peer), self._deadlines.of(context, peer) as call:
                    data = _first(requests, call)
                    with self._in_flight.holding(len(data), peer):
                        reply = answer(call, read(data))
            except Exception as error:
                self._end(context, error)
            self._count("bytes_sent", len(reply))
            return reply

        return behaviour

    def _many(self, answer: Callable[..., Iterator[bytes]], read: Callable[[bytes], Any]) -> Callable[..., Any]:
        """A method of a stream of answers, as grpc calls it."""

        def behaviour(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
            try:
                peer = self._admit(context)
                with self._in_flight.call(peer), self._deadlines.of(context, peer) as call:
                    data = _first(requests, call)
                    with self._in_flight.holding(len(data), peer):
                        for reply in answer(call, read(data)):
                            with call.waiting_for_client():
                                yield reply
                            self._count("bytes_sent", len(reply))
            except Exception as error:
                self._end(context, error)

        return behaviour

    def _admit(self, context: Any) -> str:
        """Counts a call, and returns its peer. Raises if it bears no token, or if its peer asks too often."""
        self._count("calls", 1)
        self._credentials.check_token(context.invocation_metadata(), self.address)
        connection = context.peer()
        peer = peer_network(connection)
        self._rates.take(peer)
        self._connections.admit(connection)
        return peer

    def _end(self, context: Any, error: Exception) -> None:
        """Ends a call that failed: counted, and with a status for the client. Raises what ends it."""
        self._count("errors", 1)
        if isinstance(error, self._grpc.RpcError):
            raise error
        abort(self._grpc, context, error)

    def _count(self, name: str, number: int) -> None:
        with self._counts_lock:
            self._counts[name] += number


def _first(requests: Iterator[bytes], call: Deadline) -> bytes:
    """Returns a call's request; blocks until its client has sent it. Raises `ValueError` if it sent none."""
    with call.waiting_for_client():
        data = next(requests, None)
    if data is None:
        raise ValueError("the call has no request; send one message")
    return data
