"""Bytes and counts in words: "2GiB" -> 2147483648 -> "2.00 GiB", 1 -> "1 shard".

Input: what a user typed as a budget or a size. Output: an int of bytes, or a text for people. Errors: `ConfigError` for
negative sizes, fractions of a byte and unknown units.
"""

from __future__ import annotations

import re
from fractions import Fraction

from .errors import ConfigError

_FACTORS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_FACTORS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(size: int | str, what: str) -> int:
    """Returns the bytes that `size` says: an int of bytes, or a text such as "512MiB", "1.5GiB", "2GB".

    `what` names the option in the error. Raises `ConfigError` for anything that is not a whole number of bytes >= 0.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        if size < 0:
            raise ConfigError(f"{what}: {size} bytes is below 0; give a size such as '2GiB' or a number of bytes")
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    factor = _FACTORS.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise ConfigError(f"{what}: {size!r} is not a size; write a number of bytes, or one with B, KiB, MiB, GiB, TiB")
    if match[2].endswith("b") and match[2] != match[2].lower():
        byte_unit = match[2][:-1] + "B"
        raise ConfigError(f"{what}: {size!r} reads as bits; for bytes write {match[1] + byte_unit!r}")
    value = Fraction(match[1]) * factor
    if value.denominator != 1:
        raise ConfigError(f"{what}: {size!r} is {float(value)} bytes, not a whole number; write it in a smaller unit")
    return int(value)


def format_bytes(num_bytes: float) -> str:
    """Returns `num_bytes` for people, in the largest binary unit of which there is at least one: 1536 -> '1.50 KiB'."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(num_bytes) >= factor:
            return f"{num_bytes / factor:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def count_text(count: int, noun: str) -> str:
    """Returns a count and its noun for people: 1, "shard" -> "1 shard"; 4096, "entry" -> "4,096 entries".

    `noun` is a singular whose plural ends in "s", or in "ries" if it ends in "ry".
    """
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun[:-1] + 'ies' if noun.endswith('ry') else noun + 's'}"
