"""Several servers behind one store, each of which holds a slice: see `Asked`.

Input: lookups of whole tables. Output: rows, each server's copied straight to its heads' places, all of one version.
Errors: `StoreNotReadyError` if the servers are at different versions and stay so, `DaemonError` if one does not answer
in time, and what servers raise.

A lookup is of one version: what the answers' versions have in common must be equal (`Member.common_build`), else all is
asked again. So it is with the client's own set: a lookup that uses it is of its version, or is made without it. A
server that has not named its version for CONFIRMED_S, and is not asked anyway, is asked just that.

Shapes: N tokens, O orders, H rows per key, R rows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np

from .. import kernels
from ..errors import ConfigError, DaemonError, StoreNotReadyError, TierStoreError
from ..tiers.engine import Request, VersionChangedError
from . import messages
from .channel import FORK_WAIT_S, RETRY_S_MAX, RETRY_S_MIN, TryAgainError
from .client_set import ClientSet
from .exchanges import Exchange, carry_out
from .inside import Inside
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
        self._inside = Inside()  # threads with requests under way
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
            began = time.monotonic()
            exchanges = [Exchange(member, [_what_version(member)]) for member in self.members]
            with self._inside.of_thread():
                carry_out(exchanges, until, self._closed)
            try:
                self._agree(exchanges, None, until, began)
                return
            except (VersionChangedError, TryAgainError) as error:
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
                if own is not None:
                    self.keeper.drop(own)
                    own = None
                    continue
                failed: TierStoreError = StoreNotReadyError(str(error))
            except TryAgainError as error:  # a server left before it named its version
                failed = DaemonError(str(error))
            if time.monotonic() + pause_s >= until or self._closed.wait(pause_s):
                raise failed
            pause_s = min(2 * pause_s, RETRY_S_MAX)

    def _ask_once(
        self, lookups: Sequence[Request], by_id: ById | None, until: float, own: ClientSet | None
    ) -> tuple[Sequence[Counted], Sequence[Counted], str]:
        began = time.monotonic()
        shares = Shares(self.tables, [member.requests for member in self.members])
        has = [None if own is None else own.take(*request) for request in lookups]
        for request, of_own in zip(lookups, has, strict=True):
            shares.add_lookup(request, of_own)
        if by_id is not None:
            shares.add_rows(*by_id)
        exchanges = [Exchange(member, each) for member, each in zip(self.members, shares.attempts(), strict=True)]
        uses_own = any(of_own is not None for of_own in has)
        if uses_own:
            exchanges = self._with_unconfirmed(exchanges)
        with self._inside.of_thread():
            carry_out(exchanges, until, self._closed)
        build = self._agree(exchanges, own.common_build if own is not None and uses_own else None, until, began)
        by_key, rows = Merged(self.tables, lookups), []
        for number, each in enumerate(exchanges):
            by_key.add(number, [answer for answer in each.answers if answer.is_by_key])
            rows += [answer for answer in each.answers if not answer.is_by_key]
        by_key.add_own(has, shares.compact)
        return [by_key], rows, build

    def _with_unconfirmed(self, exchanges: Sequence[Exchange]) -> list[Exchange]:
        """Returns the exchanges, and of members that are not asked and named no version lately a question of it."""
        since = time.monotonic() - CONFIRMED_S
        return [
            Exchange(each.member, [_what_version(each.member)]) if each.is_done and confirmed < since else each
            for each, confirmed in zip(exchanges, self._confirmed, strict=True)
        ]

    def _agree(self, exchanges: Sequence[Exchange], expected: str | None, until: float, began: float) -> str:
        """Returns what the versions of all answers have in common, `build` without an answer; began: before they were
        asked for.

        Raises `VersionChangedError` unless that is one thing, and `expected` if it is given.
        """
        found: dict[str, str] = {}
        for each in exchanges:
            versions = {answer.version for answer in each.answers}
            if len(versions) > 1:
                raise VersionChangedError(f"{each.member.url}: its store was changed between two requests")
            for version in versions:
                assert each.connection is not None
                found[each.member.url] = each.member.common_build(each.connection, version, until)
        builds = set(found.values())
        if len(builds) > 1:
            listed = ", ".join(f"{url} at {build[:12]}" for url, build in found.items())
            raise VersionChangedError(
                f"the slices are at different versions: {listed}; bring all to one, by 'tierstore swap' or 'publish'"
            )
        if expected is not None and (builds or {self.build}) != {expected}:
            raise VersionChangedError(f"{self.url}: another version answers than the client's own set is of")
        with self._lock:
            for build in builds - {self.build}:
                self.version += bool(self.build)
                self.build, self._confirmed = build, [0.0] * len(self.members)
            for number, each in enumerate(exchanges):
                if each.answers:
                    self._confirmed[number] = max(self._confirmed[number], began)  # it may have answered at once
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
                member.locate(index, asked, found, until)
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
        self._inside.close_for_fork(FORK_WAIT_S)
        for member in self.members:
            member.before_fork()
        self._lock.acquire()
        self.keeper.before_fork()

    def after_fork(self, *, child: bool) -> None:
        self.keeper.after_fork(child=child)
        if child:
            self._lock, self._inside = threading.Lock(), Inside()
        else:
            self._lock.release()
        for member in reversed(self.members):
            member.after_fork(child=child)
        if not child:
            self._inside.open_after_fork()


def _what_version(member: Member) -> Attempt:
    """Returns what asks a server only which version it is at."""
    request = encode(messages.LookupRequest(member.requests.identity))
    return Attempt("Lookup", request, lambda: Answer(member.url, [], [], []), is_small=True)
