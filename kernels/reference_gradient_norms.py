"""Norms of a table's gradient in NumPy, as kernels/cpu/gradient_norms.h says: the oracle of its tests.

Input: distinct rows and their gradients. Output: float64. Errors: none; NaN and infinity go through.
"""

from __future__ import annotations

import numpy as np

PARTS = 16


def gradient_norms(rows: np.ndarray, sums: np.ndarray, block_starts: np.ndarray) -> np.ndarray:
    """Returns the norm of each block: squares in 16 parts, halved until one is left, then row after row."""
    num_rows, dim = sums.shape
    padded = np.zeros((num_rows, -(-dim // PARTS) * PARTS), dtype=np.float64)
    padded[:, :dim] = sums
    parts = np.zeros((num_rows, PARTS), dtype=np.float64)
    for start in range(0, dim, PARTS):
        parts += padded[:, start : start + PARTS] ** 2
    while parts.shape[1] > 1:
        half = parts.shape[1] // 2
        parts = parts[:, :half] + parts[:, half:]
    totals = np.zeros(len(block_starts), dtype=np.float64)
    for row, squares in sorted(zip(rows.tolist(), parts[:, 0].tolist(), strict=True)):
        totals[max(0, int(np.searchsorted(block_starts, row, side="right")) - 1)] += squares
    return np.sqrt(totals)
