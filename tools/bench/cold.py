"""`tierstore bench cold`: lookups that no cache can help, beside the bare reads of as many pages.

Input: a table larger than any budget here, keys never asked for before. Output: rates of lookups by each way of
reading, beside the yardstick, fio and np.memmap. Cold means: O_DIRECT for uring; for ways through the page cache the
shards are dropped from it before every run, and what stayed is measured and printed. Every side draws pages of its own,
equally many, because a disk, or its host, may remember what it has just read.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import tierstore
from tierstore.units import format_bytes

from . import page_cache, stores
from .bare import fio, page_cached
from .bare.loops import BareLoop
from .bare.mapped import MappedRows
from .pairs import SUBJECT, Comparison, Options, Result, interleave
from .stores import MadeStore

SIZE_BYTES = 8 << 30
TOKENS = 1024
DRAM_BYTES = 256 << 20
ONE_TOKEN_LOOKUPS = 64  # in a round; their p50 is the round's figure
BARE, FIO, MEMMAP = "bare loop", "fio", "np.memmap, MADV_RANDOM"


def run(folder: Path, options: Options) -> Result:
    """Measures cold lookups of a batch and of one token. Needs the table's size (8 GiB
    by default) on the disk of `folder`."""
    size_bytes = options.size_bytes or SIZE_BYTES
    tokens = options.tokens or TOKENS
    made = stores.make_store(folder, size_bytes // stores.ROW_BYTES)
    dram_bytes = options.dram_bytes or min(DRAM_BYTES, made.spec.table_bytes // 4)
    result = Result(f"cold, table of {format_bytes(made.spec.table_bytes)}, {format_bytes(dram_bytes)} of DRAM")
    for io in ("uring", "mmap", "pread"):
        with ColdLookups(made, io, dram_bytes) as lookups:
            result.comparisons.append(_batch(made, lookups, tokens, options.pairs, result))
            if io == "uring":
                result.comparisons.append(one_token(made, lookups, options.pairs))
            result.facts[f"{io}: served by"] = lookups.store.stats()["io"]
            result.facts[f"{io}: keys that hit DRAM in all runs"] = lookups.store.stats()["hits"]["dram"]
            result.facts[f"{io}: share of the shards in the page cache before runs, at most"] = round(
                lookups.resident, 6
            )
    page_cached.measure(folder, options.pairs, result)
    return result


class ColdLookups:
    """A store opened for cold lookups; each call asks for keys of its own."""

    def __init__(self, made: MadeStore, io: str, dram_bytes: int) -> None:
        self.made, self.io = made, io
        self.store = tierstore.open(made.path, dram=dram_bytes, io=io)
        self.table = self.store[stores.TABLE]
        self.generator = np.random.default_rng()
        self.resident = 0.0
        self._checked = False

    def batch(self, out: np.ndarray) -> float:
        """Returns the seconds of one lookup that fills `out`, from the disk."""
        keys = stores.fresh_keys(self.generator, len(out))
        self.make_cold()
        started = time.perf_counter()
        self.table.lookup(keys, out)
        seconds = time.perf_counter() - started
        if not self._checked:
            self.made.check(keys, out)
            self._checked = True
        return seconds

    def each(self, num_tokens: int) -> list[float]:
        """Returns the seconds of each of `num_tokens` lookups of one token."""
        keys, out = stores.fresh_keys(self.generator, num_tokens), stores.rows_buffer(1)
        self.make_cold()
        seconds = []
        for index in range(num_tokens):
            started = time.perf_counter()
            self.table.lookup(keys[index : index + 1], out)
            seconds.append(time.perf_counter() - started)
        return seconds

    def make_cold(self) -> None:
        """Drops the shards from the page cache and notes what stayed there."""
        page_cache.drop(self.made.files)
        self.resident = max(self.resident, page_cache.residency(self.made.files))

    def __enter__(self) -> ColdLookups:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()


def bare_seconds(loop: BareLoop, made: MadeStore, generator: np.random.Generator, tokens: int) -> float:
    """Returns the seconds of the yardstick's reads of the pages of fresh keys, from the disk."""
    loop.load(made.ranges(stores.fresh_keys(generator, tokens)))
    page_cache.drop(made.files)
    return sum(loop.run())


def _batch(made: MadeStore, lookups: ColdLookups, tokens: int, pairs: int, result: Result) -> Comparison:
    out = stores.rows_buffer(tokens)
    uring = lookups.io == "uring"
    with BareLoop.uring(made.files) if uring else BareLoop.willneed(made.files) as loop:
        sides: dict[str, Callable[[], float]] = {
            SUBJECT: lambda: lookups.batch(out),
            BARE: lambda: bare_seconds(loop, made, lookups.generator, tokens),
        }
        targets = {BARE: 0.9} if uring else {BARE: 0.85} if lookups.io == "mmap" else {}
        if uring and fio.installed():
            targets[FIO] = 0.9
            sides[FIO] = lambda: fio.read_seconds(made.files, tokens * stores.ROWS_PER_TOKEN)
        elif uring:
            result.skipped[FIO] = "not installed; apt-get install fio"
        seconds = interleave(sides, pairs)
    case = f"{lookups.io}, {tokens:,} tokens x {stores.ROWS_PER_TOKEN} rows"
    return Comparison(case, "row", tokens * stores.ROWS_PER_TOKEN, seconds, targets)


def one_token(made: MadeStore, lookups: ColdLookups, pairs: int) -> Comparison:
    """Compares p50 of cold one-token lookups with the yardstick, which reads the pages of one token at a time,
    and np.memmap."""
    row_ids = np.empty((ONE_TOKEN_LOOKUPS, stores.ROWS_PER_TOKEN), dtype=np.int64)

    def bare(loop: BareLoop) -> float:
        keys = stores.fresh_keys(lookups.generator, ONE_TOKEN_LOOKUPS)
        groups = [made.ranges(keys[i : i + 1]) for i in range(len(keys))]
        whole = [group for group in groups if len(group) == stores.ROWS_PER_TOKEN] or [groups[0]]
        loop.load(np.concatenate(whole))
        return statistics.median(loop.run(len(whole[0])))

    def memmap() -> float:
        row_ids[:] = made.spec.row_ids(stores.fresh_keys(lookups.generator, ONE_TOKEN_LOOKUPS))
        lookups.make_cold()
        mapped, out = MappedRows(made, random=True), np.ones((stores.ROWS_PER_TOKEN, stores.ROW_BYTES), dtype=np.uint8)
        seconds = []
        for ids in row_ids:
            started = time.perf_counter()
            mapped.rows(ids, out)
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)

    with BareLoop.uring(made.files) as loop:
        sides: dict[str, Callable[[], float]] = {
            SUBJECT: lambda: statistics.median(lookups.each(ONE_TOKEN_LOOKUPS)),
            BARE: lambda: bare(loop),
            MEMMAP: memmap,
        }
        seconds = interleave(sides, pairs)
    return Comparison(f"{lookups.io}, one token, p50", "row", stores.ROWS_PER_TOKEN, seconds, {BARE: 0.85})
