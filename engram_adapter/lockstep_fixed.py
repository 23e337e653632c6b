"""Lock-step lookups whose shapes depend on nothing but a fixed number of tokens: for callers that record their calls.

Input: at most so many tokens on each rank. Output: their rows. Errors: as `lockstep`, and `ValueError` for more tokens;
ranks that answer from different versions are an error at once.

Keys travel with those of padding, -1, and are not made distinct: each call is the same three exchanges of the same
sizes, whatever the ids are. So it sends more than `LockStep`: the keys of all ranks to all, and rows that repeat.
Shapes: W ranks, N tokens that are fixed, n tokens of a call, O orders of the whole table, R bytes of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from tierstore.errors import ConfigError
from tierstore.spec import TableSpec

from .exchange import Ranks
from .lockstep_header import (
    FAILED,
    HEADER_BYTES,
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
    from tierstore import Store, Table


class FixedLockStep:
    """One table's lookups over ranks, of `num_tokens` tokens a rank. All ranks call it equally often, one thread at a
    time."""

    by_key = True

    def __init__(self, ranks: Ranks, store: Store, table: Table, num_tokens: int) -> None:
        """Learns what slice each rank has, and makes buffers. Blocks until all are here.

        Raises:
            ConfigError: The slices are not one table's or begin inside a head, or ranks differ in num_tokens.
            RankError: A rank did not come.
        """
        self.ranks, self._store, self._table, self._num_tokens = ranks, store, table, num_tokens
        self._what = f"table {table.spec.name}, {num_tokens} tokens"
        found = ranks.gather_objects(f"slices of table {table.spec.name}", [table.spec.to_dict(), num_tokens])
        self.slices = SliceMap.of([TableSpec.from_dict(record) for record, _ in found])
        if not self.slices.by_key:
            raise ConfigError(
                f"fixed_tokens: a slice of table {table.spec.name} begins inside a head, so rows are asked for by row "
                f"id, whose number depends on the ids; make at most {self.slices.whole.num_heads} slices, or leave "
                f"fixed_tokens out"
            )
        if len(different := {num for _, num in found}) > 1:
            raise ConfigError(f"fixed_tokens is {sorted(map(str, different))} on different ranks, must be one number")
        self._columns = list(self.slices.shares[ranks.rank].columns)
        self._token_bytes = [share.num_heads * self.slices.whole.row_bytes for share in self.slices.shares]
        self._before = [-(-HEADER_BYTES // each) for each in self._token_bytes]  # tokens that make room for a header
        own = self._before[ranks.rank] + num_tokens
        self._asked = np.full((ranks.size, own, len(self._columns)), -1, dtype=np.int64)
        self._sent = np.empty((ranks.size * own, table.spec.num_heads, table.spec.row_bytes), dtype=np.uint8)
        self._receive = [
            (before + num_tokens) * each for before, each in zip(self._before, self._token_bytes, strict=True)
        ]
        self._came = torch.empty(sum(self._receive), dtype=torch.uint8, device="cpu")

    def __deepcopy__(self, memo: Any) -> FixedLockStep:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"an embedding over ranks, of {self._what}, cannot be pickled: make it on each rank")

    def prefetch(self, make_ids: Callable[[], np.ndarray]) -> None:
        """Does nothing: a lookup that was started early would be an exchange more, or one less, later."""

    def look_up(self, make_ids: Callable[[], np.ndarray]) -> np.ndarray:
        """Returns the rows of keys, int64 [n, O], of this rank: uint8 [n, heads, R]. Blocks on the other ranks.

        make_ids: returns the keys. What it raises comes out of this rank's call; the others get a `RankError`.

        Raises:
            ValueError: More than the fixed number of tokens.
            StoreNotReadyError: Ranks answered from different versions: call again, on all ranks.
        """
        keys = np.full((self._num_tokens, len(self.slices.whole.orders)), -1, dtype=np.int64)
        num_tokens, error = 0, None
        try:
            given = make_ids()
            num_tokens = self._checked(given)
            keys[:num_tokens] = given
        except Exception as raised:  # the others wait: they must hear of it
            error = raised
        self.ranks.counts(self._what, np.zeros((self.ranks.size, 0), dtype=np.int64))
        asked = self.ranks.all_gather(self._what, torch.from_numpy(keys)).numpy()
        own = self._before[self.ranks.rank]
        self._asked[:, own:] = asked[:, :, self._columns]
        found = answered(self._store, self._answer, self._what) if error is None else failed(error)
        came, headers = self._exchanged(found.header)
        refuse_failed(self.ranks, self._what, headers["status"] == FAILED, found.error)
        if not agree(headers):
            raise of_versions(self._what, headers, 1)
        return self._rows(came, num_tokens)

    def _checked(self, keys: np.ndarray) -> int:
        """Returns how many tokens there are; raises `ValueError` if they are too many."""
        if len(keys) > self._num_tokens:
            raise ValueError(
                f"{len(keys)} tokens, and fixed_tokens is {self._num_tokens}: pass fewer, or make the embedding with "
                f"a larger fixed_tokens on all ranks"
            )
        return len(keys)

    def _answer(self) -> None:
        self._table.lookup(self._asked.reshape(-1, len(self._columns)), self._sent, timeout_s=WAIT_S)

    def _exchanged(self, header: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Sends this rank's answers; returns those of each rank, uint8 [bytes], and their headers."""
        sent = self._sent.reshape(-1)
        send = [len(sent) // self.ranks.size] * self.ranks.size
        write_headers(header, sent, send)
        self.ranks.all_to_all(self._what, torch.from_numpy(sent), send, self._receive, self._came)
        came = np.split(self._came.numpy(), np.cumsum(self._receive)[:-1])
        return came, read_headers(came)

    def _rows(self, came: list[np.ndarray], num_tokens: int) -> np.ndarray:
        whole = self.slices.whole
        rows = np.empty((num_tokens, whole.num_heads, whole.row_bytes), dtype=np.uint8)
        for share, of_rank, before in zip(self.slices.shares, came, self._before, strict=True):
            by_token = of_rank.reshape(-1, share.num_heads, whole.row_bytes)[before : before + num_tokens]
            rows[:, share.head_start : share.head_start + share.num_heads] = by_token
        return rows
