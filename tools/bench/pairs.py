"""Pairs: sides that do the same work in turn, and what their figures come to.

Input: a callable a side, each of which prepares its run by itself and returns the seconds of the run alone. Output:
`Comparison`s and `Figure`s, gathered in a `Result` that prints and records them. Shared machines drift, so no figure of
one side is ever set against a figure of another minute: a ratio is the median of rounds, in each of which every side
ran once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

SUBJECT = "tierstore"
PAIRS = 7
WARM_UP_ROUNDS = 1  # rounds that are run first and not counted


@dataclass(frozen=True)
class Options:
    """What the command line gives every benchmark; None: the benchmark's own default.

    size_bytes: of the table. pairs: rounds that count. threads: of every side. tokens: in a batch. budgets: of
    DRAM; only `trace` takes more than one. rows: table sizes of `scale`. trace, trace_tokens: a file of token
    ids, and how many of them. device: of the model of `overlap`, as torch names it.
    """

    size_bytes: int | None = None
    pairs: int = PAIRS
    threads: int = 1
    tokens: int | None = None
    budgets: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    trace: Path | None = None
    trace_tokens: int | None = None
    device: str | None = None

    @property
    def dram_bytes(self) -> int | None:
        """The store's budget, None for the benchmark's own default."""
        return self.budgets[0] if self.budgets else None


@dataclass(frozen=True)
class Comparison:
    """One piece of work and the seconds that each side took for it in each round; `targets` are least ratios to a side.

    work: how many `unit`s a run has. The subject is the side that ratios are of: its rate over the other's.
    """

    case: str
    unit: str
    work: float
    seconds: dict[str, list[float]]
    targets: dict[str, float] = field(default_factory=dict)
    subject: str = SUBJECT

    def ratios(self, side: str) -> list[float]:
        """Returns the subject's rate over the side's, in each round."""
        return [other / own for other, own in zip(self.seconds[side], self.seconds[self.subject], strict=True)]

    def ratio(self, side: str) -> float:
        """Returns the median over rounds of the subject's rate over the side's."""
        return statistics.median(self.ratios(side))

    def ns(self, side: str) -> float:
        """Returns the side's median nanoseconds for one unit of work."""
        return statistics.median(self.seconds[side]) / self.work * 1e9

    def rows(self) -> list[list[str]]:
        """Returns the lines of a printed table, the subject first."""
        lines = [[self.case, self.subject, f"{self.ns(self.subject):,.0f} ns/{self.unit}", "", "", "", ""]]
        for side, ratio in self._ratios_of_others().items():
            target = self.targets.get(side)
            shown = "" if target is None else f"{target:g} {'reached' if ratio['median'] >= target else 'MISSED'}"
            cost = f"{self.ns(side):,.0f} ns/{self.unit}"
            lines.append(["", side, cost, *(f"{value:.2f}" for value in ratio.values()), shown])
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures for JSON: every round's seconds, and what they come to."""
        costs = {side: self.ns(side) for side in self.seconds}
        return asdict(self) | {"ns_per_unit": costs, "ratios": self._ratios_of_others()}

    def _ratios_of_others(self) -> dict[str, dict[str, float]]:
        return {side: _summary(self.ratios(side)) for side in self.seconds if side != self.subject}


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


@dataclass(frozen=True)
class Figure:
    """One quantity, measured once a round; `bound`, where there is one, is the most it may be (or least,
    if at_least)."""

    case: str
    unit: str
    values: list[float]
    bound: float | None = None
    at_least: bool = False

    @property
    def median(self) -> float:
        """The median over rounds."""
        return statistics.median(self.values)

    @property
    def reached(self) -> bool | None:
        """Whether the median keeps the bound; None without a bound."""
        if self.bound is None:
            return None
        return bool(self.median >= self.bound if self.at_least else self.median <= self.bound)

    def row(self) -> list[str]:
        """Returns the line of a printed table."""
        numbers = [f"{value:,.4g}" for value in _summary(self.values).values()]
        sign = ">=" if self.at_least else "<="
        bound = "" if self.bound is None else f"{sign} {self.bound:g} {'reached' if self.reached else 'MISSED'}"
        return [self.case, self.unit, *numbers, bound]

    def to_dict(self) -> dict[str, Any]:
        """Returns the figure for JSON."""
        return asdict(self) | _summary(self.values) | {"reached": self.reached}


