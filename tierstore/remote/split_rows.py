"""Row ids on their way to a server: those of whole tokens as keys, an eighth of the bytes, others one by one.

Input: row ids, and where their rows go. Output: what to ask for, into buffers, and `take`, which brings the
answers to their places. Errors: `ValueError` for ids that are not the table's.

Shapes: N tokens, O orders, H rows per key, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import kernels
from ..address_map import is_outside_of
from ..spec import TableSpec
from ..tiers.engine import Request, RowRange
from .counts import ClientCounts
from .peer import ById
from .replies import Counted


class SplitRows:
    """One request by row ids, of which it keeps a copy.

    Attributes:
        keys: int64 [N, O], of whole tokens; -1 where all ids of an order are outside of the wanted range.
        tokens: uint8 [N, O * H, row_bytes], for their rows.
        ids: int64 [R], of the others; -1 outside of the wanted range.
        rows: uint8 [R, row_bytes], for theirs.
    """

    def __init__(
        self, index: int, spec: TableSpec, row_ids: np.ndarray, out: np.ndarray, within: RowRange | None
    ) -> None:
        """row_ids, out, within: as of `Engine.rows`."""
        row_ids = row_ids.copy()
        self._index, self._out = index, out
        self._is_outside = None if within is None else is_outside_of(row_ids, within)
        wanted = row_ids if self._is_outside is None else np.where(self._is_outside, -1, row_ids)
        if kernels.find_out_of_range(wanted, spec.num_rows) >= 0:
            raise ValueError(f"table {spec.name}: a row id is not one of the table's")
        has_keys = spec.public is None or bool(spec.public.orders)
        if has_keys and (spec.is_plain or row_ids.shape[1:] == (spec.num_heads,)):
            keys, is_whole = spec.keys_of_row_ids(row_ids.reshape(-1, spec.num_heads), within)
        else:
            keys, is_whole = np.empty((0, len(spec.orders)), dtype=np.int64), np.zeros(1, dtype=bool)
        per_token = row_ids.size // len(is_whole) if len(is_whole) else 1
        # Which ids of the request are those of whole tokens, flat.
        self._is_keyed = np.repeat(is_whole, per_token)
        self.keys = keys[is_whole[: len(keys)]]
        self.ids = wanted.reshape(-1)[~self._is_keyed]
        # Nearly always the answers can be written where they go.
        self._goes_straight = within is None and out.flags.c_contiguous and not (len(self.keys) and len(self.ids))
        to = out if self._goes_straight else np.empty(out.shape, dtype=np.uint8)
        flat, num_keyed = to.reshape(-1, spec.row_bytes), row_ids.size - len(self.ids)
        self.tokens = flat[:num_keyed].reshape(-1, spec.num_heads, spec.row_bytes)
        self.rows = flat[num_keyed:]

    @property
    def lookups(self) -> list[Request]:
        """What to look up by keys: whole tokens."""
        return [(self._index, self.keys, self.tokens)] if len(self.keys) else []

    @property
    def by_id(self) -> ById | None:
        """What to look up by ids: all else."""
        return (self._index, self.ids, self.rows) if len(self.ids) else None

    def take(self, by_key: Sequence[Counted], by_id: Sequence[Counted], counts: ClientCounts) -> None:
        """Puts the rows that have come to where they go, and counts them. by_key, by_id: the answers."""
        self._put()
        if len(self.keys) or not len(self.ids):
            counts.add_lookup(self.lookups, by_key)
        if len(self.ids):
            counts.add_rows(len(self.ids), by_id)

    def _put(self) -> None:
        """Copies the rows that have come to where they go, zeros where they are not wanted."""
        if self._goes_straight:
            return
        is_keyed = self._is_keyed.reshape(self._out.shape[:-1])
        self._out[is_keyed] = self.tokens.reshape(-1, self.tokens.shape[2])
        self._out[~is_keyed] = self.rows
        if self._is_outside is not None:
            self._out[self._is_outside] = 0
