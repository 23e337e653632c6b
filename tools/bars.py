"""What bars of progress have in common: how much is done, how fast, and how long the rest takes.

Input: tasks of rich whose fields have `unit`: "bytes", the plural of what is counted, or "" if nothing is.
Output: columns for them. Errors: none.
"""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from tierstore.units import format_bytes

RATE_MIN = 10  # a second: slower work shows the time that is left instead


class _Counted(ProgressColumn):
    """What is done, of how much: "400 of 1,000 tokens"."""

    def render(self, task: Task) -> Text:
        return Text(counted(int(task.completed), None if task.total is None else int(task.total), task.fields["unit"]))


class _Pace(ProgressColumn):
    """How fast, and how long the rest takes: "100 tokens/s, 6 s left"."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not task.fields["unit"] or not speed:
            return Text("")
        left_s = None if task.total is None or task.finished else (task.total - task.completed) / speed
        return Text(", ".join(pace(speed, left_s, task.fields["unit"])))


def columns() -> list[ProgressColumn]:
    """Returns the columns: what, a bar, how much, how fast and how long still, how long so far."""
    what = TextColumn("{task.description}", markup=False)
    return [SpinnerColumn(finished_text=" "), what, BarColumn(), _Counted(), _Pace(), TimeElapsedColumn()]


def counted(done: int, total: int | None, unit: str) -> str:
    """Returns what is done, of how much; total: None if nobody knows it."""
    if not unit:
        return ""
    if total is None:
        return number(done, unit) if done else ""
    if unit == "bytes":
        return f"{format_bytes(done)} of {format_bytes(total)}"
    return f"{done:,} of {total:,} {unit}"


def pace(rate: float, left_s: float | None, unit: str) -> list[str]:
    """Returns a rate, if it is one that says something, and what is left; left_s: None if nobody knows it."""
    parts = [f"{number(rate, unit)}/s"] if rate >= RATE_MIN else []
    return parts if left_s is None else [*parts, f"{duration(left_s)} left"]


def duration(seconds: float) -> str:
    """Returns seconds for people: 42 -> "42 s", 400 -> "6 min 40 s", 9000 -> "2 h 30 min"."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def number(count: float, unit: str) -> str:
    """Returns a count with its unit."""
    return format_bytes(count) if unit == "bytes" else f"{count:,.0f} {unit}"


def new_bar(console: Console) -> Progress:
    """Returns a bar on a console; it is shown between its `start` and `stop`."""
    return Progress(*columns(), console=console)
