"""Commits: durable points of a training, published by one catalog transaction each.

Input: runs that were written, and what the training knows of itself. Output: `TrainingRecords`, all that the catalog
says of a training. Errors: `ConfigError` for a second writer, by its process id, and for commits that are pinned or not
there; `BudgetError` for a disk without room.

Commits are independent of each other: each lists all its runs, oldest first, and the later run has the newer record.
The newest two and all pinned ones are kept; a run goes when no kept commit lists it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..formats.run import Run
from .runs import RunWriter


@dataclass(frozen=True)
class Commit:
    """A commit, as the catalog has it.

    Attributes:
        number: Never given twice in a store.
        step: The training's.
        payload: What the caller gave.
        runs: By table, oldest first: the later run has the newer record.
        optimizer: Numbers of the optimizer, JSON-able: steps of each table, and what else the training wants back.
        rates: The file of learning rates, relative to the store; None without one.
        time_s: Seconds since 1970.
        digest: SHA-256, hex, of everything else.
    """

    number: int
    step: int
    payload: bytes
    runs: Mapping[str, tuple[Run, ...]]
    optimizer: Mapping[str, Any]
    rates: str | None
    time_s: float
    digest: str


@dataclass(frozen=True)
class TrainingRecords:
    """All that a catalog says of a training.

    Attributes:
        training: What `create_training` was given: optimizer, layouts, base or initializer.
        commits: The kept ones, by number.
        pins: Numbers of pinned commits.
        current: The commit that a training opens at; None before the first.
        last_commit: The largest number ever given, 0 at first.
        last_run: The same, of runs.
    """

    path: Path
    training: Mapping[str, Any]
    commits: Mapping[int, Commit]
    pins: frozenset[int]
    current: int | None
    last_commit: int
    last_run: int


@contextlib.contextmanager
def writing(store: Path) -> Iterator[None]:
    """Holds the lock of the store's one training writer, and then removes files that no commit names.

    Raises `ConfigError` with the process id of whoever has it.
    """
    raise NotImplementedError
    yield


def create_training(store: Path, training: Mapping[str, Any]) -> TrainingRecords:
    """Notes what a training is, before its first commit. The caller is the writer."""
    raise NotImplementedError


def read_training(store: Path) -> TrainingRecords | None:
    """Reads what the catalog says of a training; None if there is none. Safe beside a writer. Blocks on the disk."""
    raise NotImplementedError


def read_commits(store: Path) -> dict[int, Commit]:
    """Returns the kept commits, by number. Safe beside a writer."""
    raise NotImplementedError


def check_room(store: Path, needed_bytes: int) -> None:
    """Raises `BudgetError`, with both numbers, if the store's disk has no room for a commit of so many bytes."""
    raise NotImplementedError


def publish_commit(
    store: Path,
    *,
    step: int,
    payload: bytes,
    runs: Mapping[str, Sequence[Run]],
    unnamed: Sequence[RunWriter],
    optimizer: Mapping[str, Any],
    rates: str | None = None,
) -> Commit:
    """Makes runs durable and publishes the commit that lists them. Blocks on the disk; the caller is the writer.

    Syncs and names `unnamed`, syncs the folder, then one transaction adds the commit and forgets those that are not
    kept; then files that no kept commit lists any more are removed. If it raises, the commit is not published, and
    earlier ones are as they were.

    Args:
        runs: By table, oldest first, all of them.
        unnamed: Finished writers of those that have not their names yet.
        payload: At most PAYLOAD_BYTES_MAX.
        optimizer: JSON-able.
        rates: What `write_rates` returned.
    """
    raise NotImplementedError


def pin(store: Path, number: int) -> None:
    """Keeps a commit until `unpin`. Any process may call. Raises `ConfigError` if it is not there."""
    raise NotImplementedError


def unpin(store: Path, number: int) -> None:
    """Ends a pin; the next prune forgets the commit unless it is one of the newest two."""
    raise NotImplementedError


def prune(store: Path) -> list[int]:
    """Forgets commits that are neither pinned nor among the newest two, and removes their runs. The caller is the
    writer. Returns their numbers."""
    raise NotImplementedError


def go_back(store: Path, number: int) -> TrainingRecords:
    """Makes `number` the current commit and forgets later ones that are not pinned. The caller is the writer."""
    raise NotImplementedError
