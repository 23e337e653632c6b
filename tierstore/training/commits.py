"""Commits: durable points of a training, published by one catalog transaction each.

Input: runs that were written, and what the training knows of itself. Output: a `Commit` that the catalog has; pins,
and commits that are gone. Errors: `ConfigError` for commits that are pinned or not there; `BudgetError` for a disk
without room.

Commits are independent of each other: each lists all its runs, oldest first, and the later run has the newer record.
The newest two and all pinned ones are kept; a run goes when no kept commit lists it. What comes first is durable before
what comes next begins: contents, names, the transaction that lists them, the removal of what it no longer lists.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..causes import naming
from ..durable import sync_folder
from ..errors import BudgetError, ConfigError
from ..formats.catalog_records import CATALOG_FILE, as_json, changing, write_records
from ..formats.rates import write_rates
from ..formats.run import TRAINING_FOLDER, Run, number_of_file
from ..formats.training_records import (
    KEPT_COMMITS,
    PAYLOAD_BYTES_MAX,
    TRAINING_KEY,
    commit_records,
    keys_of_commits,
    pin_key,
)
from ..formats.training_records import Commit as Commit
from ..formats.training_records import TrainingRecords as TrainingRecords
from ..formats.training_records import read_training as read_training
from ..units import format_bytes
from .run_writer import KEPT, RunWriter

SPARE_DISK_BYTES = 16 << 20  # left free beside a commit: the catalog's transaction, the file system's own

logger = logging.getLogger("tierstore")


def create_training(store: Path, training: Mapping[str, Any]) -> TrainingRecords:
    """Notes what a training is, before its first commit, and makes its folder. The caller is the writer.

    training: JSON-able; `layouts` has `RunLayout.to_dict()` by table.
    """
    with naming(store / TRAINING_FOLDER, writing=True):
        (store / TRAINING_FOLDER).mkdir(exist_ok=True)
        sync_folder(store)
    with _changing(store):
        if read_training(store) is not None:
            raise ConfigError(f"{store} has a training already; open it, or go back to its base: at=0")
        records = TrainingRecords(store, training, {}, frozenset(), None, 0, _last_number_on_disk(store))
        write_records(store / CATALOG_FILE, {TRAINING_KEY: as_json(training)} | records.numbers_record())
    return records


def change_training(store: Path, training: Mapping[str, Any]) -> None:
    """Notes another optimizer, and its layouts. The caller is the writer; no commit of another layout is kept."""
    with _changing(store):
        write_records(store / CATALOG_FILE, {TRAINING_KEY: as_json(training)})


def read_commits(store: Path) -> dict[int, Commit]:
    """Returns the kept commits, by number. Safe beside a writer."""
    records = read_training(store)
    return {} if records is None else dict(records.commits)


def records_with(store: Path, number: int) -> TrainingRecords:
    """Returns what the catalog says; raises `ConfigError` if commit `number`, 0: the base, is not there."""
    records = _records(store)
    if number:
        records.commit(number)
    return records


def checked_commit(step: int, payload: bytes) -> int:
    """Returns a commit's step as an int; raises `ConfigError` or `TypeError` for what no commit can have."""
    step = operator.index(step)
    if step < 0:
        raise ConfigError(f"step: {step}; a commit's step is 0 or more")
    if not isinstance(payload, bytes | bytearray | memoryview):
        raise TypeError(f"payload: a {type(payload).__name__}, must be bytes; encode it")
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise ConfigError(f"payload: {len(payload)} bytes, at most {PAYLOAD_BYTES_MAX}; keep it in a file of yours")
    return step


def check_room(store: Path, needed_bytes: int) -> None:
    """Raises `BudgetError`, with both numbers, if the store's disk has no room for a commit of so many bytes."""
    free, needed = shutil.disk_usage(store).free, needed_bytes + SPARE_DISK_BYTES
    if free < needed:
        raise BudgetError(
            f"{store}: the commit needs {format_bytes(needed)} ({needed} bytes), {format_bytes(free)} ({free} bytes) "
            f"are free on its disk; free some, then commit again; {KEPT}"
        )


