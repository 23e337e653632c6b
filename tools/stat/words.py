"""Numbers of a daemon's record in words: counts, shares, latencies, durations. A dash stands for what is not known.

Input: numbers, NaN if one is not known. Output: short texts, of three digits if that is enough.
"""

from __future__ import annotations

import math

from tierstore.units import format_bytes

from ..report.tables import percent

UNKNOWN = "-"


def number_text(number: float, form: str) -> str:
    """Returns a number in a form; a dash if it is unknown."""
    return UNKNOWN if math.isnan(number) else form.format(number)


def share_text(share: float) -> str:
    """Returns a share as a percentage; a dash if it is unknown."""
    return UNKNOWN if math.isnan(share) else percent(share)


def short_count(number: float) -> str:
    """Returns a count or a rate in three digits: 6_000_000 -> "6.00 M"; a dash if it is unknown."""
    if math.isnan(number):
        return UNKNOWN
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= factor:
            scaled = number / factor
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {unit}"
    return f"{number:.0f}" if number == int(number) or number >= 100 else f"{number:.1f}"


def latency_text(ns: float) -> str:
    """Returns nanoseconds in a unit that people read: 14_200 -> "14.2 us"; a dash if they are unknown."""
    if math.isnan(ns):
        return UNKNOWN
    for unit, factor in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if ns >= factor:
            return f"{ns / factor:.3g} {unit}"
    return f"{ns:.0f} ns"


def duration(seconds: float) -> str:
    """Returns seconds in the two largest units: 90_061 -> "1 d 1 h"."""
    whole = max(0, int(seconds))
    for unit, size, part, part_size in (("d", 86_400, "h", 3_600), ("h", 3_600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part_size} {part}"
    return f"{whole} s"


def bytes_a_second(rate: float) -> str:
    """Returns bytes a second; a dash if they are unknown."""
    return UNKNOWN if math.isnan(rate) else f"{format_bytes(rate)}/s"
