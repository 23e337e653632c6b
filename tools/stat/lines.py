"""The stat record of a daemon in lines of text: who serves what, what needs the operator's eye, how lookups fare.

Input: a record, and the rates since an earlier one if there is one. Output: lines, most of at most 80 columns. Errors:
none; nothing is fetched here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from tierstore.daemon.counts import counts_of, expected_rate, reads_of, total_of
from tierstore.daemon.record import StatRecord, ratio, read_amplification
from tierstore.units import format_bytes

from ..report.tables import percent
from .rates import Rates, quantile_ns
from .words import UNKNOWN, bytes_a_second, duration, latency_text, number_text, share_text, short_count

LOST_FRACTION_MAX = 0.01  # of reports, missed keys, remote calls: what is below is counted, but needs no eye
FULL_FRACTION = 0.99  # of a recency cache, from which on it is not called warming


def heading(record: StatRecord, now_s: float) -> list[str]:
    """Returns who serves what."""
    daemon, store, epochs = record.daemon, record.store, record.epochs
    before = f" (before: {store.previous})" if store.previous else ""
    rows = f", version {store.published} of its rows" if store.published else ""
    return [
        f"tierstore {daemon.release}, {daemon.state}, pid {daemon.pid}, "
        f"up {duration(now_s - daemon.started_at)}, {daemon.socket}",
        f"generation {store.version}, epoch {epochs.current}, {store.path}{rows}{before}",
    ]


def concerns(record: StatRecord) -> list[str]:
    """Returns what an operator should look at, a line each; nothing on a healthy daemon."""
    epochs, learning, feed = record.epochs, record.learning, record.feed
    memory, clients, remote = record.memory, record.clients, record.remote
    found = []
    if memory.used_bytes > memory.budget_bytes:
        over = format_bytes(memory.used_bytes - memory.budget_bytes)
        found.append(f"memory in use is {over} above the budget: please report this")
    if epochs.alive > 1 and epochs.waiting_for:
        pids = ", ".join(map(str, epochs.waiting_for))
        found.append(f"the old epoch waits for pid {pids}: a process leaves it at its next lookup, or when it ends")
    if feed.errors:
        found.append(f"{feed.errors:,} missed keys could not be read: run tierstore verify {record.store.path}")
    lost = ratio(learning.reports_lost, learning.reports + learning.reports_lost)
    if lost > LOST_FRACTION_MAX:
        found.append(f"{percent(lost)} of the reports were lost: the daemon is short of processor time")
    dropped = ratio(feed.dropped_keys, feed.read_keys + feed.dropped_keys)
    if dropped > LOST_FRACTION_MAX:
        found.append(_dropped(dropped, record))
    if learning.reports_refused:
        found.append(f"{learning.reports_refused:,} reports made no sense: a client is broken, or hostile")
    if clients.attached >= clients.max:
        found.append(f"all {clients.max} clients that may attach are attached: more are refused")
    if remote and ratio(remote.errors, remote.calls) > LOST_FRACTION_MAX:
        found.append(f"{remote.errors:,} of {remote.calls:,} remote calls failed; the log says why")
    return found


def _dropped(share: float, record: StatRecord) -> str:
    """Says that many missed keys were dropped, which costs hits of the recency cache, and what to do."""
    fewer = f"run 'tierstore replan {record.daemon.socket}'"
    if record.plan is None:
        fewer = "no plan made its placement: run 'tierstore profile' and 'tierstore plan', then send the daemon SIGHUP"
    return (
        f"{percent(share)} of the missed keys were dropped: misses come faster than the daemon reads them for its "
        f"recency cache, which costs hits and no rows; {fewer}, or give it more --dram"
    )


def summary(record: StatRecord, rates: Rates | None) -> list[str]:
    """Returns hit rate, lookups, latency and NVMe: now, if there are rates, and since the start; then what was
    planned."""
    counters = record.counters
    total = total_of(counts_of(record))
    amplification = number_text(read_amplification(record), "{:.1f}")
    untouched = share_text(ratio(counters.zero_miss_batches, counters.batches))
    lines = []
    if rates is not None:
        lines += [
            f"now    hit rate {share_text(rates.total.hit_rate)}, {short_count(rates.keys_s)} keys/s in "
            f"{short_count(rates.batches_s)} lookups/s, {_quantiles(rates.latency_counts, record)}",
            f"       NVMe {short_count(rates.reads_s)} reads/s, {bytes_a_second(rates.read_bytes_s)}",
        ]
    return [
        *lines,
        f"total  hit rate {share_text(total.hit_rate)}, {short_count(total.keys)} keys in "
        f"{short_count(counters.batches)} lookups, {_quantiles(record.latency.counts, record)}",
        f"       NVMe {short_count(reads_of(record))} reads, {format_bytes(counters.bytes_read)}, "
        f"{amplification} times what was missed",
        f"       {untouched} of lookups missed nothing{_not_among_the_keys(record)}",
        *_planned(record, total.hit_rate),
        *_warming(record),
    ]


def _not_among_the_keys(record: StatRecord) -> str:
    """Returns what was looked up and is in no count of keys."""
    counters, parts = record.counters, []
    if counters.rows:
        in_dram = ratio(counters.rows - counters.rows_missed, counters.rows)
        parts.append(f"{short_count(counters.rows)} rows by their ids, {share_text(in_dram)} from DRAM")
    with_hbm = sum(client.has_hbm for client in record.clients.list)
    if with_hbm:
        parts.append(f"what the GPUs of {with_hbm} clients found: see their own stats()")
    return "".join(f"\n       not among the keys: {part}" for part in parts)


def _planned(record: StatRecord, measured: float) -> list[str]:
    """Returns the hit rate that the placement's plan expected, beside the one that is measured."""
    expected = expected_rate(record)
    if expected is None or record.plan is None:
        return []
    rate, low, high = map(share_text, (expected.expected, expected.low, expected.high))
    return [f"plan   expected {rate} ({low} to {high}) of epoch {record.plan.epoch}, measured {share_text(measured)}"]


