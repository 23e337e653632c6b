"""The one thread of a training that writes: spills and commits, one after the other.

Input: requests, each with a ticket. Output: runs, of which the tables know; commits. Errors: those of the disk, by the
ticket; after one, the training is broken: which records a failed file has is not known. Before it writes a commit, it
asks whether the disk has room, and if not, only the commit fails.

A run that no commit names yet has a temporary name. Whoever opens the store next removes it.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import kernels
from ..formats.run import Run
from .commits import Commit, publish_commit
from .health import Health
from .merge import RUNS_MANY, Merges
from .rows import CachedRows
from .run_writer import RunWriter
from .runs import RunReader
from .ticket import TrainingTicket

logger = logging.getLogger("tierstore")

RUNS_LOOKED_AT = 32  # after so many more, a table's runs are looked through for such that nothing needs any more
RUNS_UNMERGED_MAX = 4 * RUNS_MANY  # of a table: beyond, a spill waits for a merge; each run takes three descriptors
RUN_ROWS_MAX = 1 << 20  # of one run: their ids are in memory until it is finished


@dataclass
class TableRuns:
    """The runs of a table that hold newest records, by ordinal, oldest first. Of the writer's thread."""

    rows: CachedRows
    runs: dict[int, Run] = field(default_factory=dict)
    unnamed: dict[int, RunWriter] = field(default_factory=dict)

    @property
    def reader(self) -> RunReader:
        """Where the runs are open."""
        return self.rows.reader

    @property
    def places(self) -> kernels.RowPlaces:
        """Where the newest records lie."""
        return self.rows.places

    @contextlib.contextmanager
    def removing(self) -> Iterator[None]:
        """Entered while records move, or runs go: prefetches that have read before do not offer what they read."""
        with self.rows.order:
            self.rows.num_removals += 1
            yield


@dataclass
class CommitRequest:
    """What a commit says besides the rows, as it was when they were frozen."""

    step: int
    payload: bytes
    optimizer: Mapping[str, Any]
    rates: Mapping[str, np.ndarray] | None  # learning rates of all steps, float64, if the rule needs them
    ticket: TrainingTicket
    _claimed: threading.Lock = field(default_factory=threading.Lock)

    def claim(self) -> bool:
        """Returns True to the first who asks: the writer, which then does it, or whoever asked and takes it back."""
        return self._claimed.acquire(blocking=False)


