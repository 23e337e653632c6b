"""A lookup's shares, one for each server, and what their answers are together.

Input: lookups of whole tables, and how those are divided. Output: attempts by server; counts of keys by the tier that
answered them. Errors: none. Sentinels are zeroed here; keys of which the client has the rows do not travel.

Shapes: N tokens, O orders, H rows per key, R rows.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from operator import add

import numpy as np

from ..tiers.engine import Request
from .parts import Divided
from .replies import DRAM, NVME, STATIC, Answer
from .requests import Attempt, Requests

DENSE_FRACTION = 0.9  # of keys; if more must travel, all do, which servers answer a little faster

Hits = list[list[int]]  # of DRAM, STATIC and NVME: by order


class Shares:
    """What each server is asked. compact: the tables whose sentinels do not travel."""

    def __init__(self, tables: Sequence[Divided], requests: Sequence[Requests]) -> None:
        """requests: of each server."""
        self._tables, self._requests = tables, requests
        self._lookups: list[list[Request]] = [[] for _ in requests]
        self._by_id: list[list[Attempt]] = [[] for _ in requests]
        self.compact: set[int] = set()

    def add_lookup(self, request: Request, has: np.ndarray | None) -> None:
        """Adds a lookup in one table. has: bool [N, O], keys whose rows are in out already; None: none."""
        index, keys, out = request
        divided = self._tables[index]
        if divided.spec.is_plain:
            self._add_plain(request, divided)
        elif not divided.has_heads:
            self.add_rows(index, divided.spec.row_ids(keys).reshape(-1), out.reshape(-1, out.shape[2]))
        else:
            self._add_heads(request, divided, has)

    def add_rows(self, index: int, row_ids: np.ndarray, out: np.ndarray) -> None:
        """Adds a lookup by row ids, int64 [R], into out, uint8 [R, row_bytes]."""
        out[row_ids < 0] = 0
        for number, part in enumerate(self._tables[index].parts):
            where = part.find(row_ids)
            self._by_id[number] += self._requests[number].rows(index, row_ids[where] - part.row_start, out, where)

    def attempts(self) -> list[list[Attempt]]:
        """Returns the requests to each server."""
        return [
            requests.lookup(lookups, compact=self.compact) + by_id if lookups else by_id
            for requests, lookups, by_id in zip(self._requests, self._lookups, self._by_id, strict=True)
        ]

    def _add_heads(self, request: Request, divided: Divided, has: np.ndarray | None) -> None:
        """Adds a lookup of which each server has some heads."""
        index, keys, out = request
        compact = False
        if has is not None:
            left = np.where(has, -1, keys)
            compact = int(np.count_nonzero(left >= 0)) < DENSE_FRACTION * left.size
            if compact:
                self.compact.add(index)
                out.reshape(*keys.shape, -1)[keys < 0] = 0
                keys = left
        for number, part in enumerate(divided.parts):
            own = keys[:, part.columns]
            if own.size and not (compact and own.max() < 0):
                self._lookups[number].append((index, own, out[:, part.head_start : part.head_end]))

    def _add_plain(self, request: Request, divided: Divided) -> None:
        """Adds a lookup in a plain table: each key is in one slice."""
        index, keys, out = request
        self.compact.add(index)
        out[keys[:, 0] < 0] = 0
        for number, part in enumerate(divided.parts):
            own = np.where((keys >= part.row_start) & (keys < part.row_end), keys - part.row_start, -1)
            if own.size and own.max() >= 0:
                self._lookups[number].append((index, own, out))


class Merged:
    """The answers of one lookup as one: what `ClientCounts` needs of an `Answer`.

    A key counts once, whatever number of servers have rows of it: for nvme if one of them read it from there. Of tables
    whose slices are cut inside heads, every key does, since servers do not say.
    """

    def __init__(self, tables: Sequence[Divided], requests: Sequence[Request]) -> None:
        self.requests: Sequence[Request] = requests
        self.num_bytes = self.num_nvme_rows = 0
        self.hits: list[Hits] = [[[0] * len(tables[index].spec.orders) for _ in range(3)] for index, _, _ in requests]
        self._tables = tables
        self._place = {index: place for place, (index, _, _) in enumerate(requests)}
        self._valid = [[0] * len(tables[index].spec.orders) for index, _, _ in requests]

    def add(self, member: int, answers: Sequence[Answer]) -> None:
        """Adds what one server answered to lookups by key."""
        sums: dict[int, Hits] = {}
        for answer in answers:
            self.num_bytes += answer.num_bytes
            self.num_nvme_rows += answer.num_nvme_rows
            for (index, _, _), hits in zip(answer.requests, answer.hits, strict=True):
                before = sums.get(index)
                sums[index] = hits if before is None else _sum(before, hits)
        for index, hits in sums.items():
            self._add_table(self._place[index], self._tables[index], member, hits)

    def _add_table(self, place: int, divided: Divided, member: int, hits: Hits) -> None:
        of_key, valid = self.hits[place], self._valid[place]
        if divided.spec.is_plain:  # no other server has these keys
            self.hits[place] = _sum(of_key, hits)
            return
        dram, static, nvme = of_key
        for column, in_dram, in_static, from_nvme in zip(divided.parts[member].columns.tolist(), *hits, strict=True):
            if valid[column]:
                in_static = min(in_static, static[column])
            found = in_dram + from_nvme
            if found > valid[column]:
                valid[column] = found
            if from_nvme > nvme[column]:
                nvme[column] = from_nvme
            dram[column] = in_dram = valid[column] - nvme[column]
            static[column] = in_static if in_static < in_dram else in_dram

    def add_own(self, has: Sequence[np.ndarray | None], compact: Container[int]) -> None:
        """Adds what the client's own set answered of each lookup, bool [N, O], last of all.

        compact: tables of which those keys did not travel; of others, the servers have counted them.
        """
        for place, (of_own, (index, keys, _)) in enumerate(zip(has, self.requests, strict=True)):
            divided, hits = self._tables[index], self.hits[place]
            if not divided.has_heads and not divided.spec.is_plain:
                hits[NVME] = np.count_nonzero(keys >= 0, axis=0).tolist()
            elif of_own is not None and index in compact:
                counts = np.count_nonzero(of_own, axis=0).tolist()
                hits[DRAM], hits[STATIC] = (list(map(add, hits[tier], counts)) for tier in (DRAM, STATIC))


def _sum(hits: Hits, more: Hits) -> Hits:
    return [list(map(add, *pair)) for pair in zip(hits, more, strict=True)]
