"""Items, 128-bit numbers as rows of a uint64 array [N, 2], in NumPy:
the oracle of kernels/cpu/items.cpp.

NumPy has no such numbers, but compares strings of 16 bytes: a big-endian item is one whose order is the item's. Its
strings end before their trailing zeros, which makes no difference:
a shorter string compares as if filled up with zeros.
"""

from __future__ import annotations

import numpy as np

_WORD_BITS = 64


def windows_of_tokens(
    token_ids: np.ndarray,
    token_map: np.ndarray | None,
    vocab_size: int,
    pad_id: int,
    barrier_id: int,
    order_max: int,
    bits: int,
    out: np.ndarray,
) -> int:
    if vocab_size < 1 or (token_map is not None and token_map.shape != (vocab_size,)):
        raise ValueError("vocab_size must be positive, token_map [vocab_size]")
    _check_packing(order_max, bits)
    if not 0 <= pad_id < 2**bits:
        raise ValueError("pad_id must fit bits")
    if token_ids.ndim != 1 or out.shape != (len(token_ids), 2):
        raise ValueError("token_ids must be [tokens], out [tokens, 2]")
    outside = (token_ids < 0) | (token_ids >= vocab_size)
    if outside.any():
        return int(np.flatnonzero(outside)[0])
    mapped = token_ids if token_map is None else token_map[token_ids]
    if ((mapped < 0) | (mapped >= 2**bits)).any():
        raise ValueError("every id, mapped, must fit bits")
    out[:] = 0
    ended = np.zeros(len(token_ids), dtype=bool)
    for back in range(order_max):
        if back > 0:
            ended |= np.concatenate([np.ones(back, dtype=bool), token_ids == barrier_id])[: len(token_ids)]
        before = np.concatenate([np.zeros(back, dtype=np.uint64), mapped.astype(np.uint64)])[: len(token_ids)]
        ids = np.where(ended, np.uint64(pad_id), before)
        place = bits * (order_max - 1 - back)
        out[:, 0] |= _shifted(ids, place - _WORD_BITS)
        out[:, 1] |= _shifted(ids, place)
    return -1


def keys_of_windows(windows: np.ndarray, order: int, bits: int, multipliers: np.ndarray, out: np.ndarray) -> None:
    _check_packing(order, bits)
    if windows.ndim != 2 or windows.shape[1] != 2 or out.shape != windows.shape[:1]:
        raise ValueError("windows must be [windows, 2], out [windows]")
    if multipliers.ndim != 1 or len(multipliers) < order:
        raise ValueError("there must be a multiplier for each id")
    if order * bits < 128 and _shift_right(windows, order * bits).any():
        raise ValueError("windows must be shifted to the order: below 2^(order * bits)")
    out[:] = 0
    for back in range(order):
        ids = _shift_right(windows, bits * (order - 1 - back))[:, 1] & np.uint64(2**bits - 1)
        out ^= (ids * multipliers[back].astype(np.uint64)).astype(np.int64)


def sort_items(items: np.ndarray, weights: np.ndarray | None = None) -> None:
    _check_items(items, weights)
    order = np.argsort(_as_strings(items), kind="stable")
    items[:] = items[order]
    if weights is not None:
        weights[:] = weights[order]


def sum_items(items: np.ndarray, weights: np.ndarray | None, shift: int) -> tuple[np.ndarray, np.ndarray]:
    _check_items(items, weights)
    if not 0 <= shift < 128:
        raise ValueError("shift must be 0 to 127")
    strings = _as_strings(items)
    if (strings[1:] < strings[:-1]).any():
        raise ValueError("items must be sorted")
    shifted = _shift_right(items, shift)
    starts = np.flatnonzero(np.concatenate([[True], (shifted[1:] != shifted[:-1]).any(axis=1)])[: len(items)])
    given = np.ones((len(items), 1), dtype=np.int64) if weights is None else weights
    sums = np.add.reduceat(given, starts, axis=0) if len(items) else given[:0].copy()
    return shifted[starts], sums


def find_items(haystack: np.ndarray, needles: np.ndarray) -> np.ndarray:
    _check_items(haystack, None)
    _check_items(needles, None)
    strings, wanted = _as_strings(haystack), _as_strings(needles)
    if (strings[1:] <= strings[:-1]).any() or (wanted[1:] < wanted[:-1]).any():
        raise ValueError("haystack must ascend strictly, needles ascend")
    if not len(strings):
        return np.full(len(wanted), -1, dtype=np.int64)
    places = np.searchsorted(strings, wanted)
    found = strings[np.minimum(places, len(strings) - 1)] == wanted
    return np.where(found, places, -1).astype(np.int64)


def _check_packing(order: int, bits: int) -> None:
    if not 1 <= bits <= 63 or not 1 <= order <= 128 // bits:
        raise ValueError("bits must be 1 to 63, order * bits 1 to 128")


def _check_items(items: np.ndarray, weights: np.ndarray | None) -> None:
    if items.ndim != 2 or items.shape[1] != 2:
        raise ValueError("items must be [items, 2]")
    if weights is not None and (weights.ndim != 2 or len(weights) != len(items)):
        raise ValueError("weights must be [items, weights]")


def _as_strings(items: np.ndarray) -> np.ndarray:
    return items.astype(">u8", order="C").view("S16")[:, 0]


def _shifted(words: np.ndarray, left: int) -> np.ndarray:
    """Words shifted left, or, where `left` is below 0, right; nothing is left of them after 64 bits."""
    if abs(left) >= _WORD_BITS:
        return np.zeros_like(words)
    return words << np.uint64(left) if left >= 0 else words >> np.uint64(-left)


def _shift_right(items: np.ndarray, shift: int) -> np.ndarray:
    high, low = items[:, 0], items[:, 1]
    return np.stack([_shifted(high, -shift), _shifted(low, -shift) | _shifted(high, _WORD_BITS - shift)], axis=1)