class Writer:
    """Writes what it is asked to, in order. `start` it, `stop` it; any thread may ask."""

    def __init__(
        self, store: Path, tables: Mapping[str, TableRuns], last_run: int, buffer_bytes: int, health: Health
    ) -> None:
        """last_run: the largest number that a run of this store ever had."""
        self._store, self._tables, self._buffer_bytes = store, tables, buffer_bytes
        self.last_run = last_run  # the largest number that was given
        self._health = health
        self._requests: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._merges = Merges(tables, self._new_run)  # of the thread alone
        self._spills: dict[str, TrainingTicket] = {}  # that are asked for
        # Not `Thread.join`: interrupted, it takes a thread that goes on for one that has ended (CPython 3.11).
        self._ended = TrainingTicket("the writer of a training")
        self.thread = threading.Thread(target=self._serve, name="tierstore-training-writer", daemon=True)
        self.num_spilled = 0  # records
        self.num_written = 0  # records, spills and commits

    def start(self) -> None:
        """Starts the thread."""
        self.thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Ends the thread once all that was asked for is written; returns whether it ended in time.

        Then removes runs that no commit names.
        """
        self._requests.put(None)
        if self.thread.ident is not None and not self._ended.ends_within(timeout_s):
            return False
        for table in self._tables.values():
            while table.unnamed:
                ordinal, run = next(reversed(table.unnamed.items()))
                run.discard()
                table.unnamed.pop(ordinal, None)  # only now: an interrupted stop is called again
        return True

    def spill(self, name: str) -> TrainingTicket:
        """Asks to write the oldest dirty records of a table; returns the ticket of the spill that is asked for."""
        found = self._spills.get(name)
        if found is not None and not found.done():
            return found
        ticket = TrainingTicket(f"writing records of table {name}")
        self._requests.put(lambda: self._do(ticket, lambda: self._spill(self._tables[name])))
        self._spills[name] = ticket  # not before: whoever found it would wait for a spill that nobody does
        return ticket

    def commit(self, request: CommitRequest) -> None:
        """Asks to write what was frozen, and to publish it."""
        self._requests.put(lambda: self._do(request.ticket, lambda: self._commit(request)) if request.claim() else None)

    def _serve(self) -> None:
        try:
            while (act := self._next()) is not None:
                act()
        finally:
            try:
                self._merges.close()
            finally:
                self._ended.end()

    def _next(self) -> Callable[[], None] | None:
        """Waits for a request; merges runs until one comes."""
        while True:
            try:
                return self._requests.get(timeout=self._merges.wait_s())
            except queue.Empty:
                self._merge()

    def _merge(self) -> None:
        try:
            self._merges.step()
        except Exception as error:
            logger.warning("%s: runs were not merged, and take more disk than they need: %s", self._store, error)

    def _new_run(self, name: str) -> RunWriter:
        self.last_run += 1
        return RunWriter(self._store, self.last_run, self._tables[name].rows.layout, self._buffer_bytes)

    def _do(self, ticket: TrainingTicket, work: Callable[[], Any]) -> None:
        try:
            self._health.check_whole()  # what was asked for is written, also while it is being closed
            result = work()
        except BaseException as error:
            try:
                self._health.mark_broken(f"a write failed: {error}")
            finally:
                ticket.end(error=error)
        else:
            ticket.end(result)

    def _spill(self, table: TableRuns) -> None:
        if len(table.runs) >= RUNS_UNMERGED_MAX:
            self._merges.look()
            while self._merges.wait_s() is not None:
                self._merge()
        self.num_spilled += self._write_run(table, table.rows.spill_rows)
        if len(table.runs) % RUNS_LOOKED_AT == 0:
            self._drop_dead_runs(table)
            if len(table.runs) > RUNS_MANY:
                self._merges.look()  # between commits, too: with a small cache there are many spills

    def _commit(self, request: CommitRequest) -> Commit:
        for table in self._tables.values():
            while self._write_run(table, RUN_ROWS_MAX) > 0:
                pass
            table.rows.cache.thaw()  # all that was frozen is written
        for table in self._tables.values():
            self._drop_dead_runs(table)
        unnamed = [writer for table in self._tables.values() for writer in table.unnamed.values()]
        commit = publish_commit(
            self._store,
            step=request.step,
            payload=request.payload,
            runs={name: tuple(table.runs.values()) for name, table in self._tables.items()},
            unnamed=unnamed,
            optimizer=request.optimizer,
            rates=request.rates,
        )
        for table in self._tables.values():
            while table.unnamed:
                table.unnamed.popitem()[1].discard()  # has its name, and is closed
        self._merges.look()
        return commit

    def _write_run(self, table: TableRuns, num_rows_max: int) -> int:
        """Writes up to so many dirty records to a run, oldest first; returns how many."""
        rows = table.rows
        row_ids = np.empty(min(num_rows_max, RUN_ROWS_MAX, rows.cache.counters()["num_takeable"]), dtype=np.int64)
        writer, done = None, 0
        try:
            while done < len(row_ids):
                writer = writer or self._new_run(rows.layout.table)
                buffer = writer.buffer()
                part = row_ids[done : done + len(buffer)]
                count = rows.cache.drain(buffer[: len(part)], part, writer.number)
                if count == 0:
                    break
                writer.write(count, part[:count])
                done += count
            if done > 0 and writer is not None:
                self._finish(table, writer, row_ids[:done])
                writer = None
        finally:
            if writer is not None:
                writer.discard()
        return done

    def _finish(self, table: TableRuns, writer: RunWriter, row_ids: np.ndarray) -> None:
        """Finishes a run; from then on its records are found there."""
        rows = table.rows
        run = writer.finish()
        ordinal = rows.reader.add(run, writer.path)
        table.unnamed[ordinal] = writer
        table.runs[ordinal] = run
        with rows.order:
            rows.places.put(row_ids, ordinal, 0)
            rows.cache.written(row_ids, writer.number)
        rows.give_room_to_index()
        self.num_written += len(row_ids)

    def _drop_dead_runs(self, table: TableRuns) -> None:
        """Forgets runs without a newest record. Reads under way go on."""
        rows = table.rows
        for ordinal in [each for each in table.runs if rows.places.live(each) == 0]:
            with table.removing():
                rows.reader.remove(ordinal)
            del table.runs[ordinal]
            if ordinal in table.unnamed:
                table.unnamed.pop(ordinal).discard()
