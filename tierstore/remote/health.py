"""The standard health service of gRPC, grpc.health.v1.Health, for load balancers, Kubernetes' probes and the like.

Input: Check and Watch calls, which need no token, since probes cannot bear one. Output: whether the server serves, and
nothing else. Errors: NOT_FOUND for Check of an unknown service;
RESOURCE_EXHAUSTED beyond WATCHERS_MAX watchers.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .connections import Connections, peer_network
from .limits import Deadlines, InFlight, Rates, Refusal
from .messages import SERVICE
from .wire import Message, decode, encode, numbered, text_field, uint_field

HEALTH_SERVICE = "grpc.health.v1.Health"
SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3  # of HealthCheckResponse.ServingStatus
WATCHERS_MAX = 16  # a thread each
WATCHERS_OF_PEER_MAX = 4
WATCH_POLL_S = 0.25  # within which watchers see a change
REQUESTS_A_SECOND_MAX = 50.0  # of one network
REQUESTS_MAX = 8  # read at the same time: grpc takes a whole message, however long, before it can be refused
REQUEST_BYTES_MAX = 4096


@numbered
@dataclass
class HealthCheckRequest(Message):
    """service: a service's full name, or empty for the whole server."""

    service: str = text_field(1)


@numbered
@dataclass
class HealthCheckResponse(Message):
    """status: a ServingStatus."""

    status: int = uint_field(1)


class Health:
    """Answers Check and Watch. Any thread may call."""

    _connections: Connections  # from `begin` on, as the next
    _deadlines: Deadlines

    def __init__(self, grpc: Any, is_healthy: Callable[[], bool]) -> None:
        """is_healthy: must be quick."""
        self._grpc = grpc
        self._is_healthy = is_healthy
        self._rates = Rates(REQUESTS_A_SECOND_MAX)
        self._reading = InFlight(REQUESTS_MAX, 0)
        self._ending = threading.Event()
        self._lock = threading.Lock()  # guards `_watchers`
        self._watchers: Counter[str] = Counter()  # by network

    def begin(self, connections: Connections, deadlines: Deadlines) -> None:
        """Takes what belongs to the server; comes before the first call."""
        self._connections, self._deadlines = connections, deadlines

    def handler(self) -> Any:
        """Returns what a grpc server takes."""
        methods = {  # as streams of one request, so that it is read after its client was counted
            "Check": self._grpc.stream_unary_rpc_method_handler(self._check),
            "Watch": self._grpc.stream_stream_rpc_method_handler(self._watch),
        }
        return self._grpc.method_handlers_generic_handler(HEALTH_SERVICE, methods)

    def end(self) -> None:
        """From now on, nothing is served. Watchers get a last status, and their calls end soon."""
        self._ending.set()

    def _status(self, service: str) -> int:
        if service not in ("", SERVICE, HEALTH_SERVICE):
            return SERVICE_UNKNOWN
        return SERVING if not self._ending.is_set() and self._is_healthy() else NOT_SERVING

    def _service(self, requests: Iterator[bytes], context: Any) -> str:
        """Returns the service that a request names; raises `Refusal`, and `ValueError` for what is not a request."""
        peer = peer_network(context.peer())
        self._rates.take(peer)
        with (
            self._reading.call(peer),
            self._deadlines.of(context, peer) as call,
            call.waiting_for_client(),
        ):
            data = next(requests, None)
        if data is None or len(data) > REQUEST_BYTES_MAX:
            raise ValueError(f"expected a HealthCheckRequest of at most {REQUEST_BYTES_MAX} bytes")
        return decode(HealthCheckRequest, data).service

    @contextmanager
    def _refusing(self, context: Any) -> Iterator[None]:
        """Ends a call with the status of what it is refused for."""
        code = self._grpc.StatusCode
        try:
            yield
        except Refusal as error:
            context.abort(code.RESOURCE_EXHAUSTED, str(error))
        except ValueError as error:
            context.abort(code.INVALID_ARGUMENT, str(error))

    def _check(self, requests: Iterator[bytes], context: Any) -> bytes:
        status = SERVICE_UNKNOWN
        with self._refusing(context):
            status = self._status(self._service(requests, context))
        if status == SERVICE_UNKNOWN:
            context.abort(
                self._grpc.StatusCode.NOT_FOUND, f"that service is not served; {SERVICE} is, and '' means all"
            )
        return encode(HealthCheckResponse(status))

    def _watch(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        with self._refusing(context):
            service = self._service(requests, context)
            with self._watching(peer_network(context.peer())), self._connections.kept(context.peer()):
                reported = None
                while context.is_active():
                    status = self._status(service)
                    if status != reported:
                        reported = status
                        yield encode(HealthCheckResponse(status))
                    elif self._ending.is_set():
                        return
                    else:
                        self._ending.wait(WATCH_POLL_S)

    @contextmanager
    def _watching(self, network: str) -> Iterator[None]:
        """Counts a watcher while it lasts; raises `Refusal` if there are too many."""
        with self._lock:
            if sum(self._watchers.values()) >= WATCHERS_MAX or self._watchers[network] >= WATCHERS_OF_PEER_MAX:
                raise Refusal(
                    f"at most {WATCHERS_MAX} calls of Watch may be under way, {WATCHERS_OF_PEER_MAX} of one host; "
                    "end some, or call Check",
                    retry=True,
                )
            self._watchers[network] += 1
        try:
            yield
        finally:
            with self._lock:
                self._watchers[network] -= 1
                if not self._watchers[network]:
                    del self._watchers[network]
