"""BENCHMARKS.md opens with a table and a chart, and the two cannot differ."""

from __future__ import annotations

import pytest
from builder.benchmark_chart import CHART, COLUMNS, HEADER, bars_of, benchmarks, summary_table, svg_of

ROW = "| a case | 2 us | | 3.10 x a < b | 3 | reached |"


def test_the_chart_is_what_the_table_says() -> None:
    bars = bars_of(benchmarks())
    assert len(bars) > 10
    assert CHART.read_text(encoding="utf-8") == svg_of(bars), "run: python docs/builder/benchmark_chart.py"


def test_every_row_has_a_verdict_or_no_target() -> None:
    for line in summary_table(benchmarks()).splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert len(cells) == COLUMNS, line
        assert bool(cells[4]) == bool(cells[5]), line


def test_what_the_table_calls_a_result_stands_in_a_section() -> None:
    table = summary_table(benchmarks())
    sections = benchmarks().partition("## Machine")[2]
    for line in table.splitlines()[2:]:
        result = line.split("|")[2].strip().split(" ")[0]
        assert result in sections, line


def test_bars_begin_at_one_and_words_are_escaped() -> None:
    slower = ROW.replace("3.10 x", "0.50 x").replace("reached", "missed")
    bars = bars_of("\n".join([HEADER, "|---|", ROW, slower, ROW.replace("3.10 x a < b", "")]) + "\n\nText.\n")
    assert [(bar.rate, bar.verdict) for bar in bars] == [(3.1, "reached"), (0.5, "missed")]
    svg = svg_of(bars)
    assert "3.10 x a &lt; b" in svg
    assert svg.count('<rect class="missed"') == 2  # the legend's and the bar


@pytest.mark.parametrize("text", ["no table", f"{HEADER}\n|---|\n| a | b |\n\n", f"{HEADER}\n|---|\n{ROW[:-9]}won |\n"])
def test_an_incomplete_table_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no table|verdict"):
        bars_of(text)
