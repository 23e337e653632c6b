"""One table of an open training: values out, gradients in.

Input: row ids, gradients. Output: float32 values. Errors: `TypeError` and `ValueError` for arrays of other types,
shapes and ranges than the table has, and for gradients that are not finite; `StoreNotReadyError` if the training is
closed or broken.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..spec import TableSpec


class TrainingTable:
    """One table of a `Training`, which it keeps open. One thread takes steps."""

    @property
    def spec(self) -> TableSpec:
        """What the table is: rows, codec, address map, fingerprint. Frozen."""
        raise NotImplementedError

    @property
    def num_steps(self) -> int:
        """How many steps were applied; Adam's bias correction counts with it. Kept with a commit."""
        raise NotImplementedError

    def set_step(self, step: int) -> None:
        """Sets `num_steps`: for a step that gave this table no gradients, or for states that come from elsewhere."""
        raise NotImplementedError

    def gather(self, row_ids: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Returns the values of rows, as they are now. Blocks on the disk for rows that DRAM does not hold.

        Args:
            row_ids: int64 [...], any strides; row id -1 gives zeros.
            out: float32 [..., dim], C-contiguous, filled and returned; None: a new array.

        Returns:
            A copy, float32 [..., dim].

        Raises:
            TypeError, ValueError: Another type or shape, or an id outside the table.
            CorruptPageError: A row cannot be read as it was written.
        """
        raise NotImplementedError

    def apply(
        self,
        row_ids: np.ndarray,
        gradients: np.ndarray,
        groups: np.ndarray | None = None,
        lr: float | None = None,
    ) -> None:
        """Takes one step of the optimizer on the rows that are given. Blocks on the disk for rows DRAM does not hold.

        Gradients of equal ids are summed in float32: within a group in the order of the batch, then the groups' sums
        in the order of their numbers. So the bits depend on the groups, and on no thread, cache or disk.

        Args:
            row_ids: int64 [...], any strides; -1: the gradient is dropped.
            gradients: float32 [..., dim], one for each row id.
            groups: int32 [...], the group of each row id, 0 or more; None: all are of one group, as torch's dense
                backward sums.
            lr: The learning rate of this step; None: the optimizer's.

        Raises:
            TypeError, ValueError: Another type, shape or range; or a sum of gradients that is not finite: then no row
                was changed.
        """
        raise NotImplementedError

    @contextmanager
    def pinned(self, row_ids: np.ndarray) -> Iterator[None]:
        """Keeps rows, int64 [...], in DRAM while the body runs; as many as half of the table's cache holds."""
        raise NotImplementedError
        yield

    def stats(self) -> dict[str, Any]:
        """Returns counters: rows found and read, spilled, dirty; bytes of cache and index."""
        raise NotImplementedError
