"""The figures of a report: curves as SVG that goes into a page as it is.

Input: the record of `GroupCurves.to_dict`. Output: one SVG a figure, text as text, colours as the page's CSS variables,
so that it is legible on dark and light. Errors: `ConfigError` without matplotlib, which is loaded when a figure is
drawn.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tierstore.extras import missing

from .tables import Record, cached_points, short_bytes, whole_bytes

# Colours that matplotlib writes and that are then replaced by the page's variables of these names.
COLOURS = {name: f"#0a0b{number:02x}" for number, name in enumerate(("ink", "grid", "a", "b", "c", "d", "e", "paper"))}
BAND_ALPHA = 0.18
LABEL_ALPHA = 0.8  # of the paper behind a label that lies over areas and curves
SIZE_INCHES = 8.0, 4.2
TICKS_MAX = 8
TICKS_APART = 1.6  # times as much memory: closer labels would touch
RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "lines.linewidth": 2,
    "lines.markersize": 5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.8,
} | dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), COLOURS["ink"])


@dataclass(frozen=True)
class Figure:
    """A figure: its name in the page, its title and what it shows for those who cannot see it, and how it is drawn."""

    name: str
    title: str
    description: str
    draw: Callable[[Any, Record], None]


def figures_of(record: Record) -> list[Figure]:
    """Returns the figures that a record has numbers for, in the order in which they are read."""
    if not cached_points(record):
        return []  # the tables are so small that only whole ones make sense
    figures = [
        Figure(
            "policies",
            "Hit rate against DRAM, by policy",
            "Four rising curves of hit rate over memory: mixed with its 95 % interval, static alone, "
            "recency alone and LRU"
            + ("; a star where memory holds the tables whole, at 100 %." if whole_bytes(record) else "."),
            _draw_policies,
        ),
        Figure(
            "orders",
            "Hit rate against DRAM, by order, mixed policy",
            "One rising curve with its 95 % interval for each order, below a dashed line, "
            "the most that a cache can reach.",
            _draw_orders,
        ),
        Figure(
            "split",
            "Who answers an access, mixed policy",
            "Stacked shares of accesses over memory: static set, recency cache, missed though seen before, "
            "never seen before.",
            _draw_split,
        ),
        Figure(
            "reads",
            "NVMe reads a token",
            "Two falling curves of reads a token over memory, without and with packed entries.",
            _draw_reads,
        ),
    ]
    if any(steps["without_read"] is not None for steps in record["steps"]):
        figures.append(
            Figure(
                "steps",
                "Steps without any NVMe read, by sequences decoded side by side",
                "Bars for each number of sequences, one for each recommended budget; "
                "the share falls as sequences are added.",
                _draw_steps,
            )
        )
    return figures


def require_matplotlib() -> None:
    """Raises `ConfigError` if matplotlib, which draws the figures, is not installed."""
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError as error:
        raise missing("a report", "report", error) from error


def svg_of(figure: Figure, record: Record) -> str:
    """Returns the figure as an `svg` element for an HTML page, with title and description. Raises `ConfigError`."""
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    with mpl.rc_context(RC | {"svg.hashsalt": figure.name}):
        canvas = Canvas(figsize=SIZE_INCHES, layout="constrained")
        FigureCanvasSVG(canvas)
        figure.draw(canvas.subplots(), record)
        written = io.StringIO()
        canvas.savefig(written, format="svg", transparent=True)
    return _for_page(written.getvalue(), figure)


def _for_page(svg: str, figure: Figure) -> str:
    """Strips what only files need, makes ids unique within the page, and puts in title, description and colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{figure.name}-", svg)
    svg = svg.replace("xlink:href", "href")
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None
    names = f'{figure.name}-title" aria-describedby="{figure.name}-description'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {view_box[0]} role="img" aria-labelledby="{names}">'
        f'<title id="{figure.name}-title">{html.escape(figure.title)}</title>'
        f'<desc id="{figure.name}-description">{html.escape(figure.description)}</desc>'
    )
    return head + svg[svg.index(">") + 1 :].strip()


def _draw_policies(axes: Any, record: Record) -> None:
    budgets = _budgets(record)
    _draw_mixed(axes, record, "all", "a", "mixed")
    for policy, label, colour, style in (
        ("static", "static alone", "b", "--s"),
        ("recency", "recency alone", "c", "-.^"),
        ("lru", "LRU", "d", ":D"),
    ):
        rates = [100 * point[policy]["all"] for point in cached_points(record)]
        axes.plot(budgets, rates, style, color=COLOURS[colour], label=label)
    for choice in record["recommended"]:
        if choice["name"] != "whole":  # which every figure marks
            _mark(axes, choice["dram_bytes"], choice["name"])
    if whole := whole_bytes(record):
        axes.plot([whole], [100], "*", markersize=13, color=COLOURS["a"], clip_on=False, label="whole tables")
    axes.set_ylim(0, 104)
    _finish(axes, record, "accesses that hit (%)", columns=5)


