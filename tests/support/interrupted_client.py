"""A process whose lookups are interrupted at any time by a signal handler that raises; run by
test_lookup_interrupts.py.

Arguments: "open" and a store's path or "connect" and a socket, an .npz with truth, how many trials, a seed. Exit status
0 and a line of counts if every promise held: rows are right or the call raised; a buffer of a call that raised is the
caller's again at once; no page reader is lost; the store goes on.
"""

from __future__ import annotations

import signal
import sys
import time
from collections import deque
from collections.abc import Callable

import numpy as np

import tierstore

WAIT_S = 60.0
GUARD = 64  # bytes on either side of a buffer
POISON, CANARY = 0xA5, 0x3C
KEPT = 48  # buffers whose calls raised, that are looked at much later
ROW_BYTES, HEADS = 40, 24
NAME = "layers.1"


class Interrupted(Exception):
    """What the handler raises."""


class Timer:
    """Raises `Interrupted` in `with`, once, after a while."""

    armed = False

    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s

    def __enter__(self) -> None:
        Timer.armed = True
        signal.setitimer(signal.ITIMER_REAL, self.delay_s)

    def __exit__(self, *_: object) -> None:
        Timer.armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    @staticmethod
    def fire(*_: object) -> None:
        if Timer.armed:
            raise Interrupted


