"""Entries by what they are and where they lie: (order index, key) pairs with their places, as arrays.

Input: indexes and trailers of records. Output: parts, unions and differences of such sets. Errors: none. Nothing here
is on a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import kernels
from ...decisions.entry_set import EntrySet


@dataclass(frozen=True, eq=False)
class Pairs(EntrySet):
    """order_index, keys, places: int64 [M] each; no pair comes twice. A place is a slot number, or a record number."""

    places: np.ndarray

    def __getitem__(self, which: Any) -> Pairs:
        return Pairs(self.order_index[which], self.keys[which], self.places[which])

    @classmethod
    def nothing(cls, _: int = 0) -> Pairs:
        """No pairs, however many were asked for."""
        return cls(*(np.empty(0, dtype=np.int64) for _ in range(3)))

    @classmethod
    def joined(cls, parts: Sequence[Pairs]) -> Pairs:
        """All pairs of several, in order."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))

    @classmethod
    def of_index(cls, order: int, buckets: np.ndarray, end: int) -> Pairs:
        """What an index names at places below `end`, uint8 [num_buckets, 64], all of one order."""
        view = buckets.reshape(-1).view(kernels.INDEX_BUCKET)
        used = (view["keys"] >= 0) & (view["places"] < end)
        keys = view["keys"][used].astype(np.int64)
        return cls(np.full(len(keys), order, dtype=np.int64), keys, view["places"][used].astype(np.int64))

    @classmethod
    def of_records(cls, records: np.ndarray, places: np.ndarray, num_orders: int) -> Pairs:
        """What records, uint8 [M, record_bytes], hold, each at its place; records marked as damaged are left out."""
        trailers = record_trailers(records)
        good = (trailers["key"] >= 0) & (trailers["order_index"] < num_orders)
        return cls(trailers["order_index"].astype(np.int64), trailers["key"].astype(np.int64), places)[good]


def record_trailers(records: np.ndarray) -> np.ndarray:
    """Returns the trailers of records, uint8 [M, record_bytes]; damaged ones have a key of -1."""
    trailer_bytes = kernels.RECORD_TRAILER.itemsize
    return np.ascontiguousarray(records[:, -trailer_bytes:]).view(kernels.RECORD_TRAILER)[:, 0]
