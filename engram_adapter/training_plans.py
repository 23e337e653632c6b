"""plan for training: what a recorded training would need of a machine, before anybody begins it.

Input: a store, traces of tokens, an optimizer, budgets. Output: a `TrainingEstimate`. Errors: `BudgetError` for a
memory or a disk in which the training of the trace does not fit, with both numbers; `ConfigError` for tables whose
codec cannot be trained. The trace is cut into steps as it comes, documents one after the other.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tierstore import kernels
from tierstore.decisions.row_traffic import TrafficCounter
from tierstore.decisions.training_budget import RecordShape, divide_training
from tierstore.decisions.training_estimate import TableNeeds, TrainingEstimate, estimate_training
from tierstore.errors import ConfigError
from tierstore.formats.catalog import CatalogImage, read_catalog
from tierstore.formats.run import RunLayout
from tierstore.formats.trace import read_token_documents, read_token_trace_info
from tierstore.offline.documents import DOCUMENT_TOKENS_MAX
from tierstore.offline.profile import trace_paths
from tierstore.process.progress import OnProgress
from tierstore.spec import TableSpec
from tierstore.training.base import base_bytes_of, check_trainable
from tierstore.training.disk_probe import probe_disk
from tierstore.training.optimizers import Optimizer
from tierstore.units import parse_bytes

from .hash_spec import HashSpec

COMMIT_STEPS = 100


def plan_training(
    store_path: str | os.PathLike[str],
    traces: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    optimizer: Optimizer,
    dram: int | str,
    batch_tokens: int,
    *,
    commit_steps: int = COMMIT_STEPS,
    probe: bool = True,
    on_progress: OnProgress | None = None,
) -> TrainingEstimate:
    """Says what training on traces would need; also `engram_adapter.plan_training`.

    Blocks: some seconds a million tokens, and five for the probe. Takes 4 bytes of memory for each row of a table, at
    most 256 MiB a table.

    Args:
        store_path: The store that would be trained; it is not changed.
        traces: Files of tokens, as `tierstore trace` writes them.
        optimizer: Its state is part of every record.
        dram: What `open_training` would get.
        batch_tokens: Of a step.
        commit_steps: Steps between two commits.
        probe: Measure the store's disk; else there are no tokens a second.
        on_progress: Called with (tokens done, tokens in all), in the calling thread.

    Raises:
        BudgetError: The index of touched rows and a few records do not fit in `dram`, or the log not on the disk.
        ConfigError: A table's codec cannot be trained, or the store holds plain tables.
        ValueError: batch_tokens or commit_steps below 1, or ids outside the vocabulary.
    """
    if batch_tokens < 1 or commit_steps < 1:
        raise ValueError(f"batch_tokens {batch_tokens}, commit_steps {commit_steps}: both must be at least 1")
    budget_bytes = parse_bytes(dram, "dram")
    image = read_catalog(store_path, may_be_initial=True)
    for table in image.tables.values():
        check_trainable(table.spec)
    hash_spec = HashSpec.from_catalog(image)
    paths = trace_paths(traces)
    total = sum(read_token_trace_info(path).num_tokens for path in paths)
    if not total:
        raise ConfigError(f"{', '.join(map(str, paths))}: the trace holds no tokens; there is nothing to plan for")
    counters = {name: TrafficCounter(table.spec.num_rows) for name, table in image.tables.items()}
    documents = (ids for path in paths for ids in read_token_documents(path, DOCUMENT_TOKENS_MAX))
    done = 0
    for step in _steps(documents, batch_tokens, hash_spec.history_tokens):
        for name, counter in counters.items():
            _count(counter, hash_spec, image.tables[name].public_spec, step)
        done += sum(len(ids) - start for ids, start in step)
        if on_progress:
            on_progress(done, total)
    traffics = {name: counter.traffic() for name, counter in counters.items()}
    touched = {name: traffic.touched_rows for name, traffic in traffics.items()}
    spec = max((table.spec for table in image.tables.values()), key=lambda each: each.dim)
    return estimate_training(
        traffics,
        _needs(image, optimizer, touched, budget_bytes),
        num_tokens=total,
        batch_tokens=batch_tokens,
        commit_steps=commit_steps,
        free_bytes=shutil.disk_usage(Path(store_path)).free,
        disk=probe_disk(store_path, spec.dim, optimizer.state_floats(spec.dim)) if probe else None,
    )


def _steps(
    documents: Iterable[np.ndarray], batch_tokens: int, history_tokens: int
) -> Iterator[list[tuple[np.ndarray, int]]]:
    """Yields steps of `batch_tokens` tokens, the last one of what is left: pieces of documents, int32 [P + T] each,
    with how many tokens P of it are only what its first tokens look back at."""
    step: list[tuple[np.ndarray, int]] = []
    room = batch_tokens
    for ids in documents:
        start = 0
        while start < len(ids):
            end = min(len(ids), start + room)
            past = max(0, start - history_tokens)
            step.append((ids[past:end], start - past))
            room -= end - start
            start = end
            if room == 0:
                yield step
                step, room = [], batch_tokens
    if step:
        yield step


def _count(counter: TrafficCounter, hash_spec: HashSpec, spec: TableSpec, step: list[tuple[np.ndarray, int]]) -> None:
    """Counts a step's rows; of a slice, those that it holds."""
    pieces = [hash_spec.row_ids(ids[None], spec.name)[0, start:] for ids, start in step]
    row_ids, rows_per_key = np.concatenate(pieces), hash_spec.heads
    if spec.is_slice:
        is_held = (row_ids >= spec.row_start) & (row_ids < spec.row_end)
        if spec.orders:  # whole columns
            held, rows_per_key = np.isin(hash_spec.offsets(spec.name), spec.offsets), spec.rows_per_key
            row_ids = np.where(is_held, row_ids - spec.row_start, -1)[:, held]
        else:
            row_ids, rows_per_key = row_ids[is_held] - spec.row_start, 1
    by_key = row_ids.reshape(-1, rows_per_key)
    distinct, *_ = kernels.distinct_rows(np.ascontiguousarray(row_ids).reshape(-1), spec.own_rows)
    counter.add_step(distinct, by_key[by_key[:, 0] >= 0])


def _needs(
    image: CatalogImage, optimizer: Optimizer, touched: dict[str, int], budget_bytes: int
) -> dict[str, TableNeeds]:
    """Returns what each table's records take, and how many fit beside the index of all touched rows."""
    shapes, layouts = {}, {}
    for name, table in image.tables.items():
        spec = table.spec
        layouts[name] = RunLayout(name, spec.dim, optimizer.state_floats(spec.dim), table.seed)
        places = kernels.RowPlaces(spec.num_rows)
        shapes[name] = RecordShape(
            num_rows=spec.num_rows,
            dim=spec.dim,
            record_bytes=layouts[name].record_bytes,
            index_bytes=places.num_bytes_with(touched[name]),
            index_bytes_max=places.num_bytes_with(spec.num_rows),
        )
    base_bytes = base_bytes_of(image, budget_bytes)
    plan = divide_training(shapes, budget_bytes, base_bytes)
    return {
        name: TableNeeds(layouts[name].stored_bytes, memory.num_slots, shapes[name].index_bytes, image.is_initial)
        for name, memory in plan.tables.items()
    }
