"""One slice behind a store of several: its server, or replicas of it, of which one answers at a time.

Input: connections, the preferred one first. Output: calls to whichever is there; what all slices of a store have in
common at the version that answered. Errors: `DaemonError` if none is there, `ConfigError` for replicas of different
tables.

A replica that cannot be reached, does not answer, or answers what is no answer, is passed over for a while. A thread
asks it again, so that no lookup waits for it; once it answers, it takes its place in the order again. If all replicas
answer garbage, that is raised at once: to wait does not help.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from ..errors import ConfigError, DaemonError, FormatError, TierStoreError
from ..spec import TableSpec
from ..tiers.engine import VersionChangedError
from .channel import Connection, NotUnderstoodError, OverdueError, Stream, TryAgainError
from .messages import Description
from .peer import describe
from .requests import Attempt, Call, Requests

logger = logging.getLogger("tierstore")

AWAY_S_MIN, AWAY_S_MAX = 0.25, 5.0  # that a replica which failed is passed over, before it is asked again
PROBE_S = 2.0  # within which it must then answer
TRY_FRACTION = 0.4  # of the time that is left, which one replica may take while there are others
BUILDS_MAX = 64  # remembered, of versions that answered
GARBAGE = (FormatError, NotUnderstoodError)
PASSED_OVER = (TryAgainError, OverdueError, *GARBAGE)  # what has another replica asked

T = TypeVar("T")


class Member:
    """Any thread may call. `requests` makes what is asked of it; `specs` are its tables'."""

    def __init__(self, connections: Sequence[Connection], until: float) -> None:
        """Asks every replica what it has; blocks until then. One must answer."""
        self.connections = list(connections)
        self.url = "|".join(connection.url for connection in connections)
        self._lock = threading.Lock()  # guards `_current`, `_away`, `_garbled`, `_probing`, `_builds`
        self._current = 0
        self._away: dict[int, tuple[float, float]] = {}  # replica -> not before when, and the pause after it
        self._garbled: set[int] = set()  # those of `_away` that answered garbage last
        self._probing: threading.Thread | None = None
        self._builds: dict[tuple[int, int], str] = {}
        self._closed = False
        for connection in self.connections:
            connection.is_probed = len(self.connections) == 1  # of the time that it takes, the others need all
        found = self._describe_all(until)
        description, self.specs = found[0]
        for other, specs in found[1:]:
            if specs != self.specs:
                raise ConfigError(f"{self.url}: {other.name} has other tables than {description.name}: no replicas")
        self.attachments = {attachment.name: bytes(attachment.value) for attachment in description.attachments}
        description.tokens_max = min(each.tokens_max for each, _ in found)
        description.message_bytes_max = min(each.message_bytes_max for each, _ in found)
        self.requests = Requests(self.url, [spec.local for spec in self.specs], description)

    def begin(self, attempt: Attempt, until: float) -> Stream:
        """Sends a request to the replica whose turn it is, and returns at once. No fork may come before its end."""
        connection, until = self._turn(until)
        return connection.begin(attempt.method, attempt.request, until, patient=len(self.connections) == 1)

    def ask(self, attempt: Attempt, until: float) -> tuple[Connection, bytes]:
        """Returns who answered a request, and the one answer; asks the replica whose turn it is, once."""
        connection, soon = self._turn(until)
        try:
            return connection, connection.unary(
                attempt.method, attempt.request, soon, patient=len(self.connections) == 1
            )
        except PASSED_OVER as error:
            raise self.passed_over(connection, error) from None

    def answered(self, ask: Callable[[Call], T], until: float) -> T:
        """Returns what `ask` makes of a replica's answers, which it gets by the call that it is handed.

        Asks other replicas, and again, until `until`; `ask` raises `FormatError` for what is no answer.
        """

        def ask_one() -> T:
            connection, soon = self._turn(until)

            def call(method: str, request: bytes, _: float) -> bytes:
                return connection.unary(method, request, soon, patient=len(self.connections) == 1)

            try:
                return ask(call)
            except PASSED_OVER as error:
                raise self.passed_over(connection, error) from None

        return self.connections[0].tried(ask_one, until)

    def locate(self, index: int, keys: np.ndarray, sources: np.ndarray, until: float) -> None:
        """As `Requests.locate`, of whichever replica answers."""
        self.answered(lambda call: self.requests.locate(call, index, keys, sources, until), until)

    def passed_over(self, connection: Connection, error: TierStoreError) -> TierStoreError:
        """Takes note that a replica failed. Returns the error to raise: one that says to try again if there are
        others, unless all that are left answer garbage."""
        if len(self.connections) == 1:
            return error
        index, now = self.connections.index(connection), time.monotonic()
        with self._lock:
            _, pause_s = self._away.get(index, (0.0, AWAY_S_MIN / 2))
            # One that answers garbage may still say well what it has, so a probe does not show when it is mended.
            pause_s = AWAY_S_MAX if isinstance(error, GARBAGE) else min(2 * pause_s, AWAY_S_MAX)
            self._away[index] = now + pause_s, pause_s
            (self._garbled.add if isinstance(error, GARBAGE) else self._garbled.discard)(index)
            others = sorted(range(len(self.connections)), key=lambda each: (self._away.get(each, (0.0,))[0], each))
            if self._current == index:
                self._current = others[0]
                logger.warning("%s: asking %s now", error, self.connections[self._current].url)
            garbled = {each for each in self._garbled if self._away[each][0] > now}
        return error if len(garbled) == len(self.connections) else TryAgainError(str(error))

    def common_build(self, connection: Connection, version: tuple[int, int], until: float) -> str:
        """Returns what all slices have in common at a version that answered.

        Raises `VersionChangedError` if the server is at another one by now: what it answered is of an unknown version.
        """
        known = self._builds.get(version)
        if known is not None:
            return known
        is_alone = len(self.connections) == 1
        soon = until if is_alone else time.monotonic() + (until - time.monotonic()) * TRY_FRACTION
        try:
            description, _ = describe(connection, soon, patient=is_alone)
        except PASSED_OVER as error:
            raise self.passed_over(connection, error) from None
        if not description.common_build:
            raise ConfigError(f"{connection.url} does not say of which version its rows are; update the server")
        if description.instance and not version[0]:
            nameless = FormatError(f"{connection.url} answered without its version; is that a tierstore?")
            raise self.passed_over(connection, nameless)
        with self._lock:
            if len(self._builds) >= BUILDS_MAX:
                self._builds.clear()
            self._builds[description.instance, description.version] = description.common_build
        if (description.instance, description.version) != version:
            raise VersionChangedError(f"{connection.url}: its store was changed after it answered")
        return description.common_build

    def close(self, timeout_s: float) -> bool:
        """Ends the thread that asks for replicas, and closes the connections."""
        self._closed = True
        for connection in self.connections:
            connection.close()
        probing = self._probing
        if probing is not None:
            probing.join(max(0.0, timeout_s))
        return probing is None or not probing.is_alive()

    def before_fork(self) -> None:
        """As of `Engine`."""
        for connection in self.connections:
            connection.before_fork()
        self._lock.acquire()

    def after_fork(self, *, child: bool) -> None:
        """As of `Engine`."""
        if child:
            self._lock, self._probing = threading.Lock(), None
        else:
            self._lock.release()
        for connection in reversed(self.connections):
            connection.after_fork(child=child)

    def _describe_all(self, until: float) -> list[tuple[Description, list[TableSpec]]]:
        found, failed = list[tuple[Description, list[TableSpec]]](), list[TierStoreError]()
        for connection in self.connections:
            left = until - time.monotonic()
            try:
                soon = until if len(self.connections) == 1 else time.monotonic() + left / 2
                found.append(describe(connection, soon, patient=False))
            except (DaemonError, FormatError) as error:
                failed.append(error)
                self.passed_over(connection, error)
        if not found:
            raise failed[0] if isinstance(failed[0], FormatError) else DaemonError(str(failed[0]))
        return found

    def _turn(self, until: float) -> tuple[Connection, float]:
        """Returns the replica to ask, and until when it may take."""
        if len(self.connections) == 1:
            return self.connections[0], until
        now = time.monotonic()
        if self._current and min(self._away.get(index, (0.0,))[0] for index in range(self._current)) <= now:
            self._probe()
        return self.connections[self._current], now + (until - now) * TRY_FRACTION

    def _probe(self) -> None:
        """Starts a thread that asks the replicas before the current one whether they are back, unless one does."""
        with self._lock:
            if self._closed or (self._probing is not None and self._probing.is_alive()):
                return
            self._probing = threading.Thread(target=self._ask_for_better, name="tierstore-replicas", daemon=True)
            self._probing.start()

    def _ask_for_better(self) -> None:
        for index in range(self._current):
            if self._closed or self._away.get(index, (0.0,))[0] > time.monotonic():
                continue
            connection = self.connections[index]
            try:
                _, specs = describe(connection, time.monotonic() + PROBE_S, patient=False)
                if specs != self.specs:
                    raise DaemonError(f"{connection.url}: it has other tables now")
            except (TierStoreError, TimeoutError) as error:
                self.passed_over(connection, error if isinstance(error, GARBAGE) else DaemonError(str(error)))
                continue
            with self._lock:
                self._away.pop(index, None)
                self._garbled.discard(index)
                self._current = min(self._current, index)
            logger.info("%s answers again", connection.url)
            return
