"""A store that is open for training: its tables, and what concerns all of them at once.

Input: row ids to prefetch, steps to commit. Output: tickets; commits. Errors: `StoreNotReadyError` once it is closed
or broken: a step or a write that failed in the middle leaves it so, and it says why, until it is opened again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .table import TrainingTable
from .ticket import TrainingTicket


class Training:
    """A store that is open for training. `tables` maps names to `TrainingTable`s, and `training[name]` is the same.

    Close it, or use `with`. One thread takes steps (gather, apply, commit); any thread may prefetch and wait for
    tickets. It is of one process: a forked child cannot use it.
    """

    @property
    def tables(self) -> Mapping[str, TrainingTable]:
        """The tables by name, in the catalog's order."""
        raise NotImplementedError

    def __getitem__(self, name: str) -> TrainingTable:
        raise NotImplementedError

    @property
    def path(self) -> str:
        """The store's folder."""
        raise NotImplementedError

    @property
    def is_broken(self) -> bool:
        """Whether a step or a write failed half-way: every call but `close` raises then. Open it again."""
        raise NotImplementedError

    @property
    def commits(self) -> Sequence[Any]:
        """The commits that the store keeps, `Commit(number, step, payload, ...)`, oldest first. Reads the catalog."""
        raise NotImplementedError

    @property
    def at(self) -> int:
        """The number of the newest commit of this training, 0 before the first."""
        raise NotImplementedError

    def prefetch(self, requests: Mapping[str, np.ndarray]) -> TrainingTicket:
        """Starts to bring rows into DRAM, by table name: int64 [...] row ids; -1 is skipped. Returns a ticket.

        A hint: results do not depend on it. Rows that find no room are read when they are gathered. `gather` waits for
        a prefetch of its rows that is under way. Blocks only for a copy of the ids.
        """
        raise NotImplementedError

    def commit(self, step: int, payload: bytes = b"") -> TrainingTicket:
        """Makes all tables, as they are now, durable, while training goes on. Returns a ticket; `wait` for it.

        Args:
            step: The caller's own step, kept with the commit.
            payload: The caller's bytes, kept with the commit: at most 1 MiB.

        Returns:
            A ticket whose `wait` returns the `Commit` once it is durable. It blocks for a commit that is under way.

        Raises:
            BudgetError: The disk has too little room; training goes on.
        """
        raise NotImplementedError

    def pin(self, number: int) -> None:
        """Keeps a commit until it is unpinned; else the newest two are kept. Blocks on the catalog."""
        raise NotImplementedError

    def unpin(self, number: int) -> None:
        """Takes back `pin`. Blocks on the catalog."""
        raise NotImplementedError

    def publish(self) -> int:
        """Publishes the newest commit to readers, as a version of the store; returns its number. Blocks."""
        raise NotImplementedError

    def rollback(self, number: int) -> None:
        """Goes back to a commit; drops all that came later, also what was not committed. Blocks as opening does."""
        raise NotImplementedError

    def stats(self) -> dict[str, Any]:
        """Returns counters of all tables, and how memory is used."""
        raise NotImplementedError

    def close(self) -> None:
        """Waits for a commit under way, drops what was not committed, and gives all memory back. Twice is harmless."""
        raise NotImplementedError

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
