"""Norms of a table's gradient in NumPy, as kernels/cpu/gradient_norms.h says: the oracle of its tests.

Input: distinct rows and their gradients. Output: float64. Errors: none; NaN and infinity go through.
"""

from __future__ import annotations

import numpy as np

LANES = 16


def gradient_norms(rows: np.ndarray, sums: np.ndarray, block_starts: np.ndarray) -> np.ndarray:
    """Returns the norm of each block: squares in 16 lanes, halved until one is left, then row after row."""
    num_rows, dim = sums.shape
    padded = np.zeros((num_rows, -(-dim // LANES) * LANES), dtype=np.float64)
    padded[:, :dim] = sums
    lanes = np.zeros((num_rows, LANES), dtype=np.float64)
    for start in range(0, dim, LANES):
        lanes += padded[:, start : start + LANES] ** 2
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    totals = np.zeros(len(block_starts), dtype=np.float64)
    for row, squares in sorted(zip(rows.tolist(), lanes[:, 0].tolist(), strict=True)):
        totals[max(0, int(np.searchsorted(block_starts, row, side="right")) - 1)] += squares
    return np.sqrt(totals)
