"""`tierstore bench scale`: what a row costs as the table grows.

Input: numbers of rows. Output: the cost of a row, warm (a working set of the same bytes in every table) and cold, and
how much more it is in the largest table than in the smallest. All tables are open at once and take turns. They are made
as `stores` says: through tierstore's own build, from one block of rows named over and over, without a checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from tierstore.units import format_bytes

from . import page_cache, stores
from .cold import ColdLookups
from .pairs import Options, Result, seconds_of_all
from .working_set import WorkingSet

ROWS = (4_000_000, 16_000_000, 64_000_000)
SET_BYTES = 128 << 20  # larger than any cache of a processor here
COLD_DRAM_BYTES = 128 << 20
BYTES_MAX_FRACTION = 1 / 4  # of the smallest table: either is at most that
WARM_TOKENS, COLD_TOKENS = 2048, 1024
WARM_REPEATS = 8  # batches in a warm run: one alone takes a few milliseconds
GROWTH_MAX_PERCENT = 15.0


def run(folder: Path, options: Options) -> Result:
    """Measures warm and cold batches in each table. Needs 23 GiB of disk by default; tables stay for the next run."""
    all_made = [stores.make_store(folder, num_rows) for num_rows in sorted(options.rows or ROWS)]
    names = [f"{made.spec.num_rows / 1e6:,.3g} million rows" for made in all_made]
    bytes_max = int(all_made[0].spec.table_bytes * BYTES_MAX_FRACTION)
    set_bytes, cold_tokens = min(SET_BYTES, bytes_max), options.tokens or COLD_TOKENS
    result = Result(f"scale, working set of {format_bytes(set_bytes)} in each table")
    with contextlib.ExitStack() as stack:
        warm, cold = {}, {}
        for name, made in zip(names, all_made, strict=True):
            page_cache.bring_in(made.files)
            warm[name] = stack.enter_context(WorkingSet(made, set_bytes, options.dram_bytes))
            page_cache.drop(made.files)
            cold[name] = stack.enter_context(ColdLookups(made, "auto", min(COLD_DRAM_BYTES, bytes_max)))
        misses_before = sum(held.misses() for held in warm.values())
        warm_sides = {
            name: partial(_warm_seconds, held, stores.rows_buffer(WARM_TOKENS)) for name, held in warm.items()
        }
        cold_sides = {name: partial(each.batch, stores.rows_buffer(cold_tokens)) for name, each in cold.items()}
        _compare("warm", WARM_TOKENS * WARM_REPEATS, warm_sides, options.pairs, result)
        _compare("cold", cold_tokens, cold_sides, options.pairs, result)
        result.facts |= {
            "served by": cold[names[0]].store.stats()["io"],
            "keys that missed in warm runs": sum(held.misses() for held in warm.values()) - misses_before,
            "share of the shards in the page cache before cold runs, at most": max(c.resident for c in cold.values()),
        }
    return result


def _warm_seconds(held: WorkingSet, out: np.ndarray) -> float:
    batches = [held.keys[held.draw(WARM_TOKENS)] for _ in range(WARM_REPEATS)]
    return seconds_of_all(held.table.lookup, batches, out)


def _compare(state: str, tokens: int, sides: Mapping[str, Callable[[], float]], pairs: int, result: Result) -> None:
    """Compares the smallest table with the others; notes how much more a row of the largest costs."""
    smallest, *_, largest = sides
    rows = tokens * stores.ROWS_PER_TOKEN
    seconds = result.compare(state, "row", rows, sides, pairs, subject=smallest).seconds
    growth = [100 * (b / a - 1) for a, b in zip(seconds[smallest], seconds[largest], strict=True)]
    case = f"{state}: cost of a row, {largest} over {smallest}"
    result.figure(case, "% more", growth, bound=GROWTH_MAX_PERCENT)
