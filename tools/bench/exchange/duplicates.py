"""Training over ranks as it is usually written: every reference of a batch travels, however often its row repeats.

Input: a training of each rank's slice. Output: a side whose step has the same rows and rule as ours. The owner of a row
is found by its range, references are sorted by owner, and counts, ids, rows and gradients are exchanged; the owner's
trainer sums what repeats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from engram_adapter.exchange import Ranks
    from tierstore import Training

WHAT = "duplicates"


class DuplicatesSent:
    """Steps of one table."""

    def __init__(self, ranks: Ranks, training: Training, table: str, row_starts: np.ndarray) -> None:
        """row_starts: int64 [W], the first row of each rank's slice."""
        self._ranks, self._table, self._starts = ranks, training[table], row_starts

    def step(self, row_ids: np.ndarray, gradients: np.ndarray) -> np.ndarray:
        """Returns the rows of row ids, float32 [R, dim], and then applies their gradients, [R, dim]."""
        ranks = self._ranks
        owners = np.searchsorted(self._starts, row_ids, side="right") - 1
        order = np.argsort(owners, kind="stable")
        send = np.bincount(owners, minlength=ranks.size)
        receive = ranks.counts(WHAT, send[:, None])[:, 0]
        asked = ranks.all_to_all(WHAT, torch.from_numpy(row_ids[order]), send.tolist(), receive.tolist()).numpy()
        found = torch.from_numpy(self._table.gather(asked))
        came = ranks.all_to_all(WHAT, found, receive.tolist(), send.tolist()).numpy()
        rows = np.empty_like(came)
        rows[order] = came
        ranks.counts(WHAT, send[:, None])
        given = torch.from_numpy(gradients[order])
        sums = ranks.all_to_all(WHAT, given, send.tolist(), receive.tolist()).numpy()
        self._table.apply(asked, sums)
        return rows
