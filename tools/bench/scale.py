"""`tierstore bench scale`: what a row costs as the table grows.

Input: numbers of rows. Output: the cost of a row, warm (a working set of the same bytes in every table) and cold, and
how much more it is in the largest table than in the smallest. All tables are open at once and take turns. They are made
as `stores` says: through tierstore's own build, from one block of rows named over and over, without a checkpoint.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from tierstore.units import format_bytes

from . import page_cache, stores
from .cold import ColdLookups
from .pairs import Comparison, Figure, Options, Result, interleave
from .working_set import WorkingSet

ROWS = (4_000_000, 16_000_000, 64_000_000)
SET_BYTES = 128 << 20  # larger than any cache of a processor here
SET_PART_MAX = 4  # of the smallest table
COLD_DRAM_BYTES = 128 << 20
WARM_TOKENS, COLD_TOKENS = 2048, 1024
WARM_REPEATS = 8  # batches in a warm run: one alone takes a few milliseconds
GROWTH_MAX_PERCENT = 15.0


def run(folder: Path, options: Options) -> Result:
    """Measures warm and cold batches in each table. Needs 23 GiB of disk by default; tables stay for the next run."""
    sizes = sorted(options.rows or ROWS)
    all_made = [stores.make_store(folder, num_rows) for num_rows in sizes]
    names = [f"{made.spec.num_rows / 1e6:,.3g} million rows" for made in all_made]
    smallest = all_made[0].spec.table_bytes
    set_bytes = min(SET_BYTES, smallest // SET_PART_MAX)
    result = Result(f"scale, working set of {format_bytes(set_bytes)} in each table")
    warm_sides: dict[str, Callable[[], float]] = {}
    cold_sides: dict[str, Callable[[], float]] = {}
    held_all, cold_all = [], []
    with contextlib.ExitStack() as stack:
        for name, made in zip(names, all_made, strict=True):
            page_cache.bring_in(made.files)
            held = stack.enter_context(WorkingSet(made, set_bytes, options.dram_bytes))
            page_cache.drop(made.files)
            cold = stack.enter_context(ColdLookups(made, "auto", min(COLD_DRAM_BYTES, smallest // SET_PART_MAX)))
            held_all.append(held)
            cold_all.append(cold)
            warm_sides[name], cold_sides[name] = _warm_side(held), _cold_side(cold, options.tokens or COLD_TOKENS)
        misses_before = sum(held.misses() for held in held_all)
        result.comparisons.append(_compared("warm", WARM_TOKENS * WARM_REPEATS, warm_sides, options.pairs, result))
        result.comparisons.append(_compared("cold", options.tokens or COLD_TOKENS, cold_sides, options.pairs, result))
        result.facts |= {
            "served by": cold_all[0].store.stats()["io"],
            "keys that missed in warm runs": sum(held.misses() for held in held_all) - misses_before,
            "share of the shards in the page cache before cold runs, at most": max(cold.resident for cold in cold_all),
        }
    return result


def _warm_side(held: WorkingSet) -> Callable[[], float]:
    out = stores.rows_buffer(WARM_TOKENS)

    def seconds() -> float:
        batches = [held.keys[held.draw(WARM_TOKENS)] for _ in range(WARM_REPEATS)]
        started = time.perf_counter()
        for keys in batches:
            held.table.lookup(keys, out)
        return time.perf_counter() - started

    return seconds


def _cold_side(cold: ColdLookups, tokens: int) -> Callable[[], float]:
    out = stores.rows_buffer(tokens)
    return lambda: cold.batch(out)


def _compared(state: str, tokens: int, sides: dict[str, Callable[[], float]], pairs: int, result: Result) -> Comparison:
    """Compares the smallest table with the others, and notes how much a row of the
    largest costs over one of the smallest."""
    seconds = interleave(sides, pairs)
    smallest, *_, largest = sides
    growth = [100 * (b / a - 1) for a, b in zip(seconds[smallest], seconds[largest], strict=True)]
    case = f"{state}: cost of a row, {largest} over {smallest}"
    result.figures.append(Figure(case, "% more", growth, bound=GROWTH_MAX_PERCENT))
    return Comparison(state, "row", tokens * stores.ROWS_PER_TOKEN, seconds, subject=smallest)