class Trials:
    """A store under interrupted calls."""

    def __init__(self, how: str, where: str, truth: str, seed: int) -> None:
        self.how, self.where = how, where
        with np.load(truth) as arrays:
            self.pool, self.ids, self.rows = arrays["pool"], arrays["ids"], arrays["rows"]
        self.rng = np.random.default_rng(seed)
        self.counts = {"interrupted": 0, "whole": 0, "waited again": 0}
        self.left: deque[np.ndarray] = deque()
        self.store = self.open()

    def open(self) -> tierstore.Store:
        if self.how == "open":
            return tierstore.open(self.where, dram="500KiB", io=str(self.rng.choice(["auto", "mmap", "pread"])))
        return tierstore.connect(self.where, staging="1MiB")

    def run(self, trials: int) -> None:
        acts = [self.lookup, self.lookup, self.strided, self.rows_by_id, self.submit, self.submit, self.wait, self.wait]
        for trial in range(trials):
            if trial % 50 == 0:
                self.store._engine.native.inject("slow", int(self.rng.integers(40)), 1)
            acts[int(self.rng.integers(len(acts)))]()
            if trial % 25 == 0:
                self.check_all_is_well()
            if trial % 250 == 249:
                self.close()
        self.check_all_is_well()
        while self.left:
            self.check_left()
        self.store.close()

    def buffer(self) -> tuple[np.ndarray, np.ndarray]:
        """Some tokens of the pool, and a guarded buffer for their rows."""
        which = self.rng.integers(0, len(self.pool), int(self.rng.integers(1, 150)))
        return which, np.full(2 * GUARD + len(which) * HEADS * ROW_BYTES, POISON, dtype=np.uint8)

    @staticmethod
    def inside(buffer: np.ndarray) -> np.ndarray:
        return buffer[GUARD:-GUARD].reshape(-1, HEADS, ROW_BYTES)

    def attempt(self, act: Callable[[], object]) -> bool:
        """Whether it came to its end."""
        try:
            with Timer(float(self.rng.exponential(0.0006)) + 1e-5):
                act()
        except Interrupted:
            self.counts["interrupted"] += 1
            return False
        self.counts["whole"] += 1
        return True

    def judge(self, whole: bool, which: np.ndarray, buffer: np.ndarray) -> None:
        assert (buffer[:GUARD] == POISON).all(), "bytes before a buffer were written"
        assert (buffer[-GUARD:] == POISON).all(), "bytes behind a buffer were written"
        if whole:
            assert np.array_equal(self.inside(buffer), self.rows[which]), "wrong rows"
            return
        buffer[:] = CANARY
        self.left.append(buffer)
        if len(self.left) > KEPT:
            self.check_left()

    def check_left(self) -> None:
        assert (self.left.popleft() == CANARY).all(), "a call that had raised wrote to its buffer later"

    def lookup(self) -> None:
        which, buffer = self.buffer()
        self.judge(self.attempt(lambda: self.store[NAME].lookup(self.pool[which], self.inside(buffer))), which, buffer)

    def strided(self) -> None:
        which, buffer = self.buffer()
        wide = np.full((len(which), HEADS, 2 * ROW_BYTES), POISON, dtype=np.uint8)
        out = wide[:, :, :ROW_BYTES]
        if self.rng.random() < 0.5:
            whole = self.attempt(lambda: self.store[NAME].lookup(self.pool[which], out))
        else:
            whole = self.attempt(lambda: self.store.submit({NAME: (self.pool[which], out)}))
        assert (wide[:, :, ROW_BYTES:] == POISON).all(), "bytes beside rows were written"
        self.inside(buffer)[:] = out
        self.judge(whole, which, buffer)

    def rows_by_id(self) -> None:
        which, buffer = self.buffer()
        ids = self.ids[which] if self.rng.random() < 0.5 else self.ids[which].reshape(-1)[::-1]
        out = self.inside(buffer) if ids.ndim == 2 else self.inside(buffer).reshape(-1, ROW_BYTES)[::-1]
        self.judge(self.attempt(lambda: self.store[NAME].rows(ids, out)), which, buffer)

    def submit(self) -> None:
        which, buffer = self.buffer()
        tickets: list[tierstore.store.store.Ticket] = []
        whole = self.attempt(lambda: tickets.append(self.store.submit({NAME: (self.pool[which], self.inside(buffer))})))
        if not tickets:
            self.judge(False, which, buffer)
        elif whole and self.rng.random() < 0.3:
            self.drop(tickets, which, buffer)
        else:
            tickets[0].wait(WAIT_S)
            self.judge(True, which, buffer)

    def drop(self, tickets: list[tierstore.store.store.Ticket], which: np.ndarray, buffer: np.ndarray) -> None:
        """A ticket that nobody waits for: its rows come all the same."""
        tickets.clear()
        deadline = time.monotonic() + WAIT_S
        while not np.array_equal(self.inside(buffer), self.rows[which]):
            assert time.monotonic() < deadline, "the rows of a ticket that was dropped did not come"
            time.sleep(0.001)
        self.judge(True, which, buffer)

    def wait(self) -> None:
        which, buffer = self.buffer()
        ticket = self.store.submit({NAME: (self.pool[which], self.inside(buffer))})
        while not self.attempt(lambda: ticket.wait(WAIT_S)):
            self.counts["waited again"] += 1
        self.judge(True, which, buffer)

    def close(self) -> None:
        self.store.submit({NAME: (self.pool[:40], np.empty((40, HEADS, ROW_BYTES), dtype=np.uint8))})
        self.attempt(self.store.close)
        self.store.close()
        self.store = self.open()

    def check_all_is_well(self) -> None:
        out = self.store[NAME].lookup(self.pool[:20])
        assert np.array_equal(out, self.rows[:20]), "wrong rows after an interrupted call"
        deadline = time.monotonic() + WAIT_S
        while len(set(self.store._engine.native.page_readers())) > 1:
            assert time.monotonic() < deadline, f"page readers were lost: {self.store._engine.native.page_readers()}"
            time.sleep(0.001)


def main(how: str, where: str, truth: str, trials: str, seed: str) -> None:
    signal.signal(signal.SIGALRM, Timer.fire)
    under_test = Trials(how, where, truth, int(seed))
    under_test.run(int(trials))
    assert under_test.counts["interrupted"] > int(trials) // 20, under_test.counts
    print(f"{how}: {trials} trials, {under_test.counts}")


if __name__ == "__main__":
    main(*sys.argv[1:])
