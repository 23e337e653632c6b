"""How tables share a budget: equally, and what one does not need goes to the others.

Input: bytes, how large each table is, and what it makes of a share. Output: the shares. Errors: those of the caller's
function. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

Share = TypeVar("Share")


def divide_fairly(
    total_bytes: int, size_of: Mapping[str, int], take: Callable[[str, int], tuple[Share, int]]
) -> dict[str, Share]:
    """Divides `total_bytes`, the smallest tables first: each gets an equal part of what is left then.

    Every table of a model is asked for equally many keys a token, so each deserves as much. The small ones go first,
    because only what they leave can go to the others.

    Args:
        total_bytes: What there is.
        size_of: By table, how much it could use at most; only the order counts.
        take: Called with a table and the bytes that it may use. Returns its share and the bytes that the share takes.

    Returns:
        The shares, in the order of `size_of`.
    """
    left_bytes, shares = total_bytes, {}
    smallest_first = sorted(size_of, key=size_of.__getitem__)
    for num_taken, name in enumerate(smallest_first):
        shares[name], taken_bytes = take(name, left_bytes // (len(smallest_first) - num_taken))
        left_bytes -= taken_bytes
    return {name: shares[name] for name in size_of}
