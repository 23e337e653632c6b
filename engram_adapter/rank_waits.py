"""Waits for other ranks: each has a limit, lets Ctrl-C through, and names the ranks that did not come.

Input: work of torch.distributed that is under way, and a store that all ranks share. Output: nothing. Errors:
`RankError`. After one, or an interrupt, nothing else may be exchanged: the others are in the middle of it.

To name ranks, each that waits long writes into the store which exchange it is in. The store may be of a process that
hangs, hence a thread asks it, for `GRACE_S`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from tierstore.errors import RankError

POLL_S = 0.05  # how late Ctrl-C may come
ANNOUNCE_S = 1.0  # a rank that has waited so long says so in the store
GRACE_S = 2.0  # for what other ranks announce, once an exchange has failed


class RankWaits:
    """The waits of one rank, and why no more are possible. `number` is of the exchange that is under way."""

    def __init__(self, rank: int, size: int, timeout_s: float, store: Any) -> None:
        """store: A store of torch.distributed, under a prefix of these ranks alone."""
        self.number = 0
        self._rank, self._size, self._timeout_s, self._store = rank, size, timeout_s, store
        self._process = os.getpid()
        self._broken: str | None = None

    def end(self, reason: str) -> None:
        """Allows no exchange from now on; waits of other threads end. The first reason counts."""
        self._broken = self._broken or reason

    def check(self, what: str) -> None:
        """Raises `RankError` if an exchange has failed before, or this is a fork, which would write to its parent's
        connections."""
        if os.getpid() != self._process:
            raise RankError(f"{what}: this process is a fork of rank {self._rank}, which alone may exchange")
        if self._broken is not None:
            raise RankError(f"{what}: no exchange of these ranks is possible any more: {self._broken}")

    @contextmanager
    def whole(self, what: str) -> Iterator[None]:
        """A body that other ranks take part in to its end: after any exception in it, no exchange is possible."""
        try:
            yield
        except BaseException as error:
            self.end(f"{what} ended with {type(error).__name__}: {error}")
            raise

    def wait(self, what: str, work: Any) -> None:
        """Waits for work, in short pieces. Raises `RankError` at the limit, or if a rank has left."""
        start = time.monotonic()
        announced = False
        with self.whole(what):
            while not self._ends(work, what, start):
                self.check(what)
                if not announced and time.monotonic() - start >= min(ANNOUNCE_S, self._timeout_s / 4):
                    announced = True
                    self._announce()

    def _ends(self, work: Any, what: str, start: float) -> bool:
        """Waits for `POLL_S`; returns whether the work has ended well."""
        had_ended = work.is_completed()  # asked before: work may end between a wait's time-out and its error
        try:
            work.wait(timedelta(seconds=POLL_S))
            return True
        except RuntimeError as error:
            waited_s = time.monotonic() - start
            if had_ended or waited_s >= self._timeout_s:
                raise self._late(what, waited_s, error) from error
            return False

    def failed(self, message: str, ranks: tuple[int, ...], what: str, waited_s: float = 0.0) -> RankError:
        """Returns the error of an exchange that failed; none follows."""
        self.end(message)
        return RankError(message, ranks=ranks, waited_for=what, waited_s=waited_s)

    def _late(self, what: str, waited_s: float, error: RuntimeError) -> RankError:
        timed_out = waited_s >= self._timeout_s
        self._announce()
        missing = self._missing(0.0 if timed_out else GRACE_S)
        who = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}" if missing else "a rank"
        how = f"did not come within {self._timeout_s:g} s" if timed_out else "left"
        message = (
            f"{who} {how}: rank {self._rank} of {self._size} waited {waited_s:.1f} s in {what}. See what that rank's "
            f"log says, and start all ranks again: they resume from the newest commit that all hold ({error})"
        )
        return self.failed(message, missing, what, waited_s)

    def _announce(self) -> None:
        """Writes that this rank waits, and in which exchange."""
        _within(GRACE_S, lambda: self._store.set(str(self._rank), str(self.number)))

    def _missing(self, grace_s: float) -> tuple[int, ...]:
        """Returns the ranks that wait neither in this exchange nor in a later one; () if the store does not answer."""

        def look() -> tuple[int, ...]:
            until = time.monotonic() + grace_s
            while True:
                others = [rank for rank in range(self._size) if rank != self._rank]
                missing = tuple(rank for rank in others if not self._waits(rank))
                if len(missing) <= 1 or time.monotonic() >= until:
                    return missing
                time.sleep(POLL_S)

        return _within(grace_s + GRACE_S, look) or ()

    def _waits(self, rank: int) -> bool:
        return self._store.check([str(rank)]) and int(self._store.get(str(rank))) >= self.number


def _within(limit_s: float, call: Callable[[], Any]) -> Any:
    """Returns what a call returns; None if it fails or takes longer than `limit_s`."""
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(call())
        except Exception:  # a store whose process is gone: the caller's own error says more
            found.append(None)

    thread = threading.Thread(target=work, name="tierstore-ranks-store", daemon=True)
    thread.start()
    thread.join(limit_s)
    return found[0] if found else None
