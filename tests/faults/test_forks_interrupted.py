"""A fork whose preparation fails, or is interrupted: no lock stays held, no answer is wrong, no interrupt is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BEGIN = """
import os, signal, sys, threading, time
import numpy as np
import tierstore

def in_child(act):
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a lock that is held would hang it
        os._exit(0 if act() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

signal.alarm(60)
keys = np.arange(30, dtype=np.int64).reshape(10, 3)
stores = [tierstore.open(sys.argv[1], dram="600KiB") for _ in range(3)]
expected = stores[0]["layers.1"].lookup(keys)

def is_right(store):
    return np.array_equal(store["layers.1"].lookup(keys), expected)

def is_refused(store):
    try:
        store["layers.1"].lookup(keys)
    except tierstore.StoreNotReadyError as error:
        store.close()
        return "could not be made ready" in str(error)
    return False
"""

FAILING = """
failing = sorted(stores, key=id)[1]._engine
before_fork = failing.before_fork
def fail():
    raise MemoryError("no memory for a lock")
failing.before_fork = fail
assert in_child(lambda: all(is_refused(store) for store in stores)) == 0
assert all(is_right(store) for store in stores)
failing.before_fork = before_fork
assert in_child(lambda: all(is_right(store) for store in stores)) == 0
assert all(is_right(store) for store in stores)
"""

INTERRUPTED = """
interrupted = sorted(stores, key=id)[1]._engine
before_fork, after_fork = interrupted.before_fork, interrupted.after_fork
def interrupt_before():
    signal.raise_signal(signal.SIGINT)
    before_fork()
    signal.raise_signal(signal.SIGUSR1)
caught = []
signal.signal(signal.SIGUSR1, lambda number, frame: caught.append(number))
interrupted.before_fork = interrupt_before
for _ in range(20):
    caught.clear()
    try:
        assert in_child(lambda: all(is_right(store) for store in stores) and not caught) == 0
        end = time.monotonic() + 20
        while time.monotonic() < end:
            time.sleep(0.01)
        raise AssertionError("the interrupt was lost")
    except KeyboardInterrupt:
        pass
    end = time.monotonic() + 20
    while not caught and time.monotonic() < end:
        time.sleep(0.01)
    assert caught == [signal.SIGUSR1]
    assert all(is_right(store) for store in stores)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""


def run(code: str, store: Path) -> str:
    command = [sys.executable, "-W", "ignore", "-c", BEGIN + code, str(store)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stderr


def test_a_store_that_cannot_be_made_ready_for_a_fork_is_refused_in_the_child_and_whole_in_the_parent(
    built: Path,
) -> None:
    assert "no memory for a lock" in run(FAILING, built)


def test_an_interrupt_while_stores_are_made_ready_for_a_fork_comes_after_it(built: Path) -> None:
    assert "Exception ignored" not in run(INTERRUPTED, built)
