"""`tierstore bench warm`: lookups of which every key hits DRAM, beside the bare probe and copy, torch and NumPy.

Input: a table larger than the budget and a working set that fits it. Output: rates of batches of tokens drawn from the
set, p50 of one token, and what the process takes beyond its budget. torch and NumPy gather the same rows from a table
that lies whole in memory, each in its fastest way: into an output that is there, NumPy also by entries of 8 rows, as
no model's table has them. One caller; --threads are those of tierstore, torch and the bare loop, NumPy has one.
Outputs are compared before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tierstore.errors import ConfigError
from tierstore.extras import install_command
from tierstore.units import format_bytes

from . import page_cache, stores
from .bare.loops import BareLoop
from .memory import growth_bytes
from .pairs import SUBJECT, Options, Result, p50, seconds_of_all
from .working_set import WorkingSet

SIZE_BYTES = 8 << 30
SET_FRACTION = 1 / 4  # of the table is the working set
TOKENS = 2048
ONE_TOKEN_LOOKUPS = 2000
MIB = 1 << 20
BARE, TORCH = "bare loop", "torch index_select(out=)"
NUMPY, NUMPY_ENTRIES = "NumPy take(out=, mode='clip')", "NumPy take of whole entries"
# Rates, by threads: of tierstore and each side but NumPy, which has one.
TARGETS = {1: {BARE: 0.85, TORCH: 2.0, NUMPY_ENTRIES: 0.85}, 2: {TORCH: 1.6, NUMPY_ENTRIES: 1.5}}


def run(folder: Path, options: Options) -> Result:
    """Measures warm lookups. Needs the table's size (8 GiB by default) on disk, and as much memory with page cache."""
    size_bytes = options.size_bytes or SIZE_BYTES
    made = stores.make_store(folder, size_bytes // stores.ROW_BYTES)
    set_bytes = int(size_bytes * SET_FRACTION)
    title = f"warm, all hits, {format_bytes(set_bytes)} of a table of {format_bytes(made.spec.table_bytes)}"
    result = Result(f"{title}, {options.threads} thread{'s' * (options.threads > 1)}")
    page_cache.bring_in(made.files)
    with WorkingSet(made, set_bytes, options.dram_bytes, threads=options.threads) as held:
        page_cache.drop(made.files)
        misses_before = held.misses()
        with BareLoop.entries(stores.ENTRY_BYTES, stores.key_pairs(held.keys), options.threads) as loop:
            _batch(held, loop, options, result)
        with BareLoop.entries(stores.ENTRY_BYTES, stores.key_pairs(held.keys)) as loop:
            _one_token(held, loop, options, result)
        result.facts |= {
            "DRAM budget": format_bytes(held.dram_bytes),
            "keys that missed in measured runs": held.misses() - misses_before,
        }
    grown = [growth_bytes(made, made.spec.table_bytes // 16) / MIB for _ in range(min(options.pairs, 3))]
    result.figure("process growth beyond the budget, at its peak", "MiB", grown, bound=64.0)
    return result


def _batch(held: WorkingSet, loop: BareLoop, options: Options, result: Result) -> None:
    tokens = options.tokens or TOKENS
    out, resident, entries = stores.rows_buffer(tokens), held.resident_rows(), held.resident_entries()
    out_rows, out_entries = out.reshape(-1, stores.ROW_BYTES), out.reshape(-1, stores.ENTRY_BYTES)

    def tierstore_seconds() -> float:
        return seconds_of_all(held.table.lookup, [held.keys[held.draw(tokens)]], out)

    def bare_seconds() -> float:
        loop.load(stores.key_pairs(held.keys[held.draw(tokens)]))
        return sum(loop.run())

    def taken(table: np.ndarray, ids: np.ndarray, into: np.ndarray) -> float:
        return seconds_of_all(lambda ids, out: table.take(ids, 0, out, mode="clip"), [ids.reshape(-1)], into)

    sides: dict[str, Callable[[], float]] = {
        SUBJECT: tierstore_seconds,
        BARE: bare_seconds,
        NUMPY: lambda: taken(resident, held.resident_ids(held.draw(tokens)), out_rows),
        NUMPY_ENTRIES: lambda: taken(entries, held.entry_ids(held.draw(tokens)), out_entries),
    }
    try:
        sides[TORCH] = _torch_side(resident, out, held, options.threads)
    except ImportError:
        result.skipped[TORCH] = f"torch is not installed; {install_command('torch')}"
    _check_sides(held, resident, entries, tokens, out)
    rows, targets = tokens * stores.ROWS_PER_TOKEN, TARGETS.get(options.threads, {})
    result.compare(f"{tokens:,} tokens x {stores.ROWS_PER_TOKEN} rows", "row", rows, sides, options.pairs, targets)


def _torch_side(resident: np.ndarray, out: np.ndarray, held: WorkingSet, threads: int) -> Callable[[], float]:
    """Returns a side that gathers with torch.index_select into `out`, with `threads` threads of torch's own."""
    import torch

    table, target = torch.from_numpy(resident), torch.from_numpy(out.reshape(-1, out.shape[-1]))

    def seconds() -> float:
        ids = torch.from_numpy(held.resident_ids(held.draw(len(out))).reshape(-1))
        torch.set_num_threads(threads)
        return seconds_of_all(lambda ids, out: torch.index_select(table, 0, ids, out=out), [ids], target)

    return seconds


def _one_token(held: WorkingSet, loop: BareLoop, options: Options, result: Result) -> None:
    out = stores.rows_buffer(1)

    def bare_p50() -> float:
        loop.load(stores.key_pairs(held.keys[held.draw(ONE_TOKEN_LOOKUPS)]))
        return float(np.median(loop.run(len(stores.ORDERS))))

    sides = {SUBJECT: lambda: p50(held.table.lookup, held.single_tokens(ONE_TOKEN_LOOKUPS), out), BARE: bare_p50}
    case = "one token, p50, through Python"
    compared = result.compare(case, "row", stores.ROWS_PER_TOKEN, sides, options.pairs)
    us = [seconds * 1e6 for seconds in compared.seconds[SUBJECT]]
    result.figure("one token (3 keys, 24 rows), p50 through Python", "us", us, bound=8.0)


def _check_sides(held: WorkingSet, resident: np.ndarray, entries: np.ndarray, tokens: int, out: np.ndarray) -> None:
    places = held.draw(tokens)
    held.table.lookup(held.keys[places], out)
    held.made.check(held.keys[places], out)
    of_entries = entries[held.entry_ids(places)].reshape(out.shape)
    if not np.array_equal(out, resident[held.resident_ids(places)]) or not np.array_equal(out, of_entries):
        raise ConfigError(
            "the table for torch and NumPy holds other rows than the store; this is a fault of the benchmark"
        )
