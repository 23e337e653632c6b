"""`tierstore bench cold`: lookups that no cache can help, beside the bare reads of as many pages.

Input: a table larger than any budget here, keys never asked for before. Output: rates of lookups by each way of
reading, beside the yardstick, fio and np.memmap. Cold means: O_DIRECT for uring; for ways through the page cache the
shards are dropped from it before every run, and what stayed is measured and printed. Every side draws pages of its own,
equally many, because a disk, or its host, may remember what it has just read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

import tierstore
from tierstore.units import format_bytes

from . import page_cache, stores
from .bare import fio, page_cached
from .bare.loops import BareLoop
from .bare.mapped import MappedRows
from .pairs import SUBJECT, Options, Result, p50, seconds_of_all, seconds_of_each
from .stores import MadeStore

SIZE_BYTES = 8 << 30
TOKENS = 1024
DRAM_BYTES = 256 << 20
ONE_TOKEN_LOOKUPS = 64  # in a round; their p50 is the round's figure
BARE, FIO, MEMMAP = "bare loop", "fio", "np.memmap, MADV_RANDOM"
BARE_TARGETS = {"uring": {BARE: 0.9, FIO: 0.9}, "mmap": {BARE: 0.85}, "pread": {}}  # of a batch, by the way of reading


def run(folder: Path, options: Options) -> Result:
    """Measures cold lookups of a batch and of one token. Needs the table's size (8 GiB by default) on the disk."""
    made = stores.make_store(folder, (options.size_bytes or SIZE_BYTES) // stores.ROW_BYTES)
    dram_bytes = options.dram_bytes or min(DRAM_BYTES, made.spec.table_bytes // 4)
    result = Result(f"cold, table of {format_bytes(made.spec.table_bytes)}, {format_bytes(dram_bytes)} of DRAM")
    for io in BARE_TARGETS:
        with ColdLookups(made, io, dram_bytes) as lookups:
            _batch(lookups, options.tokens or TOKENS, options.pairs, result)
            if io == "uring":
                one_token(lookups, options.pairs, result)
            stats = lookups.store.stats()
            share = f"{io}: share of the shards in the page cache before runs, at most"
            result.facts[f"{io}: served by"] = stats["io"]
            result.facts[f"{io}: keys that hit DRAM in all runs"] = stats["hits"]["dram"]
            result.facts[share] = round(lookups.resident, 6)
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
        keys = self.fresh_keys(len(out))
        self.make_cold()
        seconds = seconds_of_all(self.table.lookup, [keys], out)
        if not self._checked:
            self.made.check(keys, out)
            self._checked = True
        return seconds

    def each(self, num_tokens: int) -> list[float]:
        """Returns the seconds of each of `num_tokens` lookups of one token."""
        keys, out = self.fresh_keys(num_tokens), stores.rows_buffer(1)
        self.make_cold()
        return seconds_of_each(self.table.lookup, list(keys[:, None]), out)

    def fresh_keys(self, num_tokens: int) -> np.ndarray:
        """Returns keys that nobody has asked for, int64 [N, O]."""
        return stores.fresh_keys(self.generator, num_tokens)

    def make_cold(self) -> None:
        """Drops the shards from the page cache and notes what stayed there."""
        page_cache.drop(self.made.files)
        self.resident = max(self.resident, page_cache.residency(self.made.files))

    def __enter__(self) -> ColdLookups:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()


def _batch(lookups: ColdLookups, tokens: int, pairs: int, result: Result) -> None:
    made, out, uring = lookups.made, stores.rows_buffer(tokens), lookups.io == "uring"
    with BareLoop.uring(made.files) if uring else BareLoop.willneed(made.files) as loop:

        def bare() -> float:
            loop.load(made.ranges(lookups.fresh_keys(tokens)))
            page_cache.drop(made.files)
            return sum(loop.run())

        sides: dict[str, Callable[[], float]] = {SUBJECT: lambda: lookups.batch(out), BARE: bare}
        if uring and fio.installed():
            sides[FIO] = lambda: fio.read_seconds(made.files, tokens * stores.ROWS_PER_TOKEN)
        elif uring:
            result.skipped[FIO] = "not installed; apt-get install fio"
        case = f"{lookups.io}, {tokens:,} tokens x {stores.ROWS_PER_TOKEN} rows"
        result.compare(case, "row", tokens * stores.ROWS_PER_TOKEN, sides, pairs, BARE_TARGETS[lookups.io])


def one_token(lookups: ColdLookups, pairs: int, result: Result) -> None:
    """Compares p50 of cold one-token lookups with the yardstick, which reads token by token, and np.memmap."""
    made, out = lookups.made, np.ones((stores.ROWS_PER_TOKEN, stores.ROW_BYTES), dtype=np.uint8)

    def bare(loop: BareLoop) -> float:
        groups = [made.ranges(keys) for keys in lookups.fresh_keys(ONE_TOKEN_LOOKUPS)[:, None]]
        whole = [group for group in groups if len(group) == stores.ROWS_PER_TOKEN] or [groups[0]]
        loop.load(np.concatenate(whole))
        return float(np.median(loop.run(len(whole[0]))))

    def memmap() -> float:
        row_ids = made.spec.row_ids(lookups.fresh_keys(ONE_TOKEN_LOOKUPS)).reshape(ONE_TOKEN_LOOKUPS, -1)
        lookups.make_cold()
        mapped = MappedRows(made, random=True)
        return p50(mapped.rows, row_ids, out)

    with BareLoop.uring(made.files) as loop:
        sides: dict[str, Callable[[], float]] = {
            SUBJECT: lambda: float(np.median(lookups.each(ONE_TOKEN_LOOKUPS))),
            BARE: lambda: bare(loop),
            MEMMAP: memmap,
        }
        result.compare(f"{lookups.io}, one token, p50", "row", stores.ROWS_PER_TOKEN, sides, pairs, {BARE: 0.85})
