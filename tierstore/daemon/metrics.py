"""The stat record of a daemon for Prometheus, and the server that hands it out.

Flows in: a callable that gives the record. Flows out: metric families, made anew at each scrape, so that nothing is
counted twice; over HTTP, /metrics and /healthz. A record that cannot be had, or lacks what it should hold, is answered
with 503 and logged; it never ends the daemon. Sizes are bytes, times seconds, hits are in keys.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from types import TracebackType
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from ..ipc.events import event
from ..ipc.ports import parse_address
from .http import Answer, Asked, WebServer, text_answer
from .record import HEALTHY, STATES, Record, missed_bytes, ratio, read_amplification

logger = logging.getLogger("tierstore")

# `<part>_bytes` of the record's memory.
MEMORY_PARTS = ("static", "index", "recency", "resident", "staging", "counts", "work")

# What is one number of the record: its section and name there, its name here, and what it is.
_COUNTERS = (
    ("counters", "batches", "batches", "Lookups of clients."),
    ("counters", "zero_miss_batches", "zero_miss_batches", "Lookups that read nothing from NVMe."),
    ("counters", "sentinels", "sentinels", "Keys of -1, which have no rows; not among the keys."),
    ("counters", "rows", "rows", "Rows asked for one by one, by their ids; not among the keys."),
    ("counters", "rows_missed", "rows_missed", "Those of them that were not in memory."),
    ("counters", "pages_read", "pages_read", "Pages read from shards by clients; the daemon's own are not counted."),
    ("counters", "entries_read", "entries_read", "Placed entries read from the placement file, one read each."),
    ("counters", "bytes_read", "read_bytes", "Bytes read from NVMe by clients."),
    ("counters", "row_bytes_read", "row_read_bytes", "Those of them that rows asked for by their ids took."),
    ("epochs", "changes", "epoch_changes", "Epochs published since the start, new store versions included."),
    ("clients", "refused", "clients_refused", "Clients that were turned away."),
    ("learning", "reports", "reports", "Reports of clients taken: which keys they asked for."),
    ("learning", "reports_lost", "reports_lost", "Reports that found a client's queue full."),
    ("learning", "reports_refused", "reports_refused", "Reports that made no sense, from a client not to be trusted."),
    ("learning", "replans", "replans", "Re-plans of the static set."),
    ("feed", "read_keys", "feed_read_keys", "Missed keys that the daemon read for the recency cache."),
    ("feed", "dropped_keys", "feed_dropped_keys", "Missed keys that found the feed's queue full."),
    ("feed", "errors", "feed_errors", "Missed keys that the daemon could not read."),
)
_GAUGES = (
    ("daemon", "started_at", "start_time_seconds", "When the daemon started, Unix time."),
    ("store", "version", "store_version", "Number of the store version that is served, 1 at the start."),
    ("memory", "budget_bytes", "memory_budget_bytes", "DRAM that the daemon may use."),
    ("memory", "used_bytes", "memory_used_bytes", "DRAM that it uses of the budget."),
    (
        "memory",
        "process_bytes",
        "process_resident_bytes",
        "Resident size of the daemon's process, shared memory included.",
    ),
    ("epochs", "current", "epoch", "Number of the static set that new lookups use."),
    ("epochs", "alive", "epochs_alive", "Static sets in memory: 2 while a client still holds the old one."),
    ("clients", "attached", "clients", "Clients that are attached."),
    ("clients", "max", "clients_max", "Clients that may be attached at once."),
    ("learning", "tracked_keys", "tracked_keys", "Keys whose accesses are counted."),
    ("feed", "queued_keys", "feed_queued_keys", "Missed keys that wait for the daemon to read them."),
)
# Formats of an Accept header, with their versions: those that the text format 0.0.4 answers, and those beyond it.
_PLAIN = {("text/plain", None), ("text/plain", "0.0.4"), ("text/*", None), ("*/*", None)}
_NEWER = {
    ("text/plain", "1.0.0"),
    ("application/openmetrics-text", None),
    ("application/openmetrics-text", "1.0.0"),
}
_REMOTE_COUNTERS = (
    ("remote", "calls", "remote_calls", "Calls over gRPC."),
    ("remote", "errors", "remote_errors", "Calls over gRPC that failed."),
    ("remote", "bytes_sent", "remote_sent_bytes", "Bytes of rows sent over gRPC."),
)
_REMOTE_GAUGES = (("remote", "in_flight", "remote_in_flight", "Calls over gRPC under way."),)


class StatCollector(Collector):
    """Makes metrics of what `stat` returns at each scrape. Register it in a registry of its own."""

    def __init__(self, stat: Callable[[], Record]) -> None:
        """stat: returns the stat record; called by whoever scrapes, in any thread."""
        self._stat = stat

    def collect(self) -> list[Metric]:
        """Returns all families. Raises what `stat` raises, and `LookupError`,
        `TypeError` or `ValueError` for no such record."""
        return list(families_of(self._stat()))

    def describe(self) -> list[Metric]:
        """Returns nothing, so that registering asks for no record."""
        return []


def families_of(record: Record) -> Iterator[Metric]:
    """Yields the metric families of a stat record."""
    remote = record["remote"] is not None
    for rows, family in (
        (_COUNTERS + (_REMOTE_COUNTERS if remote else ()), CounterMetricFamily),
        (_GAUGES + (_REMOTE_GAUGES if remote else ()), GaugeMetricFamily),
    ):
        for section, key, name, text in rows:
            yield family(f"tierstore_{name}", text, value=record[section][key])
    yield _labelled(
        GaugeMetricFamily,
        "info",
        "What serves what; always 1.",
        ("release", "store"),
        [((record["daemon"]["release"], record["store"]["path"]), 1)],
    )
    state = record["daemon"]["state"]
    states = [((name,), int(name == state)) for name in dict.fromkeys((*STATES, state))]
    yield _labelled(GaugeMetricFamily, "state", "1 for what the daemon does now.", ("state",), states)
    yield from _keys(record)
    yield _latency(record["latency"])
    yield from _memory_and_epochs(record)
    yield _expected(record.get("plan"))
    yield from _last_replan(record["learning"])


def _keys(record: Record) -> Iterator[Metric]:
    counters = record["counters"]
    tables = counters["tables"].items()
    yield _labelled(
        CounterMetricFamily,
        "keys",
        "Keys looked up, by the tier that answered.",
        ("table", "order", "tier"),
        (
            ((table, order, tier), count)
            for table, counts in tables
            for order, hits in counts["orders"].items()
            for tier, count in hits.items()
        ),
    )
    yield _labelled(
        CounterMetricFamily,
        "static_hits",
        "Keys that the static set of the dram tier answered.",
        ("table", "order"),
        (((table, order), count) for table, counts in tables for order, count in counts["static_hits"].items()),
    )
    hits = counters["hits"]
    rate = ratio(hits["hbm"] + hits["dram"], counters["keys"])
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


def _latency(latency: Mapping[str, Any]) -> Metric:
    """Returns the times of all lookups, estimated from the share of them that is timed."""
    bounds_ns, counts, share = latency["bounds_ns"], latency["counts"], latency["share"]
    if len(counts) != len(bounds_ns) + 1 or not 0 < share <= 1:
        raise ValueError(
            f"latency: {len(bounds_ns)} bounds with {len(counts)} counts, share {share}; need one count more"
        )
    buckets, total = [], 0.0
    for bound, count in zip([*(ns / 1e9 for ns in bounds_ns), math.inf], counts, strict=True):
        total += count / share
        buckets.append(("+Inf" if bound == math.inf else repr(bound), total))
    text = "Times of lookups in clients, from the call until the rows are there, scaled up from those that are timed."
    return HistogramMetricFamily("tierstore_lookup_seconds", text, buckets, sum_value=latency["sum_ns"] / 1e9 / share)


def _memory_and_epochs(record: Record) -> Iterator[Metric]:
    parts = [((part,), record["memory"][f"{part}_bytes"]) for part in MEMORY_PARTS]
    yield _labelled(GaugeMetricFamily, "memory_bytes", "DRAM in use, by part.", ("part",), parts)
    epochs = record["epochs"]
    yield GaugeMetricFamily(
        "tierstore_epoch_waiting_clients",
        "Clients that still hold the old static set.",
        value=len(epochs["waiting_for"]),
    )
    for key, text in (
        ("static_entries", "Entries in the static set."),
        ("static_slots", "Places for entries in it."),
        ("recency_entries", "Entries in the recency cache, about: a sample is counted."),
        ("recency_slots", "Places for entries in it."),
    ):
        yield _labelled(GaugeMetricFamily, key, text, ("table",), (((name,), n) for name, n in epochs[key].items()))


def _expected(plan: Mapping[str, Any] | None) -> Metric:
    """Returns the hit rates that the placement's plan expected; no sample where no plan made it, or there is none."""
    rates = {} if plan is None else plan["hit_rates"]
    return _labelled(
        GaugeMetricFamily,
        "plan_hit_rate",
        "Hit rate that the plan expected, and between which ones it lies in 95 of 100 cases.",
        ("table", "order", "bound"),
        (
            ((table, order, bound), rate)
            for table, of_table in rates.items()
            for order, of_order in of_table.items()
            for bound, rate in of_order.items()
        ),
    )


