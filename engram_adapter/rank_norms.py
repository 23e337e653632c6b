"""Norms of a table's gradient over ranks: those that one rank with the whole table would find, in bits.

Input: this rank's rows and their sums. Output: the norm of every block of the table (a head's rows), the same on all
ranks. Errors: `RankError`.

A block's norm is a sum in the order of row ids. If slices begin at heads, one rank has it all. If a head is cut, ranks
pass the sum on in the order of their rows, 8 bytes from one to the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from tierstore import kernels

from .exchange import COUNTS_MAX, Ranks
from .table_gradient import block_starts

if TYPE_CHECKING:
    from tierstore import TableSpec


class BlockNorms:
    """The blocks of one table, and who has rows of which."""

    def __init__(self, ranks: Ranks, spec: TableSpec, starts: np.ndarray) -> None:
        """starts: int64 [W + 1], the first row of each rank's slice."""
        self._ranks, self._name = ranks, spec.name
        self._blocks = block_starts(spec)
        edges = np.concatenate([self._blocks, [spec.num_rows]])
        edges[0] = 0
        self._row_start, self._row_end = int(starts[ranks.rank]), int(starts[ranks.rank + 1])
        self._edges = edges
        self._is_cut = bool(np.setdiff1d(starts, edges).size)
        self._last_rank = np.searchsorted(starts, np.maximum(edges[1:] - 1, 0), side="right") - 1  # by block

    def of(self, rows: np.ndarray, sums: np.ndarray) -> np.ndarray:
        """Returns the norms of all blocks, float64; rows: distinct, int64 [D]; sums: float32 [D, dim]. Blocks."""
        what = f"gradient norms of table {self._name}"
        mine = np.zeros(len(self._blocks), dtype=np.float64)
        if not self._is_cut:
            kernels.gradient_norms(rows, sums, self._blocks, mine)
        with self._ranks.whole(what):
            if self._is_cut or len(mine) > COUNTS_MAX:
                self._ranks.counts(what, np.zeros((self._ranks.size, 0), dtype=np.int64))
                if self._is_cut:
                    self._pass_on(what, rows, sums, mine)
                of_all = self._ranks.all_gather(what, torch.from_numpy(mine)).numpy()
            else:
                of_all = self._ranks.counts(what, np.tile(mine.view(np.int64), (self._ranks.size, 1))).view(np.float64)
        norms: np.ndarray = of_all[self._last_rank, np.arange(len(mine))]
        return norms

    def _pass_on(self, what: str, rows: np.ndarray, sums: np.ndarray, mine: np.ndarray) -> None:
        """Writes the norms of blocks that end in this slice; sums of squares go on to the next rank, if not."""
        squares = np.empty(len(rows), dtype=np.float64)
        kernels.gradient_squares(rows, sums, squares)
        in_order = np.sort(rows)
        for block, (start, end) in enumerate(zip(self._edges[:-1].tolist(), self._edges[1:].tolist(), strict=True)):
            if end <= self._row_start or start >= self._row_end:
                continue
            total = torch.zeros(1, dtype=torch.float64, device="cpu")
            if start < self._row_start:
                self._ranks.receive(what, total, self._ranks.rank - 1)
            inside = squares[slice(*np.searchsorted(in_order, [start, end]))]
            total[0] = float(np.add.accumulate(np.concatenate([total.numpy(), inside]))[-1])
            if end > self._row_end:
                self._ranks.start_send(what, total, self._ranks.rank + 1).wait()
            else:
                mine[block] = np.sqrt(total.numpy()[0])
