"""Merging: the live records of runs that are mostly dead, or small and many, go to a new run.

Input: a table's runs with how many records of each are live. Output: new runs, to be listed in place of the old ones by
the next commit, behind all runs that were there before. Errors: those of `RunReader` and `RunWriter`; nothing is moved
then, and the old runs stay.

Records keep their order, so that rows that were touched together stay neighbours. Memory: the writer's buffers, 14
bytes a record of the run that is written, at most MERGED_RECORDS_MAX, and 8 bytes a record of one that is read. Steps
and reads go on meanwhile: `RowPlaces.move` leaves alone what was written anew, and `RunReader.read` asks again for what
has moved.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from .. import kernels
from ..formats.run import Run
from .live import LiveRows, live_of_run
from .run_writer import RunWriter
from .runs import RunReader

LIVE_FRACTION = 0.5  # a run of which less is live is merged
RUNS_MANY = 128  # of a table: beyond, the smallest are merged, too,
RUNS_FEW = 64  # until so many are left
MERGED_RECORDS_MAX = 1 << 19
RATE_BYTES_S = 64 << 20  # by default: read and written, each


@dataclass(frozen=True)
class Merged:
    """What a merge made of a table.

    Attributes:
        removed: Ordinals of runs that have no live record any more.
        added: Ordinal, run and writer of the new run, finished and readable, not yet synced; None if nothing was live.
    """

    removed: tuple[int, ...]
    added: tuple[int, Run, RunWriter] | None

    def applied_to(self, runs: Mapping[int, Run], known: frozenset[Run]) -> dict[int, Run]:
        """Returns a table's runs, by ordinal, oldest first, as the next commit lists them.

        known: those that were there when the merge began: all others are newer than what was merged.
        """
        items = list(runs.items())
        border = max((i + 1 for i, (_, run) in enumerate(items) if run in known), default=0)
        kept = [(ordinal, run) for ordinal, run in items[:border] if ordinal not in self.removed]
        return dict([*kept, *([self.added[:2]] if self.added else []), *items[border:]])


def choose_runs(num_records: Sequence[int], num_live: Sequence[int]) -> list[int]:
    """Returns the indexes of runs to merge: those of which less than half is live; if many are left, the smallest."""
    dead = [i for i, (all_, live) in enumerate(zip(num_records, num_live, strict=True)) if live < LIVE_FRACTION * all_]
    left = sorted(set(range(len(num_records))) - set(dead), key=lambda i: num_live[i])
    if len(left) <= RUNS_MANY:
        return dead
    return sorted([*dead, *left[: len(left) - RUNS_FEW]])


class Merge:
    """A merge under way, a part at a time. One thread uses it; end it by `finish` or `discard`."""

    def __init__(
        self, reader: RunReader, places: kernels.RowPlaces, chosen: Sequence[int], make_writer: Callable[[], RunWriter]
    ) -> None:
        """Takes at most MERGED_RECORDS_MAX records: what is left is for another merge.

        Args:
            reader: Where the runs are open.
            places: Where the newest records lie.
            chosen: Ordinals, in the commit's order.
            make_writer: Makes the writer of a run with the next number; called if anything is live.
        """
        self._reader, self._places, self._make_writer = reader, places, make_writer
        runs = reader.runs
        self._chosen = {ordinal: runs[ordinal] for ordinal in chosen}
        self._writer: RunWriter | None = None
        self._moved: list[LiveRows] = []
        self._parts = self._live_parts()
        self._part: LiveRows | None = None

    def step(self) -> int:
        """Copies a buffer of live records; returns how many bytes, 0 if there are no more. Blocks on the disk."""
        if self._part is None:
            self._part = next(self._parts, None)
        if self._part is None:
            return 0
        self._writer = self._writer or self._make_writer()
        buffer = self._writer.buffer()
        row_ids, runs, found = (of[: len(buffer)] for of in self._part)
        records = buffer[: len(row_ids)]
        self._reader.read(row_ids, runs, found, records[:, : self._reader.layout.record_bytes], self._places)
        self._writer.write(len(row_ids), row_ids)
        self._moved.append((row_ids, runs, found))
        left = self._part[0][len(buffer) :], self._part[1][len(buffer) :], self._part[2][len(buffer) :]
        self._part = left if len(left[0]) else None
        return records.nbytes

    def finish(self, order: contextlib.AbstractContextManager[object] | None = None) -> Merged:
        """Ends the new run and moves `places` there, holding `order` meanwhile, some 50 ns a row. Blocks on the disk.

        If it raises, nothing has moved.
        """
        added = None
        if self._writer is not None:
            run = self._writer.finish()
            added = self._reader.add(run, self._writer.path), run, self._writer
            with order or contextlib.nullcontext():
                place = 0
                for row_ids, runs, found in self._moved:
                    if self._is_there(int(runs[0])):
                        self._places.move(row_ids, runs, found, added[0], place)
                    place += len(row_ids)
            self._writer = None  # the caller's now
        dead = [i for i in self._chosen if self._is_there(i) and self._places.live(i) == 0]
        return Merged(tuple(dead), added)

    def discard(self) -> None:
        """Gives up: no file is left. Any number of times."""
        if self._writer is not None:
            self._writer.discard()

    def _live_parts(self) -> Iterator[LiveRows]:
        """The live records of the runs, MERGED_RECORDS_MAX at most."""
        left = MERGED_RECORDS_MAX
        for ordinal in self._chosen:
            parts = live_of_run(self._reader, self._places, ordinal)
            while left and self._is_there(ordinal) and (part := next(parts, None)):
                row_ids, runs, found = (of[:left] for of in part)
                yield row_ids, runs, found
                left -= len(row_ids)

    def _is_there(self, ordinal: int) -> bool:
        """Whether a run is open still: one that died meanwhile may be gone, and its ordinal another's."""
        return self._reader.runs.get(ordinal) == self._chosen[ordinal]


