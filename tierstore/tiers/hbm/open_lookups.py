"""The lookups from the device that one engine has opened, and the server of their mailboxes.

Input: the engine that answers what the device misses. Output: `DeviceLookup`s, which live until all are closed. Errors:
`BudgetError` if a lookup's buffers do not fit in the page-locked memory.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from ... import kernels
from ..engine import HostEngine, in_slices
from .lookup import DeviceLookup
from .row_lookup import DeviceRows
from .tier import HbmTier
from .times import DeviceTimes

PAIR_BYTES, ID_BYTES = 12, 8  # of a mailbox: a pair's key and number; a row id
LOOKUP_FRACTION = 1 / 4  # of the page-locked memory, at most, for the buffers of one lookup


class OpenLookups:
    """Its owner holds `lock` around every call but `move_to` and the fork hooks, and asks for none after it closed."""

    def __init__(self, what: str, engine: HostEngine, tier: HbmTier, times: DeviceTimes) -> None:
        """`what` names the store in errors; engine: answers what the device misses."""
        self._what, self._engine, self._tier, self._times = what, engine, tier, times
        self.lock = threading.Lock()  # guards `_lookups` and `_server`; held while they end, and through a fork
        self._lookups: list[DeviceLookup] = []
        self._server: kernels.MailboxServer | None = None  # from the first lookup on

    def open(self, index: int, tokens_max: int) -> DeviceLookup:
        """As `DeviceEngine.open_lookup`."""
        lookup = DeviceLookup(*self._arguments(index, tokens_max, by_row_id=False))
        self._lookups.append(lookup)
        return lookup

    def open_rows(self, index: int, tokens_max: int, within: tuple[int, int]) -> DeviceRows:
        """As `DeviceEngine.open_rows`."""
        rows = DeviceRows(*self._arguments(index, tokens_max, by_row_id=True), within=within)
        self._lookups.append(rows)
        return rows

    def _arguments(self, index: int, tokens_max: int, *, by_row_id: bool) -> tuple[Any, ...]:
        """Returns the arguments of a `DeviceLookup`, of as many tokens as its part of the page-locked memory holds."""
        if self._server is None:
            self._server = kernels.MailboxServer(self._engine.native)
        spec = self._tier.tables[index].spec
        pair_bytes = spec.entry_bytes + PAIR_BYTES + (ID_BYTES * spec.rows_per_key if by_row_id else 0)
        lookup_bytes = int(len(self._tier.pinned.block) * LOOKUP_FRACTION)
        tokens = max(1, min(tokens_max, lookup_bytes // (len(spec.orders) * pair_bytes)))
        return self._what, self._tier, self._engine, self._server, index, tokens, self._times

    def move_to(self, native: Any, timeout_s: float) -> bool:
        """Has another `kernels.Engine` answer from now on; returns whether the old one is not used any more. Blocks."""
        return self._server is None or bool(self._server.move_to(native, timeout_s))

    def steps_without_miss(self) -> int:
        """Returns how many steps asked the host for nothing. Blocks on the device."""
        return sum(lookup.steps_without_miss() for lookup in self._lookups)

    def end(self, deadline: float) -> bool:
        """Ends all lookups: no more are launched, those that were are answered, then nobody answers any more.

        deadline: of `time.monotonic`. Returns False if the time ran out; call it again.
        """
        for lookup in self._lookups:
            if not lookup.close(max(0.0, deadline - time.monotonic())):
                return False
        self._tier.end()
        return self._server is None or in_slices(self._server.close, max(0.0, deadline - time.monotonic()))

    def clear(self) -> None:
        """Forgets all lookups, which have ended."""
        self._lookups.clear()

    def before_fork(self) -> None:
        """Takes the server's lock. `lock` is held already."""
        if self._server is not None:
            self._server.before_fork()

    def after_fork(self, *, child: bool) -> None:
        """Gives it back, on either side."""
        if self._server is not None:
            self._server.after_fork(child)

    def abandon_in_child(self) -> None:
        """In a forked child: forgets all lookups; the device and the threads that might hold their locks are not
        there."""
        for lookup in self._lookups:
            lookup.abandon_in_child()
        self._lookups.clear()
