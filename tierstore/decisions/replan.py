"""A replan: which entries of a table's static set leave and which enter, by recent counts.

Input: what is static now and what else was counted, each with its counts. Output: a `Replan`, and the `Step`s that make
it with at most `spare` entries in memory beyond the set's capacity. An entry is replaced only by one that was counted
clearly more often (hysteresis), so that noise in the counts moves little.
Errors: `ValueError` for more static entries than the capacity. Pure, and deterministic among equal counts.

Shapes: n static entries, m candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .entry_set import EntrySet

HYSTERESIS = 1.25  # a candidate must have been counted that much more often, and once more, than what it replaces
LEAST_COUNT = 2  # what was counted once is most likely not requested again


@dataclass(frozen=True, eq=False)
class Entries(EntrySet):
    """Entries of one table and how often each was counted; no two have the same order and key.

    Attributes:
        order_index: uint8 [n].
        keys: int64 [n].
        counts: uint32 [n].
    """

    counts: np.ndarray

    def __post_init__(self) -> None:
        if not (self.keys.ndim == 1 and self.order_index.shape == self.counts.shape == self.keys.shape):
            shapes = self.order_index.shape, self.keys.shape, self.counts.shape
            raise ValueError(f"order_index, keys and counts of shapes {shapes} must all be [entries]")

    def __getitem__(self, which: np.ndarray | slice) -> Entries:
        return Entries(self.order_index[which], self.keys[which], self.counts[which])

    def coldest_first(self) -> np.ndarray:
        """Returns their indexes, int64 [n], by ascending count; of equal ones the larger (order, key) first."""
        return np.lexsort((self.keys, self.order_index, -self.counts.astype(np.int64)))[::-1]

    def hottest(self, most: int) -> Entries:
        """Returns the `most` hottest, hottest first; of equal ones the smaller (order, key) first."""
        some = self
        if len(self) > most:  # so that only few are sorted by all three
            least = np.partition(self.counts, len(self) - most)[len(self) - most] if most else np.inf
            some = self[self.counts >= least]
        return some[some.coldest_first()[::-1][:most]]


@dataclass(frozen=True, eq=False)
class Replan:
    """What changes about a static set.

    Attributes:
        enter: Entries that enter, hottest first.
        leave: Which of the n static entries leave, bool [n].
        coldest: The indexes of those that leave, int64, coldest first.
    """

    enter: Entries
    leave: np.ndarray
    coldest: np.ndarray

    def applied(self, current: Entries) -> Entries:
        """Returns the static set after it: what stays, in its order, then what entered."""
        return joined(current[~self.leave], self.enter)


@dataclass(frozen=True, eq=False)
class Step:
    """Entries to write into free slots, and indexes, int64, of the static entries that leave with the same epoch."""

    enter: Entries
    leave: np.ndarray


def joined(first: Entries, second: Entries) -> Entries:
    """Returns the entries of both, one after the other."""
    return Entries(
        np.concatenate([first.order_index, second.order_index]),
        np.concatenate([first.keys, second.keys]),
        np.concatenate([first.counts, second.counts]),
    )


def choose_static(
    current: Entries,
    candidates: Entries,
    capacity: int,
    hysteresis: float = HYSTERESIS,
    least_count: int = LEAST_COUNT,
) -> Replan:
    """Returns what to change about a static set of at most `capacity` entries.

    Free capacity takes the hottest candidates. After that the hottest candidate left replaces the coldest entry, the
    next the next, and so on while the candidate's count is above hysteresis * the entry's + 1. So a replan of its own
    result changes nothing. About a second for a million of each, two for ten million candidates.

    Args:
        current: What is static now.
        candidates: Anything that was counted; those that are static already are skipped.
        capacity: The most entries that may be static.
        hysteresis: 1 or more.
        least_count: Candidates counted less often do not enter; 1 or more.

    Raises:
        ValueError: More static entries than capacity; a hysteresis below 1, which would change without end; a
            least_count below 1.
    """
    if len(current) > capacity:
        raise ValueError(
            f"{len(current):,} static entries exceed the capacity of {capacity:,}: let the coldest leave first"
        )
    if hysteresis < 1 or least_count < 1:
        raise ValueError(f"hysteresis is {hysteresis}, least_count {least_count}: both must be at least 1")
    # At most len(current) of the hottest are static, so that capacity others are among these, if there are so many.
    ranked = candidates[candidates.counts >= least_count].hottest(capacity + len(current))
    ranked = ranked[~ranked.are_in(current)][:capacity]
    num_filling = min(capacity - len(current), len(ranked))
    coldest = current.coldest_first()[: len(ranked) - num_filling]
    wins = ranked.counts[num_filling : num_filling + len(coldest)] > hysteresis * current.counts[coldest] + 1
    num_swaps = int(np.count_nonzero(wins))  # the first ones: candidates descend and entries ascend
    leave = np.zeros(len(current), dtype=bool)
    leave[coldest[:num_swaps]] = True
    return Replan(ranked[: num_filling + num_swaps], leave, coldest[:num_swaps])


def steps(replan: Replan, capacity: int, spare: int) -> Iterator[Step]:
    """Yields the steps of a replan: the hottest enter first, and only as many of the coldest leave as the capacity
    needs.

    Each step writes at most `spare` entries, beside at most `capacity` live ones, and ends with at most `capacity`
    live. The slots of what leaves are free for the next step once no reader is left in the epoch before.
    Raises `ValueError` for a spare below 1, and for a replan that does not end within the capacity.
    """
    num_before = len(replan.leave)
    num_after = num_before + len(replan.enter) - len(replan.coldest)
    if spare < 1 or max(num_before, num_after) > capacity:
        raise ValueError(
            f"{spare:,} spare slots must be at least 1, and {num_before:,} live entries before and {num_after:,} after "
            f"a replan within the capacity of {capacity:,}"
        )
    num_left = 0
    for start in range(0, len(replan.enter), spare):
        enter = replan.enter[start : start + spare]
        num_leaving = max(0, num_before + start + len(enter) - capacity)
        yield Step(enter, replan.coldest[num_left:num_leaving])
        num_left = num_leaving


def hotter(best: Entries, more: Entries, most: int) -> Entries:
    """Returns the `most` hottest of what was best so far and more; of equal ones, those that came first."""
    if len(best) == most:
        more = more[more.counts > best.counts.min(initial=0)]
    return joined(best, more).hottest(most) if len(more) else best


def hottest_indexes(counts: np.ndarray, most: int) -> np.ndarray:
    """Returns the indexes of the `most` highest of counts, uint32 [n], ascending, int64; of equal ones the first."""
    if most >= len(counts):
        return np.arange(len(counts))
    if most == 0:
        return np.empty(0, dtype=np.int64)
    least = np.partition(counts, len(counts) - most)[len(counts) - most]
    chosen = counts > least
    chosen[np.flatnonzero(counts == least)[: most - np.count_nonzero(chosen)]] = True
    return np.flatnonzero(chosen)


def fresh_choice(counted: Entries, capacity: int, least_count: int = LEAST_COUNT) -> Entries:
    """Returns what a plan from scratch would take, hottest first: to say what hysteresis costs."""
    return counted[counted.counts >= least_count].hottest(capacity)


def caught(chosen: Entries, counted: Entries) -> float:
    """Returns the share of the counted accesses that are to chosen entries, 0 to 1; of no accesses 0."""
    total = int(counted.counts.sum(dtype=np.uint64))
    return int(counted.counts[counted.are_in(chosen)].sum(dtype=np.uint64)) / total if total else 0.0