def _warming(record: StatRecord) -> list[str]:
    """Returns how far the recency caches have filled, as long as they have room: hit rates still rise."""
    share = ratio(sum(record.epochs.recency_entries.values()), sum(record.epochs.recency_slots.values()))
    if math.isnan(share) or share >= FULL_FRACTION:
        return []
    return [f"warm   the recency cache is {share_text(share)} full: the hit rate can still rise"]


def learning_lines(record: StatRecord, now_s: float) -> list[str]:
    """Returns how the daemon learns: reports, keys that it reads, re-plans; and what is served to other hosts."""
    learning, feed, remote, epochs = record.learning, record.feed, record.remote, record.epochs
    last, next_s = learning.last_replan, learning.next_replan_s
    due = "on request" if next_s is None else f"in {duration(next_s)}"
    lines = [
        f"learning  reports {short_count(learning.reports)}, lost {learning.reports_lost:,}, "
        f"refused {learning.reports_refused:,}; {short_count(learning.tracked_keys)} keys counted",
        f"          missed keys read {short_count(feed.read_keys)}, waiting {feed.queued_keys:,}, "
        f"dropped {feed.dropped_keys:,}, failed {feed.errors:,}",
        f"          re-plans {learning.replans:,}, the next {due}",
    ]
    if last is not None:
        lines.append(
            f"          the last {duration(now_s - last.at)} ago: {last.entered:,} entries in, "
            f"{last.left:,} out, {last.steps} steps, {last.seconds:.1f} s"
        )
    lines.append(f"          epochs alive {epochs.alive}, changes {epochs.changes:,}")
    if remote is not None:
        lines.append(
            f"remote    {remote.address}: {remote.calls:,} calls, {remote.in_flight:,} under way, "
            f"{remote.errors:,} failed, {format_bytes(remote.bytes_sent)} sent"
        )
    return lines


def plain_lines(record: StatRecord, rates: Rates | None, now_s: float, problem: str | None = None) -> list[str]:
    """Returns one refresh for a log: a line for all, one for each table and order, one for what needs an eye."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now_s))
    if problem:
        return [f"{stamp}  ! {problem}"]
    memory = record.memory
    keys_s = reads_s = bytes_s = math.nan
    rate_now, latency_counts = math.nan, [0] * len(record.latency.counts)
    if rates is not None:
        keys_s, reads_s, bytes_s = rates.keys_s, rates.reads_s, rates.read_bytes_s
        rate_now, latency_counts = rates.total.hit_rate, rates.latency_counts
    lines = [
        f"{stamp}  {record.daemon.state}  {short_count(keys_s)} keys/s  hit rate {share_text(rate_now)}"
        f" (since start {share_text(total_of(counts_of(record)).hit_rate)})"
        f"  NVMe {short_count(reads_s)} reads/s, {bytes_a_second(bytes_s)}  {_quantiles(latency_counts, record)}"
        f"  DRAM {format_bytes(memory.used_bytes)} of {format_bytes(memory.budget_bytes)}"
        f"  epoch {record.epochs.current}  clients {record.clients.attached}"
    ]
    for (name, order), since in counts_of(record).items():
        lately = rates.counts.get((name, order)) if rates is not None else None
        now = UNKNOWN
        if rates is not None and lately is not None:
            now = f"{share_text(lately.hit_rate)} of {short_count(lately.keys / rates.seconds)} keys/s"
        lines.append(f"{stamp}    {name} order {order}  hit rate {now} (since start {share_text(since.hit_rate)})")
    return lines + [f"{stamp}  ! {concern}" for concern in concerns(record)]


def _quantiles(counts: Sequence[int], record: StatRecord) -> str:
    bounds = record.latency.bounds_ns
    texts = []
    for share in (0.5, 0.99):
        ns = quantile_ns(bounds, counts, share)
        texts.append(f"above {latency_text(bounds[-1])}" if math.isinf(ns) else latency_text(ns))
    return f"p50 {texts[0]}, p99 {texts[1]}"
