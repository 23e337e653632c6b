"""Which budgets to choose from, given a curve of hit rates.

Input: budgets in bytes, ascending, and the hit rate of each. Output: one to four `Recommendation`s, the least first.
Errors: none. Memory is bought in doublings, so that curves are judged over the logarithm of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..units import format_bytes

GAIN_MIN = 0.01  # the hit rate that a doubling of DRAM must bring to pay
WHY_WHOLE = "100.0 % of accesses hit: the tables fit in memory whole, and nothing is read from disk"


@dataclass(frozen=True)
class Recommendation:
    """A budget, and why: `name` is "frugal", "knee", "generous" or "whole"."""

    name: str
    dram_bytes: int
    why: str


def recommend(budgets: Sequence[int], rates: Sequence[float], whole_bytes: int | None = None) -> list[Recommendation]:
    """Returns the budgets to choose from, the least first: half of the gain, where the curve bends,
    where it ends to pay.

    budgets: ascending; rates: of as many. Budgets that fall together are named once, by the first of these names; if
    the curve bends before half of its gain, none is frugal. whole_bytes: a budget above all these that stores the
    tables whole, None if it is not known. Without any budget, only that one is named.
    """
    whole = [] if whole_bytes is None else [Recommendation("whole", int(whole_bytes), WHY_WHOLE)]
    if not len(budgets):
        return whole
    up = np.maximum.accumulate(np.asarray(rates, dtype=np.float64))
    doublings = np.log2(np.asarray(budgets[1:]) / np.asarray(budgets[:-1]))
    paying = np.flatnonzero(np.diff(up) >= GAIN_MIN * doublings)
    half = int(np.argmax(up >= (up[0] + up[-1]) / 2))
    last = int(paying[-1]) + 1 if len(paying) else 0
    bend = knee(budgets, rates)
    beyond = f"beyond {format_bytes(budgets[last])} memory buys little"
    if last == len(budgets) - 1:
        beyond = "nothing larger was tried" if whole_bytes is None else "the next size tried holds the tables whole"
    whys = {
        "frugal": (half, f"half of what memory can add beyond {format_bytes(budgets[0])}"),
        "knee": (bend, "the curve bends here: up to here each doubling of memory brings most"),
        "generous": (last, f"the last doubling that brings {100 * GAIN_MIN:g} point or more; {beyond}"),
    }
    if half > bend:
        del whys["frugal"]  # it would ask for more than the knee
    chosen: dict[int, Recommendation] = {}
    for name, (index, why) in whys.items():
        text = f"{100 * up[index]:.1f} % of accesses hit: {why}"
        chosen.setdefault(index, Recommendation(name, int(budgets[index]), text))
    return [chosen[index] for index in sorted(chosen)] + whole


def default_choice(groups: Sequence[Sequence[Recommendation]]) -> Recommendation:
    """Returns the budget to plan with if nobody asks for another: the largest knee of a profile's groups, one at least.

    groups: what `recommend` gave for each. If a group's knee falls together with its frugal budget, that is meant.
    """
    knees = (next((choice for choice in group if choice.name == "knee"), group[0]) for group in groups)
    return max(knees, key=lambda choice: choice.dram_bytes)


def knee(budgets: Sequence[int], rates: Sequence[float]) -> int:
    """Returns the index of the point farthest above the chord, over the logarithm of bytes; of a flat curve the first.

    That is the knee of a curve that rises after Satopaa et al., "Finding a 'kneedle' in a haystack",
    ICDCS workshops 2011.
    """
    up = np.maximum.accumulate(np.asarray(rates, dtype=np.float64))
    if up[-1] == up[0]:
        return 0
    across = np.log(np.asarray(budgets, dtype=np.float64))
    return int(np.argmax((up - up[0]) / (up[-1] - up[0]) - (across - across[0]) / (across[-1] - across[0])))
