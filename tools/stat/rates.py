"""What two stat records of a daemon say of the time between them: rates, hit rates, quantiles of latency. Pure.

Input: two records, and the seconds between them. Output: numbers, NaN if there is nothing to divide; None if the later
record is of another daemon, or of one that was started anew. Errors: none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tierstore.daemon.counts import Counts, counts_of, reads_of, total_of
from tierstore.daemon.record import StatRecord


@dataclass(frozen=True)
class Rates:
    """What went on between two records: counts of the keys by (table, order), and rates a second."""

    seconds: float
    counts: dict[tuple[str, int], Counts]
    batches_s: float
    reads_s: float
    read_bytes_s: float
    latency_counts: list[int]
    client_keys_s: dict[int, float]  # by `ClientInfo.id`: one process may have several connections

    @property
    def total(self) -> Counts:
        return total_of(self.counts)

    @property
    def keys_s(self) -> float:
        return self.total.keys / self.seconds


def rates_between(earlier: StatRecord, later: StatRecord, seconds: float) -> Rates | None:
    """Returns what went on in the `seconds` between two records of one daemon; None if they are of two, or of one
    moment."""
    same = (earlier.daemon.pid, earlier.daemon.started_at) == (later.daemon.pid, later.daemon.started_at)
    if not same or seconds <= 0 or earlier.latency.bounds_ns != later.latency.bounds_ns:
        return None
    before, none = counts_of(earlier), Counts(0, 0, 0, 0)  # a new version may bring tables
    before_keys = {client.id: client.keys for client in earlier.clients.list}
    return Rates(
        seconds=seconds,
        counts={name: now - before.get(name, none) for name, now in counts_of(later).items()},
        batches_s=(later.counters.batches - earlier.counters.batches) / seconds,
        reads_s=(reads_of(later) - reads_of(earlier)) / seconds,
        read_bytes_s=(later.counters.bytes_read - earlier.counters.bytes_read) / seconds,
        latency_counts=[now - then for then, now in zip(earlier.latency.counts, later.latency.counts, strict=True)],
        client_keys_s={
            client.id: max(0, client.keys - before_keys.get(client.id, 0)) / seconds for client in later.clients.list
        },
    )


def quantile_ns(bounds_ns: Sequence[float], counts: Sequence[int], share: float) -> float:
    """Returns the latency that `share` of the lookups took at most, from a histogram of bounds and one count more.

    Within a bucket lookups count as evenly spread. NaN if nothing was timed; infinity above the last bound.
    """
    assert len(counts) == len(bounds_ns) + 1
    total = sum(counts)
    if not total:
        return math.nan
    rank, below, lower = share * total, 0, 0.0
    for bound, count in zip(bounds_ns, counts, strict=False):
        if count and below + count >= rank:
            return lower + (bound - lower) * (rank - below) / count
        below, lower = below + count, bound
    return math.inf