class MergedTable(Protocol):
    """What a training knows of a table's runs. All of it belongs to the thread that merges."""

    runs: dict[int, Run]  # by ordinal, oldest first, as the next commit lists them
    unnamed: dict[int, RunWriter]  # by ordinal: those without their name

    @property
    def reader(self) -> RunReader:
        """Where the runs are open."""

    @property
    def places(self) -> kernels.RowPlaces:
        """Where the newest records lie."""

    def removing(self) -> contextlib.AbstractContextManager[object]:
        """Entered while records move, or runs go: others do not look at places meanwhile."""


class Merges:
    """The merges of a training, on the thread that writes: `step` between its other work, when `wait_s` is over.

    What they make is in the tables' `runs` and `unnamed`, for the next commit.
    """

    def __init__(
        self,
        tables: Mapping[str, MergedTable],
        make_writer: Callable[[str], RunWriter],
        rate_bytes_s: float = RATE_BYTES_S,
    ) -> None:
        """make_writer: of a table's next run. rate_bytes_s: at most so many bytes a second are read, and written."""
        self._tables, self._make_writer, self._rate = tables, make_writer, rate_bytes_s
        self._waiting: list[str] = []  # tables to look at
        self._merge: tuple[str, Merge, frozenset[Run]] | None = None  # under way, and the runs that there were
        self._due_s = 0.0

    def look(self) -> None:
        """Looks for runs to merge from now on; call it after a commit."""
        self._waiting = list(self._tables)

    def wait_s(self) -> float | None:
        """Returns in how many seconds `step` is due; None if there is nothing to do."""
        if self._merge is None and not self._waiting:
            return None
        return max(0.0, self._due_s - time.monotonic())

    def step(self) -> None:
        """Does a part: a buffer's records at most. Blocks on the disk. If it raises, the merge is given up."""
        if self._merge is None:
            self._begin(self._waiting.pop())
            return
        name, merge, known = self._merge
        try:
            num_bytes = merge.step()
            if num_bytes == 0:
                self._end(self._tables[name], merge, known)
                self._merge = None
        except BaseException:
            self.close()
            raise
        self._due_s = max(self._due_s, time.monotonic() - 1 / self._rate) + num_bytes / self._rate

    def close(self) -> None:
        """Gives up what is under way. Any number of times."""
        if self._merge is not None:
            self._merge[1].discard()
        self._merge, self._waiting = None, []

    def _begin(self, name: str) -> None:
        table = self._tables[name]
        ordinals = list(table.runs)
        num_live = [table.places.live(ordinal) for ordinal in ordinals]
        chosen = choose_runs([run.num_records for run in table.runs.values()], num_live)
        if chosen:
            merge = Merge(table.reader, table.places, [ordinals[i] for i in chosen], lambda: self._make_writer(name))
            self._merge = name, merge, frozenset(table.runs.values())

    def _end(self, table: MergedTable, merge: Merge, known: frozenset[Run]) -> None:
        merged = merge.finish(table.removing())
        table.runs = merged.applied_to(table.runs, known)
        if merged.added:
            table.unnamed[merged.added[0]] = merged.added[2]
        with table.removing():
            for ordinal in merged.removed:
                table.reader.remove(ordinal)
                if ordinal in table.unnamed:
                    table.unnamed.pop(ordinal).discard()
