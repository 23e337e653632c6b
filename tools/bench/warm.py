"""`tierstore bench warm`: lookups of which every key hits DRAM, beside the bare probe and copy, torch and NumPy.

Input: a table larger than the budget and a working set that fits it. Output: rates of batches of tokens drawn from the
set, p50 of one token, and what the process takes beyond its budget. torch and NumPy gather the same rows from a table
that lies whole in memory; every side has equally many threads, and their outputs are compared before anything is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tierstore.errors import ConfigError
from tierstore.extras import install_command
from tierstore.units import format_bytes

from . import page_cache, stores
from .bare.loops import BareLoop
from .callers import Callers
from .memory import growth_bytes
from .pairs import SUBJECT, Comparison, Figure, Options, Result, interleave
from .working_set import WorkingSet

SIZE_BYTES = 8 << 30
SET_FRACTION = 1 / 4  # of the table is the working set
TOKENS = 2048
ONE_TOKEN_LOOKUPS = 2000
MIB = 1 << 20
BARE, TORCH, NUMPY = "bare loop", "torch index_select(out=)", "NumPy fancy index"


def run(folder: Path, options: Options) -> Result:
    """Measures warm lookups. Needs the table's size on disk (8 GiB by default) and about as much memory,
    page cache included."""
    size_bytes = options.size_bytes or SIZE_BYTES
    tokens = options.tokens or TOKENS
    made = stores.make_store(folder, size_bytes // stores.ROW_BYTES)
    set_bytes = int(size_bytes * SET_FRACTION)
    result = Result("")
    page_cache.bring_in(made.files)
    with WorkingSet(made, set_bytes, options.dram_bytes) as held:
        result.title = f"warm, all hits, {format_bytes(set_bytes)} of a table of {format_bytes(made.spec.table_bytes)}"
        result.title += f", {options.threads} thread{'s' * (options.threads > 1)}"
        page_cache.drop(made.files)
        misses_before = held.misses()
        with BareLoop.entries(stores.ENTRY_BYTES, stores.key_pairs(held.keys), options.threads) as loop:
            result.comparisons.append(_batch(held, loop, tokens, options, result))
        with BareLoop.entries(stores.ENTRY_BYTES, stores.key_pairs(held.keys)) as loop:
            result.comparisons.append(_one_token(held, loop, options.pairs))
        p50_us = [seconds * 1e6 for seconds in result.comparisons[-1].seconds[SUBJECT]]
        result.figures.append(Figure("one token (3 keys, 24 rows), p50 through Python", "us", p50_us, bound=8.0))
        result.facts |= {
            "DRAM budget": format_bytes(held.dram_bytes),
            "keys that missed in measured runs": held.misses() - misses_before,
        }
    grown = [growth_bytes(made, made.spec.table_bytes // 16) / MIB for _ in range(min(options.pairs, 3))]
    result.figures.append(Figure("process growth beyond the budget, at its peak", "MiB", grown, bound=64.0))
    return result


def _batch(held: WorkingSet, loop: BareLoop, tokens: int, options: Options, result: Result) -> Comparison:
    out = stores.rows_buffer(tokens)
    resident = held.resident_rows()
    with Callers(options.threads) as callers:

        def tierstore_seconds() -> float:
            keys = held.keys[held.draw(tokens)]
            return callers.seconds(lambda start, end: held.table.lookup(keys[start:end], out[start:end]), tokens)

        def bare_seconds() -> float:
            loop.load(stores.key_pairs(held.keys[held.draw(tokens)]))
            return sum(loop.run())

        def numpy_seconds() -> float:
            ids = held.resident_ids(held.draw(tokens))

            def gather(start: int, end: int) -> None:
                out[start:end] = resident[ids[start:end]]

            return callers.seconds(gather, tokens)

        sides: dict[str, Callable[[], float]] = {SUBJECT: tierstore_seconds, BARE: bare_seconds, NUMPY: numpy_seconds}
        try:
            sides[TORCH] = torch_side(resident, out, held, options.threads)
        except ImportError:
            result.skipped[TORCH] = f"torch is not installed; {install_command('torch')}"
        _check_sides(held, resident, tokens, out)
        seconds = interleave(sides, options.pairs)
    targets = {BARE: 0.85, TORCH: 2.0, NUMPY: 2.5}
    rows = tokens * stores.ROWS_PER_TOKEN
    kept = {side: least for side, least in targets.items() if side in seconds}
    return Comparison(f"{tokens:,} tokens x {stores.ROWS_PER_TOKEN} rows", "row", rows, seconds, kept)


def torch_side(resident: np.ndarray, out: np.ndarray, held: WorkingSet, threads: int) -> Callable[[], float]:
    """Returns a side that gathers with torch.index_select into `out`, with `threads` threads of torch's own."""
    import torch

    table, target = torch.from_numpy(resident), torch.from_numpy(out.reshape(-1, out.shape[-1]))

    def seconds() -> float:
        ids = torch.from_numpy(held.resident_ids(held.draw(len(out))).reshape(-1))
        torch.set_num_threads(threads)
        started = time.perf_counter()
        torch.index_select(table, 0, ids, out=target)
        return time.perf_counter() - started

    return seconds


def _one_token(held: WorkingSet, loop: BareLoop, pairs: int) -> Comparison:
    def tierstore_seconds() -> float:
        keys, out = held.keys[held.draw(ONE_TOKEN_LOOKUPS)], stores.rows_buffer(1)
        return statistics.median(each_lookup(held, keys, out))

    def bare_seconds() -> float:
        loop.load(stores.key_pairs(held.keys[held.draw(ONE_TOKEN_LOOKUPS)]))
        return statistics.median(loop.run(len(stores.ORDERS)))

    seconds = interleave({SUBJECT: tierstore_seconds, BARE: bare_seconds}, pairs)
    return Comparison("one token, p50, through Python", "row", stores.ROWS_PER_TOKEN, seconds)


def each_lookup(held: WorkingSet, keys: np.ndarray, out: np.ndarray) -> list[float]:
    """Returns the seconds of each lookup of one token of keys [N, O]."""
    lookup, clock = held.table.lookup, time.perf_counter
    parts = [keys[index : index + 1] for index in range(len(keys))]
    seconds = []
    for part in parts:
        started = clock()
        lookup(part, out)
        seconds.append(clock() - started)
    return seconds


def _check_sides(held: WorkingSet, resident: np.ndarray, tokens: int, out: np.ndarray) -> None:
    places = held.draw(tokens)
    held.table.lookup(held.keys[places], out)
    held.made.check(held.keys[places], out)
    if not np.array_equal(out, resident[held.resident_ids(places)]):
        raise ConfigError(
            "the table for torch and NumPy holds other rows than the store; this is a fault of the benchmark"
        )
