"""What a server of lookups by gRPC lets its clients take: calls and bytes in flight, requests a second, and time.

Input: the beginnings and ends of calls. Output: permission. Errors: a `Refusal` with both numbers. A thread cancels
calls that are past their deadline, or whose client takes nothing off the wire. Nothing here knows rows or tables.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from ..errors import DaemonError

CALL_WAIT_S = 30.0  # of a call that names no deadline
CALL_WAIT_S_MAX = 300.0  # of any call
STALL_WAIT_S = 10.0  # that a client may leave a message untaken, or its request unsent
POLL_S = 0.25
PEERS_MAX = 1024  # whose rates are remembered
PEER_FRACTION = 0.75  # of all calls, and of all bytes, that one peer may take, so that others find room


class Refusal(DaemonError):
    """A request beyond a limit. retry: whether the same request may be taken later."""

    def __init__(self, text: str, *, retry: bool) -> None:
        super().__init__(text)
        self.retry = retry


class InFlight:
    """Calls, and the bytes that they hold in memory, in all and of each peer. Any thread may call."""

    def __init__(self, calls_max: int, bytes_max: int) -> None:
        self.calls_max, self.bytes_max = calls_max, bytes_max
        self._peer_calls_max = math.ceil(PEER_FRACTION * calls_max)
        self._peer_bytes_max = math.ceil(PEER_FRACTION * bytes_max)
        self._calls, self._bytes = _Counts(), _Counts()
        self._lock = threading.Lock()  # guards `_calls`, `_bytes`

    @property
    def num_calls(self) -> int:
        """Calls under way."""
        return self._calls.total

    def call(self, peer: str = "") -> AbstractContextManager[None]:
        """Counts a call while it lasts; raises `Refusal` if there are too many, or too many of the peer."""
        return _Counted(self._begin, self._calls, self._lock, peer, 1)

    def holding(self, num_bytes: int, peer: str = "") -> AbstractContextManager[None]:
        """Counts bytes while they are held; raises `Refusal` if there are too many, or, beside others, of the peer."""
        return _Counted(self._hold, self._bytes, self._lock, peer, num_bytes)

    def _begin(self, peer: str, number: int) -> None:
        """Counts a call; the caller has the lock."""
        num_calls, of_peer = self._calls.total, self._calls.by_peer.get(peer, 0)
        if num_calls >= self.calls_max:
            raise Refusal(f"{num_calls} calls are under way, at most {self.calls_max} may be; try again", retry=True)
        if of_peer >= self._peer_calls_max:
            raise Refusal(
                f"{of_peer} calls of {peer} are under way, at most {self._peer_calls_max} of one host may be; "
                "try again",
                retry=True,
            )
        self._calls.add(peer, number)

    def _hold(self, peer: str, num_bytes: int) -> None:
        """Counts bytes; the caller has the lock."""
        held, of_peer = self._bytes.total, self._bytes.by_peer.get(peer, 0)
        if held + num_bytes > self.bytes_max:
            retry = num_bytes <= self.bytes_max
            raise Refusal(
                f"{num_bytes} bytes, with the {held} that other calls hold, are more than the {self.bytes_max} of "
                f"all calls; {'try again' if retry else 'ask for less at once'}",
                retry=retry,
            )
        if of_peer and of_peer + num_bytes > self._peer_bytes_max:
            raise Refusal(
                f"{num_bytes} bytes, with the {of_peer} that other calls of {peer} hold, are more than the "
                f"{self._peer_bytes_max} of one host; try again",
                retry=True,
            )
        self._bytes.add(peer, num_bytes)


class _Counts:
    """A count of each peer, none of them 0, and their sum."""

    def __init__(self) -> None:
        self.total = 0
        self.by_peer: dict[str, int] = {}

    def add(self, peer: str, number: int) -> None:
        """Adds to a peer's count, or takes off. Where there is no memory to add, nothing is added."""
        total, of_peer = self.total + number, self.by_peer.get(peer, 0) + number
        if of_peer:
            self.by_peer[peer] = of_peer
        else:
            self.by_peer.pop(peer, None)
        self.total = total


