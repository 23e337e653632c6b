"""The stat record of a daemon: what it is called, and what is computed of it wherever it is shown.

Flows in: the record as it goes over the socket, plain JSON. Flows out: numbers; NaN where there is nothing to divide.
"""

from __future__ import annotations

import math
from typing import Any

Record = dict[str, Any]

STATES = ("warming", "serving", "changing", "draining")
HEALTHY = ("serving", "changing")
SECTIONS = ("daemon", "store", "counters", "latency", "memory", "epochs", "learning", "feed", "clients", "remote")


def ratio(part: float, whole: float) -> float:
    """Returns part / whole; NaN, for not known, where there is no whole."""
    return part / whole if whole else math.nan


def read_amplification(record: Record) -> float:
    """Returns the bytes read from NVMe for each byte of an entry that was not in memory. Rows by id, which have no
    entry, and what reading them took, are left out."""
    counters = record["counters"]
    return ratio(counters["bytes_read"] - counters["row_bytes_read"], missed_bytes(record))


def missed_bytes(record: Record) -> int:
    """Returns the bytes of all entries that were not in memory:
    what a store that reads nothing in vain would have read.

    Tables of an earlier version, whose shape the record does not say, are left out.
    """
    tables = record["store"]["tables"]
    counts = record["counters"]["tables"]
    return sum(
        counts[name]["hits"]["nvme"] * table["rows_per_key"] * table["row_bytes"]
        for name, table in tables.items()
        if name in counts
    )