@dataclass(frozen=True)
class Grid:
    """A table of numbers that is neither: hit rates over time, say."""

    title: str
    columns: list[str]
    lines: list[list[Any]]

    def table(self) -> Table:
        """Returns what is printed."""
        table = Table(*self.columns, title=self.title)
        for line in self.lines:
            table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in line))
        return table


@dataclass
class Result:
    """What a benchmark found: comparisons, figures, grids, facts about how they came about,
    and sides that were skipped.

    failed: why the figures mean nothing, and were left out; the command then ends with an error.
    """

    title: str
    comparisons: list[Comparison] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: str | None = None

    def compare(
        self,
        case: str,
        unit: str,
        work: float,
        sides: Mapping[str, Callable[[], float]],
        rounds: int,
        targets: Mapping[str, float] | None = None,
        *,
        subject: str = SUBJECT,
        warm_up_rounds: int = WARM_UP_ROUNDS,
    ) -> Comparison:
        """Runs the sides in turn, and adds and returns what they took. Blocks.

        This is how a benchmark declares a case.

        Args:
            case: what is done, for people.
            unit: what a run has `work` of, such as "row".
            work: units of a run.
            sides: by name, what runs once and returns its seconds; see `interleave`.
            rounds: that count.
            targets: least ratios of the subject's rate to a side's; those of absent sides are ignored.
            subject: the side that ratios are of.
            warm_up_rounds: that do not count.
        """
        kept = {side: least for side, least in (targets or {}).items() if side in sides}
        seconds = interleave(sides, rounds, warm_up_rounds)
        self.comparisons.append(Comparison(case, unit, work, seconds, kept, subject))
        return self.comparisons[-1]

    def figure(
        self, case: str, unit: str, values: list[float], bound: float | None = None, *, at_least: bool = False
    ) -> None:
        """Adds a quantity; see `Figure`."""
        self.figures.append(Figure(case, unit, values, bound, at_least))

    def table(self) -> RenderableType:
        """Returns what is printed."""
        parts: list[RenderableType] = []
        if self.comparisons:
            table = Table(
                "case", "side", "median cost", "rate / side's", "lowest", "highest", "target", title=self.title
            )
            for comparison in self.comparisons:
                for row in comparison.rows():
                    table.add_row(*row)
                table.add_section()
            parts.append(table)
        if self.figures:
            table = Table("case", "unit", "median", "lowest", "highest", "target", title=None if parts else self.title)
            for figure in self.figures:
                table.add_row(*figure.row())
            parts.append(table)
        parts += [grid.table() for grid in self.grids]
        parts += [f"{name}: {value}" for name, value in self.facts.items()]
        parts += [f"skipped: {name}: {why}" for name, why in self.skipped.items()]
        return Group(*parts)

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it for JSON."""
        return {
            "title": self.title,
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
            "figures": [figure.to_dict() for figure in self.figures],
            "grids": [asdict(grid) for grid in self.grids],
            "facts": self.facts,
            "skipped": self.skipped,
        }


def interleave(
    sides: Mapping[str, Callable[[], float]], rounds: int, warm_up_rounds: int = WARM_UP_ROUNDS
) -> dict[str, list[float]]:
    """Runs every side once a round and returns what each gave, by side.

    Each round begins with another side than the one before, so that none always runs in the wake of the same other.
    """
    names = list(sides)
    results: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warm_up_rounds, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            value = sides[name]()
            if number >= 0:
                results[name].append(value)
    return results


def seconds_of_each(call: Callable[[Any, Any], object], parts: Iterable[Any], out: Any) -> list[float]:
    """Calls `call(part, out)` for each part, and nothing else in between; returns the seconds of each call."""
    clock, seconds = time.perf_counter, []
    for part in list(parts):
        started = clock()
        call(part, out)
        seconds.append(clock() - started)
    return seconds


def seconds_of_all(call: Callable[[Any, Any], object], parts: Iterable[Any], out: Any) -> float:
    """Calls `call(part, out)` for each part; returns the seconds of all calls together."""
    listed = list(parts)
    started = time.perf_counter()
    for part in listed:
        call(part, out)
    return time.perf_counter() - started


def p50(call: Callable[[Any, Any], object], parts: Iterable[Any], out: Any) -> float:
    """Calls `call(part, out)` for each part; returns the median seconds of a call."""
    return statistics.median(seconds_of_each(call, parts, out))
