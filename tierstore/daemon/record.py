"""The stat record of a daemon: its fields, and what is computed of it wherever it is shown.

Input: the record as it goes over the socket, JSON. Output: frozen structs that the daemon makes and that stat, top and
the metrics read; numbers of them, NaN if there is nothing to divide. Errors: `DaemonError` for a record of another
release.

Fields are the keys of `tierstore stat --json`: a name that changes here changes for every program that reads those.
Sizes are in bytes, times in seconds, hits in keys. Counts are since the start of the daemon.
"""

from __future__ import annotations

import math
from typing import Literal

from msgspec import Struct

from ..ipc.messages import ReplanResult

State = Literal["warming", "serving", "changing", "draining"]
STATES: tuple[State, ...] = ("warming", "serving", "changing", "draining")
HEALTHY: tuple[State, ...] = ("serving", "changing")


class DaemonInfo(Struct, frozen=True):
    """Who serves. started_at: Unix time."""

    pid: int
    started_at: float
    state: State
    socket: str
    release: str


class TableShape(Struct, frozen=True):
    """The shape of a table. resident: whether memory holds all of its rows."""

    orders: tuple[int, ...]
    rows_per_key: int
    row_bytes: int
    num_rows: int
    resident: bool


class StoreInfo(Struct, frozen=True):
    """What is served. version: the generation, which counts the stores that were served, and versions of them.
    previous: the store that a rollback goes to. published: which published version of the store's rows; 0: the base.
    """

    path: str
    version: int
    previous: str | None
    tables: dict[str, TableShape]
    published: int = 0


class TierHits(Struct, frozen=True):
    """Keys by the tier that answered."""

    hbm: int
    dram: int
    nvme: int


class TableCounts(Struct, frozen=True):
    """Keys of one table. static_hits: those of the dram tier's hits that its static set answered; both by order."""

    hits: TierHits
    orders: dict[int, TierHits]
    static_hits: dict[int, int]


class Counters(Struct, frozen=True):
    """What clients looked up and read. See `tierstore.stats.stats_of`."""

    keys: int
    hits: TierHits
    batches: int
    zero_miss_batches: int
    sentinels: int
    rows: int
    rows_missed: int
    pages_read: int
    entries_read: int
    bytes_read: int
    row_bytes_read: int
    tables: dict[str, TableCounts]


class Latency(Struct, frozen=True):
    """A histogram of lookups: upper bounds of buckets, and one count more. share: of all lookups that are timed."""

    bounds_ns: tuple[int, ...]
    counts: tuple[int, ...]
    sum_ns: int
    share: float


class Memory(Struct, frozen=True):
    """The DRAM budget and its parts. process_bytes: the resident size of the process, shared memory included.

    present_bytes: of blocks large enough for huge pages, what was in memory at the last look; huge_page_bytes: what of
    that lay on huge pages. overlay_bytes: set aside for the index of rows that versions have, of each of two versions.
    """

    budget_bytes: int
    used_bytes: int
    static_bytes: int
    index_bytes: int
    recency_bytes: int
    resident_bytes: int
    staging_bytes: int
    counts_bytes: int
    work_bytes: int
    process_bytes: int
    present_bytes: int = 0
    huge_page_bytes: int = 0
    overlay_bytes: int = 0


class EpochInfo(Struct, frozen=True):
    """The static sets. waiting_for: process ids that keep the epoch before alive. Entries and slots are by table."""

    current: int
    alive: int
    changes: int
    waiting_for: tuple[int, ...]
    static_entries: dict[str, int]
    static_slots: dict[str, int]
    recency_entries: dict[str, int]
    recency_slots: dict[str, int]


class ExpectedRate(Struct, frozen=True):
    """A hit rate that a plan expected; another stream of the same source lies between low and high in 95 of 100
    cases."""

    expected: float
    low: float
    high: float


class PlanInfo(Struct, frozen=True):
    """The plan of the placement that the store was opened with: hit rates by table, then by order or "all"."""

    epoch: int
    hit_rates: dict[str, dict[str, ExpectedRate]]


class LearningInfo(Struct, frozen=True):
    """How the daemon learns what its clients ask for. next_replan_s: None if re-plans come on request only."""

    reports: int
    reports_lost: int
    reports_refused: int
    tracked_keys: int
    replans: int
    next_replan_s: float | None
    last_replan: ReplanResult | None


class FeedInfo(Struct, frozen=True):
    """Missed keys that the daemon reads for the recency cache."""

    queued_keys: int
    read_keys: int
    dropped_keys: int
    errors: int


class ClientInfo(Struct, frozen=True):
    """One attached client.

    id: its connection's number, never given twice. on_gpu: its kernels read the static set in place.
    """

    id: int
    pid: int
    uid: int
    attached_s: float
    version: int
    on_gpu: bool
    has_hbm: bool
    keys: int
    dram_hits: int
    nvme_hits: int
    batches: int


class ClientsInfo(Struct, frozen=True):
    """The attached clients. refused: connections that were turned away."""

    attached: int
    max: int
    refused: int
    list: tuple[ClientInfo, ...]


class RemoteInfo(Struct, frozen=True):
    """Lookups over gRPC. bytes_sent: of rows."""

    address: str
    calls: int
    errors: int
    bytes_sent: int
    in_flight: int


class StatRecord(Struct, frozen=True):
    """The stat record. plan: None if no plan made the placement; remote: None if nothing is served over gRPC."""

    daemon: DaemonInfo
    store: StoreInfo
    counters: Counters
    latency: Latency
    memory: Memory
    epochs: EpochInfo
    plan: PlanInfo | None
    learning: LearningInfo
    feed: FeedInfo
    clients: ClientsInfo
    remote: RemoteInfo | None


def ratio(part: float, whole: float) -> float:
    """Returns part / whole; NaN, for not known, if there is no whole."""
    return part / whole if whole else math.nan


def read_amplification(record: StatRecord) -> float:
    """Returns the bytes read from NVMe for each byte of an entry that was not in memory.

    Rows by id, which have no entry, and what reading them took, are left out.
    """
    counters = record.counters
    return ratio(counters.bytes_read - counters.row_bytes_read, missed_bytes(record))


def missed_bytes(record: StatRecord) -> int:
    """Returns the bytes of all entries that were not in memory: what a store that reads nothing in vain would have
    read.

    Tables of an earlier version, whose shape the record does not say, are left out.
    """
    tables, counts = record.store.tables, record.counters.tables
    return sum(
        counts[name].hits.nvme * table.rows_per_key * table.row_bytes
        for name, table in tables.items()
        if name in counts
    )
