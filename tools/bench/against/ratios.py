"""What two builds' seconds come to: of each case the median ratio of rates, and the interval of a sign test.

Input: what each build found, by side, in pairs. Output: comparisons and a grid in a `Result`. Errors: none.
"""

from __future__ import annotations

import math
from typing import Any

from ..pairs import Comparison, Grid, Result
from .builds import OTHER, THIS

RATE_MIN = 0.97
CONFIDENCE = 0.95


def compare(result: Result, found: dict[str, list[dict[str, Any]]], unit: str = "token", work: float = 1) -> None:
    """Adds each case that both builds have: of `work` units, in found[side][pair]["seconds"][case]."""
    lines = []
    result.skipped |= {case: why for of_side in found.values() for case, why in of_side[0]["skipped"].items()}
    for case in [case for case in found[THIS][0]["seconds"] if case in found[OTHER][0]["seconds"]]:
        seconds = {side: [one["seconds"][case] for one in of_side] for side, of_side in found.items()}
        comparison = Comparison(case, unit, work, seconds, {OTHER: RATE_MIN}, THIS)
        result.comparisons.append(comparison)
        ratios = comparison.ratios(OTHER)
        low, high = median_interval(ratios)
        faster = f"{sum(ratio > 1 for ratio in ratios)} of {len(ratios)}"
        lines.append([case, f"{comparison.ratio(OTHER):.3f}", f"{low:.3f}", f"{high:.3f}", faster])
    title = f"rate of this build / the other's: median, and its {CONFIDENCE:.0%} interval by the sign test"
    result.grids.append(Grid(title, ["case", "median", "low", "high", "this build is faster in"], lines))
    result.facts |= {f"{side} is": of_side[0]["build"] for side, of_side in found.items() if "build" in of_side[0]}


def median_interval(values: list[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Returns an interval that holds the median of what `values` are drawn from, whatever its shape.

    The k-th value from either end, k as large as the binomial distribution with p = 1/2 allows (the sign test turned
    around); of fewer than six values, lowest and highest, which hold it less surely.
    """
    ordered, n = sorted(values), len(values)
    tail, k = 0.0, 0
    while k < n // 2:
        tail += math.comb(n, k) / 2**n
        if 2 * tail > 1 - confidence:
            break
        k += 1
    k = max(1, k)
    return ordered[k - 1], ordered[n - k]
