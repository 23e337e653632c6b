"""Progress of a command that works in phases: what it does now, how far it is, and a sign of life every second or so.

Input: `Phases(...)(phase, done, total)` from any thread, as the jobs behind the commands report it.
Output: standard error. On a terminal a line a phase with a bar, redrawn ten times a second; elsewhere, as in a log,
plain lines: one when a phase ends, and one whenever the command has been silent for a second (later:
for a sixtieth of its time).
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import click

from .cli import console

SILENCE_S = 1.0
SILENCE_FRACTION = 1 / 60  # of the time so far: a job of an hour says something once a minute
LOOK_S = 0.1

OnPhase = Callable[[str, int, "int | None"], None]


@dataclass
class _Phase:
    """The phase under way. `total` is None if nobody knows it."""

    name: str
    unit: str
    started_s: float
    done: int = 0
    total: int | None = None


class Phases:
    """Shows phases one after the other; use it with `with`. Any thread may call it.
    A phase begins with its first call."""

    def __init__(self, units: Mapping[str, str], *, ends: bool = True) -> None:
        """units: what each phase counts, such as "tokens" or "bytes"; "" if it counts nothing. ends: whether a log gets
        a line when a phase ends, also if it was over in a moment."""
        self._units, self._ends = units, ends
        self._lock = threading.Lock()  # guards all that follows
        self._phase: _Phase | None = None
        self._started_s = self._shown_s = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        self._ended = threading.Event()
        self._watch: threading.Thread | None = None

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        """Says that `done` of `total` are done in `phase`; another name than before ends the phase before."""
        with self._lock:
            if self._phase is None or self._phase.name != phase:
                self._end_phase()
                self._phase = _Phase(phase, self._units.get(phase, ""), time.monotonic())
                self._begin_bar()
            self._phase.done, self._phase.total = done, total
            if self._bar is not None:
                self._bar.update(self._task, completed=done, total=total)

    def __enter__(self) -> Phases:
        self._started_s = self._shown_s = time.monotonic()
        if sys.stderr.isatty():
            from .bars import new_bar

            self._bar = new_bar(console(err=True))
            self._bar.start()
        else:
            self._watch = threading.Thread(target=self._watch_silence, name="tierstore-progress", daemon=True)
            self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._watch is not None:
            self._watch.join()
        with self._lock:
            if kind is None:
                self._end_phase()
            if self._bar is not None:
                self._bar.stop()

    def _begin_bar(self) -> None:
        if self._bar is not None:
            assert self._phase is not None
            self._task = self._bar.add_task(self._phase.name, total=None, unit=self._phase.unit)

    def _end_phase(self) -> None:
        if self._phase is None:
            return
        if self._bar is not None:
            phase = self._phase
            whole = phase.total or max(phase.done, 1)
            self._bar.update(self._task, completed=whole, total=whole)
            self._bar.stop_task(self._task)
        elif self._ends:
            self._say(time.monotonic())

    def _watch_silence(self) -> None:
        while not self._ended.wait(LOOK_S):
            with self._lock:
                now = time.monotonic()
                patience = max(SILENCE_S, SILENCE_FRACTION * (now - self._started_s))
                if self._phase is not None and now - self._shown_s >= patience:
                    self._say(now)

    def _say(self, now: float) -> None:
        assert self._phase is not None
        self._shown_s = now
        click.echo(_line(self._phase, now - self._phase.started_s), err=True)


def _line(phase: _Phase, seconds: float) -> str:
    """One plain line: "counting: 40 %, 400 of 1,000 tokens, 100 tokens/s, 6 s left, 4 s"."""
    from .bars import counted, pace

    share = f"{100 * phase.done // phase.total:3d} %" if phase.total else ""
    parts = [part for part in (share, counted(phase.done, phase.total, phase.unit)) if part]
    if phase.unit and phase.done and seconds >= SILENCE_S:
        rate = phase.done / seconds
        is_under_way = phase.total is not None and phase.done < phase.total
        left_s = (phase.total - phase.done) / rate if phase.total is not None and is_under_way else None
        parts += pace(rate, left_s, phase.unit)
    return f"{phase.name}: " + ", ".join([*parts, f"{seconds:.1f} s"])
