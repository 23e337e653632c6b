"""Which budgets to choose from, given a curve of hit rates.

Flows in: budgets in bytes, ascending, and the hit rate of each. Flows out: one to three `Recommendation`s, the least first.
Memory is bought in doublings, so that curves are judged over the logarithm of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..units import format_bytes

GAIN_MIN = 0.01  # the hit rate that a doubling of DRAM must bring to be worth it


@dataclass(frozen=True)
class Recommendation:
    """A budget, and why: `name` is "frugal", "knee" or "generous"."""

    name: str
    dram_bytes: int
    why: str


def recommend(budgets: Sequence[int], rates: Sequence[float]) -> list[Recommendation]:
    """Returns the budgets to choose from, the least first: half of the gain, where the curve bends, where it ends to pay.

    budgets: ascending, one at least; rates: of as many. Budgets that fall together are named once, by the first of these names;
    where the curve bends before half of its gain, none is frugal.
    """
    up = np.maximum.accumulate(np.asarray(rates, dtype=np.float64))
    doublings = np.log2(np.asarray(budgets[1:]) / np.asarray(budgets[:-1]))
    worth = np.flatnonzero(np.diff(up) >= GAIN_MIN * doublings)
    half = int(np.argmax(up >= (up[0] + up[-1]) / 2))
    last = int(worth[-1]) + 1 if len(worth) else 0
    bend = knee(budgets, rates)
    beyond = f"beyond {format_bytes(budgets[last])} memory buys little"
    if last == len(budgets) - 1:
        beyond = "nothing larger was tried"
    whys = {
        "frugal": (half, f"half of what memory can add beyond {format_bytes(budgets[0])}"),
        "knee": (bend, "the curve bends here: up to here each doubling of memory brings most"),
        "generous": (last, f"the last doubling that brings {100 * GAIN_MIN:g} point or more; {beyond}"),
    }
    if half > bend:
        del whys["frugal"]  # it would ask for more than the knee
    chosen: dict[int, Recommendation] = {}
    for name, (place, why) in whys.items():
        text = f"{100 * up[place]:.1f} % of accesses hit: {why}"
        chosen.setdefault(place, Recommendation(name, int(budgets[place]), text))
    return [chosen[place] for place in sorted(chosen)]


def knee(budgets: Sequence[int], rates: Sequence[float]) -> int:
    """Returns the place of the point farthest above the chord, over the logarithm of bytes; of a flat curve the first.

    That is the knee of a curve that rises after Satopaa et al., "Finding a 'kneedle' in a haystack", ICDCS workshops 2011.
    """
    up = np.maximum.accumulate(np.asarray(rates, dtype=np.float64))
    if up[-1] == up[0]:
        return 0
    across = np.log(np.asarray(budgets, dtype=np.float64))
    return int(np.argmax((up - up[0]) / (up[-1] - up[0]) - (across - across[0]) / (across[-1] - across[0])))
