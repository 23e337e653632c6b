"""The numbers of a profile's curves as tables, once for the terminal and the report alike.

Flows in: the record of `tierstore.decisions.curves.Curves.as_record`. Flows out: `NumberTable`s of text, in the order in
which they are read. Nothing is computed here but percentages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tierstore.units import format_bytes

Record = dict[str, Any]


@dataclass(frozen=True)
class NumberTable:
    """A table of text: what it shows, its columns, its lines. The first column names the line."""

    title: str
    columns: list[str]
    lines: list[list[str]]


def recommended_table(record: Record) -> NumberTable:
    """Returns the recommended budgets, the least first, with what each would bring and why."""
    by_bytes = {point["dram_bytes"]: point for point in record["points"]}
    lines = []
    for choice in record["recommended"]:
        mixed = by_bytes[choice["dram_bytes"]]["mixed"]
        lines.append(
            [
                choice["name"],
                short_bytes(choice["dram_bytes"]),
                percent(mixed["hit_rate"]["all"]),
                _between(mixed, "all"),
                f"{mixed['reads_per_token']:.1f}",
                f"{mixed['packed_reads_per_token']:.1f}",
                choice["why"],
            ]
        )
    columns = ["budget", "DRAM", "hit rate", "95 % interval", "NVMe reads a token", "with packed entries", "why"]
    return NumberTable("Recommended budgets", columns, lines)


def policy_table(record: Record) -> NumberTable:
    """Returns the hit rate of each policy by budget."""
    lines = []
    for point in record["points"]:
        alone = [percent(point[policy]["all"]) for policy in ("static", "recency", "lru")]
        mixed = point["mixed"]
        lines.append(
            [short_bytes(point["dram_bytes"]), percent(mixed["hit_rate"]["all"]), _between(mixed, "all"), *alone]
        )
    columns = ["DRAM", "mixed", "95 % interval", "static alone", "recency alone", "LRU"]
    return NumberTable("Hit rate by policy, all orders", columns, lines)


def order_table(record: Record) -> NumberTable:
    """Returns the mixed policy's hit rate of each order by budget, and the most that is possible."""
    orders = [str(order) for order in record["orders"]]
    lines = []
    for point in record["points"]:
        mixed = point["mixed"]
        cells = [f"{percent(mixed['hit_rate'][order])} ({_between(mixed, order)})" for order in orders]
        lines.append([short_bytes(point["dram_bytes"]), *cells])
    lines.append(["not seen before", *(percent(record["first_touch"][order]) for order in orders)])
    columns = ["DRAM", *(f"order {order} (95 % interval)" for order in orders)]
    return NumberTable("Hit rate by order, mixed", columns, lines)


def split_table(record: Record) -> NumberTable:
    """Returns who answers by budget: static set, recency cache, NVMe; and how memory is divided for it."""
    lines = []
    for point in record["points"]:
        mixed = point["mixed"]
        lines.append(
            [
                short_bytes(point["dram_bytes"]),
                percent(mixed["static_share"]["all"]),
                percent(mixed["recency_share"]["all"]),
                percent(1 - mixed["hit_rate"]["all"]),
                f"{100 * mixed['static_fraction']:g} %",
                f"{mixed['static_entries']:,}",
                f"{mixed['recency_entries']:,}",
            ]
        )
    columns = ["DRAM", "static", "recency", "missed", "memory for static", "static entries", "recency entries"]
    return NumberTable("Who answers, mixed", columns, lines)


def reads_table(record: Record) -> NumberTable:
    """Returns NVMe reads a token by budget, without and with packed entries."""
    lines = [
        [
            short_bytes(point["dram_bytes"]),
            f"{point['mixed']['misses_per_token']:.2f}",
            f"{point['mixed']['reads_per_token']:.2f}",
            f"{point['mixed']['packed_reads_per_token']:.2f}",
        ]
        for point in record["points"]
    ]
    return NumberTable("NVMe reads a token, mixed", ["DRAM", "entries missed", "reads", "reads with packed"], lines)


def steps_table(record: Record) -> NumberTable:
    """Returns what a decoding step of several sequences meets, by recommended budget."""
    lines = [
        [
            f"{steps['sequences']:,}",
            short_bytes(steps["dram_bytes"]),
            "unknown" if steps["without_read"] is None else percent(steps["without_read"]),
            percent(steps["hit_rate"]),
            percent(steps["entries_shared"], 2),
            f"{steps['reads_per_token']:.2f}",
            f"{steps['packed_reads_per_token']:.2f}",
        ]
        for steps in sorted(record["steps"], key=lambda steps: (steps["sequences"], steps["dram_bytes"]))
    ]
    columns = ["sequences", "DRAM", "steps without a read", "hit rate", "entries shared", "reads a token", "packed"]
    return NumberTable("Decoding side by side", columns, lines)


def percent(share: float, digits: int = 1) -> str:
    """Returns a share for people: 0.5 -> "50.0 %"."""
    return f"{100 * share:.{digits}f} %"


def short_bytes(num_bytes: int) -> str:
    """Returns bytes for people without decimals that say nothing: 1 << 30 -> "1 GiB"."""
    number, unit = format_bytes(num_bytes).split()
    return f"{float(number):g} {unit}"


def _between(mixed: Record, order: str) -> str:
    return f"{100 * mixed['low'][order]:.1f} to {100 * mixed['high'][order]:.1f} %"
