"""A stat record as a daemon gives it: two tables of DeepSeek-V4.1's shape, a day of serving, three clients,
one re-plan."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from tierstore.daemon.record import (
    ClientInfo,
    ClientsInfo,
    Counters,
    DaemonInfo,
    EpochInfo,
    ExpectedRate,
    FeedInfo,
    Latency,
    LearningInfo,
    Memory,
    PlanInfo,
    RemoteInfo,
    StatRecord,
    StoreInfo,
    TableCounts,
    TableShape,
    TierHits,
)
from tierstore.ipc.messages import ReplanResult

STARTED_AT = 1_790_000_000.0
BOUNDS_NS = tuple(1000 << step for step in range(21))  # 1 us to 1.05 s
ORDERS = (2, 3, 4)
S = TypeVar("S", bound=msgspec.Struct)


def changed(part: S, **changes: Any) -> S:
    """The part of a record with other values; a dict for a struct within it changes some of that one's."""
    for name, value in changes.items():
        within = getattr(part, name)
        if isinstance(within, msgspec.Struct) and isinstance(value, dict):
            changes[name] = changed(within, **value)
    return msgspec.structs.replace(part, **changes)


def table_counts(dram: list[int], static: list[int], nvme: list[int]) -> TableCounts:
    """Counts of one table, by order."""
    orders = {order: TierHits(0, *hits) for order, hits in zip(ORDERS, zip(dram, nvme, strict=True), strict=True)}
    return TableCounts(TierHits(0, sum(dram), sum(nvme)), orders, dict(zip(ORDERS, static, strict=True)))


def client(number: int, pid: int, attached_s: float, version: int, keys: int, nvme: int) -> ClientInfo:
    """A line of the list of clients."""
    return ClientInfo(number, pid, 1000, attached_s, version, False, False, keys, keys - nvme, nvme, keys // 125)


def stat_record(**changes: Any) -> StatRecord:
    """The record, with changes as `changed` takes them."""
    tables = {
        "layers.1": table_counts([930_000, 680_000, 500_000], [800_000, 420_000, 210_000], [70_000, 320_000, 500_000]),
        "layers.14": table_counts([910_000, 660_000, 480_000], [790_000, 410_000, 200_000], [90_000, 340_000, 520_000]),
    }
    rates = {
        order: ExpectedRate(rate, rate - 0.02, rate + 0.03)
        for order, rate in (("2", 0.95), ("3", 0.70), ("4", 0.52), ("all", 0.7233))
    }
    shape = TableShape(orders=ORDERS, rows_per_key=8, row_bytes=264, num_rows=384_000_000, resident=False)
    counts = (0, 0, 40, 900, 2_400, 1_500, 700, 300, 90, 40, 20, 6, 2, *[0] * 8, 2)
    record = StatRecord(
        daemon=DaemonInfo(4242, STARTED_AT, "serving", "/run/tierstore/v41.sock", "0.5.0"),
        store=StoreInfo("/srv/models/v41.tier", 2, "/srv/models/v41-may.tier", dict.fromkeys(tables, shape)),
        counters=Counters(
            keys=6_000_000,
            hits=TierHits(hbm=0, dram=4_160_000, nvme=1_840_000),
            batches=48_000,
            zero_miss_batches=12_000,
            sentinels=9_000,
            rows=0,
            rows_missed=0,
            pages_read=9_000_000,
            entries_read=600_000,
            bytes_read=40_000_000_000,
            row_bytes_read=0,
            tables=tables,
        ),
        latency=Latency(bounds_ns=BOUNDS_NS, counts=counts, sum_ns=330_000_000, share=0.125),
        memory=Memory(
            budget_bytes=8 << 30,
            used_bytes=8_400_000_000,
            static_bytes=5_000_000_000,
            index_bytes=300_000_000,
            recency_bytes=2_900_000_000,
            resident_bytes=0,
            staging_bytes=16 << 20,
            counts_bytes=64 << 20,
            work_bytes=60_000_000,
            process_bytes=8_700_000_000,
        ),
        epochs=EpochInfo(
            current=7,
            alive=2,
            changes=5,
            waiting_for=(5102,),
            static_entries={"layers.1": 1_180_000, "layers.14": 1_150_000},
            static_slots=dict.fromkeys(tables, 1_250_000),
            recency_entries={"layers.1": 300_000, "layers.14": 270_000},
            recency_slots=dict.fromkeys(tables, 600_000),
        ),
        plan=PlanInfo(epoch=3, hit_rates=dict.fromkeys(tables, rates)),
        learning=LearningInfo(
            reports=5_800_000,
            reports_lost=1_200,
            reports_refused=0,
            tracked_keys=900_000,
            replans=5,
            next_replan_s=212.0,
            last_replan=ReplanResult(at=STARTED_AT + 85_000, entered=21_000, left=21_000, seconds=3.2, steps=4),
        ),
        feed=FeedInfo(queued_keys=310, read_keys=700_000, dropped_keys=4_000, errors=0),
        clients=ClientsInfo(
            attached=3,
            max=64,
            refused=1,
            list=(
                client(1, 5101, 86_000.0, 2, 3_000_000, 910_000),
                client(2, 5102, 40_000.0, 1, 2_000_000, 640_000),
                client(4, 5230, 75.0, 2, 900_000, 270_000),
            ),
        ),
        remote=RemoteInfo(address="127.0.0.1:7070", calls=1_500, errors=2, bytes_sent=190_000_000, in_flight=1),
    )
    return changed(record, **changes)
