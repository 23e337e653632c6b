"""Which rows a recorded training would touch, and after how many steps it would touch them again.

Input: the distinct rows of each step, in order. Output: `RowTraffic`: how often a cache of any size would have to read
a row again, how many rows would be dirty after so many steps, how many rows are touched at all. Pure.

Time is counted in steps. A row that comes back after g steps is still in a cache that holds the rows of the last w
steps if g <= w. So the share of references m(w) with a longer gap is the miss rate of that cache, and its size is
s(w) = m(0) + ... + m(w - 1) references (Denning, The working set model for program behavior, 1968).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COUNTERS_MAX = 1 << 26  # of the last step of each row, 4 bytes each; of larger tables one row in so many is watched


@dataclass(frozen=True)
class RowTraffic:
    """What a recorded training does to the rows of one table.

    Attributes:
        num_rows: Of the table.
        num_steps: That were recorded.
        watched_one_in: All figures count one row in so many, and are multiplied; 1: all are exact.
        rows_per_step: Distinct rows of a step, on average.
        touched_rows: Distinct rows of all steps.
        touched_late: Those that the second half of the steps touched first.
        first_touches: Of a step, on average.
        gaps: float64 [G]: references of a step, on average, that come g steps after the last one of their row.
        places_fraction: Of a row that was touched before: places that it takes where rows of one n-gram, touched
            together last time, lie side by side. 1.0 if that was not counted.
    """

    num_rows: int
    num_steps: int
    watched_one_in: int
    rows_per_step: float
    touched_rows: int
    touched_late: int
    first_touches: float
    gaps: np.ndarray
    places_fraction: float

    def misses(self, window: int) -> float:
        """Returns references of a step that a cache of the last `window` steps has to read, first touches included."""
        return self.rows_per_step - float(self.gaps[: window + 1].sum())

    def rows_in(self, window: int) -> float:
        """Returns how many distinct rows so many steps touch, on average."""
        window = min(window, self.num_steps)
        hits = np.cumsum(self.gaps)[:window]
        misses = window * self.rows_per_step - float(hits.sum())
        if len(hits) < window:
            misses -= (window - len(hits)) * float(hits[-1])
        return min(misses, float(self.touched_rows))

    def window_of(self, num_slots: int) -> int:
        """Returns how many steps back a cache of so many rows reaches; `num_steps` if it holds all that is touched."""
        if num_slots >= self.touched_rows:
            return self.num_steps
        low, high = 0, self.num_steps
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.rows_in(middle) <= num_slots else (low, middle - 1)
        return low


class TrafficCounter:
    """Counts a recorded training step by step. Holds 4 bytes for each row that it watches."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._every = -(-num_rows // COUNTERS_MAX)
        self._last = np.zeros(-(-num_rows // self._every), dtype=np.int32)  # the last step of a row, from 1
        self._gaps = np.zeros(64, dtype=np.int64)
        self._firsts: list[int] = []
        self._references = self._again = self._places = 0

    def add_step(self, row_ids: np.ndarray, by_key: np.ndarray) -> None:
        """Counts a step: its distinct rows, int64 [D]; and the row ids of its n-grams, int64 [K, H], for places."""
        step = len(self._firsts) + 1
        if self._every == 1:
            before = np.sort(self._last[by_key], axis=1)
            self._again += int(np.count_nonzero(before))
            self._places += int(np.count_nonzero(before[:, 0]))
            self._places += int(((before[:, 1:] != before[:, :-1]) & (before[:, 1:] > 0)).sum())
        watched = (row_ids if self._every == 1 else row_ids[row_ids % self._every == 0]) // self._every
        last = self._last[watched]
        gaps = np.bincount(step - last[last > 0])
        if len(gaps) > len(self._gaps):
            self._gaps = np.pad(self._gaps, (0, len(gaps) - len(self._gaps)))
        self._gaps[: len(gaps)] += gaps
        self._firsts.append(int((last == 0).sum()))
        self._references += len(watched)
        self._last[watched] = step

    def traffic(self) -> RowTraffic:
        """Returns what was counted so far; one step at least was."""
        steps = len(self._firsts)
        assert steps, "the caller counts a step first"
        return RowTraffic(
            num_rows=self._num_rows,
            num_steps=steps,
            watched_one_in=self._every,
            rows_per_step=self._every * self._references / steps,
            touched_rows=min(self._num_rows, self._every * sum(self._firsts)),
            touched_late=self._every * sum(self._firsts[steps // 2 :]),
            first_touches=self._every * sum(self._firsts) / steps,
            gaps=self._every * self._gaps / steps,
            places_fraction=self._places / self._again if self._again else 1.0,
        )
