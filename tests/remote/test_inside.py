"""Threads inside a `with` are waited for by forks and closes, also those that an interrupt took out of it."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from support.remote_servers import serving_process
from support.stores import Model, random_keys
from support.waiting import WAIT_S, eventually

from tierstore.remote.client import connect_remote
from tierstore.remote.inside import Inside

TRIALS = 150
NAME = "layers.1"


class Interrupted(Exception):
    """What the handler raises."""


@contextlib.contextmanager
def thread(act: Callable[[], object]) -> Iterator[threading.Thread]:
    started = threading.Thread(target=act)
    started.start()
    yield started
    started.join(WAIT_S)
    assert not started.is_alive()


def test_a_wait_ends_when_those_who_are_inside_have_left() -> None:
    inside, entered, leave = Inside(), threading.Event(), threading.Event()

    def stay() -> None:
        with inside.of_thread(), inside.of_thread():
            entered.set()
            leave.wait(WAIT_S)

    assert inside.wait(0)
    with thread(stay):
        assert entered.wait(WAIT_S)
        assert not inside.wait(0)
        assert not inside.wait(0.01)
        leave.set()
        assert inside.wait(WAIT_S)


@pytest.mark.parametrize("was_inside", [False, True])
def test_nobody_enters_while_the_process_forks(was_inside: bool) -> None:
    inside, came = Inside(), threading.Event()
    ready, shut = threading.Event(), threading.Event()

    def enter() -> None:
        if was_inside:
            with inside.of_thread():
                pass
        ready.set()
        shut.wait(WAIT_S)
        with inside.of_thread():
            came.set()

    with thread(enter):
        assert ready.wait(WAIT_S)
        inside.close_for_fork(WAIT_S)
        shut.set()
        assert not came.wait(0.05)
        inside.open_after_fork()
        assert came.wait(WAIT_S)


def test_a_fork_begins_though_a_thread_enters_again_and_again() -> None:
    inside, ended, rounds = Inside(), threading.Event(), [0]

    def look_up() -> None:
        while not ended.is_set():
            with inside.of_thread():
                rounds[0] += 1

    with thread(look_up):
        for _ in range(20):
            before = rounds[0]
            eventually(lambda before=before: rounds[0] > before, "a round of the thread")
            inside.close_for_fork(WAIT_S)
            held = rounds[0]
            assert inside._locks
            assert len(inside._held) == len(inside._locks)
            assert rounds[0] == held
            inside.open_after_fork()
        ended.set()


def test_a_thread_that_ended_leaves_no_lock() -> None:
    inside = Inside()
    for _ in range(20):
        with thread(lambda: inside.of_thread().__enter__()):
            pass
    assert len(inside._locks) == 0


def test_an_interrupted_lookup_leaves_nobody_inside(built: Path, model: Model) -> None:
    """Else each fork would wait for it, and `close` would say that lookups did not end."""
    keys = random_keys(np.random.default_rng(5), 20)
    expected, rng, is_armed = model.expected(NAME, keys), random.Random(0), False
    num_interrupted = 0

    def interrupt(*_: object) -> None:
        if is_armed:
            raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with serving_process(built) as address:
            store = connect_remote(f"grpc://{address}", timeout_s=WAIT_S)
            table, engine = store[NAME], cast(Any, store._engine)
            for _ in range(TRIALS):
                try:
                    is_armed = True
                    signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 3e-3))
                    rows = table.lookup(keys)
                    is_armed = False
                    np.testing.assert_array_equal(rows, expected)
                except Interrupted:
                    is_armed = False
                    num_interrupted += 1
            left = []
            with thread(lambda: left.extend([engine._calls.wait(0), engine._asked.connection._inside.wait(0)])):
                pass
            assert left == [True, True]
            np.testing.assert_array_equal(table.lookup(keys), expected)
            with thread(lambda: left.append(engine.close(WAIT_S))):
                pass
            assert left[-1] is True
            store.close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert num_interrupted > 0
