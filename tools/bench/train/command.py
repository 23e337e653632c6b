"""`tierstore bench train`: steps of training beside torch, FBGEMM and bare loops, warm and cold; prefetches.

Input: stores that are made for the run in V4.1's shape, and removed in the end. Output: for warm steps, comparisons by
the processor's time, which neighbours disturb little, and by the wall; else by the wall. Gradients are given: no model
is computed. What a step gives is checked by the tests of the trainer, not here.
"""

from __future__ import annotations

import os
from pathlib import Path

from tierstore.units import format_bytes

from .. import stores
from ..pairs import Options, Result
from . import cold, warm

SIZE_BYTES = 256 << 20  # of the warm tables' float32 values
COLD_ROWS = 2_000_000


def run(folder: Path, options: Options) -> Result:
    """Measures training. Needs some 4 GiB on the disk, and 2 GiB of memory. Blocks for minutes."""
    num_rows = (options.size_bytes or SIZE_BYTES) // (4 * stores.DIM)
    result = Result(f"training, a table of {format_bytes(num_rows * 4 * stores.DIM)} of float32 values")
    result.facts["processors of this process, and load before"] = (
        f"{len(os.sched_getaffinity(0))}, {os.getloadavg()[0]:.1f}"
    )
    with stores.temporary_store(folder, num_rows) as made, stores.temporary_store(folder, num_rows) as other:
        warm.measure(made, other, options, result)
    with stores.temporary_store(folder, COLD_ROWS) as made:
        cold.measure(folder, made, options, result)
    return result
