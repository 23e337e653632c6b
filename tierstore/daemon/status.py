"""The status page: how a daemon fares, for a browser. A page, its script and style, and the JSON that the script polls.

Input: stat records. Output: answers by path. The page loads nothing from elsewhere, and its policy has browsers
refuse it. Errors: none; what `stat` raises is the caller's.

The JSON has no paths, sockets, users or process ids: whoever can reach the address may read it. Its keys are those of
`StatusRecord`; counts are since the start of the daemon, and the script makes rates of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path, PurePath

import msgspec
from msgspec import Struct

from ..printable import printable
from .counts import Counts, counts_of, expected_rate, reads_of
from .http_messages import Answer
from .record import HEALTHY, ExpectedRate, StatRecord, missed_bytes

PAGES = Path(__file__).parent / "pages"
STATUS_PATH = "/status.json"
FILES = {
    "/": ("status.html", "text/html; charset=utf-8"),
    "/status.js": ("status.js", "text/javascript; charset=utf-8"),
    "/numbers.js": ("numbers.js", "text/javascript; charset=utf-8"),
    "/status.css": ("status.css", "text/css; charset=utf-8"),
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = (
    ("Content-Security-Policy", POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
)


class StatusKeys(Struct, frozen=True):
    """Keys by who answered: the client's GPU, the static set, the recency cache, a table in memory whole, the disk."""

    hbm: int
    static: int
    recency: int
    resident: int
    nvme: int


class StatusTable(Struct, frozen=True):
    """One table. table_bytes: of all rows. plan: hit rates that the placement's plan expected, by order or "all"."""

    table_bytes: int
    resident: bool
    keys: StatusKeys
    orders: dict[int, StatusKeys]
    plan: dict[str, float]


class StatusStore(Struct, frozen=True):
    """What is served. name: of the folder, without where it is. published: version of the rows, 0 for the base."""

    name: str
    version: int
    published: int
    table_bytes: int


class StatusEpochs(Struct, frozen=True):
    """The static sets. alive: 2 until the one before has been left."""

    current: int
    alive: int
    changes: int


class StatusMemory(Struct, frozen=True):
    """The DRAM budget and its parts. static_bytes: with its index. other_bytes: bookkeeping and staging."""

    budget_bytes: int
    used_bytes: int
    static_bytes: int
    recency_bytes: int
    resident_bytes: int
    other_bytes: int


class StatusCounters(Struct, frozen=True):
    """Lookups, and reads of NVMe. entry_read_bytes: what reading missed entries took; missed_bytes: their own size."""

    lookups: int
    reads: int
    read_bytes: int
    entry_read_bytes: int
    missed_bytes: int


class StatusLatency(Struct, frozen=True):
    """A histogram of the lookups that are timed: upper bounds of buckets, and one count more."""

    bounds_ns: tuple[int, ...]
    counts: tuple[int, ...]


class StatusClient(Struct, frozen=True):
    """One attached client. id: its connection's number. version: of the store that it reads."""

    id: int
    attached_s: float
    version: int
    has_hbm: bool
    keys: int
    nvme_hits: int
    lookups: int


class StatusClients(Struct, frozen=True):
    """The attached clients. refused: connections that were turned away."""

    attached: int
    max: int
    refused: int
    list: tuple[StatusClient, ...]


class StatusRemote(Struct, frozen=True):
    """Calls of other hosts."""

    calls: int
    errors: int
    in_flight: int


class StatusRecord(Struct, frozen=True):
    """All that the page shows. plan: the hit rate that the plan expects of this traffic; None if no plan was made."""

    release: str
    state: str
    healthy: bool
    started_at: float
    up_s: float
    store: StatusStore
    epochs: StatusEpochs
    memory: StatusMemory
    counters: StatusCounters
    keys: StatusKeys
    tables: dict[str, StatusTable]
    latency: StatusLatency
    plan: ExpectedRate | None
    clients: StatusClients
    remote: StatusRemote | None


def file_answer(path: str) -> Answer:
    """Returns one of FILES: the page, its script or its style."""
    name, content_type = FILES[path]
    return Answer(HTTPStatus.OK, _file(name), content_type, HEADERS)


