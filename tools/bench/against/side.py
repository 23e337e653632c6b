"""One process of `tierstore bench NAME --against OTHER`: a build measures itself, through the public API alone.

Input: a JSON object as the only argument: a store, keys, token ids, and the benchmark's name. Output: one line of JSON:
which build this is, a checksum of rows, the keys that missed where none should, and the seconds of each case. The text
of this file runs under either build (`python -c`), so it imports nothing of `tools` and
calls only what commit 8498e4b has, too.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tierstore

FILL_ROUNDS_MAX, FILL_PAUSE_S = 20, 0.2  # an attached store's misses are in the daemon's cache within that
FILL_TOKENS = 512  # looked up at once while the caches fill
HELD_SHARE_MIN = 0.8
START_WAIT_S, WAIT_S = 120.0, 60.0
IN_MEMORY = ("resident", "recency", "static")


@dataclass
class Side:
    """An open store and what is looked up in it. held: the places of tokens that DRAM holds; None if nothing is to hit.

    token_ids: int64 [N]; keys, int64 [N, O], are of the n-grams that end at each. fresh_start: the first key that is
    asked for next, if nothing is to hit.
    """

    store: Any
    name: str  # of the table
    layer: int
    keys: np.ndarray
    token_ids: np.ndarray
    rng: np.random.Generator
    fresh_start: int
    held: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.table = self.store[self.name]

    def rows_buffer(self, num_tokens: int) -> np.ndarray:
        """Returns a buffer for the rows of so many tokens, its memory already there."""
        spec = self.table.spec
        return np.ones((num_tokens, len(spec.orders) * spec.rows_per_key, spec.row_bytes), dtype=np.uint8)

    def batches(self, count: int, num_tokens: int) -> list[np.ndarray]:
        """Returns `count` batches of keys [num_tokens, O]: drawn from what is held, or never asked for before."""
        if self.held is not None:
            return [self.keys[self.rng.choice(self.held, num_tokens)] for _ in range(count)]
        start, self.fresh_start = self.fresh_start, self.fresh_start + count * num_tokens
        assert self.fresh_start <= len(self.keys), "every cold key is asked for once"
        return [self.keys[at : at + num_tokens] for at in range(start, self.fresh_start, num_tokens)]

    def misses(self) -> int:
        """Returns how many keys came from NVMe so far."""
        return int(self.store.stats()["hits"]["nvme"])


def lookups(side: Side, num_tokens: int, count: int) -> float:
    """Median seconds of `Table.lookup`."""
    out = side.rows_buffer(num_tokens)
    return _median(lambda keys: side.table.lookup(keys, out), side.batches(count, num_tokens))


def submits(side: Side, num_tokens: int, count: int) -> float:
    """Median seconds of `Store.submit` and the wait for it."""
    out = side.rows_buffer(num_tokens)
    return _median(
        lambda keys: side.store.submit({side.name: (keys, out)}).wait(timeout_s=WAIT_S), side.batches(count, num_tokens)
    )


def embeddings(side: Side, num_tokens: int, count: int) -> float:
    """Median seconds of `TieredEmbedding`, each call of so many tokens that follow each other, with those before."""
    import torch

    from engram_adapter import HashSpec, TieredEmbedding

    embedding = TieredEmbedding(side.store, side.layer, HashSpec.from_store(side.store))
    before = side.table.spec.orders[-1] - 1
    ids = torch.from_numpy(side.token_ids)[None]
    assert side.held is not None
    is_held = np.isin(np.arange(len(side.keys)), side.held)
    runs = np.flatnonzero(np.lib.stride_tricks.sliding_window_view(is_held, num_tokens).all(axis=1))
    starts = side.rng.choice(runs[runs >= before], count).tolist()
    calls = [(ids[:, start : start + num_tokens], ids[:, start - before : start]) for start in starts]
    return _median(lambda call: embedding(call[0], history=call[1]), calls)


Measure = Callable[[Side, int, int], float]
# Of each benchmark: its cases, with tokens of a call and calls of which the median is taken.
CASES: dict[str, dict[str, tuple[Measure, int, int]]] = {
    "warm": {"lookup, 2,048 tokens": (lookups, 2048, 40), "submit and wait, 2,048 tokens": (submits, 2048, 40)},
    "cold": {"lookup, 512 tokens": (lookups, 512, 20), "lookup, 1 token, p50": (lookups, 1, 200)},
    "decode": {
        "lookup, 1 token, p50": (lookups, 1, 4000),
        "submit and wait, 1 token, p50": (submits, 1, 4000),
        "TieredEmbedding, 1 token, p50": (embeddings, 1, 2000),
        "TieredEmbedding, 8 tokens, p50": (embeddings, 8, 1000),
    },
    "serve": {
        "attached lookup, 2,048 tokens": (lookups, 2048, 40),
        "attached lookup, 1 token, p50": (lookups, 1, 4000),
    },
}


def measure(ask: dict[str, Any]) -> dict[str, Any]:
    """Opens the store as the benchmark `ask["bench"]` wants it, and returns what it found."""
    keys, token_ids = np.load(ask["keys"]), np.load(ask["token_ids"])
    rng = np.random.default_rng(ask["seed"])
    with _opened(ask) as store:
        num_checked = ask["checked_tokens"]
        side = Side(store, ask["table"], ask["layer"], keys, token_ids, rng, num_checked)
        checksum = zlib.crc32(side.table.lookup(keys[:num_checked]).tobytes())
        if ask["bench"] != "cold":
            side.held = _held(side)
        misses, seconds, skipped = side.misses(), {}, {}
        for case, (measured, num_tokens, calls) in CASES[ask["bench"]].items():
            try:
                seconds[case] = measured(side, num_tokens, max(1, int(calls * ask["effort"]))) / num_tokens
            except ImportError as error:
                skipped[case] = str(error)
        missed = side.misses() - misses if ask["bench"] != "cold" else 0
    build = {"package": str(Path(tierstore.__file__).parent), "version": tierstore.__version__}
    return {"build": build, "checksum": checksum, "missed": missed, "seconds": seconds, "skipped": skipped}


@contextlib.contextmanager
def _opened(ask: dict[str, Any]) -> Iterator[Any]:
    """Opens the store in process; for `serve`, starts this build's daemon and attaches to it."""
    if ask["bench"] != "serve":
        with tierstore.open(ask["store"], dram=ask["dram_bytes"], placement="none") as store:
            yield store
        return
    command = [sys.executable, "-m", "tierstore.tools.cli", "serve", ask["store"], "--socket", ask["socket"]]
    daemon = subprocess.Popen([*command, "--dram", str(ask["dram_bytes"]), "--replan", "off"], stderr=subprocess.PIPE)
    try:
        with _connected(ask["socket"], daemon) as store:
            yield store
    finally:
        daemon.terminate()
        daemon.communicate(timeout=WAIT_S)


