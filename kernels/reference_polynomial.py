"""The hash without a key that heads share, in NumPy: the oracle of kernels/cpu/hash.cpp's `polynomial_keys_of_tokens`.

Same function, arguments and results as kernels/_cpu.pyi documents.
"""

from __future__ import annotations

import numpy as np

_KEY_MAX = 2**63 - 1
_ORDER_MAX = 16


def polynomial_keys_of_tokens(
    token_ids: np.ndarray,
    history: np.ndarray | None,
    dead: np.ndarray | None,
    vocab_size: int,
    weights: np.ndarray,
    moduli: np.ndarray,
    barrier_id: int,
    out: np.ndarray,
) -> int:
    past = np.empty((len(token_ids), 0), dtype=np.int64) if history is None else history
    no_text = np.zeros(token_ids.shape, dtype=bool) if dead is None else dead
    _check(token_ids, past, no_text, vocab_size, weights, moduli, out)
    ids = np.concatenate([past, token_ids], axis=1)
    ended = np.concatenate([past == -1, no_text], axis=1)
    outside = ~ended & ((ids < 0) | (ids >= vocab_size))
    if outside.any():
        return int(np.flatnonzero(outside)[0])
    num_past = past.shape[1]
    for column in range(token_ids.shape[1]):
        sums = np.zeros((len(ids), len(moduli)), dtype=np.int64)
        alive = np.ones(len(ids), dtype=bool)  # look-back has not ended
        for back in range(weights.shape[1]):
            place = num_past + column - back
            if place < 0:
                break
            if back > 0:
                alive = alive & (ids[:, place] != barrier_id)
            alive = alive & ~ended[:, place]
            sums += np.where(alive, ids[:, place], 0)[:, None] * weights[:, back]
        out[:, column] = sums % moduli
    return -1


def _check(
    token_ids: np.ndarray,
    past: np.ndarray,
    no_text: np.ndarray,
    vocab_size: int,
    weights: np.ndarray,
    moduli: np.ndarray,
    out: np.ndarray,
) -> None:
    if vocab_size < 1:
        raise ValueError("vocab_size must be positive")
    if moduli.ndim != 1 or not moduli.size or weights.ndim != 2 or len(weights) != len(moduli):
        raise ValueError("moduli must be [heads], weights [heads, 1 to 16]")
    if not 1 <= weights.shape[1] <= _ORDER_MAX or (moduli < 1).any() or (weights < 0).any():
        raise ValueError("moduli must be positive, weights [heads, 1 to 16] and not below 0")
    if any(sum(of_head) * vocab_size > _KEY_MAX for of_head in weights.tolist()):
        raise ValueError("weights must not be below 0, and their sums below 2^63 for ids below vocab_size")
    if token_ids.ndim != 2 or past.ndim != 2 or len(past) != len(token_ids) or past.shape[1] >= weights.shape[1]:
        raise ValueError("token_ids must be [sequences, tokens], history [sequences, fewer than the largest order]")
    if no_text.shape != token_ids.shape or out.shape != (*token_ids.shape, len(moduli)):
        raise ValueError("dead must be [sequences, tokens], out [sequences, tokens, heads]")
