"""The metrics of a daemon over HTTP: /metrics for Prometheus, /healthz, and the status page at /.

Input: a callable that gives the stat record. Output: its families, made anew at each scrape, so that nothing is counted
twice; the page for browsers. Errors: a record that cannot be had is answered with 503 and logged; it never ends the
daemon.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from http import HTTPStatus

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from ..ipc.events import event
from ..ipc.ports import parse_address
from .exposition import encoder_of
from .families import families_of
from .http import HttpServer
from .http_messages import Answer, HttpRequest, text_answer
from .record import HEALTHY, StatRecord
from .status import FILES, STATUS_PATH, file_answer, status_answer

logger = logging.getLogger("tierstore")


class StatCollector(Collector):
    """Makes metrics of what `stat` returns at each scrape. Register it in a registry of its own."""

    def __init__(self, stat: Callable[[], StatRecord]) -> None:
        """stat: returns the stat record; called at each scrape, in any thread."""
        self._stat = stat

    def collect(self) -> list[Metric]:
        """Returns all families. Raises what `stat` raises, and `ValueError` for a record that contradicts itself."""
        return list(families_of(self._stat()))

    def describe(self) -> list[Metric]:
        """Returns nothing, so that registering asks for no record."""
        return []


class MetricsServer:
    """Serves /metrics, /healthz and the status page over HTTP until it is closed; see `http.HttpServer` for its limits.

    /healthz: 200 while the daemon serves, also while it changes epoch or version; else 503. `address` is what was
    bound.
    """

    def __init__(self, address: str, stat: Callable[[], StatRecord]) -> None:
        """address: "HOST:PORT". stat: returns the stat record, and may be called in several threads at once.

        Raises `ConfigError` if it is not an address, or cannot be bound. An address that other hosts can reach is
        logged: the record names paths, and neither TLS nor a token guards it.
        """
        self._stat = stat
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(StatCollector(stat))
        self._server = HttpServer(address, self._answer, "metrics address")
        self.address = self._server.address
        if not parse_address(self.address, "metrics address").is_loopback:
            event(
                logger,
                logging.WARNING,
                "metrics_open_to_others",
                address=self.address,
                remedy="bind to 127.0.0.1, or put a firewall or a proxy with TLS before it",
            )

    def close(self) -> None:
        """Ends the server; blocks for a bounded time. Twice is harmless."""
        self._server.close()

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, request: HttpRequest) -> Answer:
        path = request.path
        if path in FILES:
            return file_answer(path)
        if path not in ("/metrics", "/healthz", STATUS_PATH):
            return text_answer(HTTPStatus.NOT_FOUND, "there are /, /metrics and /healthz")
        try:
            if path == "/metrics":
                encode, content_type = encoder_of(request.accept)
                return Answer(HTTPStatus.OK, encode(self._registry), content_type)
            record = self._stat()
            if path == STATUS_PATH:
                return status_answer(record, time.time())
            state = record.daemon.state
        except Exception as error:  # whatever ails the record, the daemon must go on
            event(logger, logging.ERROR, "stat_failed", path=path, error=error)
            return text_answer(HTTPStatus.SERVICE_UNAVAILABLE, "the daemon cannot say how it fares; its log says why")
        return text_answer(HTTPStatus.OK if state in HEALTHY else HTTPStatus.SERVICE_UNAVAILABLE, state)
