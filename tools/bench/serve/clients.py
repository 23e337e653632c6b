"""Client processes: each has the store its own way, attached to a daemon or opened by itself, and looks up in it.

Input: how to have the store, keys, stretches of the monotonic clock that all processes share. Output: from each, the
lookups that ended in a stretch, and how long they took. Before anything is timed, each process compares the rows of all
keys with what was built. Errors: `DaemonError` if again and again a process was not ready when a stretch began: it
would have measured another one.

The other half of this module is what these processes run: lines of JSON come in and go out.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import select
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

import tierstore
from tierstore.errors import DaemonError

from .. import stores

START_WAIT_S, ANSWER_WAIT_S, STOP_WAIT_S = 300.0, 120.0, 30.0
LEAD_S = 0.3  # from saying when a stretch begins to its beginning,
LEAD_S_EACH = 0.01  # and as much more for each process;
STRETCHES_MAX = 6  # that are tried, each with twice the lead, until no process comes too late
CHUNK_TOKENS = 256  # looked up together while all keys are checked
WARM_ROUNDS_MAX = 6  # times that all keys are looked up, while some still miss
ONE_TOKEN_KEYS, BATCHES = 4096, 16  # drawn beforehand, and looked up over and over
LOOKUPS_BETWEEN_LOOKS = 64  # of one token: whether to end; what ends too late is not counted


class Clients:
    """Processes that look up the same keys. Use it in a `with`."""

    def __init__(self, store: Path, keys_file: Path, count: int, **access: Any) -> None:
        """Starts `count` processes and blocks until each has checked every row. access: "socket",
        or "dram" in bytes."""
        how = json.dumps({"store": str(store), "keys": str(keys_file), **access})
        command = [sys.executable, "-m", __name__, how]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
        ]
        try:
            self.misses_when_warm = sum(self._answer(process, START_WAIT_S)["misses"] for process in self._processes)
        except BaseException:
            self._kill()
            raise

    @property
    def pids(self) -> list[int]:
        """The processes' ids."""
        return [process.pid for process in self._processes]

    def stretch(self, tokens: int, seconds: float) -> list[dict[str, Any]]:
        """Has all look up batches of `tokens` in one stretch of time; returns what each says: see `_timed`.

        A stretch that a process was late for is no figure; it is measured again, with more time before it begins.
        """
        lead_s = LEAD_S + LEAD_S_EACH * len(self._processes)
        for _ in range(STRETCHES_MAX):
            start = time.monotonic() + lead_s
            self._say({"tokens": tokens, "start": start, "end": start + seconds})
            answers = [self._answer(process, lead_s + seconds + ANSWER_WAIT_S) for process in self._processes]
            if not any(answer["late"] for answer in answers):
                return answers
            lead_s *= 2
        raise DaemonError(
            f"a client process was not ready when a stretch of {seconds} s began, {STRETCHES_MAX} times; "
            "the machine is too busy to measure on"
        )

    @contextlib.contextmanager
    def watch(self) -> Iterator[list[dict[str, Any]]]:
        """Has all look up one token after the other while the body runs; afterwards the list holds what each says."""
        answers: list[dict[str, Any]] = []
        self._say({"tokens": 1, "start": 0.0, "end": None})
        try:
            yield answers
        finally:
            self._say({})
            answers += [self._answer(process, ANSWER_WAIT_S) for process in self._processes]

    def _say(self, message: dict[str, Any]) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()

    def _answer(self, process: subprocess.Popen[str], wait_s: float) -> dict[str, Any]:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], wait_s)
        line = process.stdout.readline() if ready else ""
        if not line:
            state = "ended; its words are above" if ready else f"has not answered for {wait_s:.0f} s"
            raise DaemonError(f"client process {process.pid} {state}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait(STOP_WAIT_S)

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()  # it ends when nobody speaks to it
        try:
            for process in self._processes:
                process.wait(STOP_WAIT_S)
        finally:
            self._kill()


def _run(how: dict[str, Any]) -> None:
    """What a client process does."""
    logging.getLogger("tierstore").setLevel(logging.ERROR)  # that its daemon is gone, when that is measured, is no news
    made = stores.find_store(Path(how["store"]))
    keys = np.load(how["keys"])
    with (
        tierstore.connect(how["socket"]) if "socket" in how else tierstore.open(how["store"], dram=how["dram"]) as store
    ):
        table = store[stores.TABLE]
        for _ in range(WARM_ROUNDS_MAX):
            misses = _misses(store)
            for start in range(0, len(keys), CHUNK_TOKENS):
                part = keys[start : start + CHUNK_TOKENS]
                made.check(part, table.lookup(part))
            misses = _misses(store) - misses
            if not misses:
                break
        _print({"misses": misses})
        generator = np.random.default_rng()
        with open(0, "rb", buffering=0, closefd=False) as lines:  # so that no line is taken in before it is waited for
            for line in iter(lines.readline, b""):
                asked = json.loads(line)
                misses = _misses(store)
                answer = _timed(table, keys, generator, asked["tokens"], asked["start"], asked["end"], lines)
                _print(answer | {"misses": _misses(store) - misses})


def _timed(
    table: tierstore.Table,
    keys: np.ndarray,
    generator: np.random.Generator,
    tokens: int,
    start: float,
    end: float | None,
    lines: BinaryIO,
) -> dict[str, Any]:
    """Looks batches up from `start` to `end` of the monotonic clock, None: until a line comes in, which is read.

    Returns {"lookups": that ended in time, "late": whether it began too late, "p50_s", "p99_s", "max_s":
    of their seconds}.
    """
    drawn = keys[generator.integers(0, len(keys), (ONE_TOKEN_KEYS if tokens == 1 else BATCHES, tokens))]
    parts, out = itertools.cycle(list(drawn)), stores.rows_buffer(tokens)
    between_looks = range(LOOKUPS_BETWEEN_LOOKS if tokens == 1 else 1)
    lookup, clock = table.lookup, time.monotonic
    late = end is not None and clock() > start
    time.sleep(max(0.0, start - clock()))
    stamps = array("d", [clock()])
    ended = False
    while not ended:
        for _ in between_looks:
            lookup(next(parts), out)
            stamps.append(clock())
        ended = stamps[-1] >= end if end is not None else bool(select.select([lines], [], [], 0)[0])
    if end is None:
        lines.readline()
    times = np.array(stamps)
    taken = np.diff(times[times <= (end or np.inf)])
    p50_s, p99_s, max_s = np.percentile(taken, [50, 99, 100]).tolist() if len(taken) else (0.0, 0.0, 0.0)
    return {"lookups": len(taken), "late": late, "p50_s": p50_s, "p99_s": p99_s, "max_s": max_s}


def _misses(store: tierstore.Store) -> int:
    return int(store.stats()["hits"]["nvme"])


def _print(record: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _run(json.loads(sys.argv[1]))
