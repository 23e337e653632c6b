"""`tierstore bench trace`: real text through V4.1's hash into a scaled table.

Input: token ids (a trace file, else what `real_text` finds). Output: for each DRAM budget the hit rates by order as the
text goes on, and rows a second; and a prefill of 8,192 tokens, half of whose keys are cached and half not, beside the
bare copies of its hits and the bare reads of its misses, added.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np

import tierstore
from tierstore.units import format_bytes

from . import page_cache, real_text, stores
from .bare.loops import BareLoop
from .pairs import SUBJECT, Grid, Options, Result, seconds_of_all
from .placed import run_placed
from .stores import MadeStore

SIZE_BYTES = 8 << 30
DRAM_PARTS = (64, 16, 4)  # of the table, where no budget is given
TRACE_TOKENS = 1 << 18
SEGMENTS = 8
BATCH_TOKENS = 1024
PREFILL_TOKENS = 8192
PREFILL_DRAM_FRACTION = 1 / 8
BARE_ENTRIES = 100_000  # that the yardstick's hits are drawn from: 200 MiB
BARE = "bare loops, copies + reads"


def run(folder: Path, options: Options) -> Result:
    """Runs the text through a store of each budget. Needs the table's size on disk (8 GiB by default)."""
    size_bytes = options.size_bytes or SIZE_BYTES
    made = stores.make_store(folder, size_bytes // stores.ROW_BYTES)
    num_tokens = options.trace_tokens or TRACE_TOKENS
    text = real_text.load(options.trace, num_tokens)
    spec = stores.v41_hash(stores.rows_per_head(size_bytes), text.token_map)
    assert spec.moduli(stores.LAYER) == made.spec.moduli
    keys = text.keys(spec, stores.LAYER, num_tokens)
    budgets = options.budgets or tuple(made.spec.table_bytes // part for part in DRAM_PARTS)
    result = Result(f"trace, {num_tokens:,} tokens, table of {format_bytes(made.spec.table_bytes)}")
    for budget in budgets:
        result.grids.append(_over_time(made, keys, budget, options.tokens or BATCH_TOKENS))
    _prefill(made, keys, options, result)
    result.facts["text"] = text.source
    if options.trace is None:
        run_placed(folder, options, size_bytes, result)
    return result


def _over_time(made: MadeStore, keys: np.ndarray, dram_bytes: int, batch_tokens: int) -> Grid:
    """Looks all keys up in batches; a line for each segment of the text."""
    orders = [f"order {order}" for order in stores.ORDERS]
    columns = ["tokens up to", *(f"hits, {order}" for order in orders), "batches without a miss", "rows/s"]
    lines = []
    out = stores.rows_buffer(batch_tokens)
    with tierstore.open(made.path, dram=dram_bytes) as store:
        table = store[stores.TABLE]
        bounds = [len(keys) * i // SEGMENTS for i in range(SEGMENTS + 1)]
        for start, end in itertools.pairwise(bounds):
            before, started = store.stats(), time.perf_counter()
            for at in range(start, end, batch_tokens):
                part = keys[at : min(at + batch_tokens, end)]
                table.lookup(part, out[: len(part)])
            seconds, after = time.perf_counter() - started, store.stats()
            batches = after["batches"] - before["batches"]
            whole = (after["zero_miss_batches"] - before["zero_miss_batches"]) / batches if batches else 0.0
            rates = [round(rate, 4) for rate in _hit_rates(before, after)]
            rows_per_s = round((end - start) * stores.ROWS_PER_TOKEN / seconds) if end > start else 0
            lines.append([end, *rates, round(whole, 4), rows_per_s])
        served = store.stats()["io"]
    return Grid(f"{format_bytes(dram_bytes)} of DRAM, batches of {batch_tokens:,} tokens, io {served}", columns, lines)


def _hit_rates(before: dict, after: dict) -> list[float]:
    """Returns the share of keys of each order that did not come from NVMe between two readings of `Store.stats`."""
    rates = []
    for order in stores.ORDERS:
        old, new = (stats["tables"][stores.TABLE]["orders"][order] for stats in (before, after))
        counts = {tier: new[tier] - old[tier] for tier in new}
        total = sum(counts.values())
        rates.append(1 - counts["nvme"] / total if total else 0.0)
    return rates


class _Piece:
    """8,192 tokens of the text under a salt, so that nobody has seen their keys; half of the distinct keys are chosen.

    XOR with one number keeps which n-grams are equal, and so the text's own repetition, but gives other keys and pages.
    """

    def __init__(self, keys: np.ndarray, generator: np.random.Generator) -> None:
        start = int(generator.integers(0, max(1, len(keys) - PREFILL_TOKENS)))
        salt = generator.integers(0, 2**63 - 1, dtype=np.int64)
        self.keys = keys[start : start + PREFILL_TOKENS] ^ salt
        pairs = stores.key_pairs(self.keys)
        _, self.distinct = np.unique(pairs, axis=0, return_inverse=True)
        self.chosen = (generator.random(self.distinct.max() + 1) < 0.5)[self.distinct]  # bool, a key of the flat list

    def cached(self) -> np.ndarray:
        """Returns the keys with -1 in place of those that are to miss."""
        return np.where(self.chosen.reshape(self.keys.shape), self.keys, -1)

    def missing(self) -> np.ndarray:
        """Returns the keys with -1 in place of those that are to hit."""
        return np.where(self.chosen.reshape(self.keys.shape), -1, self.keys)


def _prefill(made: MadeStore, keys: np.ndarray, options: Options, result: Result) -> None:
    generator = np.random.default_rng()
    tokens = min(PREFILL_TOKENS, len(keys))
    out = stores.rows_buffer(tokens)
    filled = stores.key_pairs(stores.fresh_keys(generator, BARE_ENTRIES // len(stores.ORDERS)))
    dram_bytes = options.dram_bytes or int(made.spec.table_bytes * PREFILL_DRAM_FRACTION)
    hits = []
    with (
        tierstore.open(made.path, dram=dram_bytes) as store,
        BareLoop.entries(stores.ENTRY_BYTES, filled) as copies,
        BareLoop.uring(made.files) as reads,
    ):
        table = store[stores.TABLE]

        def tierstore_seconds() -> float:
            piece = _Piece(keys, generator)
            for _ in range(2):  # the second time shows an admission policy that the keys come again
                table.lookup(piece.cached(), out)
            page_cache.drop(made.files)
            before = store.stats()["hits"]["nvme"]
            seconds = seconds_of_all(table.lookup, [piece.keys], out)
            hits.append(1 - (store.stats()["hits"]["nvme"] - before) / piece.keys.size)
            return seconds

        def bare_seconds() -> float:
            piece = _Piece(keys, generator)
            reads.load(made.ranges(piece.missing()))
            copies.load(filled[generator.permutation(len(filled))[piece.distinct[piece.chosen] % len(filled)]])
            return sum(copies.run()) + sum(reads.run())

        case, rows = f"prefill of {tokens:,} tokens of real text, half hits", tokens * stores.ROWS_PER_TOKEN
        result.compare(case, "row", rows, {SUBJECT: tierstore_seconds, BARE: bare_seconds}, options.pairs, {BARE: 0.85})
        made.check(keys[:1], table.lookup(keys[:1]))
    result.facts["prefill: share of keys that hit, lowest and highest"] = [round(min(hits), 3), round(max(hits), 3)]
