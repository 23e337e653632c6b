"""The chart of BENCHMARKS.md: a bar for each row of its first table that has a rate beside the best peer.

Input: the text of BENCHMARKS.md. Output: `summary_table` gives the table as it stands, `svg_of` the chart; as a
program, it writes docs/benchmarks.svg. Errors: `ValueError` for a text without the table, or for a row that is not
complete. Pure but for the program: the same text gives the same bytes.

The scale is logarithmic, and bars begin at 1: to the right tierstore is faster, to the left its peer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "docs" / "benchmarks.svg"
HEADER = "| case | result | hardware | best peer | target | verdict |"
COLUMNS = HEADER.count("|") - 1
PEER = re.compile(r"(?P<rate>\d+(?:\.\d+)?) x .+")
VERDICTS = {"reached": "target reached", "missed": "target missed", "": "no target"}

RATE_MIN, RATE_MAX = 0.2, 100.0
TICKS = (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
WIDTH, LABELS, PEERS = 960, 330, 290  # pixels: the chart, its labels on the left, peers on the right
ROW, BAR, TOP, BOTTOM = 26, 15, 66, 34
STYLE = """
text { font: 13px system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif; fill: #1f2328; }
.ground { fill: #ffffff; } .title { font-weight: 650; } .faint { fill: #59636e; }
.grid { stroke: #d1d9e0; } .one { stroke: #59636e; stroke-width: 1.5; }
.reached { fill: #1971c2; } .missed { fill: #d9480f; } .none { fill: #868e96; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; } .ground { fill: #131416; } .faint { fill: #9198a1; }
.grid { stroke: #3d444d; } .one { stroke: #9198a1; }
.reached { fill: #74c0fc; } .missed { fill: #ff8a5c; } .none { fill: #868e96; }
}
"""


@dataclass(frozen=True)
class Bar:
    """A row with a rate beside the best peer, and the words of its cell; above 1 tierstore is faster."""

    case: str
    rate: float
    words: str
    verdict: str


def summary_table(text: str) -> str:
    """Returns the first table of BENCHMARKS.md, header included. Raises `ValueError` if it is not there."""
    start = text.find(f"{HEADER}\n")
    if start < 0:
        raise ValueError(f"BENCHMARKS.md has no table with the header {HEADER}")
    return text[start:].split("\n\n", 1)[0]


def bars_of(text: str) -> list[Bar]:
    """Returns the bars of BENCHMARKS.md, in the order of its table."""
    bars = []
    for line in summary_table(text).splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != COLUMNS or cells[-1] not in VERDICTS:
            raise ValueError(f"{len(cells)} cells, {COLUMNS} expected, or an unknown verdict: {line}")
        if found := PEER.fullmatch(cells[3]):
            bars.append(Bar(cells[0], float(found["rate"]), cells[3], cells[-1]))
    return bars


def svg_of(bars: Sequence[Bar]) -> str:
    """Returns the chart, as SVG with a ground of its own, in the reader's theme."""
    height = TOP + ROW * len(bars) + BOTTOM
    title = "Rate of tierstore beside the best peer"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">',
        f"<style>{STYLE}</style>",
        f'<rect class="ground" width="{WIDTH}" height="{height}" rx="6"/>',
        _text(16, 26, "title", f"{title}: right of 1 tierstore is faster (logarithmic)"),
        *_legend(),
        *(line for tick in TICKS for line in _tick(tick, height)),
        *(line for number, bar in enumerate(bars) for line in _bar(bar, TOP + ROW * number)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _legend() -> list[str]:
    parts, left = [], 16
    for verdict, words in VERDICTS.items():
        parts.append(f'<rect class="{verdict or "none"}" x="{left}" y="39" width="11" height="11"/>')
        parts.append(_text(left + 17, 49, "faint", words))
        left += 130
    return parts


def _tick(rate: float, height: int) -> list[str]:
    x = _x(rate)
    line = f'<line class="{"one" if rate == 1 else "grid"}" x1="{x}" x2="{x}" y1="{TOP}" y2="{height - BOTTOM}"/>'
    return [line, _text(x, height - BOTTOM + 19, "faint", f"{rate:g}", "middle")]


def _bar(bar: Bar, top: int) -> list[str]:
    start, end = sorted((_x(1), _x(bar.rate)))
    base = top + ROW - 9
    place = f'x="{start}" y="{top + (ROW - BAR) // 2}" width="{round(end - start, 1)}" height="{BAR}"'
    return [
        _text(LABELS - 12, base, "", bar.case, "end"),
        f'<rect class="{bar.verdict or "none"}" {place}/>',
        _text(WIDTH - PEERS + 14, base, "", bar.words),
    ]


def _x(rate: float) -> float:
    bounded = min(max(rate, RATE_MIN), RATE_MAX)
    part = math.log(bounded / RATE_MIN) / math.log(RATE_MAX / RATE_MIN)
    return round(LABELS + part * (WIDTH - LABELS - PEERS), 1)


def _text(x: float, y: float, kind: str, words: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>'


def benchmarks() -> str:
    """Returns the text of BENCHMARKS.md."""
    return (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")


def reference() -> str:
    """Returns the first table of BENCHMARKS.md: the generated part of docs/benchmarks.md."""
    return summary_table(benchmarks())


if __name__ == "__main__":
    CHART.write_text(svg_of(bars_of(benchmarks())), encoding="utf-8")
    print(CHART)
