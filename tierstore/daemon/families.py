"""The stat record of a daemon as metric families of Prometheus.

Input: a record. Output: families; names and labels are what dashboards read. Errors: `ValueError` for a record that
contradicts itself. Sizes are bytes, times seconds, hits are in keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from .record import (
    STATES,
    EpochInfo,
    Latency,
    LearningInfo,
    Memory,
    PlanInfo,
    RemoteInfo,
    StatRecord,
    missed_bytes,
    ratio,
    read_amplification,
)

# A metric that is one number of the record: its name, what it is, and where the record has it. mypy checks the latter.
Number = tuple[str, str, Callable[[StatRecord], float]]

_COUNTERS: tuple[Number, ...] = (
    ("batches", "Lookups of clients.", lambda record: record.counters.batches),
    ("zero_miss_batches", "Lookups that read nothing from NVMe.", lambda record: record.counters.zero_miss_batches),
    ("sentinels", "Keys of -1, which have no rows; not among the keys.", lambda record: record.counters.sentinels),
    ("rows", "Rows asked for one by one, by their ids; not among the keys.", lambda record: record.counters.rows),
    ("rows_missed", "Those of them that were not in memory.", lambda record: record.counters.rows_missed),
    (
        "pages_read",
        "Pages read from shards by clients; the daemon's own are not counted.",
        lambda record: record.counters.pages_read,
    ),
    (
        "entries_read",
        "Placed entries read from the placement file, one read each.",
        lambda record: record.counters.entries_read,
    ),
    ("read_bytes", "Bytes read from NVMe by clients.", lambda record: record.counters.bytes_read),
    (
        "row_read_bytes",
        "Those of them that rows asked for by their ids took.",
        lambda record: record.counters.row_bytes_read,
    ),
    (
        "epoch_changes",
        "Epochs published since the start, new store versions included.",
        lambda record: record.epochs.changes,
    ),
    ("clients_refused", "Clients that were turned away.", lambda record: record.clients.refused),
    ("reports", "Reports of clients taken: which keys they asked for.", lambda record: record.learning.reports),
    ("reports_lost", "Reports that found a client's queue full.", lambda record: record.learning.reports_lost),
    (
        "reports_refused",
        "Reports that made no sense, from a client not to be trusted.",
        lambda record: record.learning.reports_refused,
    ),
    ("replans", "Re-plans of the static set.", lambda record: record.learning.replans),
    (
        "feed_read_keys",
        "Missed keys that the daemon read for the recency cache.",
        lambda record: record.feed.read_keys,
    ),
    ("feed_dropped_keys", "Missed keys that found the feed's queue full.", lambda record: record.feed.dropped_keys),
    ("feed_errors", "Missed keys that the daemon could not read.", lambda record: record.feed.errors),
)
_GAUGES: tuple[Number, ...] = (
    ("start_time_seconds", "When the daemon started, Unix time.", lambda record: record.daemon.started_at),
    (
        "store_version",
        "Generation: counts the stores, and versions of them, that were served; 1 at the start.",
        lambda record: record.store.version,
    ),
    (
        "published_version",
        "Published version of the store's rows that is served, 0 for the base.",
        lambda record: record.store.published,
    ),
    ("memory_budget_bytes", "DRAM that the daemon may use.", lambda record: record.memory.budget_bytes),
    ("memory_used_bytes", "DRAM that it uses of the budget.", lambda record: record.memory.used_bytes),
    (
        "process_resident_bytes",
        "Resident size of the daemon's process, shared memory included.",
        lambda record: record.memory.process_bytes,
    ),
    (
        "huge_page_present_bytes",
        "DRAM in large blocks that was in memory at the last look, minutes ago at most.",
        lambda record: record.memory.present_bytes,
    ),
    (
        "huge_page_bytes",
        "Those of them that lay on huge pages.",
        lambda record: record.memory.huge_page_bytes,
    ),
    ("epoch", "Number of the static set that new lookups use.", lambda record: record.epochs.current),
    (
        "epochs_alive",
        "Static sets in memory: 2 until the old one is reclaimed.",
        lambda record: record.epochs.alive,
    ),
    ("clients", "Clients that are attached.", lambda record: record.clients.attached),
    ("clients_max", "Clients that may be attached at once.", lambda record: record.clients.max),
    ("tracked_keys", "Keys whose accesses are counted.", lambda record: record.learning.tracked_keys),
    (
        "feed_queued_keys",
        "Missed keys that wait for the daemon to read them.",
        lambda record: record.feed.queued_keys,
    ),
)
_MEMORY_PARTS: tuple[tuple[str, Callable[[Memory], int]], ...] = (
    ("static", lambda memory: memory.static_bytes),
    ("index", lambda memory: memory.index_bytes),
    ("recency", lambda memory: memory.recency_bytes),
    ("resident", lambda memory: memory.resident_bytes),
    ("overlay", lambda memory: memory.overlay_bytes),
    ("staging", lambda memory: memory.staging_bytes),
    ("counts", lambda memory: memory.counts_bytes),
    ("work", lambda memory: memory.work_bytes),
)


def families_of(record: StatRecord) -> Iterator[Metric]:
    """Yields the metric families of a stat record."""
    for numbers, family in ((_COUNTERS, CounterMetricFamily), (_GAUGES, GaugeMetricFamily)):
        for name, text, value_of in numbers:
            yield family(f"tierstore_{name}", text, value=value_of(record))
    if record.remote is not None:
        yield from _remote(record.remote)
    yield _labelled(
        GaugeMetricFamily,
        "info",
        "What serves what; always 1.",
        ("release", "store"),
        [((record.daemon.release, record.store.path), 1)],
    )
    states = [((state,), int(state == record.daemon.state)) for state in STATES]
    yield _labelled(GaugeMetricFamily, "state", "1 for what the daemon does now.", ("state",), states)
    yield from _keys(record)
    yield _latency(record.latency)
    parts = [((part,), bytes_of(record.memory)) for part, bytes_of in _MEMORY_PARTS]
    yield _labelled(GaugeMetricFamily, "memory_bytes", "DRAM in use, by part.", ("part",), parts)
    yield from _epochs(record.epochs)
    yield _expected(record.plan)
    yield from _last_replan(record.learning)


def _remote(remote: RemoteInfo) -> Iterator[Metric]:
    yield CounterMetricFamily("tierstore_remote_calls", "Calls over gRPC.", value=remote.calls)
    yield CounterMetricFamily("tierstore_remote_errors", "Calls over gRPC that failed.", value=remote.errors)
    yield CounterMetricFamily("tierstore_remote_sent_bytes", "Bytes of rows sent over gRPC.", value=remote.bytes_sent)
    yield GaugeMetricFamily("tierstore_remote_in_flight", "Calls over gRPC under way.", value=remote.in_flight)


def _keys(record: StatRecord) -> Iterator[Metric]:
    counters = record.counters
    yield _labelled(
        CounterMetricFamily,
        "keys",
        "Keys looked up, by the tier that answered.",
        ("table", "order", "tier"),
        (
            ((table, order, tier), count)
            for table, counts in counters.tables.items()
            for order, hits in counts.orders.items()
            for tier, count in (("hbm", hits.hbm), ("dram", hits.dram), ("nvme", hits.nvme))
        ),
    )
    yield _labelled(
        CounterMetricFamily,
        "static_hits",
        "Keys that the static set of the dram tier answered.",
        ("table", "order"),
        (
            ((table, order), count)
            for table, counts in counters.tables.items()
            for order, count in counts.static_hits.items()
        ),
    )
    rate = ratio(counters.hits.hbm + counters.hits.dram, counters.keys)
    yield GaugeMetricFamily(
        "tierstore_hit_rate", "Share of all keys answered without NVMe, since the start.", value=rate
    )
    missed = missed_bytes(record)
    yield CounterMetricFamily("tierstore_missed_bytes", "Bytes of the entries that were not in memory.", value=missed)
    yield GaugeMetricFamily(
        "tierstore_read_amplification",
        "Bytes read from NVMe for each byte of an entry that was not in memory, since the start; without rows by id.",
        value=read_amplification(record),
    )


def _latency(latency: Latency) -> Metric:
    """Returns the times of all lookups, estimated from the share of them that is timed."""
    bounds_ns, counts, share = latency.bounds_ns, latency.counts, latency.share
    if len(counts) != len(bounds_ns) + 1 or not 0 < share <= 1:
        raise ValueError(
            f"latency: {len(bounds_ns)} bounds with {len(counts)} counts, share {share}; need one count more"
        )
    buckets, total = [], 0.0
    for bound, count in zip([*(ns / 1e9 for ns in bounds_ns), math.inf], counts, strict=True):
        total += count / share
        buckets.append(("+Inf" if bound == math.inf else repr(bound), total))
    text = "Times of lookups in clients, from the call until the rows are there, scaled up from those that are timed."
    return HistogramMetricFamily("tierstore_lookup_seconds", text, buckets, sum_value=latency.sum_ns / 1e9 / share)


def _epochs(epochs: EpochInfo) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "tierstore_epoch_waiting_clients",
        "Clients that still read the old static set.",
        value=len(epochs.waiting_for),
    )
    by_table: tuple[tuple[str, str, Mapping[str, int]], ...] = (
        ("static_entries", "Entries in the static set.", epochs.static_entries),
        ("static_slots", "Slots for entries in it.", epochs.static_slots),
        ("recency_entries", "Entries in the recency cache, about: a sample is counted.", epochs.recency_entries),
        ("recency_slots", "Slots for entries in it.", epochs.recency_slots),
    )
    for name, text, counts in by_table:
        yield _labelled(GaugeMetricFamily, name, text, ("table",), (((table,), n) for table, n in counts.items()))


def _expected(plan: PlanInfo | None) -> Metric:
    """Returns the hit rates that the placement's plan expected; no sample if no plan made it, or nothing was placed."""
    rates = {} if plan is None else plan.hit_rates
    return _labelled(
        GaugeMetricFamily,
        "plan_hit_rate",
        "Hit rate that the plan expected, and between which ones it lies in 95 of 100 cases.",
        ("table", "order", "bound"),
        (
            ((table, order, bound), rate)
            for table, of_table in rates.items()
            for order, of_order in of_table.items()
            for bound, rate in (("expected", of_order.expected), ("low", of_order.low), ("high", of_order.high))
        ),
    )


