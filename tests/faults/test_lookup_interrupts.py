"""Signal handlers that raise, in every lookup: nothing hangs, nothing is lost,
and a buffer is its owner's again at once.

TIERSTORE_SOAK=1 has 10,000 trials of each.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.marks import slow_but
from support.repository import SUPPORT
from support.shapes import HEADS, ROW_BYTES
from support.stores import Model, random_keys

import tierstore
from tierstore.daemon.daemon import Daemon

CLIENT = SUPPORT / "interrupted_client.py"
TRIALS = 10_000 if os.environ.get("TIERSTORE_SOAK") else 400
PROMPT_S = 0.2  # within which an interrupt takes effect, once of a few times
LATE_S = 10  # for what is tried once; all the slow reads take minutes
FOR_EVER = 1 << 40
NAME = "layers.1"


@pytest.fixture(scope="module")
def truth(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pool = random_keys(np.random.default_rng(0), 500)
    path = tmp_path_factory.mktemp("truth") / "truth.npz"
    np.savez(path, pool=pool, ids=model.row_ids(NAME, pool), rows=model.expected(NAME, pool))
    return path


def sweep(how: str, where: Path, truth: Path, seed: int) -> None:
    command = [sys.executable, "-X", "faulthandler", str(CLIENT), how, str(where), str(truth), str(TRIALS), str(seed)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120 + TRIALS / 10)
    print(ran.stdout)
    assert ran.returncode == 0, f"status {ran.returncode}: {ran.stdout[-400:]} {ran.stderr[-1200:]}"


def test_interrupted_lookups_of_an_open_store_lose_nothing(placed: Path, truth: Path) -> None:
    sweep("open", placed, truth, 1)


def test_interrupted_lookups_of_an_attached_store_lose_nothing(placed: Path, truth: Path, tmp_path: Path) -> None:
    daemon = Daemon(placed, tmp_path / "socket", 900 << 10, replan_s=None)
    daemon.start()
    try:
        sweep("connect", tmp_path / "socket", truth, 2)
    finally:
        assert daemon.close()


class Stop(Exception):
    """What the handler raises."""


@pytest.fixture
def slow(built: Path) -> Iterator[tierstore.Store]:
    """A store whose every read takes 20 ms, until the test ends."""
    store = tierstore.open(built, dram="500KiB")
    store._engine.native.inject("slow", 0, FOR_EVER)
    yield store
    store._engine.native.inject("none")
    store.close()


@pytest.fixture
def handling() -> Iterator[Callable[[Callable[..., Any]], None]]:
    before = signal.getsignal(signal.SIGALRM)
    yield lambda handler: signal.signal(signal.SIGALRM, handler) and None
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def stop(*_: object) -> None:
    raise Stop


def seconds_until_stopped(act: Callable[[], object], delay_s: float = 0.25) -> float:
    signal.setitimer(signal.ITIMER_REAL, delay_s)
    fires_at = time.monotonic() + delay_s
    with pytest.raises(Stop):
        act()
    return time.monotonic() - fires_at


def fill(store: tierstore.Store) -> None:
    """Submits until the store takes no more."""
    while True:
        keys = np.random.default_rng().integers(0, 2**60, (200, 3))
        store.submit({NAME: (keys, np.empty((200, HEADS, ROW_BYTES), dtype=np.uint8))})


def fill_by_id(store: tierstore.Store, model: Model) -> None:
    """The same by row ids."""
    while True:
        ids = model.row_ids(NAME, np.random.default_rng().integers(0, 2**60, (20, 3)))
        store[NAME].submit_rows(ids, np.empty((20, HEADS, 2 * ROW_BYTES), dtype=np.uint8)[:, :, ::2])


@pytest.mark.parametrize("what", ["lookup", "rows", "whole rows", "wait", "submit", "submit rows", "close"])
def test_an_interrupt_takes_effect_at_once_and_the_store_goes_on(
    slow: tierstore.Store, model: Model, handling: Any, what: str
) -> None:
    handling(stop)
    keys = random_keys(np.random.default_rng(1), 600)
    ids, out = model.row_ids(NAME, keys), np.empty((600, HEADS, ROW_BYTES), dtype=np.uint8)
    ticket = slow.submit({NAME: (keys, out)})
    acts: dict[str, Callable[[], object]] = {
        "lookup": lambda: slow[NAME].lookup(keys),
        "rows": lambda: slow[NAME].rows(ids.reshape(-1)[:-1]),
        "whole rows": lambda: slow[NAME].rows(ids),
        "wait": lambda: ticket.wait(60),
        "submit": lambda: fill(slow),
        "submit rows": lambda: fill_by_id(slow, model),
        "close": slow.close,
    }
    took_s = [seconds_until_stopped(acts[what]) for _ in range(3)]
    assert min(took_s) < PROMPT_S, took_s
    slow._engine.native.inject("none")
    ticket.wait(60)
    np.testing.assert_array_equal(out, model.expected(NAME, keys))
    if what != "close":
        np.testing.assert_array_equal(slow[NAME].lookup(keys), out)


def test_an_interrupt_takes_effect_while_every_page_reader_is_busy(slow: tierstore.Store, handling: Any) -> None:
    handling(stop)
    readers = slow._engine.native.page_readers()[0]
    rng = np.random.default_rng(2)
    tickets = [
        slow.submit({NAME: (rng.integers(0, 2**60, (300, 3)), np.empty((300, HEADS, ROW_BYTES), dtype=np.uint8))})
        for _ in range(2 * readers)
    ]
    took_s = [seconds_until_stopped(lambda: slow[NAME].lookup(rng.integers(0, 2**60, (300, 3)))) for _ in range(3)]
    assert min(took_s) < PROMPT_S, took_s
    slow._engine.native.inject("none")
    for ticket in tickets:
        ticket.wait(60)


def test_a_handler_may_close_the_store_that_it_interrupts(slow: tierstore.Store, model: Model, handling: Any) -> None:
    keys = random_keys(np.random.default_rng(3), 60)

    def close(*_: object) -> None:
        slow._engine.native.inject("none")
        slow.close()

    handling(close)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    started = time.monotonic()
    np.testing.assert_array_equal(slow[NAME].lookup(keys), model.expected(NAME, keys))
    assert time.monotonic() - started < 30
    with pytest.raises(tierstore.StoreNotReadyError):
        slow[NAME].lookup(keys)


def test_a_handler_may_look_up_in_the_store_that_it_interrupts(
    slow: tierstore.Store, model: Model, handling: Any
) -> None:
    keys, others = random_keys(np.random.default_rng(4), 60), random_keys(np.random.default_rng(5), 20)
    found: list[np.ndarray] = []

    def look_up(*_: object) -> None:
        slow._engine.native.inject("none")
        found.append(slow[NAME].lookup(others))

    handling(look_up)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    np.testing.assert_array_equal(slow[NAME].lookup(keys), model.expected(NAME, keys))
    np.testing.assert_array_equal(found[0], model.expected(NAME, others))


@pytest.mark.parametrize("how", ["lookup", "rows"])
@pytest.mark.parametrize("timeout_s", [0.0, 0.25])
def test_a_lookup_ends_when_its_time_is_over_and_leaves_its_buffer_alone(
    slow: tierstore.Store, model: Model, timeout_s: float, how: str
) -> None:
    keys = random_keys(np.random.default_rng(7), 300)
    ids = model.row_ids(NAME, keys)
    out, started = np.empty((300, HEADS, ROW_BYTES), dtype=np.uint8), time.monotonic()
    look_up, asked = (slow[NAME].lookup, keys) if how == "lookup" else (slow[NAME].rows, ids)
    with pytest.raises(TimeoutError, match=f"not there within {timeout_s} s"):
        look_up(asked, out, timeout_s=timeout_s)
    assert time.monotonic() - started < timeout_s + LATE_S
    out[:] = 0x3C
    slow._engine.native.inject("none")
    np.testing.assert_array_equal(slow[NAME].lookup(keys, timeout_s=60.0), model.expected(NAME, keys))
    assert (out == 0x3C).all()


@pytest.mark.parametrize(
    "how", slow_but(["lookup", "submit rows"], ["lookup", "rows", "whole rows", "submit", "submit rows"])
)
def test_a_buffer_is_its_owners_again_when_the_call_was_interrupted(
    slow: tierstore.Store, model: Model, handling: Any, how: str
) -> None:
    handling(stop)
    keys = random_keys(np.random.default_rng(6), 300)
    ids, out = model.row_ids(NAME, keys), np.empty((300, HEADS, ROW_BYTES), dtype=np.uint8)

    def submit_again() -> None:
        while True:  # until the store has no room, and waits for some
            slow.submit({NAME: (keys, np.empty_like(out))})

    def submit_rows_again() -> None:
        while True:
            slow[NAME].submit_rows(ids, np.empty_like(out), within=(0, 900))

    acts: dict[str, Callable[[], object]] = {
        "lookup": lambda: slow[NAME].lookup(keys, out),
        "rows": lambda: slow[NAME].rows(ids.reshape(-1), out.reshape(-1, 40)),
        "whole rows": lambda: slow[NAME].rows(ids, out[::-1]),
        "submit": submit_again,
        "submit rows": submit_rows_again,
    }
    seconds_until_stopped(acts[how])
    out[:] = 0x3C
    slow._engine.native.inject("none")
    np.testing.assert_array_equal(slow[NAME].lookup(keys), model.expected(NAME, keys))
    assert (out == 0x3C).all()
