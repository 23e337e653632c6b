"""N-grams as 128-bit items, which the store counts without knowing tokens: token ids -> windows -> a layer's keys.

Input: the tokens of one document. Output: for each token the *window* of the last `orders[-1]` mapped ids, packed so
that its prefix is the n-gram of every lower order; and from such n-grams, counted or not, the keys of any layer.
Errors: `ConfigError` for hashes whose longest n-gram needs more than 128 bits.

Windows consist of mapped ids, so what hashes alike counts as one, and the same profile serves all layers.
"""

from __future__ import annotations

import functools

import numpy as np

from tierstore import ConfigError, kernels

from .hash_config import POLYNOMIAL
from .hash_spec import HashSpec

ITEM_BITS = 128
WORD_BITS = 64


@functools.lru_cache(maxsize=8)  # short documents would spend most of their time here
def window_bits(spec: HashSpec) -> int:
    """Returns the bits of one id in a window: the fewest that hold every mapped id and the pad id.

    Raises `ConfigError` if the spec lacks its token map, or if the longest n-gram needs more than 128 bits.
    """
    token_map, pad_id = spec.kernel_token_map, spec.pad_id
    assert pad_id is not None, "a spec that has its token map knows its pad id"
    id_max = max(pad_id, spec.vocab_size - 1 if token_map is None else int(token_map.max()))
    bits = max(1, id_max.bit_length())
    if bits * spec.orders[-1] > ITEM_BITS:
        raise ConfigError(
            f"n-grams of {spec.orders[-1]} ids of {bits} bits take {bits * spec.orders[-1]} bits, an item has "
            f"{ITEM_BITS}; this model cannot be profiled by its tokens: record keys instead"
        )
    return bits


def ngram_windows(spec: HashSpec, token_ids: np.ndarray) -> np.ndarray:
    """Returns the window that ends at each token of one document: integers [T] -> uint64 [T, 2], the high word first.

    The newest id is in the most significant field of `orders[-1]` fields of `window_bits` bits; look-back ends where it
    does for `HashSpec.keys`. The n-gram of order n is the window shifted right by `window_bits * (orders[-1] - n)`.
    Raises `TypeError` (no integers), `ValueError` (not [T], ids outside the vocabulary),
    `ConfigError` as `window_bits` does.
    """
    bits = window_bits(spec)
    ids = np.asarray(token_ids)
    if ids.dtype.kind not in "iu" or ids.dtype == np.uint64:
        raise TypeError(f"token_ids are {ids.dtype}, expected integers up to int64")
    if ids.ndim != 1:
        raise ValueError(f"token_ids are {list(ids.shape)}, expected [tokens]: one document")
    windows = np.empty((len(ids), 2), dtype=np.uint64)
    barrier_id = -1 if spec.barrier_id is None else spec.barrier_id
    assert spec.pad_id is not None, "window_bits has looked"
    outside = kernels.windows_of_tokens(
        ids.astype(np.int64, copy=False), spec.kernel_token_map, spec.vocab_size, spec.pad_id, barrier_id,
        spec.orders[-1], bits, windows,
    )  # fmt: skip
    if outside >= 0:
        raise ValueError(
            f"token id {ids[outside]} of the document, position {outside} is outside the "
            f"vocabulary of {spec.vocab_size}"
        )
    return windows


def keys_of_windows(spec: HashSpec, windows: np.ndarray, order_index: int, layer: int | str) -> np.ndarray:
    """Returns the keys that a layer gives n-grams of `orders[order_index]` ids.

    Takes uint64 [M, 2], shifted to that order; returns int64 [M]. Raises `ValueError` if the model has no such order or
    windows have more bits, `KeyError` for a layer without a table, `ConfigError` as `window_bits` does.
    """
    if not 0 <= order_index < len(spec.orders):
        raise ValueError(f"order {order_index} of {len(spec.orders)}: the model's n-grams have orders {spec.orders}")
    order = spec.orders[order_index]
    keys = np.empty(len(windows), dtype=np.int64)
    multipliers = np.array(spec.multipliers(layer), dtype=np.int64)
    if spec.kind == POLYNOMIAL:
        weights = multipliers.reshape(len(spec.orders), -1)[order_index, :order]
        keys[:] = (_ids_of_windows(spec, windows, order) * weights).sum(axis=1) % spec.moduli(layer)[order_index]
    else:
        kernels.keys_of_windows(windows, order, window_bits(spec), multipliers, keys)
    return keys


def _ids_of_windows(spec: HashSpec, windows: np.ndarray, order: int) -> np.ndarray:
    """Returns the ids of n-grams, int64 [M, order], the newest first. Raises `ValueError` for windows of more bits."""
    bits = window_bits(spec)
    high, low = np.ascontiguousarray(windows[:, 0]), np.ascontiguousarray(windows[:, 1])
    if order * bits < ITEM_BITS and _shifted(high, low, order * bits).any():
        raise ValueError(f"windows have more than the {order * bits} bits of {order} ids")
    mask = np.uint64((1 << bits) - 1)
    fields = [_shifted(high, low, bits * (order - 1 - back)) & mask for back in range(order)]
    return np.stack(fields, axis=1).astype(np.int64)


def _shifted(high: np.ndarray, low: np.ndarray, bits: int) -> np.ndarray:
    """Returns the low 64 bits of 128-bit numbers, uint64 [M] each half, shifted right by `bits`; bits: 0 to 127."""
    if bits >= WORD_BITS:
        shifted: np.ndarray = high >> np.uint64(bits - WORD_BITS)
        return shifted
    if bits == 0:
        return low
    joined: np.ndarray = (high << np.uint64(WORD_BITS - bits)) | (low >> np.uint64(bits))
    return joined
