"""Reports of an attached store's counters to its daemon, so that the daemon shows what its clients looked up.

Input: the store's counters, which only grow. Output: one message a report. A report counts from the start of its
connection: what earlier connections have reported, the daemon has kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from ..ipc.channel import Channel
from ..ipc.messages import EngineCounters, FromClient
from ..stats import counters_since

SEND_S = 1.0  # that a message may take


class CounterReports:
    """The reports of one store. One thread at a time may call."""

    def __init__(self, counters: Callable[[], Any]) -> None:
        """counters: returns the store's counters of now."""
        self._counters = counters
        self._reported: Any = None  # the newest report's counters, counted from the store's opening
        self._reported_before: Any = None  # the same of the connections before this one

    def send(self, channel: Channel) -> None:
        """Reports what was counted since this connection began. Blocks, SEND_S at most; raises as `Channel.send`."""
        counters = self._counters()
        since = msgspec.convert(counters_since(counters, self._reported_before), EngineCounters)
        channel.send(FromClient(counters=since), timeout_s=SEND_S)
        self._reported = counters  # only now: what was not sent is part of the next report

    def end_connection(self) -> None:
        """Begins anew for the next connection."""
        self._reported_before = self._reported