def _draw_orders(axes: Any, record: Record) -> None:
    for order, colour in zip(dict.fromkeys(map(str, record["orders"])), "abcde" * len(record["orders"]), strict=False):
        _draw_mixed(axes, record, order, colour, f"order {order}")
        ceiling = 100 * (1 - record["first_touch"][order])
        axes.axhline(ceiling, color=COLOURS[colour], linewidth=1.2, linestyle=(0, (5, 4)))
    axes.set_ylim(0, 100)
    _finish(axes, record, "accesses that hit (%)", columns=len(record["orders"]))


def _draw_split(axes: Any, record: Record) -> None:
    mixed = [point["mixed"] for point in cached_points(record)]
    static = [100 * each["static_share"]["all"] for each in mixed]
    recency = [100 * each["recency_share"]["all"] for each in mixed]
    first = 100 * record["first_touch"]["all"]
    seen = [max(0.0, 100 - a - b - first) for a, b in zip(static, recency, strict=True)]
    labels = ["static set", "recency cache", "missed, seen before", "never seen before"]
    colours = [COLOURS[name] for name in ("a", "c", "d", "grid")]
    axes.stackplot(_budgets(record), static, recency, seen, [first] * len(mixed), labels=labels, colors=colours)
    axes.set_ylim(0, 100)
    _finish(axes, record, "accesses (%)", columns=2)


def _draw_reads(axes: Any, record: Record) -> None:
    for name, label, colour, style in (
        ("reads_per_token", "rows read one by one", "c", "-.^"),
        ("packed_reads_per_token", "with packed entries", "a", "-o"),
    ):
        reads = [point["mixed"][name] for point in cached_points(record)]
        axes.plot(_budgets(record), reads, style, color=COLOURS[colour], label=label)
    axes.set_ylim(bottom=0)
    _finish(axes, record, "NVMe reads a token", columns=2)


def _draw_steps(axes: Any, record: Record) -> None:
    budgets = sorted({steps["dram_bytes"] for steps in record["steps"]})
    sequences = sorted({steps["sequences"] for steps in record["steps"]})
    shares = {(steps["dram_bytes"], steps["sequences"]): 100 * steps["without_read"] for steps in record["steps"]}
    width = 0.8 / len(budgets)
    for index, (budget, colour) in enumerate(zip(budgets, "abcde", strict=False)):
        across = [group + (index - (len(budgets) - 1) / 2) * width for group in range(len(sequences))]
        heights = [shares[budget, number] for number in sequences]
        bars = axes.bar(across, heights, width * 0.92, color=COLOURS[colour], label=short_bytes(budget))
        axes.bar_label(bars, [f"{height:.1f}" for height in heights], fontsize=9, padding=2)
    axes.set_xticks(range(len(sequences)), [f"{number:,}" for number in sequences])
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("sequences decoded side by side")
    axes.set_ylabel("steps without a read (%)")
    axes.set_ylim(0, max(5.0, 1.15 * max(shares.values())))
    axes.legend(loc="upper right", title="DRAM")


def _draw_mixed(axes: Any, record: Record, order: str, colour: str, label: str) -> None:
    mixed = [point["mixed"] for point in cached_points(record)]
    low, rates, high = ([100 * each[name][order] for each in mixed] for name in ("low", "hit_rate", "high"))
    axes.fill_between(_budgets(record), low, high, color=COLOURS[colour], alpha=BAND_ALPHA, linewidth=0)
    axes.plot(_budgets(record), rates, "-o", color=COLOURS[colour], label=label)


def _mark(axes: Any, dram_bytes: int, words: str) -> None:
    """Draws an upright at a budget, with its name beside it."""
    axes.axvline(dram_bytes, color=COLOURS["ink"], linewidth=0.8, linestyle=(0, (2, 3)))
    axes.annotate(
        words,
        (dram_bytes, 0),
        xycoords=("data", "axes fraction"),
        xytext=(-5, 6),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="bottom",
        bbox={"facecolor": COLOURS["paper"], "alpha": LABEL_ALPHA, "edgecolor": "none", "pad": 1.5},
    )


def _budgets(record: Record) -> list[int]:
    """Budgets that cache entries, ascending."""
    return [point["dram_bytes"] for point in cached_points(record)]


def _finish(axes: Any, record: Record, what: str, columns: int) -> None:
    budgets, whole = _budgets(record), whole_bytes(record)
    axes.set_xscale("log", base=2)
    stride = -(-len(budgets) // TICKS_MAX)
    shown = budgets[::-1][::stride][::-1]
    if whole:
        _mark(axes, whole, "tables fit whole")
        shown = [budget for budget in shown if budget * TICKS_APART <= whole] + [whole]
    axes.set_xticks(shown, [short_bytes(budget) for budget in shown])
    axes.minorticks_off()
    axes.margins(x=0.02)
    axes.set_xlabel("DRAM, logarithmic")
    axes.set_ylabel(what)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0.2, columnspacing=1.2)
