"""`tierstore bench decode`: one token at a time, as a model that writes asks for them.

Input: a table, a working set of it that fits the budget, keys never asked for. Output: p50 and p99 of one-token
lookups, warm and cold; what is left to do in a `wait` that comes after the reads had time to end; and what 64 threads
get done together, beside 2.
"""

from __future__ import annotations

import statistics
import threading
import time
from pathlib import Path

import numpy as np

from tierstore.units import format_bytes

from . import page_cache, stores
from .cold import ColdLookups, one_token
from .pairs import Comparison, Figure, Options, Result, interleave
from .warm import each_lookup
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
    cold_dram_bytes = options.dram_bytes or int(made.spec.table_bytes * DRAM_FRACTION)
    result = Result(f"decode, table of {format_bytes(made.spec.table_bytes)}")
    with ColdLookups(made, "auto", cold_dram_bytes) as lookups:
        result.comparisons.append(one_token(made, lookups, options.pairs))
        _latencies(result, "cold", [lookups.each(COLD_LOOKUPS) for _ in range(options.pairs)])
        result.figures.append(_late_wait(lookups, options.pairs))
        result.facts["served by"] = lookups.store.stats()["io"]
        result.facts["share of the shards in the page cache before cold runs, at most"] = lookups.resident
    page_cache.bring_in(made.files)
    with WorkingSet(made, int(size_bytes * SET_FRACTION), options.dram_bytes) as held:
        out = stores.rows_buffer(1)
        rounds = [each_lookup(held, held.keys[held.draw(WARM_LOOKUPS)], out) for _ in range(options.pairs)]
        _latencies(result, "warm", rounds)
        result.comparisons.append(_many_threads(held, options.pairs))
    return result


def _latencies(result: Result, state: str, rounds: list[list[float]]) -> None:
    bound = 8.0 if state == "warm" else None
    p50 = [statistics.median(seconds) * 1e6 for seconds in rounds]
    p99 = [float(np.percentile(seconds, 99)) * 1e6 for seconds in rounds]
    result.figures.append(Figure(f"{state}, one token (3 keys, 24 rows), p50", "us", p50, bound))
    result.figures.append(Figure(f"{state}, one token (3 keys, 24 rows), p99", "us", p99))


def _late_wait(lookups: ColdLookups, pairs: int) -> Figure:
    """The share of a cold lookup's duration that `wait` takes when it comes later than the reads ended."""
    out = stores.rows_buffer(WAIT_TOKENS)
    shares = []
    for _ in range(pairs + 1):
        lookup_s = lookups.batch(out)
        keys = stores.fresh_keys(lookups.generator, WAIT_TOKENS)
        lookups.make_cold()
        ticket = lookups.store.submit({stores.TABLE: (keys, out)})
        time.sleep(WAIT_FACTOR * lookup_s)  # the caller's other work, such as earlier layers
        started = time.perf_counter()
        ticket.wait(JOIN_TIMEOUT_S)
        shares.append(100 * (time.perf_counter() - started) / lookup_s)
        lookups.made.check(keys, out)
    case = f"wait after the reads had time to end, {WAIT_TOKENS} tokens, part of the lookup"
    return Figure(case, "%", shares[1:], bound=5.0)


def _many_threads(held: WorkingSet, pairs: int) -> Comparison:
    """The same one-token lookups shared out among many threads and among few."""

    def seconds_with(num_threads: int) -> float:
        places = held.draw(LOOKUPS_TOGETHER).reshape(num_threads, -1)
        ready = threading.Barrier(num_threads + 1)

        def work(own: np.ndarray) -> None:
            keys, out = held.keys[own], stores.rows_buffer(1)
            parts = [keys[index : index + 1] for index in range(len(keys))]
            ready.wait(JOIN_TIMEOUT_S)
            for part in parts:
                held.table.lookup(part, out)

        threads = [threading.Thread(target=work, args=(own,)) for own in places]
        for thread in threads:
            thread.start()
        ready.wait(JOIN_TIMEOUT_S)
        started = time.perf_counter()
        for thread in threads:
            thread.join(JOIN_TIMEOUT_S)
        return time.perf_counter() - started

    many, few = f"{MANY_THREADS} threads", f"{FEW_THREADS} threads"
    sides = {many: lambda: seconds_with(MANY_THREADS), few: lambda: seconds_with(FEW_THREADS)}
    seconds = interleave(sides, pairs)
    return Comparison(
        "one-token lookups of all threads together", "lookup", LOOKUPS_TOGETHER, seconds, {few: 0.8}, many
    )
