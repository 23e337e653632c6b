"""What an open training holds: runs, caches, the threads, and how all of it goes to another commit.

Input: a store, its base rows, what its catalog says, a budget. Output: tables that take steps. Errors: `FormatError`
and `CorruptPageError` for runs that are not what the commit lists; `BudgetError`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import kernels
from ..decisions.training_budget import READING_FRACTION, RecordShape, TableMemory, TrainingPlan, divide_training
from ..formats.catalog import CatalogImage
from ..formats.rates import read_rates
from ..formats.run import Run, RunLayout
from ..layout import TableLayout
from ..tiers.memory import allocate
from .base import BaseRows
from .commits import Commit
from .health import Health
from .optimizers import Optimizer
from .owned import Owned
from .prefetch import Prefetches
from .rows import POLL_S, CachedRows
from .runs import DEPTH, READ_BYTES, RunReader
from .table import StepParts, TrainingTable
from .ticket import WAIT_S
from .writer import TableRuns, Writer

DEPTH_MIN = 4  # reads of runs under way
CALLS = 2  # that read runs at the same time: a step, and a prefetch
SCRATCH_BYTES = 8 << 20  # of sums of gradients, beside the budget


@dataclass
class TableFiles:
    """The runs of one table that are open, and where its rows lie in them."""

    layout: RunLayout
    reader: RunReader
    places: kernels.RowPlaces
    runs: dict[int, Run] = field(default_factory=dict)

    def load(self, runs: tuple[Run, ...]) -> None:
        """Opens runs, oldest first, and reads which rows they have. Blocks on the disk."""
        for run in runs:
            ordinal = self.reader.add(run)
            self.runs[ordinal] = run
            self.reader.load(ordinal, self.places)


def layout_of(table: TableLayout, optimizer: Optimizer) -> RunLayout:
    """Returns how the training records of a table look."""
    dim = table.spec.dim
    return RunLayout(table.spec.name, dim, optimizer.state_floats(dim), table.seed)


def open_files(
    store: Path,
    image: CatalogImage,
    optimizer: Optimizer,
    commit: Commit | None,
    io: str,
    budget_bytes: int,
    owned: Owned,
) -> dict[str, TableFiles]:
    """Opens the runs of a commit, None for none, which `owned` closes. Blocks on the disk."""
    found = {}
    reading_bytes = int(budget_bytes * READING_FRACTION) // len(image.tables)
    for name, table in image.tables.items():
        layout = layout_of(table, optimizer)
        read_bytes = max(READ_BYTES, layout.read_bytes_max)
        depth = max(DEPTH_MIN, min(DEPTH, reading_bytes // (CALLS * read_bytes)))
        reader = RunReader(store, layout, io, depth, CALLS)
        owned.add(reader.close)
        found[name] = TableFiles(layout, reader, kernels.RowPlaces(table.spec.num_rows))
        found[name].load(() if commit is None else commit.runs.get(name, ()))
    return found


def plan_memory(
    files: Mapping[str, TableFiles], image: CatalogImage, budget_bytes: int, base_bytes: int
) -> TrainingPlan:
    """Divides the budget beside the indexes as they are now. Raises `BudgetError`."""
    shapes = {
        name: RecordShape(
            num_rows=image.tables[name].spec.num_rows,
            dim=of.layout.dim,
            record_bytes=of.layout.record_bytes,
            index_bytes=of.reader.num_bytes + of.places.num_bytes,
            index_bytes_max=of.reader.num_bytes
            + of.places.num_bytes_with(image.tables[name].spec.num_rows - of.places.num_found),
        )
        for name, of in files.items()
    }
    return divide_training(shapes, budget_bytes, base_bytes)


class OpenedTraining:
    """Everything that `Training` and its tables share. `start` it; `stop` it before what it stands on is closed."""

    def __init__(
        self,
        image: CatalogImage,
        base: Mapping[str, BaseRows],
        files: dict[str, TableFiles],
        plan: TrainingPlan,
        optimizer: Optimizer,
        threads: int,
        health: Health,
    ) -> None:
        self.store, self.plan, self.optimizer, self.health = image.path, plan, optimizer, health
        self.attachments = image.attachments
        self.files = files
        self.parts = StepParts(SCRATCH_BYTES, threads)
        self._buffer = allocate(plan.buffer_bytes)
        native = kernels.Optimizer(**optimizer.to_dict())
        self.rows = {
            name: CachedRows(
                of.layout,
                _new_cache(of.layout, plan.tables[name], image.tables[name].spec.num_rows, native),
                of.places,
                of.reader,
                base[name],
                self._buffer,
                threads,
                plan.tables[name],
            )
            for name, of in files.items()
        }
        self.prefetches = Prefetches(self.rows, plan.buffer_bytes, health)
        self.writer: Writer | None = None
        self.tables = {
            name: TrainingTable(
                image.tables[name].public_spec, rows, self.parts, optimizer, health, self.prefetches.wait_for
            )
            for name, rows in self.rows.items()
        }

    def start(self, last_run: int, commit: Commit | None) -> None:
        """Sets the steps of a commit, and starts the threads. last_run: see `Writer`."""
        self._set_steps(commit)
        tables = {name: TableRuns(rows, self.files[name].runs) for name, rows in self.rows.items()}
        self.writer = Writer(self.store, tables, last_run, self.plan.buffer_bytes, self.health)
        for name, rows in self.rows.items():
            rows.spill = partial(self.writer.spill, name)
        self.writer.start()
        if not self.prefetches.is_started:
            self.prefetches.start()

    def stop(self, timeout_s: float = WAIT_S) -> None:
        """Waits for the step that is taken and for what is written now, and ends the threads. Raises `TimeoutError`.

        Any number of times. Nobody can begin a step any more.
        """
        until = time.monotonic() + timeout_s
        while self.parts.lock.locked():  # not taken here: Ctrl-C may come before it could be given back
            if time.monotonic() > until:
                raise TimeoutError(f"{self.health.what}: a step did not end within {timeout_s:g} s; close it again")
            time.sleep(POLL_S)
        if not self.prefetches.stop(timeout_s) or not self._stop_writer(timeout_s):
            raise TimeoutError(f"{self.health.what}: a write did not end within {timeout_s:g} s; close it again")

    def is_needed_by_this_thread(self) -> bool:
        """Whether `stop` might wait for the thread that asks: it is one of ours, or takes a step."""
        ours = {self.prefetches.thread} | ({self.writer.thread} if self.writer else set())
        return threading.current_thread() in ours or self.parts.lock.locked()

    def _stop_writer(self, timeout_s: float) -> bool:
        if self.writer is not None and not self.writer.stop(timeout_s):
            return False
        self.writer = None
        return True

    def go_to(self, commit: Commit | None, last_run: int) -> None:
        """Drops all rows and runs, and loads those of a commit, None for none. With the lock of steps held. Blocks."""
        with self.prefetches.paused():  # what they have read before is not to come into the cache afterwards
            self._go_to(commit, last_run)

    def _go_to(self, commit: Commit | None, last_run: int) -> None:
        last_run = max(last_run, 0 if self.writer is None else self.writer.last_run)
        if not self._stop_writer(WAIT_S):
            raise TimeoutError(f"{self.health.what}: a write did not end within {WAIT_S:g} s")
        for name, of in self.files.items():
            rows = self.rows[name]
            rows.cache.clear()
            with rows.order:
                for ordinal in of.reader.runs:  # merges may have changed which there are
                    of.reader.remove(ordinal)
                of.runs.clear()
                rows.num_removals += 1
                rows.places = of.places = kernels.RowPlaces(self.tables[name].spec.own_rows)
            of.load(() if commit is None else commit.runs.get(name, ()))
            rows.give_room_to_index()
        self.start(last_run, commit)

    def numbers(self) -> dict[str, Any]:
        """Returns what a commit keeps of the optimizer, for JSON."""
        return {"optimizer": self.optimizer.to_dict(), "steps": {name: t.num_steps for name, t in self.tables.items()}}

    def rates(self) -> dict[str, np.ndarray] | None:
        """Returns the learning rates of all steps, float64 [steps] by table; None if the rule needs none."""
        found = {name: rows.cache.rates() for name, rows in self.rows.items()}
        return found if any(len(each) for each in found.values()) else None

    def dirty_file_bytes(self) -> int:
        """Returns how many bytes of runs a commit would write now."""
        every = [(rows.layout, rows.cache.counters()) for rows in self.rows.values()]
        return sum(layout.run_bytes(now["num_dirty"] + now["num_writing"]) for layout, now in every)

    def stats(self) -> dict[str, Any]:
        """Returns counters of all tables, and bytes."""
        tables = {name: table.stats() for name, table in self.tables.items()}
        total = {name: sum(table[name] for table in tables.values()) for name in next(iter(tables.values()))}
        return {
            "tables": tables,
            "hits": total["hits"],
            "misses": total["misses"],
            "rows_read": {"runs": total["rows_read_from_runs"], "base": total["rows_read_from_base"]},
            "rows_spilled": self.writer.num_spilled if self.writer else 0,
            "rows_written": self.writer.num_written if self.writer else 0,
            "rows_prefetched": self.prefetches.num_rows,
            "prefetches_dropped": self.prefetches.num_dropped,
            "memory": {
                "budget_bytes": self.plan.budget_bytes,
                "planned_bytes": self.plan.num_bytes,
                "base_bytes": self.plan.base_bytes,
                **{name: total[name] for name in ("cache_bytes", "index_bytes", "dirty_bytes")},
            },
        }

    def drop(self) -> None:
        """Lets go of the memory: a closed training that somebody still names must not keep its budget."""
        for rows in self.rows.values():
            rows.drop()

    def _set_steps(self, commit: Commit | None) -> None:
        steps = {} if commit is None else dict(commit.optimizer["steps"])
        rates = {} if commit is None or commit.rates is None else read_rates(self.store, commit.rates)
        for name, rows in self.rows.items():
            rows.cache.set_steps(int(steps.get(name, 0)), rates.get(name, np.empty(0)))


def _new_cache(layout: RunLayout, memory: TableMemory, num_rows: int, optimizer: kernels.Optimizer) -> kernels.RowCache:
    block = allocate(memory.cache_bytes)
    return kernels.RowCache(
        block, num_rows, layout.dim, layout.record_bytes, memory.num_slots, memory.num_aside, optimizer
    )
