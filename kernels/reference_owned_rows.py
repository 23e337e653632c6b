"""What ranks exchange of a batch, in Python, as kernels/cpu/owned_rows.h says: the oracle of its tests.

Input: row ids, groups, where owners begin, gradients. Output: as `kernels.OwnedRows`. Errors: none; all is in range.
"""

from __future__ import annotations

import numpy as np


def owned_rows(
    row_ids: np.ndarray, starts: np.ndarray, groups: np.ndarray, gradients: np.ndarray, scale: float
) -> tuple[list[int], list[int], np.ndarray, list[int], np.ndarray]:
    """Returns row_ids, counts, sum_counts, rows_of_sums and sums, float32 [sums, dim]."""
    num_owners, num_groups = len(starts) - 1, int(groups.max(initial=0)) + 1
    rows_of: list[dict[int, int]] = [{} for _ in range(num_owners)]  # by owner: row -> its place there
    sums_of: list[list[dict[int, np.ndarray]]] = [[{} for _ in range(num_groups)] for _ in range(num_owners)]
    for row, group, gradient in zip(row_ids.tolist(), groups.tolist(), gradients, strict=True):
        if row < 0:
            continue
        owner = next(each for each in range(num_owners) if starts[each] <= row < starts[each + 1])
        rows_of[owner].setdefault(row, len(rows_of[owner]))
        sums = sums_of[owner][group]
        sums[row] = gradient + np.float32(0) if row not in sums else sums[row] + gradient
    found = [
        (rows_of[owner][row], sums[row] * np.float32(scale))
        for owner in range(num_owners)
        for sums in sums_of[owner]
        for row in sums
    ]
    counts = np.array([[len(sums) for sums in each] for each in sums_of])
    values = np.array([each for _, each in found], dtype=np.float32).reshape(len(found), gradients.shape[1])
    places = [place for place, _ in found]
    return [row for each in rows_of for row in each], [len(each) for each in rows_of], counts, places, values
