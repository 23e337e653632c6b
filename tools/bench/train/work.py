"""What every side of `bench train` works on: batches of row ids, gradients, and the two clocks.

Input: a number of rows. Output: row ids in V4.1's shape, which repeat about as those of text do; gradients; seconds of
a call, by the wall and of all of the process's threads together. Errors: none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from .. import stores
from ..pairs import WARM_UP_ROUNDS, Comparison, Result, interleave

ROWS_PER_TOKEN = stores.ROWS_PER_TOKEN
LR = 0.01
FRESH_FRACTION = 0.4  # of the keys of a batch come from all there are; recorded text has 0.56 distinct rows a reference
ZIPF = 1.3  # of the others


@dataclass
class Batches:
    """Batches of row ids of one table, drawn anew for each step, and the gradients, which are always the same."""

    num_rows: int
    tokens: int
    dim: int = stores.DIM
    generator: np.random.Generator = field(default_factory=lambda: np.random.default_rng(1))

    def __post_init__(self) -> None:
        """Makes the gradients: of a row's place in the batch alone, as those of the bare loop are."""
        places = np.arange(self.references * self.dim, dtype=np.uint32) * np.uint32(2654435761)
        values = (places >> 16).astype(np.float32) / np.float32(65536) - np.float32(0.5)
        self.gradients = values.reshape(self.references, self.dim)

    @property
    def references(self) -> int:
        """Row ids of a batch."""
        return self.tokens * ROWS_PER_TOKEN

    def draw(self) -> np.ndarray:
        """Returns the row ids of a batch, int64 [references]: of each key, the rows of its heads."""
        num_keys, heads = self.tokens * len(stores.ORDERS), stores.HEADS
        known = self.generator.zipf(ZIPF, num_keys) % self.num_rows
        keys = np.where(
            self.generator.random(num_keys) < FRESH_FRACTION, self.generator.integers(0, 2**62, num_keys), known
        )
        mixed: np.ndarray = keys.astype(np.uint64)[:, None] * np.uint64(heads) + np.arange(heads, dtype=np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15)
        return ((mixed >> np.uint64(32)) % np.uint64(self.num_rows)).astype(np.int64).reshape(-1)


@dataclass(frozen=True)
class Seconds:
    """What a call took: by the wall, and of the processor in all threads."""

    wall: float
    cpu: float


def timed(call: Callable[[], object]) -> Seconds:
    """Calls it once."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def compare(
    result: Result,
    case: str,
    work: float,
    sides: Mapping[str, Callable[[], Seconds]],
    rounds: int,
    targets: Mapping[str, float],
    *,
    by_cpu: bool,
) -> None:
    """Runs sides in turn and adds two comparisons, one a clock. Targets are of the processor's, or of the wall's."""
    found: dict[str, list[Seconds]] = {side: [] for side in sides}

    def kept(side: str) -> float:
        found[side].append(sides[side]())
        return found[side][-1].wall

    interleave({side: partial(kept, side) for side in sides}, rounds, WARM_UP_ROUNDS)
    reached = {side: least for side, least in targets.items() if side in sides}
    for clock, is_cpu in (("processor", True), ("wall", False)):
        seconds = {side: [each.cpu if is_cpu else each.wall for each in all_[-rounds:]] for side, all_ in found.items()}
        given = reached if is_cpu == by_cpu else {}
        result.comparisons.append(Comparison(f"{case}, {clock}", "reference", work, seconds, given))
