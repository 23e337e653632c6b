"""`tierstore top` shows what went on between two records, waits for a daemon that goes away,
and leaves the terminal tidy."""

from __future__ import annotations

import calendar
import codecs
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.repository import REPOSITORY
from support.stat_record import STARTED_AT, changed, stat_record

from tierstore.daemon.record import StatRecord
from tierstore.errors import DaemonError
from tierstore.tools import top
from tierstore.tools.cli import run
from tierstore.tools.stat.lines import plain_lines
from tierstore.tools.stat.rates import rates_between
from tierstore.tools.top import refreshes


def record_after(step: int, **changes: Any) -> StatRecord:
    """The record after so many times 1,000 more hits of one order."""
    record = stat_record(**changes)
    counts = record.counters.tables["layers.1"]
    hits = changed(counts.orders[2], dram=counts.orders[2].dram + 1_000 * step)
    tables = record.counters.tables | {"layers.1": changed(counts, orders=counts.orders | {2: hits})}
    return changed(record, counters={"tables": tables})


def fetcher(*answers: StatRecord | Exception) -> Callable[[], StatRecord]:
    left = list(answers)

    def fetch() -> StatRecord:
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return fetch


def clock_of(*seconds: float) -> Callable[[], float]:
    return iter(seconds).__next__


def test_each_refresh_has_the_rates_since_the_one_before() -> None:
    fetch = fetcher(record_after(0), record_after(1), record_after(5))
    shown = list(refreshes(fetch, lambda: True, 3, clock_of(10.0, 12.0, 13.0)))
    assert shown[0].rates is None
    assert [refresh.rates.keys_s for refresh in shown[1:] if refresh.rates] == [500, 4_000]
    assert [refresh.problem for refresh in shown] == [None] * 3


def test_it_ends_when_it_is_told_to_without_fetching_once_more() -> None:
    told = iter([True, False])
    assert len(list(refreshes(fetcher(*map(record_after, range(2))), lambda: next(told), None))) == 2


def test_a_daemon_that_is_away_is_shown_as_such_and_taken_up_again() -> None:
    restarted = {"pid": 4300, "started_at": STARTED_AT + 99}
    away = DaemonError("x.sock: no daemon answers")
    fetch = fetcher(record_after(0), away, record_after(0, daemon=restarted), record_after(1, daemon=restarted))
    shown = list(refreshes(fetch, lambda: True, 4, clock_of(0.0, 3.0, 4.0)))
    assert [refresh.problem for refresh in shown] == [None, "x.sock: no daemon answers", None, None]
    assert shown[1].record.daemon.pid == 4242
    assert shown[2].rates is None  # of another process
    assert shown[3].rates is not None
    assert shown[3].rates.keys_s == 1_000


def test_after_a_gap_the_rates_are_of_the_whole_gap() -> None:
    away = DaemonError("x.sock: no answer within 10 s")
    shown = list(refreshes(fetcher(record_after(0), away, record_after(6)), lambda: True, 3, clock_of(0.0, 3.0)))
    assert shown[2].rates is not None
    assert shown[2].rates.keys_s == 2_000


def test_a_daemon_that_is_not_there_at_the_start_is_an_error() -> None:
    with pytest.raises(DaemonError, match="no daemon"):
        next(refreshes(fetcher(DaemonError("no daemon")), lambda: True, None))


def test_plain_lines_say_what_the_screen_says() -> None:
    rates = rates_between(record_after(0), record_after(3), 2.0)
    now_s = calendar.timegm((2026, 9, 22, 14, 15, 1))
    lines = plain_lines(record_after(3), rates, now_s)
    assert all(line.startswith("2026-09-22T14:15:01Z  ") for line in lines)
    assert "1.50 k keys/s  hit rate 100.0 % (since start 69.3 %)" in lines[0]
    assert "DRAM 7.82 GiB of 8.00 GiB  epoch 7  clients 3" in lines[0]
    assert lines[1].endswith("layers.1 order 2  hit rate 100.0 % of 1.50 k keys/s (since start 93.0 %)")
    assert lines[2].endswith("layers.1 order 3  hit rate - of 0 keys/s (since start 68.0 %)")
    assert lines[-1].endswith(
        "  ! the old epoch waits for pid 5102: a process leaves it at its next lookup, or when it ends"
    )
    assert plain_lines(record_after(3), None, now_s, "away") == ["2026-09-22T14:15:01Z  ! away"]


