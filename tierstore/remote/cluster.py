"""Several servers behind one store, each of which holds a slice: see `Asked`.

Input: lookups of whole tables. Output: rows, each server's copied straight to its heads' places, all of one version.
Errors: `StoreNotReadyError` if the servers are at different versions and stay so, `DaemonError` if one does not answer
in time, and what servers raise.

A lookup is of one version: what the answers' versions have in common must be equal (`Member.common_build`), else all is
asked again. So it is with the client's own set: a lookup that uses it is of its version, or is made without it. A
server that has not said for CONFIRMED_S which version it is at, and is not asked anyway, is asked just that.

Shapes: N tokens, O orders, H rows per key, R rows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np

from .. import kernels
from ..errors import ConfigError, StoreNotReadyError
from ..tiers.engine import Request, VersionChangedError
from . import messages
from .channel import RETRY_S_MAX, RETRY_S_MIN
from .client_set import ClientSet
from .lanes import Lane, exchange
from .member import Member
from .merged import Merged, Shares
from .parts import Divided, divide
from .peer import ById
from .replies import Answer, Counted
from .requests import Attempt
from .set_keeper import SetKeeper
from .wire import encode

STATIC = kernels.SOURCES.index("static")
AGREE_S = 1.0  # that servers may take to be at one version when a store is connected
CONFIRMED_S = 0.25  # for which a version that a server has named counts without asking


class Cluster:
    """See `Asked`. version grows whenever the servers agree upon another version than before."""

    def __init__(self, members: Sequence[Member], dram_bytes: int) -> None:
        """dram_bytes: of the client's own set; 0: none. Raises `ConfigError` unless the slices are of one store."""
        self.members: Sequence[Member] = list(members)
        self.url = ", ".join(member.url for member in members)
        self.tables: Sequence[Divided] = divide({member.url: member.specs for member in members})
        self.version, self.build = 0, ""
        self._lock = threading.Lock()  # guards `version`, `build`, `_confirmed`
        self._confirmed = [0.0] * len(self.members)  # when each was last at `build`, by time.monotonic
        self._closed = threading.Event()
        self.keeper = SetKeeper(self, dram_bytes)

    def ask(
        self, lookups: Sequence[Request], by_id: ById | None, until: float
    ) -> tuple[Sequence[Counted], Sequence[Counted]]:
        answered = self._ask(lookups, by_id, until, self.keeper.current)
        self.keeper.wake()
        return answered[0], answered[1]

    def check_versions(self, until: float) -> None:
        """Has all servers name their versions; raises `StoreNotReadyError` unless they come to be at one soon."""
        pause_until = min(until, time.monotonic() + AGREE_S)
        while True:
            lanes = [Lane(member, [_what_version(member)]) for member in self.members]
            exchange(lanes, until, self._closed)
            try:
                self._agree(lanes, None, until)
                return
            except VersionChangedError as error:
                if time.monotonic() >= pause_until or self._closed.wait(RETRY_S_MIN):
                    raise StoreNotReadyError(str(error)) from error

    def look_up_for_set(self, request: Request, until: float) -> str:
        """Fills a request's buffer without the client's own set; returns what the version that answered has in
        common."""
        return self._ask([request], None, until, None)[2]

    def _ask(
        self, lookups: Sequence[Request], by_id: ById | None, until: float, own: ClientSet | None
    ) -> tuple[Sequence[Counted], Sequence[Counted], str]:
        """See `ask`; returns the build, too. own: the client's own set, if it is to be used."""
        pause_s = RETRY_S_MIN
        while True:
            try:
                return self._ask_once(lookups, by_id, until, own)
            except VersionChangedError as error:  # what was answered is of no version, or of another than our set
                reason = error
            if own is not None:
                self.keeper.drop(own)
                own = None
            elif time.monotonic() + pause_s >= until or self._closed.wait(pause_s):
                raise StoreNotReadyError(str(reason)) from reason
            else:
                pause_s = min(2 * pause_s, RETRY_S_MAX)

    def _ask_once(
        self, lookups: Sequence[Request], by_id: ById | None, until: float, own: ClientSet | None
    ) -> tuple[Sequence[Counted], Sequence[Counted], str]:
        shares = Shares(self.tables, [member.requests for member in self.members])
        has = [None if own is None else own.take(*request) for request in lookups]
        for request, of_own in zip(lookups, has, strict=True):
            shares.add_lookup(request, of_own)
        if by_id is not None:
            shares.add_rows(*by_id)
        lanes = [Lane(member, each) for member, each in zip(self.members, shares.attempts(), strict=True)]
        uses_own = any(of_own is not None for of_own in has)
        if uses_own:
            lanes = self._with_unconfirmed(lanes)
        exchange(lanes, until, self._closed)
        build = self._agree(lanes, own.common_build if own is not None and uses_own else None, until)
        by_key, rows = Merged(self.tables, lookups), []
        for number, lane in enumerate(lanes):
            by_key.add(number, [answer for answer in lane.answers if answer.is_by_key])
            rows += [answer for answer in lane.answers if not answer.is_by_key]
        by_key.add_own(has, shares.compact)
        return [by_key], rows, build

    def _with_unconfirmed(self, lanes: Sequence[Lane]) -> list[Lane]:
        """Returns the lanes, with a question of the version for members that said none lately, and are not asked."""
        now = time.monotonic()
        return [
            Lane(lane.member, [_what_version(lane.member)]) if lane.is_done and now - confirmed > CONFIRMED_S else lane
            for lane, confirmed in zip(lanes, self._confirmed, strict=True)
        ]

    def _agree(self, lanes: Sequence[Lane], expected: str | None, until: float) -> str:
        """Returns what the versions of all answers have in common, `build` if there are none.

        Raises `VersionChangedError` unless that is one thing, and `expected` if it is given.
        """
        found: dict[str, str] = {}
        for lane in lanes:
            versions = {answer.version for answer in lane.answers}
            if len(versions) > 1:
                raise VersionChangedError(f"{lane.member.url}: its store was changed between two requests")
            for version in versions:
                assert lane.connection is not None
                found[lane.member.url] = lane.member.common_build(lane.connection, version, until)
        builds = set(found.values())
        if len(builds) > 1:
            told = ", ".join(f"{url} at {build[:12]}" for url, build in found.items())
            raise VersionChangedError(
                f"the slices are at different versions: {told}; bring all to one, by 'tierstore swap' or 'publish'"
            )
        if expected is not None and (builds or {self.build}) != {expected}:
            raise VersionChangedError(f"{self.url}: another version answers than the client's own set is of")
        now = time.monotonic()
        with self._lock:
            for build in builds - {self.build}:
                self.version += bool(self.build)
                self.build, self._confirmed = build, [0.0] * len(self.members)
            for number, lane in enumerate(lanes):
                if lane.answers:
                    self._confirmed[number] = now
        own = self.keeper.current
        if own is not None and builds and builds != {own.common_build}:
            self.keeper.drop(own)
        return next(iter(builds), self.build)

    def locate(self, index: int, keys: np.ndarray, sources: np.ndarray, until: float) -> None:
        divided, own = self.tables[index], self.keeper.current
        sources[...] = 0
        for member, part in zip(self.members, divided.parts, strict=True):
            if divided.spec.is_plain:
                is_here = (keys >= part.row_start) & (keys < part.row_end)
                columns, asked = np.zeros(1, dtype=np.int64), np.where(is_here, keys - part.row_start, -1)
            elif divided.has_heads:
                columns, asked = part.columns, np.ascontiguousarray(keys[:, part.columns])
            else:
                raise ConfigError(
                    f"table {divided.spec.name}: slices begin or end inside a head, and so do not say what would "
                    "answer a key"
                )
            found = np.empty(asked.shape, dtype=np.uint8)
            if len(columns):
                member.requests.locate(member.connections[0], index, asked, found, until)
            for own_column, column in enumerate(columns):  # a key's rows may lie in several; the slowest counts
                np.maximum(sources[:, column], found[:, own_column], out=sources[:, column])
        has = None if own is None else own.take(index, keys, None)
        if has is not None:
            sources[has] = STATIC

    def close(self, timeout_s: float) -> bool:
        self._closed.set()
        until = time.monotonic() + timeout_s
        ended = [member.close(until - time.monotonic()) for member in self.members]
        return self.keeper.close(until - time.monotonic()) and all(ended)

    def before_fork(self) -> None:
        for member in self.members:
            member.before_fork()
        self._lock.acquire()
        self.keeper.before_fork()

    def after_fork(self, *, child: bool) -> None:
        self.keeper.after_fork(child=child)
        if child:
            self._lock = threading.Lock()
        else:
            self._lock.release()
        for member in reversed(self.members):
            member.after_fork(child=child)


def _what_version(member: Member) -> Attempt:
    """Returns what asks a server only which version it is at."""
    request = encode(messages.LookupRequest(member.requests.identity))
    return Attempt("Lookup", request, lambda: Answer(member.url, [], [], []), is_small=True)
