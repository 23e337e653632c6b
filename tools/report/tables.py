"""The numbers of a profile's curves as tables, once for the terminal and the report alike.

Input: the record of `tierstore.decisions.hit_rates.GroupCurves.to_dict`. Output: `NumberTable`s of text, in the order
in which they are read. Errors: none. Nothing is computed here but percentages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tierstore.units import format_bytes

Record = dict[str, Any]
EXACT_DIGITS_MAX = 7


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


def cached_points(record: Record) -> list[Record]:
    """Returns the points whose budgets cache entries: all but the one, if any, that stores the tables whole."""
    return [
        point for point in record["points"] if not point.get("resident")
    ]  # profiles of older versions do not say it


def whole_bytes(record: Record) -> int | None:
    """Returns the budget that stores the tables whole; None in a record that does not say it."""
    return next((point["dram_bytes"] for point in record["points"] if point.get("resident")), None)


def policy_table(record: Record) -> NumberTable:
    """Returns the hit rate of each policy by budget."""
    lines = []
    for point in record["points"]:
        alone = [percent(point[policy]["all"]) for policy in ("static", "recency", "lru")]
        mixed = point["mixed"]
        lines.append([_budget(point), percent(mixed["hit_rate"]["all"]), _between(mixed, "all"), *alone])
    columns = ["DRAM", "mixed", "95 % interval", "static alone", "recency alone", "LRU"]
    return NumberTable("Hit rate by policy, all orders", columns, lines)


def order_table(record: Record) -> NumberTable:
    """Returns the mixed policy's hit rate of each order by budget, and the share of entries that no cache has seen."""
    orders = list(dict.fromkeys(map(str, record["orders"])))
    lines = []
    for point in record["points"]:
        mixed = point["mixed"]
        cells = [f"{percent(mixed['hit_rate'][order])} ({_between(mixed, order)})" for order in orders]
        lines.append([_budget(point), *cells])
    lines.append(["not seen before", *(percent(record["first_touch"][order]) for order in orders)])
    columns = ["DRAM", *(f"order {order} (95 % interval)" for order in orders)]
    return NumberTable("Hit rate by order, mixed", columns, lines)


def split_table(record: Record) -> NumberTable:
    """Returns who answers by budget: static set, recency cache, NVMe; and how memory is divided for it."""
    lines = []
    for point in record["points"]:
        mixed = point["mixed"]
        if point.get("resident"):
            lines.append([_budget(point), *("whole tables",) * 2, percent(1 - mixed["hit_rate"]["all"]), *("-",) * 3])
            continue
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
            _budget(point),
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
    """Returns bytes for people without decimals that say nothing: 1 << 30 -> "1 GiB"; exactly,
    if that takes two decimals."""
    exact = exact_bytes(num_bytes)
    if len(exact.split()[0]) <= EXACT_DIGITS_MAX:
        return exact
    number, unit = format_bytes(num_bytes).split()
    return f"{float(number):g} {unit}"


def exact_bytes(num_bytes: int) -> str:
    """Returns bytes exactly, as the options of commands take them, in the largest unit with at most two decimals."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= factor and num_bytes * 4 % factor == 0:
            return f"{num_bytes / factor:.2f}".rstrip("0").rstrip(".") + f" {unit}"
    return f"{num_bytes} B"


def _budget(point: Record) -> str:
    return short_bytes(point["dram_bytes"]) + (" (whole)" if point.get("resident") else "")


def _between(mixed: Record, order: str) -> str:
    return f"{100 * mixed['low'][order]:.1f} to {100 * mixed['high'][order]:.1f} %"
