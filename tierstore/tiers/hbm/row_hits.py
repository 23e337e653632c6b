"""What slots hold of rows that the host asks for by their ids.

Input: row ids; what finds the entries of keys in slots. Output: the ids that are left for the engine below, and the
entries, which go over the zeros that it gives for the others. Shapes: N tokens, O orders, H rows per key, M entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ...address_map import is_outside_of
from ...spec import TableSpec
from ..engine import RowRange

# keys [N, O] -> the same with -1 for hits; which were hit, bool [N, O]; their entries, uint8 [M, entry_bytes]. The last
# two are None if nothing was.
TakeHits = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None, np.ndarray | None]]


class RowHits(NamedTuple):
    """Row ids for the engine below; which of their pairs were hit, bool [N, O], and entries, [M, H, row_bytes]."""

    rest: np.ndarray
    hits: np.ndarray | None
    entries: np.ndarray | None

    def put(self, out: np.ndarray) -> None:
        """Copies the entries to their places in out, uint8 of any strides."""
        if self.hits is None or self.entries is None:
            return
        if self.entries.shape[1] == self.hits.shape[1] == 1:  # a plain table's, of any shape
            out[self.hits.reshape(out.shape[:-1])] = self.entries[:, 0]
        else:  # to split an axis takes no copy
            out.reshape(*self.hits.shape, *self.entries.shape[1:])[self.hits] = self.entries


def take_row_hits(spec: TableSpec, row_ids: np.ndarray, within: RowRange | None, take_hits: TakeHits) -> RowHits:
    """Takes the entries of whole tokens; rows outside of within are zeros. row_ids: as of `Engine.rows`, and the
    callee's own."""
    if not spec.is_plain and row_ids.shape[1:] != (spec.num_heads,):
        return RowHits(row_ids, None, None)
    keys, _ = spec.keys_of_row_ids(row_ids.reshape(-1, spec.num_heads), within)
    _, hits, entries = take_hits(keys)
    if hits is None or entries is None:
        return RowHits(row_ids, None, None)
    by_pair = row_ids.reshape(*hits.shape, spec.rows_per_key)
    entries = entries.reshape(-1, spec.rows_per_key, spec.row_bytes)
    if within is not None:
        entries = np.where(is_outside_of(by_pair[hits], within)[..., None], np.uint8(0), entries)
    return RowHits(np.where(hits[..., None], -1, by_pair).reshape(row_ids.shape), hits, entries)
