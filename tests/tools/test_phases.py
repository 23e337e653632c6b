"""A command that works in phases is never silent for long: each phase ends with a line, and silence is broken."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import time

import pytest
from support.waiting import WAIT_S, eventually

from tierstore.tools import phases as module
from tierstore.tools.bars import duration
from tierstore.tools.phases import Phases


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The plain lines, as they are printed."""
    lines: list[str] = []
    monkeypatch.setattr(module.click, "echo", lambda line, err: lines.append(line) if err else None)
    return lines


def test_each_phase_ends_with_a_line_of_what_was_done(said: list[str]) -> None:
    with Phases({"counting": "tokens", "copying": "bytes"}) as phases:
        for done in (0, 400, 1000):
            phases("counting", done, 1000)
        phases("sorting", 0, None)
        phases("copying", 3 << 20, 6 << 20)
        phases("merging", 0, None)
    assert [re.sub(r"\d+\.\d s$", "_", line) for line in said] == [
        "counting: 100 %, 1,000 of 1,000 tokens, _",
        "sorting: _",
        "copying:  50 %, 3.00 MiB of 6.00 MiB, _",
        "merging: _",
    ]


def test_silence_is_broken_while_a_phase_says_nothing(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_S", 0.05)
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    with Phases({"replaying": "simulations"}) as phases:
        phases("replaying", 2, 8)
        eventually(lambda: len(said) >= 3)
    assert all(line.startswith("replaying:  25 %, 2 of 8 simulations, ") for line in said)
    assert any(line.endswith(" s") and " s left, " in line for line in said)


def test_a_longer_job_may_report_less_often(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_S", 0.0)
    monkeypatch.setattr(module, "SILENCE_FRACTION", 1e9)
    monkeypatch.setattr(module, "LOOK_S", 0.001)
    looked = threading.Event()
    real = time.monotonic

    def clock() -> float:
        if threading.current_thread().name == "tierstore-progress" and said == []:
            looked.set()
        return real()

    monkeypatch.setattr(module.time, "monotonic", clock)
    with Phases({}) as phases:
        phases("sorting", 0, None)
        assert looked.wait(WAIT_S)
        assert said == []


def test_on_a_terminal_each_phase_has_a_bar_with_its_rate_and_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with contextlib.suppress(InterruptedError), Phases({"merging": "n-grams"}) as phases:
        phases("merging", 0, None)
        phases("merging", 100_000, 400_000)
        phases("merging", 200_000, 400_000)
        raise InterruptedError  # what is under way stays as it is
    shown = capsys.readouterr().err
    assert "200,000 of 400,000 n-grams" in shown
    assert re.search(r"\d n-grams/s, \d+ s left", shown)


def test_a_phase_whose_end_is_worth_no_line_speaks_only_if_it_lasts(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Phases({}, ends=False) as phases:
        phases("swapping", 0, None)
    assert said == []
    monkeypatch.setattr(module, "SILENCE_S", 0.02)
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    with Phases({}, ends=False) as phases:
        phases("swapping", 0, None)
        eventually(lambda: said)
    assert re.fullmatch(r"swapping: \d+\.\d s", said[0])


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "0 s"), (119, "119 s"), (400, "6 min 40 s"), (9000, "2 h 30 min")]
)
def test_what_is_left_is_said_in_units_that_people_read(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_an_error_ends_it_without_a_word_of_success(said: list[str]) -> None:
    def fail() -> None:
        with Phases({"counting": "tokens"}) as phases:
            phases("counting", 1, 2)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert said == []
    assert "tierstore-progress" not in {thread.name for thread in threading.enumerate()}


def test_threads_may_tell_at_once(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_S", WAIT_S)
    with Phases({"replaying": "simulations"}) as phases:
        threads = [threading.Thread(target=phases, args=("replaying", done, 64)) for done in range(65)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(said) == 1