def _last_replan(learning: Mapping[str, Any]) -> Iterator[Metric]:
    """Yields what is known of re-plans; families without a value where there was none, or none is due."""
    next_s, last = learning["next_replan_s"], learning["last_replan"]
    yield _optional("next_replan_seconds", "Until the next re-plan.", next_s)
    for key, name, text in (
        ("at", "last_replan_time_seconds", "When the last re-plan ended, Unix time."),
        ("seconds", "last_replan_seconds", "How long the last re-plan took."),
        ("entered", "last_replan_entered", "Entries that the last re-plan brought into the static set."),
        ("left", "last_replan_left", "Entries that the last re-plan took out of the static set."),
    ):
        yield _optional(name, text, None if last is None else last[key])


def _optional(name: str, text: str, value: float | None) -> Metric:
    return GaugeMetricFamily(f"tierstore_{name}", text, value=value)  # None: a family without a sample


def _labelled(
    family: Callable[..., Metric],
    name: str,
    text: str,
    labels: tuple[str, ...],
    samples: Iterable[tuple[tuple[Any, ...], float]],
) -> Metric:
    metric: Any = family(f"tierstore_{name}", text, labels=labels)
    for values, number in samples:
        metric.add_metric([_label(value) for value in values], number)
    return metric


def _label(value: Any) -> str:
    return str(value).encode("utf-8", "backslashreplace").decode()  # paths may be no UTF-8