def status_answer(record: StatRecord, now_s: float) -> Answer:
    """Returns what the script polls. now_s: Unix time."""
    return Answer(HTTPStatus.OK, msgspec.json.encode(status_of(record, now_s)), "application/json", HEADERS)


def status_of(record: StatRecord, now_s: float) -> StatusRecord:
    """Returns what the page shows of a record. now_s: Unix time."""
    daemon, store, epochs, counters = record.daemon, record.store, record.epochs, record.counters
    tables, remote = _tables_of(record), record.remote
    return StatusRecord(
        release=daemon.release,
        state=daemon.state,
        healthy=daemon.state in HEALTHY,
        started_at=daemon.started_at,
        up_s=max(0.0, now_s - daemon.started_at),
        store=StatusStore(
            name=_name_of(store.path),
            version=store.version,
            published=store.published,
            table_bytes=sum(table.table_bytes for table in tables.values()),
        ),
        epochs=StatusEpochs(epochs.current, epochs.alive, epochs.changes),
        memory=_memory_of(record),
        counters=StatusCounters(
            lookups=counters.batches,
            reads=reads_of(record),
            read_bytes=counters.bytes_read,
            entry_read_bytes=counters.bytes_read - counters.row_bytes_read,
            missed_bytes=missed_bytes(record),
        ),
        keys=_sum([table.keys for table in tables.values()]),
        tables=tables,
        latency=StatusLatency(record.latency.bounds_ns, record.latency.counts),
        plan=expected_rate(record),
        clients=_clients_of(record),
        remote=None if remote is None else StatusRemote(remote.calls, remote.errors, remote.in_flight),
    )


@functools.cache
def _file(name: str) -> bytes:
    return (PAGES / name).read_bytes()


def _name_of(path: str) -> str:
    """The last part of a path, as text that JSON and a page can hold."""
    return printable(PurePath(path).name.encode("utf-8", "backslashreplace").decode())


def _tables_of(record: StatRecord) -> dict[str, StatusTable]:
    """Returns all tables that were asked, also those of an earlier version, whose size is no longer known."""
    plan = {} if record.plan is None else record.plan.hit_rates
    orders: dict[str, dict[int, StatusKeys]] = {}
    for (name, order), counts in counts_of(record).items():
        shape = record.store.tables.get(name)
        orders.setdefault(name, {})[order] = _keys_of(counts, resident=shape is not None and shape.resident)
    tables = {}
    for name in dict.fromkeys((*record.store.tables, *orders)):
        shape = record.store.tables.get(name)
        tables[name] = StatusTable(
            table_bytes=0 if shape is None else shape.num_rows * shape.row_bytes,
            resident=shape is not None and shape.resident,
            keys=_sum(list(orders.get(name, {}).values())),
            orders=orders.get(name, {}),
            plan={order: rate.expected for order, rate in plan.get(name, {}).items()},
        )
    return tables


def _keys_of(counts: Counts, *, resident: bool) -> StatusKeys:
    return StatusKeys(
        hbm=counts.hbm,
        static=counts.static,
        recency=0 if resident else counts.other,
        resident=counts.other if resident else 0,
        nvme=counts.nvme,
    )


def _sum(parts: Sequence[StatusKeys]) -> StatusKeys:
    return StatusKeys(*(sum(getattr(part, name) for part in parts) for name in StatusKeys.__struct_fields__))


def _memory_of(record: StatRecord) -> StatusMemory:
    memory = record.memory
    static_bytes = memory.static_bytes + memory.index_bytes
    of_hits = static_bytes + memory.recency_bytes + memory.resident_bytes
    return StatusMemory(
        budget_bytes=memory.budget_bytes,
        used_bytes=memory.used_bytes,
        static_bytes=static_bytes,
        recency_bytes=memory.recency_bytes,
        resident_bytes=memory.resident_bytes,
        other_bytes=max(0, memory.used_bytes - of_hits),
    )


def _clients_of(record: StatRecord) -> StatusClients:
    clients = record.clients
    listed = tuple(
        StatusClient(
            id=client.id,
            attached_s=client.attached_s,
            version=client.version,
            has_hbm=client.has_hbm,
            keys=client.keys,
            nvme_hits=client.nvme_hits,
            lookups=client.batches,
        )
        for client in clients.list
    )
    return StatusClients(clients.attached, clients.max, clients.refused, listed)