class _Counted:
    """What is counted of a peer while a `with` lasts. A class: as a generator it would cost each call more."""

    __slots__ = ("_add", "_counts", "_lock", "_number", "_peer")

    def __init__(
        self, add: Callable[[str, int], None], counts: _Counts, lock: threading.Lock, peer: str, number: int
    ) -> None:
        """add: counts, or raises. lock: guards the counts."""
        self._add, self._counts, self._lock, self._peer, self._number = add, counts, lock, peer, number

    def __enter__(self) -> None:
        with self._lock:
            self._add(self._peer, self._number)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._counts.add(self._peer, -self._number)


class Rates:
    """Requests a second of each peer, by a token bucket that holds one second of requests. Any thread may call."""

    def __init__(self, per_second: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """per_second: above 0, or None for no limit."""
        self._per_second = per_second
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # requests left, when that was; oldest first
        self._lock = threading.Lock()  # guards `_buckets`

    def take(self, peer: str) -> None:
        """Counts a request of a peer; raises `Refusal` if it asks too often."""
        if self._per_second is None:
            return
        most = max(1.0, self._per_second)
        with self._lock:
            now = self._clock()
            left, at = self._buckets.pop(peer, (most, now))
            left = min(most, left + (now - at) * self._per_second)
            self._buckets[peer] = (max(left - 1, 0.0) if left >= 1 else left, now)
            if len(self._buckets) > PEERS_MAX:
                del self._buckets[next(iter(self._buckets))]
        if left < 1:
            raise Refusal(
                f"more than {self._per_second:g} requests a second from {peer}; ask for more in each", retry=True
            )


class Deadline:
    """When a call is cancelled: at its deadline, or when its client has not moved for STALL_WAIT_S.
    The call's thread writes it."""

    def __init__(self, context: Any, expires_at: float, peer: str = "") -> None:
        """peer: what the call's client is counted by."""
        self.context, self.expires_at, self.peer = context, expires_at, peer
        self.stalls_at: float | None = None

    def waiting_for_client(self) -> AbstractContextManager[None]:
        """While this lasts, it is the client's turn."""
        return _ClientsTurn(self)

    def has_passed(self, now: float) -> bool:
        """Whether the call must be cancelled."""
        stalls_at = self.stalls_at
        return now >= self.expires_at or (stalls_at is not None and now >= stalls_at)

    def is_over(self) -> bool:
        """Whether nobody waits for the call's answer any more."""
        return not self.context.is_active() or self.has_passed(time.monotonic())


class _ClientsTurn:
    """See `Deadline.waiting_for_client`."""

    __slots__ = ("_call",)

    def __init__(self, call: Deadline) -> None:
        self._call = call

    def __enter__(self) -> None:
        self._call.stalls_at = time.monotonic() + STALL_WAIT_S

    def __exit__(self, *_: object) -> None:
        self._call.stalls_at = None


class Deadlines:
    """Cancels calls in time, by a thread of its own. Any thread may call."""

    def __init__(self) -> None:
        self._calls: set[Deadline] = set()
        self._lock = threading.Lock()  # guards `_calls`
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tierstore-remote-deadlines", daemon=True)
        self._thread.start()

    def of(self, context: Any, peer: str = "") -> AbstractContextManager[Deadline]:
        """Watches a call of a peer while it lasts. One that names no deadline gets CALL_WAIT_S."""
        remaining = context.time_remaining()
        seconds = CALL_WAIT_S if remaining is None or remaining > 1e6 else min(remaining, CALL_WAIT_S_MAX)
        return _Watched(Deadline(context, time.monotonic() + seconds, peer), self._calls, self._lock)

    def stop(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(POLL_S):
            now = time.monotonic()
            with self._lock:
                passed = [call for call in self._calls if call.has_passed(now)]
            for call in passed:
                call.context.cancel()


class _Watched:
    """See `Deadlines.of`."""

    __slots__ = ("_call", "_calls", "_lock")

    def __init__(self, call: Deadline, calls: set[Deadline], lock: threading.Lock) -> None:
        """calls: what is watched; lock: guards it."""
        self._call, self._calls, self._lock = call, calls, lock

    def __enter__(self) -> Deadline:
        with self._lock:
            self._calls.add(self._call)
        return self._call

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._calls.discard(self._call)
