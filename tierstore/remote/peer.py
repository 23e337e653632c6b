"""One server as a client sees it: what it serves, and which version of its store answered last.

Input: lookups, cut into requests by `requests`. Output: answers, all of one version of the store: the server is asked
again if a change came between two requests. Errors: what the connection raises; `StoreNotReadyError` if the store
changes all the time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from ..errors import FormatError, TierStoreError
from ..spec import TableSpec
from ..tiers.engine import Request, VersionChangedError, in_one_version
from . import messages
from .channel import Connection
from .messages import Description
from .replies import Answer, Counted, decoded
from .requests import Requests
from .wire import encode

logger = logging.getLogger("tierstore")

ById = tuple[int, np.ndarray, np.ndarray]  # index, row ids [R], out [R, row_bytes]


class Asked(Protocol):
    """Whoever answers a `RemoteEngine`: one server, or several behind one store. Any thread may call."""

    url: str  # names it in errors

    @property
    def version(self) -> int:
        """One more whenever another version answers than before."""

    @property
    def build(self) -> str:
        """As of `Backing`."""

    def ask(
        self, lookups: Sequence[Request], by_id: ById | None, until: float
    ) -> tuple[Sequence[Counted], Sequence[Counted]]:
        """Fills the buffers of lookups by keys, and of one by row ids, all from one version. Blocks until `until`.

        Returns what answered the keys, and what the ids, for counts.
        """

    def locate(self, index: int, keys: np.ndarray, sources: np.ndarray, until: float) -> None:
        """As `Engine.locate`."""

    def close(self, timeout_s: float) -> bool:
        """Ends what it does by itself; returns whether it did in time. Connections are their owner's."""

    def before_fork(self) -> None:
        """As of `Engine`."""

    def after_fork(self, *, child: bool) -> None:
        """As of `Engine`."""


def describe(connection: Any, until: float, *, patient: bool) -> tuple[Description, list[TableSpec]]:
    """Asks a server what it has; raises `FormatError` if that contradicts itself."""
    reply = connection.unary("Describe", encode(messages.DescribeRequest()), until, patient=patient)
    description = decoded(Description, reply, connection.url)
    specs = [table.as_spec() for table in description.tables]
    if bytes(description.identity) != messages.identity_of(specs):
        raise FormatError(
            f"{connection.url}: its tables are not those of its identity; the server is of another release: update both"
        )
    return description, specs


class Peer:
    """See `Asked`."""

    def __init__(self, connection: Connection, description: Description, specs: Sequence[TableSpec]) -> None:
        """description: of the server, which states its limits."""
        self.connection, self.url = connection, connection.url
        self.requests = Requests(connection.url, specs, description)
        self.version, self.build = description.version, description.build
        self.common_build = description.common_build
        # Instance of the server, and its version, that answered last.
        self._answered = (description.instance, description.version) if description.instance else None
        self._lock = threading.Lock()  # guards `version` and `_answered`

    def ask(
        self, lookups: Sequence[Request], by_id: ById | None, until: float
    ) -> tuple[Sequence[Counted], Sequence[Counted]]:
        by_key = self.requests.lookup(lookups)
        attempts = by_key + (self.requests.rows(*by_id) if by_id else [])

        def ask_all() -> list[Answer]:
            answers = [self.connection.tried(partial(each.ask, self.connection, until), until) for each in attempts]
            if len({answer.version for answer in answers}) > 1:
                raise VersionChangedError(f"{self.url}: its store was changed between two requests")
            return answers

        answers = in_one_version(self, ask_all, self.url)
        for version in {answer.version for answer in answers} - {self._answered}:
            self._take_version(version, until)
        return answers[: len(by_key)], answers[len(by_key) :]

    def locate(self, index: int, keys: np.ndarray, sources: np.ndarray, until: float) -> None:
        self.requests.locate(self._call, index, keys, sources, until)

    def _call(self, method: str, request: bytes, until: float) -> bytes:
        return self.connection.tried(partial(self.connection.unary, method, request, until), until)

    def close(self, timeout_s: float) -> bool:  # noqa: ARG002
        return True

    def before_fork(self) -> None:
        self.connection.before_fork()

    def after_fork(self, *, child: bool) -> None:
        if child:
            self._lock = threading.Lock()
        self.connection.after_fork(child=child)

    def _take_version(self, version: tuple[int, int], until: float) -> None:
        """Takes note that another version answers than before, and says so if it is of another server,
        or a restarted one."""
        with self._lock:
            before, self._answered = self._answered, version
            self.version += before is not None
        if before is None or before == version:  # the latter: another thread was here first
            return
        try:
            now, _ = describe(self.connection, until, patient=True)
        except (TierStoreError, TimeoutError) as error:
            logger.warning("%s: another version of the store answers now; which, it does not say: %s", self.url, error)
            return
        known, self.build, self.common_build = self.build, now.build, now.common_build
        if version[0] != before[0] and known and now.build and known != now.build:
            _warn_of_another_build(self.url, now, known)


def _warn_of_another_build(url: str, now: Description, known: str) -> None:
    logger.warning(
        "%s: connected again, to another version of the store than before: rows come from %s (digest %.12s) now, their "
        "digest was %.12s; if that is not meant, use 'tierstore swap' on the server's host",
        url, now.name, now.build, known,
    )  # fmt: skip