def _last_replan(learning: LearningInfo) -> Iterator[Metric]:
    """Yields what is known of re-plans; families without a value if there was none, or none is due."""
    last = learning.last_replan
    at, seconds, entered, left = (None,) * 4 if last is None else (last.at, last.seconds, last.entered, last.left)
    yield _optional("next_replan_seconds", "Until the next re-plan.", learning.next_replan_s)
    yield _optional("last_replan_time_seconds", "When the last re-plan ended, Unix time.", at)
    yield _optional("last_replan_seconds", "How long the last re-plan took.", seconds)
    yield _optional("last_replan_entered", "Entries that the last re-plan brought into the static set.", entered)
    yield _optional("last_replan_left", "Entries that the last re-plan took out of the static set.", left)


def _optional(name: str, text: str, value: float | None) -> Metric:
    return GaugeMetricFamily(f"tierstore_{name}", text, value=value)  # None: a family without a sample


def _labelled(
    family: Callable[..., Metric],
    name: str,
    text: str,
    labels: tuple[str, ...],
    samples: Iterable[tuple[tuple[object, ...], float]],
) -> Metric:
    metric: Any = family(f"tierstore_{name}", text, labels=labels)
    for values, number in samples:
        metric.add_metric([_label(value) for value in values], number)
    return metric


def _label(value: object) -> str:
    return str(value).encode("utf-8", "backslashreplace").decode()  # paths may be no UTF-8
