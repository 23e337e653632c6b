"""What ranks ask each other for in a lock-step lookup: entries by key, or rows by row id.

Input: the keys or row ids of a batch. Output: what each rank is asked for, each thing once; the lookups that answer it;
and, once the answers are here, the batch's rows. Nothing here talks to other ranks. Errors: those of lookups.

An item is what is asked for: a key in one of a rank's columns, or a row id. A rank answers each in equally many bytes.
Before the answers for each rank come those of items -1, which are zeros: room for a header.
Shapes: N tokens, O orders, W ranks, C columns of a rank, M items, R bytes of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tierstore import kernels
from tierstore.spec import KEY_MAX
from tierstore.store.arguments import refuse_outside

from .lockstep_header import HEADER_BYTES
from .slice_map import SliceMap

if TYPE_CHECKING:
    from tierstore import Table, Ticket


@dataclass(frozen=True)
class Wanted:
    """What one rank asks for.

    Attributes:
        messages: By rank, int64: what it is sent.
        num_items: By rank: items in its message.
        places: Of each element of the batch, where it lies among distinct items; -1 for none. See the forms.
    """

    messages: list[np.ndarray]
    num_items: list[int]
    places: list[np.ndarray]


class Form(ABC):
    """One way to ask. `item_bytes`, of an answer, and `header_items`, before the answers, are by rank."""

    def __init__(self, slices: SliceMap, rank: int, item_bytes: Sequence[int]) -> None:
        """rank: this process's."""
        self.slices, self.rank = slices, rank
        self.item_bytes = list(item_bytes)
        self.header_items = [-(-HEADER_BYTES // each) for each in item_bytes]

    @abstractmethod
    def wanted(self, ids: np.ndarray) -> Wanted:
        """Returns what a batch asks for: keys [N, O], or row ids [...]."""

    @abstractmethod
    def submit(self, table: Table, messages: Sequence[np.ndarray], out: np.ndarray) -> Ticket:
        """Starts the lookup of what all ranks ask for, by rank, into out, uint8 [M, item bytes], headers included.

        messages are not looked at afterwards.
        """

    @abstractmethod
    def items_of(self, message: np.ndarray) -> int:
        """Returns how many items a message to this rank holds."""

    @abstractmethod
    def rows_shape(self, ids: np.ndarray) -> tuple[int, ...]:
        """Returns the shape of the rows of a batch."""

    @abstractmethod
    def put(self, wanted: Wanted, answers: Sequence[np.ndarray], out: np.ndarray) -> None:
        """Writes the rows of the batch to out, uint8 of `rows_shape`.

        answers: by rank, uint8 [bytes], headers included.
        """

    def answer_bytes(self, num_items: int, rank: int) -> int:
        """Returns the bytes of a rank's answers to one rank, header included."""
        return (self.header_items[rank] + num_items) * self.item_bytes[rank]


class KeyForm(Form):
    """Entries by key, of slices that begin and end at heads.

    A message is the number of distinct keys of each of the rank's columns, then these keys. Places are by order of the
    whole table.
    """

    def __init__(self, slices: SliceMap, rank: int) -> None:
        super().__init__(slices, rank, [share.rows_per_key * slices.whole.row_bytes for share in slices.shares])
        self._columns = [list(share.columns) for share in slices.shares]

    def wanted(self, ids: np.ndarray) -> Wanted:
        found = [distinct(np.ascontiguousarray(column), KEY_MAX) for column in ids.T]
        messages = []
        for columns in self._columns:
            of_columns = [found[column][0] for column in columns]
            lengths = np.array([len(keys) for keys in of_columns], dtype=np.int64)
            messages.append(np.concatenate([lengths, *of_columns]))
        num_items = [len(message) - len(columns) for message, columns in zip(messages, self._columns, strict=True)]
        return Wanted(messages, num_items, [places for _, places in found])

    def items_of(self, message: np.ndarray) -> int:
        return len(message) - len(self._columns[self.rank])

    def submit(self, table: Table, messages: Sequence[np.ndarray], out: np.ndarray) -> Ticket:
        columns, header = len(self._columns[self.rank]), self.header_items[self.rank]
        lengths = np.array([[header, *message[:columns]] for message in messages], dtype=np.int64)
        indices = np.tile(np.array([0, *range(columns)], dtype=np.int32), len(messages))
        before = np.full(header, -1, dtype=np.int64)
        keys = np.concatenate([part for message in messages for part in (before, message[columns:])])
        return table.submit_entries(np.repeat(indices, lengths.reshape(-1)), keys, out)

    def rows_shape(self, ids: np.ndarray) -> tuple[int, ...]:
        return len(ids), self.slices.whole.num_heads, self.slices.whole.row_bytes

    def put(self, wanted: Wanted, answers: Sequence[np.ndarray], out: np.ndarray) -> None:
        by_token = out.reshape(len(out), out.shape[1] * out.shape[2])
        for rank, share in enumerate(self.slices.shares):
            items = answers[rank].reshape(-1, self.item_bytes[rank])
            at, byte_start = self.header_items[rank], share.head_start * self.slices.whole.row_bytes
            for column, length in zip(share.columns, wanted.messages[rank].tolist(), strict=False):
                kernels.place_entries(items[at : at + length], wanted.places[column], by_token, byte_start)
                at, byte_start = at + length, byte_start + self.item_bytes[rank]


class RowForm(Form):
    """Rows by row id, of any slices. A message is distinct row ids. Places are, by rank, of those in its message."""

    def __init__(self, slices: SliceMap, rank: int) -> None:
        super().__init__(slices, rank, [slices.whole.row_bytes] * len(slices.shares))

    def wanted(self, ids: np.ndarray) -> Wanted:
        refuse_outside(self.slices.whole, ids)
        row_ids, places = distinct(np.ascontiguousarray(ids.reshape(-1)), self.slices.whole.num_rows)
        owners = self.slices.owners(row_ids)
        by_owner = np.argsort(owners, kind="stable")
        counts = np.bincount(owners, minlength=len(self.item_bytes))
        messages = np.split(row_ids[by_owner], np.cumsum(counts)[:-1])
        at = np.empty(len(row_ids) + 1, dtype=np.int64)
        at[by_owner], at[-1] = np.arange(len(row_ids)), -1  # -1 is the place of no row
        return Wanted(messages, counts.tolist(), [at[places]])

    def items_of(self, message: np.ndarray) -> int:
        return len(message)

    def submit(self, table: Table, messages: Sequence[np.ndarray], out: np.ndarray) -> Ticket:
        before = np.full(self.header_items[self.rank], -1, dtype=np.int64)
        return table.submit_rows(np.concatenate([part for message in messages for part in (before, message)]), out)

    def rows_shape(self, ids: np.ndarray) -> tuple[int, ...]:
        return *ids.shape, self.slices.whole.row_bytes

    def put(self, wanted: Wanted, answers: Sequence[np.ndarray], out: np.ndarray) -> None:
        width, header = self.item_bytes[0], self.header_items[0]
        rows = np.concatenate([of_rank.reshape(-1, width)[header:] for of_rank in answers])
        kernels.place_entries(rows, wanted.places[0], out.reshape(-1, width))


def distinct(ids: np.ndarray, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distinct ids of int64 [N] in the order of first touch, and the place of each there, int64 [N].

    -1 means no id, and has place -1. Ids are below `end`, or, for keys, at most KEY_MAX.
    """
    if end == KEY_MAX and len(ids) and ids.max() == KEY_MAX:  # which the kernel takes for one that is outside
        found, places = np.unique(ids, return_inverse=True)
        none = int(found[0] == -1)
        return found[none:], places.astype(np.int64) - none
    found, starts, order, _ = kernels.distinct_rows(ids, end)
    places = np.full(len(ids), -1, dtype=np.int64)
    places[order] = np.repeat(np.arange(len(found)), np.diff(starts))
    return found, places
