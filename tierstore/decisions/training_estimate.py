"""What a training will need of a machine: memory of indexes, log on disk, reads and writes, and so tokens a second.

Input: the traffic of each table, how its records look, how many of them fit in memory, and what the disk can do.
Output: a `TrainingEstimate`. Errors: `BudgetError` for a log that the disk has no room for. Pure.

A first touch reads a page of the base. A row that left the cache is read from a run, several of one n-gram at once. A
dirty row is written once when it leaves the cache, or with the next commit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import BudgetError
from ..units import format_bytes
from .row_traffic import RowTraffic

ROW_ID_BYTES = 8  # of a record in a run, behind all records
LOG_MAX = 2  # runs take so many times the newest records before they are merged
MILLION = 1_000_000


@dataclass(frozen=True)
class DiskRates:
    """What a disk did in a probe.

    reads_per_s: of one record, at random. neighbours_per_s: of eight records side by side, at random.
    write_bytes_per_s: of records, written in sequence and synced.
    """

    reads_per_s: float
    neighbours_per_s: float
    write_bytes_per_s: float


@dataclass(frozen=True)
class TableNeeds:
    """What the estimate knows of a table beside its traffic.

    stored_bytes: of a record in a run. num_slots: records in memory. index_bytes: of the index, all touched rows in it.
    is_drawn: whether rows that were not touched are drawn and not read.
    """

    stored_bytes: int
    num_slots: int
    index_bytes: int
    is_drawn: bool = False


@dataclass(frozen=True)
class TableEstimate:
    """What a training does to one table.

    Attributes:
        touched_rows: Distinct rows of the whole trace.
        touched_fraction: Of the table.
        growth_fraction: Rows that the second half of the trace touched first, of all touched rows.
        watched_one_in: The figures count one row in so many; 1: they are exact.
        rows_per_step: Distinct rows of a step.
        base_reads_per_step: Rows read from the base: first touches; none of a table from scratch.
        run_reads_per_step: Places read from runs: rows that left the cache.
        rows_written_per_step: Records written, by commits and because the cache is full.
        log_bytes_per_million_tokens: Bytes of runs that a million tokens write.
        log_bytes: The most that the runs of the whole trace take on disk.
        index_bytes: Memory of the index of touched rows.
        cached_rows: Records that fit in memory.
    """

    touched_rows: int
    touched_fraction: float
    growth_fraction: float
    watched_one_in: int
    rows_per_step: float
    base_reads_per_step: float
    run_reads_per_step: float
    rows_written_per_step: float
    log_bytes_per_million_tokens: float
    log_bytes: int
    index_bytes: int
    cached_rows: int


@dataclass(frozen=True)
class TrainingEstimate:
    """What a training needs.

    Attributes:
        num_tokens: Of the trace.
        batch_tokens: Of a step.
        commit_steps: Steps between two commits.
        tables: By name.
        disk: What the disk did in a probe; None without one.
        tokens_per_s: That the disk can carry, reads and writes one after the other; None without a probe or if nothing
            is read or written.
        reads_per_s: At that rate.
        write_bytes_per_s: At that rate.
    """

    num_tokens: int
    batch_tokens: int
    commit_steps: int
    tables: Mapping[str, TableEstimate]
    disk: DiskRates | None
    tokens_per_s: float | None
    reads_per_s: float | None
    write_bytes_per_s: float | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the estimate for JSON."""
        return asdict(self)


def estimate_training(
    traffics: Mapping[str, RowTraffic],
    needs: Mapping[str, TableNeeds],
    *,
    num_tokens: int,
    batch_tokens: int,
    commit_steps: int,
    free_bytes: int,
    disk: DiskRates | None = None,
) -> TrainingEstimate:
    """Returns what a training needs. Raises `BudgetError` if the log of the trace does not fit in `free_bytes`."""
    tables = {
        name: _estimate_table(traffic, needs[name], batch_tokens, commit_steps) for name, traffic in traffics.items()
    }
    log_bytes = sum(table.log_bytes for table in tables.values())
    if log_bytes > free_bytes:
        raise BudgetError(
            f"the runs of {num_tokens} tokens take up to {format_bytes(log_bytes)} ({log_bytes} bytes), the store's "
            f"disk has {format_bytes(free_bytes)} free ({free_bytes} bytes); free some, put the store on another disk, "
            f"or train on fewer tokens"
        )
    rates: tuple[float | None, float | None, float | None] = None, None, None
    if disk is not None:
        rates = _rates(tables, needs, disk, batch_tokens)
    return TrainingEstimate(num_tokens, batch_tokens, commit_steps, tables, disk, *rates)


def _estimate_table(traffic: RowTraffic, needs: TableNeeds, batch_tokens: int, commit_steps: int) -> TableEstimate:
    window = traffic.window_of(needs.num_slots)
    again = max(0.0, traffic.misses(window) - traffic.first_touches) if window < traffic.num_steps else 0.0
    if window >= commit_steps:
        written = traffic.rows_in(commit_steps) / commit_steps
    else:  # rows leave the cache between commits, each written when it leaves
        written = traffic.misses(window) + min(traffic.rows_in(window), needs.num_slots) / commit_steps
    written = min(written, traffic.rows_per_step)
    bytes_per_row = needs.stored_bytes + ROW_ID_BYTES
    return TableEstimate(
        touched_rows=traffic.touched_rows,
        touched_fraction=traffic.touched_rows / traffic.num_rows,
        growth_fraction=traffic.touched_late / max(1, traffic.touched_rows),
        watched_one_in=traffic.watched_one_in,
        rows_per_step=traffic.rows_per_step,
        base_reads_per_step=0.0 if needs.is_drawn else traffic.first_touches,
        run_reads_per_step=again * traffic.places_fraction,
        rows_written_per_step=written,
        log_bytes_per_million_tokens=written * bytes_per_row * MILLION / batch_tokens,
        log_bytes=min(LOG_MAX * traffic.touched_rows, int(written * traffic.num_steps) + 1) * bytes_per_row,
        index_bytes=needs.index_bytes,
        cached_rows=min(needs.num_slots, traffic.num_rows),
    )


def _rates(
    tables: Mapping[str, TableEstimate], needs: Mapping[str, TableNeeds], disk: DiskRates, batch_tokens: int
) -> tuple[float | None, float | None, float | None]:
    """Returns tokens, reads and written bytes a second."""
    base = sum(table.base_reads_per_step for table in tables.values())
    runs = sum(table.run_reads_per_step for table in tables.values())
    written = sum(
        table.rows_written_per_step * (needs[name].stored_bytes + ROW_ID_BYTES) for name, table in tables.items()
    )
    seconds = base / disk.reads_per_s + runs / disk.neighbours_per_s + written / disk.write_bytes_per_s
    if seconds <= 0:
        return None, None, None
    return batch_tokens / seconds, (base + runs) / seconds, written / seconds
