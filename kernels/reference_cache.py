"""The recency cache's policy and reuse distances in plain Python:
the oracle of kernels/cpu/simulate.cpp and stack_distances.cpp.

Written from the policy's description, not from its code, and with Python's integers. Input: accesses. Output:
which of them hit. About ten microseconds an access.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np

WAYS = 8
WINDOW_WAYS = 2
GHOSTS = 32
COUNT_MAX = 15
ACCESSES_PER_ENTRY_AND_AGE = 10
ORDERS_MAX = 16
BYTE = 256  # clock and age of a set are bytes, and start again at 0

_WORD = 2**64


@dataclass
class _Resident:
    """An entry in its way: what it is, its uses, the set's clock when it came, whether it is still in the window."""

    name: tuple[int, int]  # order, key
    uses: int
    arrival: int
    in_window: bool = True


@dataclass
class _Set:
    """Eight ways, and a ring of the last entries that left, by fingerprint; 0: an empty slot."""

    ways: list[_Resident | None] = field(default_factory=lambda: [None] * WAYS)
    ghosts: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)] * GHOSTS)  # fingerprint, uses
    next_ghost: int = 0
    clock: int = 0
    age: int = 0

    def find(self, name: tuple[int, int]) -> _Resident | None:
        return next((there for there in self.ways if there and there.name == name), None)

    def catch_up(self, age: int) -> None:
        """Halves all uses once for each age since the set was last written."""
        behind, self.age = (age - self.age) % BYTE, age
        for there in self.ways:
            if there:
                there.uses >>= behind
        self.ghosts = [(fingerprint, uses >> behind) for fingerprint, uses in self.ghosts]

    def recall(self, fingerprint: int) -> int:
        """Returns the uses that are remembered of an entry that had left, and forgets it."""
        for place, (other, uses) in enumerate(self.ghosts):
            if other == fingerprint:
                self.ghosts[place] = (0, 0)
                return uses
        return 0

    def admit(self, name: tuple[int, int], uses: int) -> None:
        """Puts a new entry into the window, in the last empty way, else in that of the entry that must go."""
        empty = [way for way, there in enumerate(self.ways) if there is None]
        way = empty[-1] if empty else None
        window = [there for there in self.ways if there and there.in_window]
        if len(window) >= WINDOW_WAYS:
            oldest = max(window, key=self._waited)
            if way is None:
                way = self._evict(oldest)
            else:
                oldest.in_window = False
        assert way is not None, "a full set has a full window"
        self.clock = (self.clock + 1) % BYTE
        self.ways[way] = _Resident(name, uses, self.clock)

    def _evict(self, oldest: _Resident) -> int:
        """Lets the oldest of the window take the place of the least used other entry, if used as often;
        else it goes."""
        others = [there for there in self.ways if there and not there.in_window]
        least = min(others, key=lambda there: (there.uses, -self._waited(there)))
        if oldest.uses >= least.uses:
            oldest.in_window = False
            leaving = least
        else:
            leaving = oldest
        self.ghosts[self.next_ghost] = (_fingerprint(leaving.name), leaving.uses)
        self.next_ghost = (self.next_ghost + 1) % GHOSTS
        return self.ways.index(leaving)

    def _waited(self, there: _Resident) -> int:
        return (self.clock - there.arrival) % BYTE


def simulate_cache(order_index: np.ndarray, keys: np.ndarray, batch_ends: np.ndarray, num_sets: int) -> np.ndarray:
    if keys.ndim != 1 or order_index.shape != keys.shape or batch_ends.ndim != 1 or num_sets < 1:
        raise ValueError("order_index and keys must be [accesses], batch_ends [batches], num_sets at least 1")
    ends = [0, *batch_ends.tolist()]
    if ends != sorted(ends) or ends[-1] != len(keys):
        raise ValueError("batch_ends must ascend, the last being the number of accesses")
    if (order_index >= ORDERS_MAX).any() or (keys < -1).any():
        raise ValueError("order_index must be 0 to 15, keys not below -1")
    names = list(zip(order_index.tolist(), keys.tolist(), strict=True))
    sets: dict[int, _Set] = {}
    hits = np.zeros(len(keys), dtype=bool)
    period = ACCESSES_PER_ENTRY_AND_AGE * WAYS * num_sets
    next_ageing, age = period, 0
    for start, end in itertools.pairwise(ends):
        missed = set()
        for place in range(start, end):
            name = names[place]
            if name[1] < 0:
                continue
            there = sets.setdefault(_set_of(name, num_sets), _Set()).find(name)
            if there:
                there.uses = min(COUNT_MAX, there.uses + 1)
                hits[place] = True
            else:
                missed.add(name)
        for name in sorted(missed):
            if end >= next_ageing:  # the cache ages when an entry comes, once however long none came
                next_ageing, age = end + period, (age + 1) % BYTE
            into = sets[_set_of(name, num_sets)]
            into.catch_up(age)
            into.admit(name, min(COUNT_MAX, into.recall(_fingerprint(name)) + 1))
    return hits


def stack_distances(items: np.ndarray) -> np.ndarray:
    if items.ndim != 1 or ((items < 0) | (items >= len(items))).any():
        raise ValueError("items must be [accesses] and dense: 0 to accesses - 1")
    tree = [0] * (len(items) + 1)  # Fenwick: how many last accesses are at a place and before it

    def add(place: int, change: int) -> None:
        place += 1
        while place < len(tree):
            tree[place] += change
            place += place & -place

    last: dict[int, int] = {}
    distances = np.full(len(items), -1, dtype=np.int64)
    for now, item in enumerate(items.tolist()):
        if item in last:
            node, up_to = last[item] + 1, 0
            while node:
                up_to += tree[node]
                node &= node - 1
            distances[now] = len(last) - up_to
            add(last[item], -1)
        add(now, 1)
        last[item] = now
    return distances


def _hash(name: tuple[int, int]) -> int:
    """MurmurHash3's finalizer of key + order * 2^64 / golden ratio."""
    order, key = name
    value = (key + order * 0x9E3779B97F4A7C15) % _WORD
    value = (value ^ value >> 33) * 0xFF51AFD7ED558CCD % _WORD
    value = (value ^ value >> 33) * 0xC4CEB9FE1A85EC53 % _WORD
    return value ^ value >> 33


def _set_of(name: tuple[int, int], num_sets: int) -> int:
    return _hash(name) * num_sets // _WORD


def _fingerprint(name: tuple[int, int]) -> int:
    return _hash(name) % 2**16 or 1
