"""One step of an optimizer on one table: whole if its rows fit into the cache, else in parts.

Input: the step's distinct rows and gradients (`kernels.RowUpdate`). Output: changed records. Errors: `ValueError` for a
sum that is not finite: no row was changed; what reading rows raises; `TimeoutError` if a commit does not come on.

`is_half` says whether an error leaves rows of which only some were changed: then the training is broken.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from .. import kernels
from .rows import POLL_S, CachedRows
from .ticket import WAIT_S


class Step:
    """A step that is being taken. Of one thread."""

    def __init__(
        self, rows: CachedRows, update: kernels.RowUpdate, lr: float, threads: int, check: Callable[[], None]
    ) -> None:
        """check: raises if the training cannot go on."""
        self.is_half = False
        self._rows, self._update, self._lr, self._threads, self._check = rows, update, lr, threads, check

    def take(self) -> None:
        """Changes all rows of the step. Blocks on the disk for those that the cache has not."""
        if self._try(0, len(self._update)):
            return
        if len(self._update) > self._rows.part_rows:
            self._take_in_parts()
            return
        pins = self._rows.cache.pins()
        try:
            self._take_part(0, len(self._update), pins)
        finally:
            pins.release()

    def _take_in_parts(self) -> None:
        bad = self._update.find_not_finite()
        if bad >= 0:
            raise self._not_finite(bad)
        start, num_rows = 0, len(self._update)
        while start < num_rows:
            end = min(start + self._rows.part_rows, num_rows)  # asked each time: the cache may give slots up
            pins = self._rows.cache.pins()
            try:
                self._take_part(start, end, pins)
            finally:
                pins.release()
            start = end

    def _take_part(self, start: int, end: int, pins: kernels.RowPins) -> None:
        """Brings what is missing of distinct rows start to end, and changes them all."""
        wanted = self._update.row_ids[start:end]
        missing = self._rows.cache.find(wanted, pins)
        self._rows.bring(wanted[missing], pins)
        self.is_half = start > 0 or end < len(self._update)
        assert self._try(start, end), "rows that are pinned are not there"

    def _try(self, start: int, end: int) -> bool:
        """Changes distinct rows start to end if the cache has them all; returns whether it did.

        While a commit drains, waits for room for the records that it froze.
        """
        until = time.monotonic() + WAIT_S
        while True:
            what, count = self._rows.cache.update(self._update, start, end, self._lr, self._threads)
            if what == "not_finite":
                raise self._not_finite(count)
            if what != "no_room_aside":
                return what == "done"
            if time.monotonic() > until:
                raise TimeoutError(
                    f"table {self._rows.layout.table}: the commit under way did not write a record in {WAIT_S:g} s; "
                    f"the disk has stopped answering"
                )
            self._check()  # the writer may have failed
            time.sleep(POLL_S)

    def _not_finite(self, number: int) -> ValueError:
        row_id = int(self._update.row_ids[number])
        return ValueError(
            f"table {self._rows.layout.table}: the gradients of row {row_id} sum up to a number that is not finite; no "
            f"row was changed: skip the step, or scale the loss down"
        )
