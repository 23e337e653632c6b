"""Who waits where: each rank that waits long writes it into a store that all share, so that errors can name the others.

Input: a store of torch.distributed. Output: the ranks that do not wait. Errors: none, since this is for the message of
another error. The store may be of a process that hangs, hence a thread asks it, for `GRACE_S`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

GRACE_S = 2.0  # for what other ranks announce, once an exchange has failed
POLL_S = 0.05


class RankRoll:
    """The ranks that wait, by the number of the exchange that each is in."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        """store: A prefix of these ranks alone. rank: This one of `size`."""
        self._store, self._rank, self._size = store, rank, size

    def announce(self, number: int) -> None:
        """Writes that this rank waits in exchange `number`."""
        _within(GRACE_S, lambda: self._store.set(str(self._rank), str(number)))

    def missing(self, number: int, grace_s: float) -> tuple[int, ...]:
        """Returns the ranks that do not wait in exchange `number`, or a later one; () if the store does not answer."""

        def look() -> tuple[int, ...]:
            until = time.monotonic() + grace_s
            while True:
                others = [rank for rank in range(self._size) if rank != self._rank]
                missing = tuple(rank for rank in others if not self._waits(rank, number))
                if len(missing) <= 1 or time.monotonic() >= until:
                    return missing
                time.sleep(POLL_S)

        return _within(grace_s + GRACE_S, look) or ()

    def _waits(self, rank: int, number: int) -> bool:
        return self._store.check([str(rank)]) and int(self._store.get(str(rank))) >= number


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