def test_without_a_terminal_it_prints_count_refreshes_and_ends_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch = fetcher(record_after(0), DaemonError("x.sock: away"), record_after(1))
    monkeypatch.setattr(top, "fetch_record", lambda _: fetch())
    assert run(["top", "x.sock", "--count", "3", "--interval", "0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("  serving  " in line for line in lines) == 2
    assert sum(line.endswith("  ! x.sock: away") for line in lines) == 1


@pytest.mark.parametrize("when", ["fetching", "waiting", "before"])
def test_ctrl_c_is_a_good_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], when: str) -> None:
    """Whenever it comes; and then nothing more is fetched, or waited for."""
    fetched: list[float] = []

    def fetch(_: object) -> StatRecord:
        fetched.append(time.monotonic())
        if when == "before" or len(fetched) == 2:
            signal.raise_signal(signal.SIGINT)
        return record_after(0)

    monkeypatch.setattr(top, "fetch_record", fetch)
    if when == "waiting":  # it comes before the wait begins, which must not miss it
        monkeypatch.setattr(top.click, "echo", lambda _: signal.raise_signal(signal.SIGINT))
    handler = signal.getsignal(signal.SIGINT)
    interval = "600" if when == "waiting" else "0.1"
    assert run(["top", "x.sock", "--interval", interval]) == 0
    assert len(fetched) == {"fetching": 2, "waiting": 1, "before": 1}[when]
    assert "interrupted" not in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_ends_what_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    def hanging(_: str) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it went on")

    monkeypatch.setattr(top, "fetch_record", lambda _: record_after(0))
    monkeypatch.setattr(top.click, "echo", hanging)
    assert run(["top", "x.sock", "--interval", "600"]) == 0


@pytest.mark.parametrize(
    "options", [["--interval", "0"], ["--interval", "nan"], ["--count", "0"], ["--interval", "inf"]]
)
def test_intervals_and_counts_that_make_no_sense_are_wrong_usage(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["top", "x.sock", *options]) == 2
    assert "Invalid value" in capsys.readouterr().err


CODE = """
import sys
sys.path.insert(0, "tests")
from support.stat_record import stat_record
from tierstore.tools.stat import command as stat
stat.ask = lambda socket, request, kind, timeout_s: stat_record()
from tierstore.tools.cli import main
main()
"""


# Ctrl-C as it comes now and then on a busy machine: between two lines of rich, so many of its outputs after the start.
INTERRUPTED = """
import signal
from rich.console import Console
enter, entered = Console._enter_buffer, []
def entering(self):
    enter(self)
    entered.append(self)
    if len(entered) == COUNT:
        signal.raise_signal(signal.SIGINT)
Console._enter_buffer = entering
"""


@pytest.fixture
def screen(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[bytes], int, list[Any]]]:
    """`tierstore top` on a terminal of its own: the process, our end of the terminal,
    and how the terminal was set before.

    A parameter is code that it runs first.
    """
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    process = subprocess.Popen(
        [sys.executable, "-c", getattr(request, "param", "") + CODE, "top", "x.sock", "--interval", "600"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=REPOSITORY,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "60"},
    )
    try:
        yield process, ours, before
    finally:
        process.kill()
        process.wait(60)
        os.close(theirs)
        os.close(ours)


def seen(ours: int, text: str) -> str:
    """Reads the terminal until a text is there, 60 s at most; returns all of it."""
    deadline, found, decoder = time.monotonic() + 60, "", codecs.getincrementaldecoder("utf-8")()
    while text not in found:
        assert select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0], f"{text!r} is not in {found!r}"
        found += decoder.decode(os.read(ours, 65536))  # which may end within a letter
    return found


@pytest.mark.parametrize("end", ["q", "Q", "Ctrl-C"])
def test_on_a_terminal_it_ends_at_q_and_at_ctrl_c_with_status_0_and_the_terminal_as_it_was(
    screen: tuple[subprocess.Popen[bytes], int, list[Any]], end: str
) -> None:
    process, ours, before = screen
    found = seen(ours, "5101")
    assert "layers.14" in found
    assert "\x1b[?1049h" in found  # a screen of its own
    if end == "Ctrl-C":
        process.send_signal(signal.SIGINT)
    else:
        os.write(ours, b"x" + end.encode())
    left = seen(ours, "\x1b[?1049l")
    assert process.wait(60) == 0
    assert "Traceback" not in left
    assert termios.tcgetattr(ours)[:4] == before[:4]


@pytest.mark.parametrize("screen", [INTERRUPTED.replace("COUNT", str(count)) for count in range(1, 5)], indirect=True)
def test_ctrl_c_in_the_middle_of_drawing_leaves_the_terminal_as_it_was(
    screen: tuple[subprocess.Popen[bytes], int, list[Any]],
) -> None:
    process, ours, before = screen
    left = seen(ours, "\x1b[?1049l")
    assert process.wait(60) == 0
    assert "\x1b[?1049h" in left
    assert "Traceback" not in left
    assert termios.tcgetattr(ours)[:4] == before[:4]
