"""`RowIdEmbedding`: a module over a store in the place of an `nn.Embedding`, for models that hash by themselves.

Input: row ids, as the model has them. Output: rows in the table's float type, without gradient, on the device of the
ids. Errors: what lookups raise, and `ValueError` for ids outside the table or their head.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch

from tierstore.errors import ConfigError, TierStoreError

from .codecs import decode_rows
from .lookup_call import WAIT_S, as_int64
from .lookup_operators import is_traced, rows_operator
from .store_module import StoreModule
from .token_shapes import check_integers

if TYPE_CHECKING:
    from tierstore import Store, Ticket


class ExpectedRows(NamedTuple):
    """A lookup that was started for row ids that a module is expected to be asked for."""

    row_ids: np.ndarray  # int64 [..., O * H]
    ticket: Ticket
    rows: np.ndarray  # uint8 [..., O * H, row_bytes]


class RowIdEmbedding(StoreModule):
    """Drop-in for an embedding whose caller already has row ids: `RowIdEmbedding(store, layer)(row_ids)`.

    Stands in for `nn.Embedding` (`weight.device`, `weight.dtype`, `num_embeddings`, `embedding_dim`), and with
    `head_offsets=True` for the published MultiHeadEmbedding, which takes ids within each head and adds the offsets
    itself. `weight` is empty, [0, dim]: it follows `.to(device)`, keeps the table's float type under `.to(dtype)`,
    because that is the type of the output, and is not in the state_dict. To torch.compile and torch.export it is one
    operator; copies share the store, and a pickled one opens it anew where it arrives.

    Attributes:
        stands_for_weight: Whether a saved model has the rows as this module's weight; `swap_embedding` sets it.
    """

    _ANEW: ClassVar = StoreModule._ANEW | {"_of_thread"}
    weight: torch.Tensor

    def __init__(self, store: Store, layer: int | str, head_offsets: bool = False, process_group: Any = None) -> None:
        """Binds a table, by the index of the model's module or by name. Raises `ConfigError` if the store has none.

        process_group: as of `TieredEmbedding`: ranks that hold a slice each, and all call this in the same order. They
        ask each other for rows, one by one, so a table that its rank does not hold whole in memory is read by page.
        """
        self._head_offsets, self._is_over_ranks = head_offsets, process_group is not None
        super().__init__(store, layer if isinstance(layer, str) else f"layers.{layer}")
        self._lock_step = None
        if process_group is not None:
            from .exchange import Ranks  # loads torch.distributed
            from .lockstep import LockStep

            self._lock_step = LockStep(Ranks.of(process_group), store, self._table, by_key=False)
        self.stands_for_weight = False
        # On the CPU whatever torch's default device is: a model that is made on the meta device still has its rows.
        empty = torch.empty((0, self.embedding_dim), dtype=self.dtype, device="cpu")
        self.register_buffer("weight", empty, persistent=False)

    def _bind(self, store: Store) -> None:
        super()._bind(store)
        self._of_thread = threading.local()  # `expected`: what this thread's next forward may take

    @property
    def _kind(self) -> str:
        return f"{super()._kind}(head_offsets={self._head_offsets}){' over ranks' if self._is_over_ranks else ''}"

    def forward(self, row_ids: torch.Tensor) -> torch.Tensor:
        """Returns the rows of `row_ids`, integers [...], as [..., dim] on their device; row id -1 gives a zero row.

        With `head_offsets`, the last axis of `row_ids` is the heads, and each id counts within its head. Blocks on the
        reads. Raises `ValueError` for ids outside the table or their head, `CorruptPageError` if a row is damaged.
        """
        if is_traced():
            traced: torch.Tensor = rows_operator(row_ids, self._handle, self.embedding_dim, self.dtype)
            return traced
        return self.look_up(row_ids)

    def look_up(self, row_ids: torch.Tensor) -> torch.Tensor:
        """Does what `forward` says, in traced programs too."""
        if self._lock_step is not None:
            rows = self._lock_step.look_up(lambda: self._ids_of(row_ids))
        else:
            rows = self._own_rows(self._ids_of(row_ids))
        return decode_rows(torch.from_numpy(rows).to(row_ids.device), self._table_spec.codec, self.embedding_dim)

    def _ids_of(self, row_ids: torch.Tensor) -> np.ndarray:
        """Returns the table's row ids, int64 [...]. Raises `TypeError`, and `ValueError` for ids outside their head."""
        check_integers(row_ids, "row ids")
        ids = as_int64(row_ids)
        return self._ids_in_table(ids) if self._head_offsets else ids

    def _own_rows(self, ids: np.ndarray) -> np.ndarray:
        """Returns rows of this store, uint8 [..., row_bytes], those that were expected if they are of these ids."""
        rows = self._take_expected(ids) if hasattr(self._of_thread, "expected") else None
        return self._table.rows(ids) if rows is None else rows

    def expect(self, expected: ExpectedRows) -> None:
        """Has this thread's next forward take rows that were asked for before, if it asks for those very ids.

        If it asks for others, they are dropped, and it looks its own up.
        """
        self._of_thread.expected = expected

    def _take_expected(self, ids: np.ndarray) -> np.ndarray | None:
        """Returns the rows of `ids` if they were expected; None if not, or if their request failed.

        A request of several tables fails as one, and what is wrong may be another table's page: this one looks up
        again, and raises then if the page is its own. `TimeoutError` comes through.
        """
        expected: ExpectedRows = self._of_thread.expected
        del self._of_thread.expected
        if expected.row_ids.shape != ids.shape or not (expected.row_ids == ids).all():
            return None
        try:
            expected.ticket.wait(timeout_s=WAIT_S)
        except TierStoreError:
            return None
        return expected.rows

    def copy_rows_to(self, values: torch.Tensor, piece_bytes: int) -> None:
        """Fills values, [num_embeddings, embedding_dim] on the CPU, with all rows, piece by piece. Blocks."""
        spec = self._table_spec
        if spec.is_slice:
            raise ConfigError(f"the store has a slice of table {spec.name}, not all rows: join the slices first")
        step = max(1, piece_bytes // spec.row_bytes)
        for start in range(0, spec.num_rows, step):
            rows = self._table.rows(np.arange(start, min(start + step, spec.num_rows), dtype=np.int64))
            values[start : start + step] = decode_rows(torch.from_numpy(rows), spec.codec, self.embedding_dim)

    def _ids_in_table(self, ids: np.ndarray) -> np.ndarray:
        """Adds each head's offset. An id past its head's end is refused: it would become the next head's row."""
        spec = self._table_spec.whole or self._table_spec
        if ids.ndim == 0 or ids.shape[-1] != spec.num_heads:
            raise ValueError(
                f"ids of shape {list(ids.shape)} for table {spec.name}: the last axis must be its {spec.num_heads} "
                f"heads"
            )
        outside = (ids < -1) | (ids >= np.array(spec.moduli, dtype=np.int64))
        if outside.any():
            *_, head = index = tuple(int(axis) for axis in np.argwhere(outside)[0])
            raise ValueError(
                f"id {ids[index]} of head {head} of table {spec.name}: that head has rows 0 to "
                f"{spec.moduli[head] - 1}; "
                f"pass ids within the head, or use head_offsets=False for ids that count from the table's start"
            )
        return np.where(ids == -1, -1, ids + np.array(spec.offsets, dtype=np.int64))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RowIdEmbedding:
        super()._apply(fn, recurse)
        self.weight = self.weight.to(self.dtype)
        return self
