"""Lookups of a table whose slices lie in the stores of ranks that run in lock-step, as those of one engine do.

Input: each rank's own keys, or row ids, of any number. Output: their rows, from whichever rank holds them. Errors:
`RankError` if a rank did not come, is elsewhere in its code, or could not answer (its own error says why);
`StoreNotReadyError` if ranks go on answering from different versions. On every rank, or on none.

A lookup is three exchanges, each of all ranks: who wants how much; what it wants; the answers. What a few tokens want
goes along with the first. A prefetch makes the first two and starts the reads; its forward makes the third. Each answer
begins with a header that says which version of the store it is of, so rows of two versions are never mixed: all ranks
see the same headers, and ask again together.
Shapes: W ranks, M items (see `lockstep_forms`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from tierstore.errors import ConfigError
from tierstore.spec import TableSpec

from .exchange import Ranks
from .lockstep_forms import Form, KeyForm, RowForm, Wanted
from .lockstep_header import (
    FAILED,
    FINE,
    OTHER_IDS,
    Answered,
    agree,
    answered,
    failed,
    of_versions,
    read_headers,
    write_headers,
)
from .lookup_call import WAIT_S
from .rank_agreement import refuse_failed
from .slice_map import SliceMap

if TYPE_CHECKING:
    from tierstore import Store, Table, Ticket

PREFETCHES_MAX = 8  # of one table; the oldest is dropped beyond it, on all ranks alike
SHORT_MAX = 56  # numbers of a message that goes along with the counts, as those of a few tokens do
_LEADING = 3  # numbers before it: the message's length, that of the rank's longest, and whether the rank failed
VERSION_TRIES_MAX = 16
_NO_IDS = np.empty(0, dtype=np.int64)
VERSION_PAUSE_S, VERSION_PAUSE_MAX_S = 0.001, 0.5  # doubled from try to try: about 4 s in all


@dataclass(frozen=True)
class Asked:
    """A lookup whose questions have been exchanged, and whose reads have been started.

    Attributes:
        ids: This rank's, as they were asked for.
        wanted: What it wants of each rank.
        messages: What each rank wants of it.
        out: Its answers to all ranks, uint8 [M, item bytes].
        ticket: Of the reads, which write to `out`; None if they could not be started.
        version: Of the store when they were started.
        error: Why not.
    """

    ids: np.ndarray
    wanted: Wanted
    messages: list[np.ndarray]
    out: np.ndarray
    ticket: Ticket | None
    version: int
    error: Exception | None = None


class LockStep:
    """One table's lookups over ranks. All ranks call the same methods in the same order, one thread at a time."""

    def __init__(self, ranks: Ranks, store: Store, table: Table, by_key: bool = True) -> None:
        """Learns what slice each rank has. Blocks until all are here.

        by_key: whether keys are asked for, if all slices begin and end at heads; else rows are, by row id.

        Raises:
            ConfigError: The slices are not one table's, overlap, or leave rows out; keys of a store reached by gRPC.
            RankError: A rank did not come.
        """
        self.ranks, self._store, self._table = ranks, store, table
        self._what = f"table {table.spec.name}"
        found = ranks.gather_objects(f"slices of {self._what}", [table.spec.to_dict(), "server" in store.stats()])
        self.slices = SliceMap.of([TableSpec.from_dict(record) for record, _ in found])
        of = KeyForm if by_key and self.slices.by_key else RowForm
        if of is KeyForm and (remote := [rank for rank, (_, is_remote) in enumerate(found) if is_remote]):
            raise ConfigError(
                f"{self._what}: the store of rank {remote[0]} is reached by gRPC, which has no lookups of single keys; "
                f"open the slice in the rank, or attach to the daemon of its host"
            )
        self._form: Form = of(self.slices, ranks.rank)
        self._order = [*(rank for rank in range(ranks.size) if rank != ranks.rank), ranks.rank]  # of answers in memory
        self._prefetched: deque[Asked] = deque()
        self._spare: list[np.ndarray] = []  # buffers to use again: fresh memory costs as much as what is copied into it

    @property
    def by_key(self) -> bool:
        """Whether `look_up` takes keys of the whole table; else row ids."""
        return isinstance(self._form, KeyForm)

    def __deepcopy__(self, memo: Any) -> LockStep:
        return self  # a model's copy asks the same ranks

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"an embedding over the ranks of a process group, of {self._what}, cannot be pickled: make it on each rank"
        )

    def prefetch(self, make_ids: Callable[[], np.ndarray]) -> None:
        """Starts the reads of a lookup that a later `look_up` takes, the oldest first. Blocks on two small exchanges.

        make_ids: as of `look_up`. Raises as it does, but for what reading raises.
        """
        asked = self._ask("prefetch", make_ids)
        self._prefetched.append(asked)
        while len(self._prefetched) > PREFETCHES_MAX:
            self._prefetched.popleft()

    def look_up(self, make_ids: Callable[[], np.ndarray], out: np.ndarray | None = None) -> np.ndarray:
        """Returns the rows of this rank's ids, uint8 [N, heads, R], or of row ids [..., R]. Blocks on all ranks' reads.

        If a prefetch is open, its oldest is taken; if it was of other ids on any rank, all ranks ask anew.

        Args:
            make_ids: Returns keys of the whole table, int64 [N, O], or row ids, int64 [...]. What it raises comes out
                of this rank's call; the others get a `RankError`.
            out: Contiguous, of the rows' shape, filled and returned; None: a new array.

        Raises:
            RankError: A rank did not come, or could not answer.
            StoreNotReadyError: Ranks go on answering from different versions. All else: as the store's lookups.
        """
        if not self._prefetched:
            rows = self._finish(self._ask("forward", make_ids), out, begins=False)
        else:
            asked = self._prefetched.popleft()
            status, ids = FINE, asked.ids
            try:
                ids = make_ids()
                same = ids.shape == asked.ids.shape and bool((ids == asked.ids).all())
                status = FINE if same else OTHER_IDS
            except Exception as error:  # the others wait: they must hear of it
                asked = replace(asked, error=error)
            rows = self._finish(asked, out, status)
            if rows is None:
                rows = self._finish(self._ask("forward", lambda: ids), out, begins=False)
        assert rows is not None, "only a prefetch can be of other ids"
        return rows

    def _ask(self, doing: str, make_ids: Callable[[], np.ndarray]) -> Asked:
        """Exchanges what all ranks want, and starts the reads that answer it."""
        what, ranks = f"{doing} of {self._what}", self.ranks
        error, ids, wanted = None, _NO_IDS, Wanted([_NO_IDS] * ranks.size, [0] * ranks.size, [])
        try:
            ids = make_ids()
            wanted = self._form.wanted(ids)
        except Exception as raised:  # the others wait: they must hear of it
            error = raised
        lengths = list(map(len, wanted.messages))
        numbers = np.zeros((ranks.size, _LEADING + SHORT_MAX), dtype=np.int64)
        numbers[:, 0], numbers[:, 1], numbers[:, 2] = lengths, max(lengths), error is not None
        if max(lengths) <= SHORT_MAX:
            for row, message in zip(numbers, wanted.messages, strict=True):
                row[_LEADING : _LEADING + len(message)] = message
        came = ranks.counts(what, numbers)
        refuse_failed(ranks, what, came[:, 2] != 0, error)
        sizes = came[:, 0].tolist()
        if came[:, 1].max() <= SHORT_MAX:  # all ranks see this alike: nobody has more to send
            return self._started(
                ids, wanted, [row[_LEADING : _LEADING + size] for row, size in zip(came, sizes, strict=True)]
            )
        sent = torch.from_numpy(np.concatenate(wanted.messages))
        messages = ranks.all_to_all(what, sent, lengths, sizes).numpy()
        return self._started(ids, wanted, np.split(messages, np.cumsum(sizes)[:-1]))

    def _started(self, ids: np.ndarray, wanted: Wanted, messages: list[np.ndarray]) -> Asked:
        """Starts the reads for all ranks. What fails goes to them with the answers."""
        form, own = self._form, self.ranks.rank
        num_bytes = sum(form.answer_bytes(form.items_of(message), own) for message in messages)
        out = self._buffer(num_bytes).reshape(-1, form.item_bytes[own])
        version = self._store.version
        try:
            ticket = form.submit(self._table, [messages[rank] for rank in self._order], out)
        except Exception as error:
            return Asked(ids, wanted, messages, out, None, version, error)
        return Asked(ids, wanted, messages, out, ticket, version)

    def _finish(
        self, asked: Asked, out: np.ndarray | None, status: int = FINE, *, begins: bool = True
    ) -> np.ndarray | None:
        """Exchanges the answers; returns the rows, or None if some rank's forward is of other ids.

        begins: whether this begins a call, in which all ranks must be.
        """
        what = f"forward of {self._what}{', prefetched' if begins else ''}"
        pause_s, ticket = VERSION_PAUSE_S, asked.ticket
        if begins:
            self.ranks.counts(what, np.zeros((self.ranks.size, 0), dtype=np.int64))
        for _ in range(VERSION_TRIES_MAX):
            own = failed(asked.error) if asked.error is not None else self._answered(asked, ticket, status)
            answers, headers = self._exchanged(what, asked, own.header)
            refuse_failed(self.ranks, what, headers["status"] == FAILED, own.error)
            if (headers["status"] == OTHER_IDS).any():
                return None
            if agree(headers):
                rows = _checked(out, self._form.rows_shape(asked.ids))
                self._form.put(asked.wanted, answers, rows)
                for used in (asked.out, answers[self._order[0]]):
                    memory = used if used.base is None else used.base
                    if all(memory is not spare for spare in self._spare):
                        self._spare.append(memory)
                return rows
            ticket = None  # asked again, of whatever version answers then
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, VERSION_PAUSE_MAX_S)
        raise of_versions(what, headers, VERSION_TRIES_MAX)

    def _answered(self, asked: Asked, ticket: Ticket | None, status: int) -> Answered:
        """Waits for this rank's answers; has them looked up anew if another version answers than when they began."""
        begun = [ticket] if ticket is not None and asked.version == self._store.version else []

        def answer() -> None:
            started = (
                begun.pop()
                if begun
                else self._form.submit(self._table, [asked.messages[rank] for rank in self._order], asked.out)
            )
            started.wait(WAIT_S)

        return answered(self._store, answer, self._what, status)

    def _exchanged(self, what: str, asked: Asked, header: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Sends this rank's answers with their header; returns those of each rank, uint8 [bytes], and their headers."""
        form, own = self._form, self.ranks.rank
        given = asked.out.reshape(-1)
        send = [form.answer_bytes(form.items_of(message), own) for message in asked.messages]
        receive = [form.answer_bytes(count, rank) for rank, count in enumerate(asked.wanted.num_items)]
        write_headers(header, given, [send[rank] for rank in self._order])
        num_kept, send[own], receive[own] = send[own], 0, 0  # its own answers stay where they are, behind the others'
        sent, kept = np.split(given, [len(given) - num_kept])
        came = self._buffer(sum(receive))
        self.ranks.all_to_all(what, torch.from_numpy(sent), send, receive, torch.from_numpy(came))
        answers = np.split(came, np.cumsum(receive)[:-1])
        answers[own] = kept
        return answers, read_headers(answers)

    def _buffer(self, num_bytes: int) -> np.ndarray:
        """Returns uint8 [num_bytes]: a spare buffer if one is large enough."""
        for index, spare in enumerate(self._spare):
            if len(spare) >= num_bytes:
                return self._spare.pop(index)[:num_bytes]
        self._spare.clear()
        return np.empty(num_bytes, dtype=np.uint8)


def _checked(out: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """Returns where rows go; raises `ValueError` for an `out` that they do not fit."""
    if out is None:
        return np.empty(shape, dtype=np.uint8)
    if out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise ValueError(f"out is {out.dtype} {list(out.shape)}, must be contiguous uint8 {list(shape)}")
    return out
