"""A stat record as a daemon gives it: two tables of DeepSeek-V4.1's shape, a day of serving, three clients,
one re-plan."""

from __future__ import annotations

from typing import Any

STARTED_AT = 1_790_000_000.0
BOUNDS_NS = [1000 << step for step in range(21)]  # 1 us to 1.05 s


def table_counts(dram: list[int], static: list[int], nvme: list[int]) -> dict[str, Any]:
    """Counts of one table, orders 2, 3 and 4, as JSON has them."""
    orders = {
        str(order): {"hbm": 0, "dram": in_dram, "nvme": in_nvme}
        for order, in_dram, in_nvme in zip((2, 3, 4), dram, nvme, strict=True)
    }
    return {
        "hits": {"hbm": 0, "dram": sum(dram), "nvme": sum(nvme)},
        "orders": orders,
        "static_hits": dict(zip(("2", "3", "4"), static, strict=True)),
    }


def stat_record() -> dict[str, Any]:
    """A fresh record, which a test may change."""
    tables = {
        "layers.1": table_counts([930_000, 680_000, 500_000], [800_000, 420_000, 210_000], [70_000, 320_000, 500_000]),
        "layers.14": table_counts([910_000, 660_000, 480_000], [790_000, 410_000, 200_000], [90_000, 340_000, 520_000]),
    }
    shape = {"orders": [2, 3, 4], "rows_per_key": 8, "row_bytes": 264, "num_rows": 384_000_000, "resident": False}
    counts = [0, 0, 40, 900, 2_400, 1_500, 700, 300, 90, 40, 20, 6, 2, *[0] * 8, 2]
    return {
        "daemon": {
            "pid": 4242,
            "started_at": STARTED_AT,
            "state": "serving",
            "socket": "/run/tierstore/v41.sock",
            "release": "0.5.0",
        },
        "store": {
            "path": "/srv/models/v41.tier",
            "version": 2,
            "previous": "/srv/models/v41-may.tier",
            "tables": {"layers.1": dict(shape), "layers.14": dict(shape)},
        },
        "counters": {
            "keys": 6_000_000,
            "hits": {"hbm": 0, "dram": 4_160_000, "nvme": 1_840_000},
            "batches": 48_000,
            "zero_miss_batches": 12_000,
            "sentinels": 9_000,
            "rows": 0,
            "rows_missed": 0,
            "pages_read": 9_000_000,
            "entries_read": 600_000,
            "bytes_read": 40_000_000_000,
            "row_bytes_read": 0,
            "tables": tables,
        },
        "latency": {"bounds_ns": BOUNDS_NS, "counts": counts, "sum_ns": 330_000_000, "share": 0.125},
        "memory": {
            "budget_bytes": 8 << 30,
            "used_bytes": 8_400_000_000,
            "static_bytes": 5_000_000_000,
            "index_bytes": 300_000_000,
            "recency_bytes": 2_900_000_000,
            "resident_bytes": 0,
            "staging_bytes": 16 << 20,
            "counts_bytes": 64 << 20,
            "work_bytes": 60_000_000,
            "process_bytes": 8_700_000_000,
        },
        "epochs": {
            "current": 7,
            "alive": 2,
            "changes": 5,
            "waiting_for": [5102],
            "static_entries": {"layers.1": 1_180_000, "layers.14": 1_150_000},
            "static_slots": {"layers.1": 1_250_000, "layers.14": 1_250_000},
            "recency_entries": {"layers.1": 300_000, "layers.14": 270_000},
            "recency_slots": {"layers.1": 600_000, "layers.14": 600_000},
        },
        "plan": {
            "epoch": 3,
            "hit_rates": {
                name: {
                    order: {"expected": rate, "low": rate - 0.02, "high": rate + 0.03}
                    for order, rate in (("2", 0.95), ("3", 0.70), ("4", 0.52), ("all", 0.7233))
                }
                for name in tables
            },
        },
        "learning": {
            "reports": 5_800_000,
            "reports_lost": 1_200,
            "reports_refused": 0,
            "tracked_keys": 900_000,
            "replans": 5,
            "next_replan_s": 212.0,
            "last_replan": {"at": STARTED_AT + 85_000, "entered": 21_000, "left": 21_000, "seconds": 3.2, "steps": 4},
        },
        "feed": {"queued_keys": 310, "read_keys": 700_000, "dropped_keys": 4_000, "errors": 0},
        "clients": {
            "attached": 3,
            "max": 64,
            "refused": 1,
            "list": [
                client(5101, 86_000.0, 2, 3_000_000, 910_000),
                client(5102, 40_000.0, 1, 2_000_000, 640_000),
                client(5230, 75.0, 2, 900_000, 270_000),
            ],
        },
        "remote": {"address": "127.0.0.1:7070", "calls": 1_500, "errors": 2, "bytes_sent": 190_000_000, "in_flight": 1},
    }


def client(pid: int, attached_s: float, version: int, keys: int, nvme: int) -> dict[str, Any]:
    """A line of the list of clients."""
    hits = {"dram_hits": keys - nvme, "nvme_hits": nvme}
    return {
        "pid": pid,
        "uid": 1000,
        "attached_s": attached_s,
        "version": version,
        "keys": keys,
        **hits,
        "batches": keys // 125,
    }