def _connected(socket: str, daemon: subprocess.Popen[bytes]) -> Any:
    deadline = time.monotonic() + START_WAIT_S
    while True:
        try:
            return tierstore.connect(socket)
        except tierstore.DaemonError:
            if daemon.poll() is not None:
                raise RuntimeError((daemon.communicate()[1] or b"").decode(errors="replace")[-2000:]) from None
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _held(side: Side) -> np.ndarray:
    """Looks all keys up until DRAM holds what it will hold of them;
    returns the places of tokens that it holds whole."""
    held = np.zeros(0, dtype=np.int64)
    for _ in range(FILL_ROUNDS_MAX):
        before = side.misses()
        for start in range(0, len(side.keys), FILL_TOKENS):
            side.table.lookup(side.keys[start : start + FILL_TOKENS])
        time.sleep(FILL_PAUSE_S)  # a daemon reads what was missed by itself
        found = np.isin(side.table.explain(side.keys), IN_MEMORY).all(axis=1)
        held = np.flatnonzero(found)
        if side.misses() == before or (len(held) >= HELD_SHARE_MIN * len(side.keys)):
            break
    if len(held) < HELD_SHARE_MIN * len(side.keys):
        raise RuntimeError(f"DRAM holds {len(held)} of {len(side.keys)} tokens whole; give --dram more")
    return held


def _median(call: Callable[[Any], object], parts: Sequence[Any] | Iterable[Any]) -> float:
    """Calls `call` on each part and returns the median of the seconds that it took."""
    clock, seconds = time.perf_counter, []
    for part in parts:
        started = clock()
        call(part)
        seconds.append(clock() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(json.loads(sys.argv[1]))) + "\n")
