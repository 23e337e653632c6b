"""Where the rows of an answer go: each piece of it is copied once, to the caller's buffer, as it comes.

Input: a buffer, and which of its units (the rows of a token, of a key, or of one id) an answer holds, in which order.
Output: rows in their places. Errors: none; whoever calls `put` has checked that the rows fit.

Shapes: N tokens, O columns, H rows per key, U units.
"""

from __future__ import annotations

import numpy as np

from ..tiers.engine import Request
from .wire import Buffer


class Place:
    """One behind the other, as most buffers take them.

    Attributes:
        num_bytes: Of all rows that it takes.
        unit_bytes: Of a token, a key or a row; a piece begins with a unit.
    """

    def __init__(self, out: np.ndarray, unit_bytes: int) -> None:
        """out: uint8, contiguous."""
        self.num_bytes, self.unit_bytes = out.nbytes, unit_bytes
        self._data = out.reshape(-1).data

    def put(self, start: int, rows: Buffer) -> None:
        """Copies rows, bytes of the answer from `start` on."""
        self._data[start : start + len(rows)] = rows


class Apart(Place):
    """Units that lie apart: of some heads of each token, or at any places."""

    def __init__(self, units: np.ndarray, where: tuple[np.ndarray, ...] | None = None) -> None:
        """units: uint8 [..., unit_bytes], any strides but within a unit. where: their indices, int64 [U] for each axis
        but the last; None: all of them, in order, of one axis."""
        self.unit_bytes = units.shape[-1]
        self.num_bytes = units.nbytes if where is None else len(where[0]) * self.unit_bytes
        self._units, self._where = units, where

    def put(self, start: int, rows: Buffer) -> None:
        """As `Place.put`; both are whole units."""
        first, end = start // self.unit_bytes, (start + len(rows)) // self.unit_bytes
        values = np.frombuffer(rows, dtype=np.uint8).reshape(-1, self.unit_bytes)
        if self._where is None:
            self._units[first:end] = values
        else:
            self._units[tuple(indices[first:end] for indices in self._where)] = values


def place_of(request: Request, token_bytes: int, *, compact: bool) -> Place:
    """Returns the place of a request's rows, whose out is uint8 [N, O * H, row_bytes], of any stride between tokens.

    compact: without the rows of sentinels, which are not written.
    """
    _, keys, out = request
    if compact:
        units = out.reshape(len(out), keys.shape[1], token_bytes // keys.shape[1])
        return Apart(units, np.nonzero(keys >= 0))
    if out.flags.c_contiguous:
        return Place(out, token_bytes)
    return Apart(out.reshape(len(out), token_bytes))
