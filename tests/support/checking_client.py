"""A client of a daemon that checks every row: a program for tests, run as `checking_client.py SOCKET TRUTH.npz SEED`.

Every lookup must be of one version entirely. It looks up until its input ends, then prints a report. Options:
`--shift`: what it asks for most drifts; `--threads N`; `--pause S`: between two lookups; `--brief`: it detaches and
attaches again after every 50 lookups.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading
import time

import numpy as np

import tierstore

TOKENS_MAX = 60
FAULTS_MAX = 10
BRIEF_LOOKUPS = 50
DRIFT_LOOKUPS = 40
TABLES = ("layers.1", "layers.14")


class Checker:
    """Threads that look up, and what they found wrong."""

    def __init__(self, socket: str, truth: str, shift: bool, pause_s: float) -> None:
        self.socket, self.shift, self.pause_s = socket, shift, pause_s
        with np.load(truth) as arrays:
            self.pool = arrays["pool"]
            self.rows = {name: (arrays[f"{name}/0"], arrays[f"{name}/1"]) for name in TABLES}
        self.ended = threading.Event()
        self.faults: list[str] = []
        self.lookups = 0
        self.longest_s = 0.0
        self.lock = threading.Lock()

    def work(self, store: tierstore.Store, seed: int, lookups_max: int | None = None) -> None:
        rng, number = np.random.default_rng(seed), 0
        while not self.ended.is_set() and (lookups_max is None or number < lookups_max):
            count = int(rng.integers(1, TOKENS_MAX))
            hot = number // DRIFT_LOOKUPS * 37 if self.shift else 0
            which = (np.minimum(rng.zipf(1.3, count) - 1, len(self.pool) - 1) + hot) % len(self.pool)
            started = time.monotonic()
            try:
                fault = self.look(store, which, number)
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"
            with self.lock:
                self.lookups += 1
                self.longest_s = max(self.longest_s, time.monotonic() - started)
                if fault is not None and len(self.faults) < FAULTS_MAX:
                    self.faults.append(f"lookup {number}: {fault}")
            number += 1
            self.ended.wait(self.pause_s)

    def look(self, store: tierstore.Store, which: np.ndarray, number: int) -> str | None:
        """One lookup, by one of three ways; says what is wrong with it."""
        keys = self.pool[which]
        outs = {name: np.full((len(which), 24, 40), 0xA5, dtype=np.uint8) for name in TABLES}
        if number % 3 == 0:
            names = TABLES
            store.submit({name: (keys, outs[name]) for name in names}).wait(60)
        else:
            names = TABLES[number % 2 :][:1]
            store[names[0]].lookup(keys, outs[names[0]])
        fits = [all(np.array_equal(outs[name], self.rows[name][v][which]) for name in names) for v in range(2)]
        if any(fits):
            return None
        parts = [
            [bool((outs[name][i] == self.rows[name][v][which[i]]).all()) for v in range(2)]
            for name in names
            for i in range(len(which))
        ]
        return f"tokens of {names} by version: {parts}"

    def report(self, store: tierstore.Store) -> dict[str, object]:
        stats = store.stats()
        return {
            "lookups": self.lookups, "faults": self.faults, "hits": stats["hits"], "longest_s": self.longest_s,
            "attached": stats["attached"], "threads": threading.active_count(),
            "descriptors": len(os.listdir("/proc/self/fd")),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("socket")
    parser.add_argument("truth")
    parser.add_argument("seed", type=int)
    parser.add_argument("--shift", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pause", type=float, default=0.004)
    parser.add_argument("--brief", action="store_true")
    options = parser.parse_args()
    checker = Checker(options.socket, options.truth, options.shift, options.pause)

    def come_and_go() -> None:
        round_number = 0
        while not checker.ended.is_set():
            with contextlib.suppress(tierstore.DaemonError), tierstore.connect(options.socket) as passing:
                checker.work(passing, options.seed + 1000 * round_number, BRIEF_LOOKUPS)
            round_number += 1

    with tierstore.connect(options.socket) as store:
        threads = [
            threading.Thread(target=checker.work, args=(store, options.seed * 100 + number))
            for number in range(options.threads)
        ]
        if options.brief:
            threads = [threading.Thread(target=come_and_go)]
        for thread in threads:
            thread.start()
        sys.stdin.read()
        checker.ended.set()
        for thread in threads:
            thread.join(60)
        print(json.dumps(checker.report(store)))


if __name__ == "__main__":
    main()