def encoder_of(accept: str) -> tuple[Callable[[Any], bytes], str]:
    """Returns what encodes metrics, and the Content-Type, for a header Accept: of what there is, what is wanted most.

    Who asks for no format that there is gets the text format 0.0.4, which every scraper reads.
    """
    ranges = [(_weight_of(text), text) for text in accept.split(",")]
    for _, text in sorted((each for each in ranges if each[0]), key=lambda each: each[0], reverse=True):
        kind, *parameters = (part.strip().lower() for part in text.split(";"))
        version = next((each.partition("=")[2] for each in parameters if each.startswith("version=")), None)
        if (kind, version) in _PLAIN:
            break
        if (kind, version) in _NEWER:  # prometheus_client looks neither at weights nor at what else is acceptable
            encode, content_type = choose_encoder(text)
            return encode, content_type
    encode, content_type = choose_encoder("")
    return encode, content_type


def _weight_of(media_range: str) -> float:
    """Returns the weight ("q") of one format of an Accept header, 0 to 1; 0: not acceptable."""
    for parameter in media_range.split(";")[1:]:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "q":
            try:
                weight = float(value)
            except ValueError:
                return 0.0
            return weight if 0.0 <= weight <= 1.0 else 0.0
    return 1.0


class MetricsServer:
    """Serves /metrics and /healthz over HTTP until it is closed; see `web.WebServer` for its limits.

    /healthz: 200 while the daemon serves, also while it changes epoch or version; else 503.
    `address` tells what was bound.
    """

    def __init__(self, address: str, stat: Callable[[], Record]) -> None:
        """address: "HOST:PORT". stat: returns the stat record, and may be called in several threads at once.

        Raises `ConfigError` where the address is none, or cannot be bound. What other hosts can reach is logged: the
        record names paths, and neither TLS nor a token guards it.
        """
        self._stat = stat
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(StatCollector(stat))
        self._server = WebServer(address, self._answer, "metrics address")
        self.address = self._server.address
        if not parse_address(self.address, "metrics address").is_loopback:
            event(
                logger,
                logging.WARNING,
                "metrics_open_to_others",
                address=self.address,
                remedy="bind to 127.0.0.1, or let a firewall or a proxy with TLS stand before it",
            )

    def close(self) -> None:
        """Ends the server; blocks for a bounded time. Twice is harmless."""
        self._server.close()

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self, asked: Asked) -> Answer:
        path = asked.path
        if path not in ("/metrics", "/healthz"):
            return text_answer(HTTPStatus.NOT_FOUND, "there are /metrics and /healthz")
        try:
            if path == "/metrics":
                encode, content_type = encoder_of(asked.accept)
                return Answer(HTTPStatus.OK, encode(self._registry), content_type)
            state = self._stat()["daemon"]["state"]
        except Exception as error:  # whatever ails the record, the daemon must go on
            event(logger, logging.ERROR, "stat_failed", path=path, error=error)
            return text_answer(HTTPStatus.SERVICE_UNAVAILABLE, "the daemon cannot say how it fares; its log tells why")
        return text_answer(HTTPStatus.OK if state in HEALTHY else HTTPStatus.SERVICE_UNAVAILABLE, str(state))