def publish_commit(
    store: Path,
    *,
    step: int,
    payload: bytes,
    runs: Mapping[str, Sequence[Run]],
    unnamed: Sequence[RunWriter],
    optimizer: Mapping[str, Any],
    rates: Mapping[str, np.ndarray] | None = None,
) -> Commit:
    """Makes runs durable and publishes the commit that lists them. Blocks on the disk; the caller is the writer.

    Syncs and names `unnamed`, syncs the folder, then one transaction adds the commit and forgets those that are not
    kept; then files that no kept commit lists any more are removed. If it raises, the commit is not published, and
    earlier ones are as they were; what was named goes with the writer's end.

    Args:
        step: The training's.
        payload: At most PAYLOAD_BYTES_MAX.
        runs: By table, oldest first, all of them.
        unnamed: Finished writers of those that have not their names yet.
        optimizer: JSON-able.
        rates: Learning rates of all steps, float64 by table.
    """
    step = checked_commit(step, payload)
    for writer in unnamed:
        writer.sync()
    for writer in unnamed:
        writer.rename()
    before = _records(store)
    number = before.last_commit + 1
    written = write_rates(store, number, rates) if rates is not None else None
    with naming(store / TRAINING_FOLDER, writing=True, note=KEPT):
        sync_folder(store / TRAINING_FOLDER)
    listed = {table: tuple(of) for table, of in runs.items()}
    commit = Commit(number, step, bytes(payload), listed, optimizer, written, time.time(), "").sealed()
    newest_run = max((run.number for of in listed.values() for run in of), default=0)
    for writer in unnamed:
        writer.keep()  # before it can be listed
    with _changing(store):
        before = _records(store)
        after = replace(
            before,
            commits={**before.commits, number: commit},
            current=number,
            last_commit=number,
            last_run=max(before.last_run, newest_run),
        )
        dropped = after.unkept(KEPT_COMMITS)
        after = _without(after, dropped)
        write_records(
            store / CATALOG_FILE, commit_records(commit) | after.numbers_record(), removed=keys_of_commits(dropped)
        )
    _remove(store, before.files - after.files)
    return commit


def pin(store: Path, number: int) -> None:
    """Keeps a commit until `unpin`. Any process may call. Raises `ConfigError` if it is not there."""
    with _changing(store):
        _records(store).commit(number)
        write_records(store / CATALOG_FILE, {pin_key(number): b"{}"})


def unpin(store: Path, number: int) -> bool:
    """Ends a pin; returns whether there was one. Any process may call.

    The commit goes with the next commit unless it is one of the newest two. Raises `ConfigError` if it is not there.
    """
    with _changing(store):
        records = _records(store)
        records.commit(number)
        write_records(store / CATALOG_FILE, {}, removed=[pin_key(number)])
        return number in records.pins


def forget_commit(store: Path, number: int) -> None:
    """Forgets a commit, and removes runs that no other lists. The caller is the writer.

    Raises `ConfigError` if it is pinned, is the one that a training opens at, or is not there.
    """
    with _changing(store):
        before = _records(store)
        before.commit(number)
        if number in before.pins:
            raise ConfigError(
                f"{store}: commit {number} is pinned; unpin it first: tierstore commits {store} --unpin {number}"
            )
        if number == before.current:
            raise ConfigError(f"{store}: commit {number} is the one that a training opens at; go back to another first")
        after = _without(before, [number])
        write_records(store / CATALOG_FILE, after.numbers_record(), removed=keys_of_commits([number]))
    _remove(store, before.files - after.files)


def go_back(store: Path, number: int) -> TrainingRecords:
    """Makes `number` the current commit, 0: the base, and forgets later ones that are not pinned.

    The caller is the writer. Raises `ConfigError` if the commit is not there. Numbers are not given again.
    """
    with _changing(store):
        before = records_with(store, number)
        dropped = [each for each in before.commits if each > number and each not in before.pins]
        after = replace(_without(before, dropped), current=number or None)
        if after != before:
            write_records(store / CATALOG_FILE, after.numbers_record(), removed=keys_of_commits(dropped))
    _remove(store, before.files - after.files)
    return after


def remove_unnamed(store: Path) -> list[str]:
    """Removes files of the training folder that no kept commit names; returns their names. The caller is the writer.

    Their numbers are noted first, so that they are not given again.
    """
    folder = store / TRAINING_FOLDER
    if not folder.is_dir():
        return []
    records = read_training(store)
    named = records.files if records else frozenset()
    numbers = {name: number_of_file(name) for name in sorted(os.listdir(folder))}
    unnamed = [name for name, of in numbers.items() if of is not None and f"{TRAINING_FOLDER}/{name}" not in named]
    last = max((numbers[name] or 0 for name in unnamed), default=0)
    if records is not None and last > records.last_run:
        with _changing(store):
            write_records(store / CATALOG_FILE, replace(_records(store), last_run=last).numbers_record())
    _remove(store, (f"{TRAINING_FOLDER}/{name}" for name in unnamed))
    return unnamed


@contextlib.contextmanager
def _changing(store: Path) -> Iterator[None]:
    """`changing`, and the cause of what the system refuses meanwhile."""
    file = store / CATALOG_FILE
    with naming(file, file, writing=True, note=KEPT), changing(store):
        yield


def _records(store: Path) -> TrainingRecords:
    records = read_training(store)
    if records is None:
        raise ConfigError(f"{store} has no training; begin one: tierstore.open_training({str(store)!r}, optimizer=...)")
    return records


def _without(records: TrainingRecords, numbers: Sequence[int]) -> TrainingRecords:
    commits = {number: commit for number, commit in records.commits.items() if number not in numbers}
    return replace(records, commits=commits, pins=records.pins - set(numbers))


def _last_number_on_disk(store: Path) -> int:
    return max((number_of_file(name) or 0 for name in os.listdir(store / TRAINING_FOLDER)), default=0)


def _remove(store: Path, files: Iterable[str]) -> None:
    """Removes files that nothing names. What cannot be removed is logged, and tried again by the next writer."""
    for file in files:
        try:
            (store / file).unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s is not needed any more and cannot be removed: %s", store / file, error)
