"""Pools of threads: none is left behind, even if the start of one was interrupted."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from tierstore.process.workers import UNKNOWN_STARTS_S, joined_pool

INTERRUPTED_AT_THE_END = """
import signal, time
from tierstore.process.workers import aside
def ring(*_): raise KeyboardInterrupt
signal.signal(signal.SIGALRM, ring)
def compute():
    time.sleep(1.0)
    print("ended", flush=True)
signal.setitimer(signal.ITIMER_REAL, 0.2)
try:
    aside(compute)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_a_computation_that_nobody_waits_for_ends_before_python_does() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_AT_THE_END], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["interrupted", "ended"], "")


class Alarm(Exception):
    """What a signal handler raises."""


def test_a_thread_whose_start_was_interrupted_has_ended_when_the_pool_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    start, ended = threading.Thread.start, threading.Event()

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise Alarm

    def work() -> None:
        time.sleep(0.2)
        ended.set()

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(Alarm), joined_pool(2, "test") as pool:
        pool.submit(work)
    assert ended.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("test-")]


def test_a_thread_that_never_ran_is_not_waited_for_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(thread: threading.Thread) -> None:
        threading._limbo[thread] = thread  # type: ignore[attr-defined]  # as `start` does first
        raise Alarm

    monkeypatch.setattr(threading.Thread, "start", lost)
    try:
        started = time.monotonic()
        with pytest.raises(Alarm), joined_pool(1, "lost") as pool:
            pool.submit(int)
        assert time.monotonic() - started < 60 * UNKNOWN_STARTS_S
    finally:
        threading._limbo.clear()  # type: ignore[attr-defined]
