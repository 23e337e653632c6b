"""Initial values of rows by Philox4x32-10, in NumPy: the oracle of kernels/cpu/philox.h.

Input: seed, table and row ids. Output: float32 [R, dim]. Errors: none.

Integers are Python's rule modulo 2^32. The normal's logarithm, sine and cosine are NumPy's own in float64, so that the
comparison with the kernel's polynomials says something; it allows one unit in the last place of float32.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 10
MASK = np.uint64(0xFFFFFFFF)
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counters: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Returns Philox4x32-10 of uint32 [..., 4] under uint32 [2], as Salmon et al. (SC 2011) define it."""
    c0, c1, c2, c3 = (counters[..., word].astype(np.uint64) for word in range(4))
    k0, k1 = int(key[0]), int(key[1])
    for _ in range(ROUNDS):
        first, second = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (second >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            second & MASK,
            (first >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            first & MASK,
        )
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def initial_rows(
    row_ids: np.ndarray, kind: str, first: float, second: float, seed: int, table: int, dim: int
) -> np.ndarray:
    """Returns what `kernels.initial_rows` draws, float32 [R, dim]."""
    columns = np.arange((dim + 3) // 4, dtype=np.uint64)
    rows = row_ids.astype(np.uint64)[:, None]
    words = np.broadcast_arrays(columns, rows & MASK, rows >> np.uint64(32), np.uint64(table))
    drawn = philox4x32(np.stack(words, axis=-1), np.array([seed & 0xFFFFFFFF, seed >> 32]))
    if kind == "uniform":
        values = first + (second - first) * ((drawn >> 8) * 2.0**-24)
    else:
        radius = np.sqrt(-2 * np.log((drawn[..., 0::2] + 1.0) * 2.0**-32))
        angle = 2 * np.pi * (drawn[..., 1::2] * 2.0**-32)
        pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
        values = first + second * pairs.reshape(*drawn.shape)
    return values.reshape(len(row_ids), -1)[:, :dim].astype(np.float32)
