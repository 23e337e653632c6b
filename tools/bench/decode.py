"""`tierstore bench decode`: one token at a time, as a model that writes asks for them.

Input: a table, a working set of it that fits the budget, keys never asked for. Output: p50 and p99 of one-token
lookups, warm and cold; what is left to do in a `wait` that comes after the reads had time to end; and what 64 threads
get done together, beside 2; batches down to values in bfloat16 (`decoded`).
"""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path

import numpy as np

from tierstore.extras import install_command
from tierstore.store.ticket import Ticket
from tierstore.units import format_bytes

from . import decoded, page_cache, stores
from .cold import ColdLookups, one_token
from .pairs import Options, Result, seconds_of_all, seconds_of_each
from .working_set import WorkingSet

SIZE_BYTES = 8 << 30
SET_FRACTION = 1 / 64  # of the table is the working set
DRAM_FRACTION = 1 / 16
WARM_LOOKUPS, COLD_LOOKUPS = 4000, 256  # in a round
WAIT_TOKENS = 256  # in a lookup that is submitted
WAIT_FACTOR = 2.0  # how many times a lookup's own duration the caller does something else
FEW_THREADS, MANY_THREADS = 2, 64
LOOKUPS_TOGETHER = 12_800  # of all threads, in a round
JOIN_TIMEOUT_S = 600


def run(folder: Path, options: Options) -> Result:
    """Measures one-token lookups and submitted ones. Needs the table's size on disk (8 GiB by default)."""
    size_bytes = options.size_bytes or SIZE_BYTES
    made = stores.make_store(folder, size_bytes // stores.ROW_BYTES)
    result = Result(f"decode, table of {format_bytes(made.spec.table_bytes)}")
    cold_dram_bytes = options.dram_bytes or int(made.spec.table_bytes * DRAM_FRACTION)
    with ColdLookups(made, "auto", cold_dram_bytes) as lookups:
        one_token(lookups, options.pairs, result)
        _latencies(result, "cold", [lookups.each(COLD_LOOKUPS) for _ in range(options.pairs)])
        _late_wait(lookups, options.pairs, result)
        result.facts["served by"] = lookups.store.stats()["io"]
        result.facts["share of the shards in the page cache before cold runs, at most"] = lookups.resident
    page_cache.bring_in(made.files)
    with WorkingSet(made, int(size_bytes * SET_FRACTION), options.dram_bytes) as held:
        out = stores.rows_buffer(1)
        rounds = [
            seconds_of_each(held.table.lookup, held.single_tokens(WARM_LOOKUPS), out) for _ in range(options.pairs)
        ]
        _latencies(result, "warm", rounds, p50_bound=8.0)
        _many_threads(held, options.pairs, result)
    try:
        of_values = decoded.measure(folder, size_bytes, options)
    except ImportError:
        result.skipped["values in bf16"] = f"torch is not installed; {install_command('torch')}"
    else:
        result.comparisons += of_values.comparisons
        result.facts |= of_values.facts
    return result


def _latencies(result: Result, state: str, rounds: list[list[float]], p50_bound: float | None = None) -> None:
    for percent, bound in ((50, p50_bound), (99, None)):
        us = [float(np.percentile(seconds, percent)) * 1e6 for seconds in rounds]
        result.figure(f"{state}, one token (3 keys, 24 rows), p{percent}", "us", us, bound)


def _late_wait(lookups: ColdLookups, pairs: int, result: Result) -> None:
    """The share of a cold lookup's duration that `wait` takes when it comes later than the reads ended."""
    out = stores.rows_buffer(WAIT_TOKENS)
    shares = []
    for _ in range(pairs + 1):
        lookup_s = lookups.batch(out)
        keys = lookups.fresh_keys(WAIT_TOKENS)
        lookups.make_cold()
        ticket = lookups.store.submit({stores.TABLE: (keys, out)})
        time.sleep(WAIT_FACTOR * lookup_s)  # the caller's other work, such as earlier layers
        shares.append(100 * seconds_of_all(Ticket.wait, [ticket], JOIN_TIMEOUT_S) / lookup_s)
        lookups.made.check(keys, out)
    case = f"wait after the reads had time to end, {WAIT_TOKENS} tokens, part of the lookup"
    result.figure(case, "%", shares[1:], bound=5.0)


def _many_threads(held: WorkingSet, pairs: int, result: Result) -> None:
    """The same one-token lookups shared out among many threads and among few."""

    def seconds_with(num_threads: int) -> float:
        ready = threading.Barrier(num_threads + 1)

        def work(parts: list[np.ndarray]) -> None:
            out = stores.rows_buffer(1)
            ready.wait(JOIN_TIMEOUT_S)
            for part in parts:
                held.table.lookup(part, out)

        threads = [
            threading.Thread(target=work, args=(held.single_tokens(LOOKUPS_TOGETHER // num_threads),))
            for _ in range(num_threads)
        ]
        for thread in threads:
            thread.start()
        ready.wait(JOIN_TIMEOUT_S)
        return seconds_of_all(threading.Thread.join, threads, JOIN_TIMEOUT_S)

    few, many = (f"{count} threads" for count in (FEW_THREADS, MANY_THREADS))
    sides = {many: partial(seconds_with, MANY_THREADS), few: partial(seconds_with, FEW_THREADS)}
    case = "one-token lookups of all threads together"
    result.compare(case, "lookup", LOOKUPS_TOGETHER, sides, pairs, {few: 0.9}, subject=many)
