"""A store that is open for training: its tables, and what concerns all of them at once.

Input: row ids to prefetch, steps to commit. Output: tickets; commits. Errors: `StoreNotReadyError` once it is closed
or broken: a step or a write that failed in the middle leaves it so, and it says why, until it is opened again.
"""

from __future__ import annotations

import atexit
import operator
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from ..store.arguments import checked_ids
from .commits import Commit, check_room, checked_commit, go_back, pin, read_commits, records_with, unpin
from .health import Health
from .opened import OpenedTraining
from .optimizers import Optimizer
from .owned import Owned
from .publish import publish
from .table import TrainingTable
from .ticket import TrainingTicket
from .writer import CommitRequest, Writer

_open_trainings: weakref.WeakSet[Training] = weakref.WeakSet()


class Training:
    """A store that is open for training. `tables` maps names to `TrainingTable`s, and `training[name]` is the same.

    Close it, or use `with`. One thread takes steps (gather, apply, commit); any thread may prefetch and wait for
    tickets. It is of one process: a forked child cannot use it.
    """

    def __init__(self, opened: OpenedTraining, owned: Owned, health: Health, commit: Commit | None) -> None:
        """`open_training` is the way in. owned: what is closed with it, its threads first."""
        self._opened, self._owned, self._health = opened, owned, health
        self._at = 0 if commit is None else commit.number
        self._changes_committed = 0
        self._last_ticket: TrainingTicket | None = None
        _open_trainings.add(self)
        owned.hand_over()

    def __repr__(self) -> str:
        return f"<tierstore.Training {self.path}: {len(self.tables)} tables, at commit {self.at}>"

    @property
    def tables(self) -> Mapping[str, TrainingTable]:
        """The tables by name, in the catalog's order."""
        return MappingProxyType(self._opened.tables)

    def __getitem__(self, name: str) -> TrainingTable:
        try:
            return self._opened.tables[name]
        except KeyError:
            raise KeyError(f"{self.path} has no table {name!r}; it has {', '.join(self._opened.tables)}") from None

    def attachment(self, name: str) -> bytes:
        """Returns a record that the adapter put in the catalog; raises `KeyError` if there is not one."""
        return self._opened.attachments[name]

    @property
    def path(self) -> str:
        """The store's folder."""
        return str(self._opened.store)

    @property
    def optimizer(self) -> Optimizer:
        """The rule and its numbers; its lr is the rate of steps that are given none."""
        return self._opened.optimizer

    @property
    def is_broken(self) -> bool:
        """Whether a step or a write failed half-way: every call but `close` raises then. Open it again."""
        return self._health.broken is not None

    def mark_broken(self, reason: str) -> None:
        """Refuses all that follows: for a caller whose step was interrupted between two tables."""
        self._health.mark_broken(reason)

    @property
    def commits(self) -> Sequence[Commit]:
        """The commits that the store keeps, oldest first. Reads the catalog."""
        return [commit for _, commit in sorted(read_commits(self._opened.store).items())]

    @property
    def at(self) -> int:
        """The number of the newest commit of this training, 0 before the first."""
        ticket = self._last_ticket
        if ticket is not None and ticket.done() and not self.is_broken:
            return int(ticket.wait().number)
        return self._at

    @property
    def has_changes(self) -> bool:
        """Whether a step was taken since the newest commit was asked for, or since opening or rolling back."""
        return self._opened.parts.num_changes != self._changes_committed

    def prefetch(self, requests: Mapping[str, np.ndarray]) -> TrainingTicket:
        """Starts to bring rows into DRAM, by table name: int64 [...] row ids; -1 is skipped. Returns a ticket.

        A hint: results do not depend on it. Rows that find no room are read when they are gathered. `gather` waits for
        a prefetch of its rows that is under way. Blocks only for a copy of the ids.
        """
        self._health.check()
        return self._opened.prefetches.add({name: _local_copy(self[name], ids) for name, ids in requests.items()})

    def commit(self, step: int, payload: bytes = b"", together: str | None = None) -> TrainingTicket:
        """Makes all tables, as they are now, durable, while training goes on. Returns a ticket; `wait` for it.

        The ticket's `wait` returns the `Commit` once it is durable. Blocks for a commit that is under way.

        Args:
            step: The caller's own step, kept with the commit.
            payload: The caller's bytes, kept with the commit: at most 1 MiB.
            together: Of slices that ranks commit together: a text that no other commit has, the same on all of them.

        Raises:
            BudgetError: The disk has too little room; training goes on.
            ConfigError, TypeError: A step below 0, a payload that is too long or not bytes.
        """
        step = checked_commit(step, payload)
        self.prepare_commit()
        with self._opened.parts.lock:
            self._health.check()
            opened, writer = self._opened, self._opened.writer
            assert writer is not None, "it is started until it is closed"
            ticket = TrainingTicket(f"a commit of {self.path}")
            numbers = opened.numbers() if together is None else opened.numbers() | {"together": together}
            request = CommitRequest(step, bytes(payload), numbers, opened.rates(), ticket)
            self._freeze(writer, request)
            self._changes_committed = opened.parts.num_changes
        return ticket

    def prepare_commit(self) -> None:
        """Waits for a commit under way. Raises `BudgetError` if the disk has no room for another one."""
        self._health.check()
        if self._last_ticket is not None:
            self._at = int(self._last_ticket.wait().number)
        check_room(self._opened.store, self._opened.dirty_file_bytes())

    def _freeze(self, writer: Writer, request: CommitRequest) -> None:
        """Freezes all tables for a commit, and has it written: all of it, or nothing."""
        before = self._last_ticket
        try:
            self._last_ticket = request.ticket
            for rows in self._opened.rows.values():
                rows.cache.freeze()
            writer.commit(request)
        except BaseException:
            if request.claim():  # the writer has not begun: it will not
                for rows in self._opened.rows.values():
                    rows.cache.thaw()
                self._last_ticket = before
            raise

    def pin(self, number: int) -> None:
        """Keeps a commit until it is unpinned; else the newest two are kept. Blocks on the catalog."""
        pin(self._opened.store, number)

    def unpin(self, number: int) -> None:
        """Takes back `pin`. Blocks on the catalog."""
        unpin(self._opened.store, number)

    def publish(self) -> int:
        """Publishes the newest commit to readers, as a version of the store; returns its number. Blocks.

        Waits for a commit that is under way. If no row differs from the newest version's, that is the one. Raises
        `ConfigError` if nothing was committed, or another process publishes.
        """
        self._health.check()
        if self._last_ticket is not None:
            self._last_ticket.wait()
        return publish(self.path).version

    def rollback(self, number: int) -> None:
        """Goes back to a commit, 0 for the store as it was built; drops all that came later, also what was not
        committed. Blocks as opening does.

        Raises:
            ConfigError: The store does not keep that commit; all is as before. After any other error the training is
                broken, and nothing that was committed is dropped.
        """
        number, opened = operator.index(number), self._opened
        self._health.check()
        if self._last_ticket is not None:
            self._last_ticket.wait()
        with opened.parts.lock:
            self._health.check()
            if number == self.at and not self.has_changes:
                return
            records = records_with(opened.store, number)
            try:
                opened.go_to(records.commits.get(number), records.last_run)
                go_back(opened.store, number)
                self._last_ticket, self._at, self._changes_committed = None, number, opened.parts.num_changes
            except BaseException as error:
                self._health.mark_broken(f"going back to commit {number} failed: {error!r}")
                raise

    def stats(self) -> dict[str, Any]:
        """Returns counters of all tables, and how memory is used."""
        ticket = self._last_ticket
        return {**self._opened.stats(), "commit_under_way": ticket is not None and not ticket.done()}

    def close(self) -> None:
        """Waits for a commit under way, drops what was not committed, and gives all memory back. Twice is harmless."""
        if not self._health.is_of_this_process():  # threads, files and lock are the parent's
            return
        self._health.is_closed = True  # whoever takes the lock of steps from now on is refused
        self._owned.close()  # its threads first
        self._opened.drop()

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:  # when this runs, sys may be gone
        if is_finalizing() or not hasattr(self, "_last_ticket") or not self._health.is_of_this_process():
            return
        if self._opened.is_needed_by_this_thread():  # the collector runs anywhere
            threading.Thread(target=self.close, name="tierstore-training-close").start()
        else:
            self.close()


def _local_copy(table: TrainingTable, row_ids: np.ndarray) -> np.ndarray:
    """Returns a copy of row ids, int64 [R], as the table's records count them."""
    return table.local_rows(np.array(checked_ids(row_ids, "row_ids"), dtype=np.int64, copy=True).reshape(-1))


@atexit.register
def _close_all() -> None:
    """Ends the threads, which write to memory that the interpreter frees. One that does not end keeps no other open."""
    failed: BaseException | None = None
    for training in list(_open_trainings):
        try:
            if training._health.is_of_this_process():
                training.close()
        except BaseException as error:
            failed = failed or error
    if failed is not None:
        raise failed
