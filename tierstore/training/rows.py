"""The records of one table, wherever the newest one lies: in the cache, in a run, or in the base store.

Input: row ids, steps. Output: records in the cache, values in the caller's buffer. Errors: `CorruptPageError` for what
cannot be read; `BudgetError` if pins leave no slot; `TimeoutError` if the disk has stopped answering.

A record that is not in the cache lies where `places` says, else it is the base's. Only steps change records, and a
record leaves the cache only once `places` has it. So what the thread of steps reads is the newest. What a prefetch has
read is the newest still if the row's place is the same when it is offered to the cache: `order` makes the two one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .. import kernels
from ..decisions.training_budget import SLOTS_MIN, TableMemory
from ..errors import BudgetError
from ..formats.run import RunLayout
from .base import BaseRows
from .runs import RunReader
from .ticket import WAIT_S, TrainingTicket

NO_RUN = np.uint16(0xFFFF)
POLL_S = 0.001
PART_FRACTION = 1 / 4  # of the slots that one part of a step may pin
PINNED_FRACTION = 1 / 2  # of the slots that callers may pin
DIRTY_FRACTION = 3 / 4  # of the slots; beyond it, the oldest dirty ones are written
SPILL_FRACTION = 1 / 4  # of the slots, for one run


class Found(NamedTuple):
    """Where records lay when they were read, [n] each, and how many runs had gone by then."""

    runs: np.ndarray
    places: np.ndarray
    num_removals: int


class CachedRows:
    """The records of one table. One thread takes steps, any may `bring`, and the writer drains."""

    def __init__(
        self,
        layout: RunLayout,
        cache: kernels.RowCache,
        places: kernels.RowPlaces,
        reader: RunReader,
        base: BaseRows,
        buffer: np.ndarray,
        threads: int,
        memory: TableMemory,
    ) -> None:
        """buffer: uint8, for records that a step reads; tables share it. memory: what the table was given."""
        self.layout, self.cache, self.places, self.reader = layout, cache, places, reader
        self.memory = memory
        self.num_slots = memory.num_slots  # fewer as the index of runs grows; the writer says so
        self.is_whole = memory.is_whole
        self.spill: Callable[[], TrainingTicket] | None = None  # asks the writer for room
        self.order = threading.Lock()  # guards what `places` says of a row against what the cache has
        self.num_removals = 0  # of runs, whose ordinals are given again; guarded by `order`
        self.num_read = {"runs": 0, "base": 0}  # rows, about: threads count without a lock
        self.base = base
        self._threads = threads
        self._chunk = len(buffer) // layout.record_bytes
        self._buffer = buffer[: self._chunk * layout.record_bytes].reshape(self._chunk, layout.record_bytes)

    @property
    def part_rows(self) -> int:
        """Rows that one part of a step may pin at most."""
        return max(1, int(self.num_slots * PART_FRACTION))

    def gather(self, row_ids: np.ndarray, out: np.ndarray, wait_for: Callable[[np.ndarray], None]) -> None:
        """Copies values of rows, int64 [R], to out, float32 [R, dim]. Blocks on the disk for what the cache has not.

        wait_for: called with distinct missing rows, which a prefetch may be reading.
        """
        missing = self.cache.gather(row_ids, out, self._threads)
        for start in range(0, len(missing), 1 << 16):
            at = missing[start : start + (1 << 16)].astype(np.int64)
            rows, number = np.unique(row_ids[at], return_inverse=True)
            wait_for(rows)
            self._gather_distinct(rows, at, number, out)

    def _gather_distinct(self, rows: np.ndarray, at: np.ndarray, number: np.ndarray, out: np.ndarray) -> None:
        """Reads distinct rows; writes the values of rows[number[i]] to out[at[i]]."""
        by_row = np.argsort(number, kind="stable")
        starts = np.searchsorted(number[by_row], np.arange(len(rows) + 1))
        values = self._buffer.view(np.float32)[:, : self.layout.dim]
        for start in range(0, len(rows), self._chunk):
            part = rows[start : start + self._chunk]
            self._read_newest(part)
            mine = by_row[starts[start] : starts[start + len(part)]]
            out[at[mine]] = values[number[mine] - start]

    def _read_newest(self, rows: np.ndarray) -> None:
        """Fills the buffer with the newest records of distinct rows, and offers those that were read to the cache."""
        records = self._buffer[: len(rows)]
        values = np.empty((len(rows), self.layout.dim), dtype=np.float32)
        missing = self.cache.gather(rows, values, self._threads)  # a prefetch may have brought some meanwhile
        if len(missing) < len(rows):
            records.view(np.float32)[:, : self.layout.dim] = values
        if len(missing):
            read = records if len(missing) == len(rows) else np.empty((len(missing), records.shape[1]), np.uint8)
            self.read(rows[missing], read)
            self.cache.put(rows[missing], read)
            if read is not records:
                records[missing] = read

    def read(self, rows: np.ndarray, out: np.ndarray) -> Found:
        """Reads the newest records of rows that the cache has not, int64 [n], into out, uint8 [n, record_bytes].

        Returns where they lay. Blocks on the disk.
        """
        runs, places = np.empty(len(rows), dtype=np.uint16), np.empty(len(rows), dtype=np.uint32)
        with self.order:
            self.places.find(rows, runs, places)
            found = Found(runs, places, self.num_removals)
        of_run = runs != NO_RUN
        num_in_runs = int(np.count_nonzero(of_run))
        self.num_read["runs"] += num_in_runs
        self.num_read["base"] += len(rows) - num_in_runs
        if num_in_runs == len(rows):
            self.reader.read(rows, runs, places, out, self.places)
        elif num_in_runs == 0:
            self.base.read(rows, out)
        else:
            part = np.empty((num_in_runs, out.shape[1]), dtype=np.uint8)
            self.reader.read(rows[of_run], runs[of_run], places[of_run], part, self.places)
            out[of_run] = part
            part = np.empty((len(rows) - num_in_runs, out.shape[1]), dtype=np.uint8)
            self.base.read(rows[~of_run], part)
            out[~of_run] = part
        self.cache.bring_up_to_date(out, self._threads)
        return found

    def offer(self, rows: np.ndarray, records: np.ndarray, found: Found) -> int:
        """Offers records that were read at `found` to the cache, if they are the newest still. Does not wait for room.

        Returns how many rows, from the first on, needed no more room.
        """
        runs, places = np.empty_like(found.runs), np.empty_like(found.places)
        with self.order:
            self.places.find(rows, runs, places)
            is_newest = (runs == found.runs) & (places == found.places)
            if found.num_removals != self.num_removals:  # a number of a run may have been given again
                is_newest[:] = False
            good = np.flatnonzero(is_newest)
            done = self.cache.put(rows[good], records[good])
        return len(rows) if done == len(good) else int(good[done])

    def bring(self, rows: np.ndarray, pins: kernels.RowPins) -> None:
        """Reads distinct rows that the cache has not, and pins them there; waits for room. Of the thread of steps."""
        for start in range(0, len(rows), self._chunk):
            part = rows[start : start + self._chunk]
            records = self._buffer[: len(part)]
            self.read(part, records)
            self._put_all(part, records, pins)

    def _put_all(self, rows: np.ndarray, records: np.ndarray, pins: kernels.RowPins) -> None:
        until = time.monotonic() + WAIT_S
        done = self.cache.put(rows, records, pins)
        while done < len(rows):
            counters = self.cache.counters()
            if counters["num_dirty"] + counters["num_writing"] + counters["num_free"] == 0:
                raise BudgetError(
                    f"table {self.layout.table}: all {counters['num_slots']} slots of its cache are pinned; pin fewer "
                    f"rows, or ask for more dram"
                )
            if counters["num_free"] == 0 and self.spill is not None:
                self.spill().wait(max(0.0, until - time.monotonic()))
            done += self.cache.put(rows[done:], records[done:], pins)

    def pin(self, rows: np.ndarray, wait_for: Callable[[np.ndarray], None]) -> kernels.RowPins:
        """Brings distinct rows into the cache and pins them, as far as there is room; see `TrainingTable.pin_rows`."""
        pins = self.cache.pins()
        try:
            room = int(self.num_slots * PINNED_FRACTION) - self.cache.counters()["num_pinned"]
            wanted = rows[: max(0, room)]
            missing = wanted[self.cache.find(wanted, pins)]
            if len(missing):
                wait_for(missing)
                self.bring(missing[self.cache.find(missing, pins)], pins)
        except BudgetError:  # others have pinned all the rest
            return pins
        except BaseException:
            pins.release()
            raise
        return pins

    def has_too_many_dirty(self) -> bool:
        """Whether the oldest dirty records should be written, so that there is room. A whole table needs none."""
        return not self.is_whole and int(self.cache.counters()["num_dirty"]) > DIRTY_FRACTION * self.num_slots

    @property
    def spill_rows(self) -> int:
        """How many records one spill writes."""
        return max(1, int(self.num_slots * SPILL_FRACTION))

    def give_room_to_index(self) -> None:
        """Has the cache give up slots that the index of runs has grown into. Of the writer's thread.

        Rows that are dirty or pinned may be in the way; then the next run tries again.
        """
        if self.is_whole:
            return
        given_up = (self.memory.num_slots - self.num_slots) * self.layout.record_bytes
        index_bytes = self.places.num_bytes + self.reader.num_bytes
        over = self.memory.cache_bytes - given_up + index_bytes - self.memory.share_bytes
        if over <= 0:
            return
        wanted = self.num_slots - -(-over // self.layout.record_bytes)
        if wanted < SLOTS_MIN:
            raise BudgetError(
                f"table {self.layout.table}: its share of dram is {self.memory.share_bytes} bytes, and the index of "
                f"{self.places.num_found} touched rows takes {self.places.num_bytes} of them; ask for more dram"
            )
        self.num_slots = int(self.cache.shrink(wanted))

    def stats(self) -> dict[str, int]:
        """Returns counters, and bytes."""
        counters = self.cache.counters()
        given_up_bytes = (self.memory.num_slots - self.num_slots) * self.layout.record_bytes
        return {
            **counters,
            "rows_read_from_runs": self.num_read["runs"],
            "rows_read_from_base": self.num_read["base"],
            "cache_bytes": self.memory.cache_bytes - given_up_bytes,
            "index_bytes": self.places.num_bytes + self.reader.num_bytes,
            "touched_rows": self.places.num_found,
            "dirty_bytes": counters["num_dirty"] * self.layout.record_bytes,
        }

    def drop(self) -> None:
        """Lets go of cache and index, for good."""
        for name in ("cache", "places", "_buffer"):
            self.__dict__.pop(name, None)
