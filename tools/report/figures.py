"""The figures of a report: which curves there are, what they are called, and what is marked on them.

Input: the record of `GroupCurves.to_dict`. Output: two SVGs a figure, one for wide pages and one for phones, of which
the page's style shows one. Errors: none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .chart import Area, Chart, Curve, Level, Mark, svg_of
from .tables import Record, cached_points, short_bytes, whole_bytes
from .words import knee_bytes, name_of

WIDE_PX, NARROW_PX = (880, 420), (350, 330)
COLOURS = "abcde"
TICKS_APART = 1.6  # times as much memory: the tables whole replace a budget closer than that
HEADROOM = 1.12  # above the highest point


@dataclass(frozen=True)
class Figure:
    """A figure: its name in the page, its title and what it shows for those who cannot see it, and how it is drawn."""

    name: str
    title: str
    description: str
    chart: Callable[[Record], Chart]


def figures_of(record: Record) -> list[Figure]:
    """Returns the figures that a record has numbers for, in the order in which they are read."""
    if not cached_points(record):
        return []  # the tables are so small that only whole ones make sense
    figures = [
        Figure(
            "policies",
            "What each doubling of memory buys",
            "Four rising curves of hit rate over memory: mixed with its 95 % interval, static alone, "
            "recency alone and LRU; rings mark the recommended budgets"
            + (", the last one where memory holds the tables whole, at 100 %." if whole_bytes(record) else "."),
            _policies,
        ),
        Figure(
            "orders",
            "Short and long combinations of tokens",
            "One rising curve with its 95 % interval for each order, below a dashed line, "
            "the most that a cache can reach.",
            _orders,
        ),
        Figure(
            "split",
            "Who answers an access",
            "Stacked shares of accesses over memory: static set, recency cache, missed though seen before, "
            "never seen before.",
            _split,
        ),
        Figure(
            "reads",
            "Reads of the disk for each token",
            "Two falling curves of reads a token over memory, without and with packed entries.",
            _reads,
        ),
    ]
    if any(steps["without_read"] is not None for steps in record["steps"]):
        figures.append(
            Figure(
                "steps",
                "Steps that read nothing, by sequences decoded side by side",
                "A falling curve for each recommended budget: the share of steps without a read falls as sequences "
                "are added.",
                _steps,
            )
        )
    return figures


def svgs_of(figure: Figure, record: Record) -> str:
    """Returns the figure twice, as `svg` elements of class "wide" and "narrow"."""
    chart = figure.chart(record)
    return "".join(
        svg_of(chart, *size, f"{figure.name}-{css}", figure.title, figure.description, css)
        for css, size in (("wide", WIDE_PX), ("narrow", NARROW_PX))
    )


def _policies(record: Record) -> Chart:
    points = cached_points(record)
    curves = [_mixed(record, "all", "a", "mixed", bold=True)]
    for policy, label, colour, dashes in (
        ("static", "static alone", "b", "7 4"),
        ("recency", "recency alone", "c", "2 4"),
        ("lru", "LRU", "d", ""),
    ):
        rates = [(point["dram_bytes"], 100 * point[policy]["all"]) for point in points]
        curves.append(Curve(label, colour, rates, dashes=dashes))
    rate_of = {point["dram_bytes"]: 100 * point["mixed"]["hit_rate"]["all"] for point in record["points"]}
    marks = [
        Mark(
            choice["dram_bytes"],
            rate_of[choice["dram_bytes"]],
            f"{name_of(choice, record)}: {short_bytes(choice['dram_bytes'])}, {rate_of[choice['dram_bytes']]:.1f} %",
            "a",
            bold=choice["dram_bytes"] == knee_bytes(record),
        )
        for choice in record["recommended"]
        if choice["name"] != "whole"  # which every figure marks
    ] + _whole(record, 100)
    return Chart("DRAM", "accesses that hit", 100, _ticks(record), " %", curves, marks=marks)


def _orders(record: Record) -> Chart:
    orders = list(dict.fromkeys(map(str, record["orders"])))
    colours = dict(zip(orders, COLOURS * len(orders), strict=False))
    most = {order: 100 * (1 - record["first_touch"][order]) for order in orders}
    levels = [Level(most[order], f"limit {most[order]:.0f} %", colours[order]) for order in orders]
    curves = [_mixed(record, order, colours[order], f"order {order}") for order in orders]
    return Chart(
        "DRAM", "accesses that hit", 100, _ticks(record), " %", curves, marks=_whole(record, 100), levels=levels
    )


def _split(record: Record) -> Chart:
    points = cached_points(record)
    first = 100 * record["first_touch"]["all"]
    layers: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for point in points:
        mixed, budget = point["mixed"], point["dram_bytes"]
        static, recency = (100 * mixed[name]["all"] for name in ("static_share", "recency_share"))
        seen = max(0.0, 100 - static - recency - first)
        for layer, share in (
            (("static set", "a"), static),
            (("recency", "b"), recency),
            (("missed", "c"), seen),
            (("never seen", "soft"), first),
        ):
            layers.setdefault(layer, []).append((budget, share))
    areas = [Area(label, colour, shares) for (label, colour), shares in layers.items()]
    return Chart("DRAM", "accesses", 100, _ticks(record), " %", areas=areas, marks=_whole(record, 100))


def _reads(record: Record) -> Chart:
    curves = []
    for name, label, colour in (
        ("reads_per_token", "row by row", "c"),
        ("packed_reads_per_token", "packed", "a"),
    ):
        reads = [(point["dram_bytes"], point["mixed"][name]) for point in cached_points(record)]
        curves.append(Curve(label, colour, reads, bold=colour == "a"))
    most = max(reads for curve in curves for _, reads in curve.points)
    return Chart(
        "DRAM", "NVMe reads a token", max(1.0, HEADROOM * most), _ticks(record), curves=curves, marks=_whole(record, 0)
    )


def _steps(record: Record) -> Chart:
    budgets = sorted({steps["dram_bytes"] for steps in record["steps"]})
    curves = []
    for budget, colour in zip(budgets, COLOURS, strict=False):
        shares = sorted(
            (steps["sequences"], 100 * steps["without_read"])
            for steps in record["steps"]
            if steps["dram_bytes"] == budget
        )
        curves.append(Curve(short_bytes(budget), colour, shares))
    ticks = [(number, f"{number:,}") for number, _ in curves[0].points]
    most = max(share for curve in curves for _, share in curve.points)
    return Chart("sequences", "steps without a read", max(5.0, HEADROOM * most), ticks, " %", curves)


def _whole(record: Record, y: float) -> list[Mark]:
    """The budget, if any is known, from which on nothing is read."""
    whole = whole_bytes(record)
    return [] if whole is None else [Mark(whole, y, f"tables whole: {short_bytes(whole)}")]


def _mixed(record: Record, order: str, colour: str, label: str, *, bold: bool = False) -> Curve:
    points, band = [], []
    for point in cached_points(record):
        mixed, budget = point["mixed"], point["dram_bytes"]
        points.append((budget, 100 * mixed["hit_rate"][order]))
        band.append((budget, 100 * mixed["low"][order], 100 * mixed["high"][order]))
    return Curve(label, colour, points, band, bold=bold)


def _ticks(record: Record) -> list[tuple[float, str]]:
    budgets, whole = [point["dram_bytes"] for point in cached_points(record)], whole_bytes(record)
    if whole:
        budgets = [budget for budget in budgets if budget * TICKS_APART <= whole] + [whole]
    return [(budget, short_bytes(budget)) for budget in budgets]
