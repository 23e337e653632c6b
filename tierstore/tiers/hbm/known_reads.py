"""Reads of the host for keys that it knows, straight into the buffers of a lookup's mailbox.

Input: missed pairs. Output: their entries, where kernels take them from. Errors: `TimeoutError` if the reads of a
lookup before do not end.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from ...errors import TierStoreError
from ..engine import Pending
from .mailbox import WAIT_S, Mailbox


class KnownReads:
    """The reads of one lookup after the other. Its owner's lock guards it."""

    def __init__(self, what: str, table: str, engine: Any, index: int, mailbox: Mailbox) -> None:
        """what, table: the store and the table, as errors call them. engine: reads; index: the table's there."""
        self._what, self._table = what, table
        self._engine, self._index, self._mailbox = engine, index, mailbox
        self._newest: Pending | None = None  # writes to the mailbox's buffers until it has ended

    def begin(self, keys: np.ndarray, missed: np.ndarray) -> Pending | None:
        """Starts reading the entries of keys[missed], int64 [N * O] and [M]; None if memory held all of them."""
        pairs = self._mailbox.pairs[: len(missed)]
        pairs[:] = missed
        entries = self._mailbox.entries_of(len(missed))
        self._newest = self._engine.submit_pairs(self._index, keys[missed], pairs, entries)
        return self._newest

    def end(self) -> None:
        """Waits for reads that were given up: they write to the buffers until they have ended."""
        newest = self._newest
        if newest is not None and not newest.done():
            with contextlib.suppress(TierStoreError, OSError):  # was raised to those who gave them up
                newest.wait(WAIT_S)
            if not newest.done():
                raise TimeoutError(
                    f"{self._what}: reads of a lookup before this one, of table {self._table}, have not ended within "
                    f"{WAIT_S:.0f} s more; the disk has stopped answering"
                )
        self._newest = None
