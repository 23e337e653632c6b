"""One table over ranks: rows to the ranks that need them, and gradients back to the rank that owns each row.

Input: a batch's row ids, and later their gradients; this rank's slice of the table. Output: values of all rows; the
gradients of the slice's rows. Errors: `RankError` (a rank did not come, left, or is elsewhere), `ConfigError` for
slices that are not the whole table.

A batch's distinct rows travel once, in the order of first reference, to and from their owners. Gradients are summed for
each group (a sequence) before they travel. The owner adds groups in the order of ranks, of each rank's in their order:
the global batch's. So the bits do not depend on how many ranks there are.

Shapes: W ranks, R references of this rank's batch, D distinct rows of them, N rows that all ranks ask this one for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from tierstore import kernels
from tierstore.errors import ConfigError

from .early_rows import AskedRows, EarlyBatch, EarlyRows, EarlyThread, EarlyTicket
from .exchange import Ranks
from .rank_agreement import refusal_of
from .rank_norms import BlockNorms
from .table_gradient import GradientPart

if TYPE_CHECKING:
    from tierstore.training.table import TrainingTable

Reduction = Literal["mean", "sum"]

_NO_IDS = np.empty(0, dtype=np.int64)


class SentLookup(NamedTuple):
    """What a lookup's backward needs of its forward."""

    num_references: int
    owned: kernels.OwnedRows  # the rows that this rank asked for
    asked: AskedRows | None  # those that ranks asked this one for; None on a replica, which none asks


class TableExchange:
    """Exchanges the rows of one table. All ranks call the same methods in the same order; of one thread."""

    def __init__(self, ranks: Ranks, table: TrainingTable, reduction: Reduction = "mean") -> None:
        """Compares the slices of all ranks. Blocks until all are here.

        Raises:
            ConfigError: The ranks' slices are not the whole table, in the order of ranks, each row once; or another
                reduction.
        """
        if reduction not in ("mean", "sum"):
            raise ConfigError(f"reduction {reduction!r}: 'mean' (as DDP and FSDP) or 'sum'")
        self.ranks, self._table, self.spec = ranks, table, table.spec
        self._scale = 1 / ranks.size if reduction == "mean" else 1.0
        self.starts = _starts(ranks, self.spec, reduction)
        self._threads = torch.get_num_threads()
        self._norms = BlockNorms(ranks, self.spec, self.starts)
        self.early = EarlyRows(EarlyThread.of(ranks), self.spec.name, self.starts)

    def forward(
        self,
        make_ids: Callable[[], tuple[np.ndarray, np.ndarray | None]],
        with_gradient: bool,
        values_of: Callable[[np.ndarray, torch.Tensor], torch.Tensor],
    ) -> tuple[SentLookup, torch.Tensor]:
        """Returns the lookup and the values of its distinct rows, [D, dim], valid until the next exchange. Blocks.

        What `make_ids` raises on one rank is a `RankError` on the others, and the next call works.

        Args:
            make_ids: Returns row ids of the table, int64 [R], -1 for no row; and groups, int32 [R], ascending, or None.
            with_gradient: Whether backward will come; the same on all ranks.
            values_of: Called once, with the rows of this slice that ranks ask for, int64 [N], and room for float32
                [N, dim]; returns their values, there or elsewhere.
        """
        what = f"forward of table {self.spec.name}, {'with' if with_gradient else 'without'} gradient"
        row_ids, early, owned, error = _NO_IDS, None, kernels.OwnedRows(_NO_IDS, self.starts, None), None
        try:
            row_ids, groups = make_ids()
            early = self.early.take(row_ids)
            owned = kernels.OwnedRows(row_ids, self.starts, groups if with_gradient else None)
        except Exception as raised:  # the others wait: they must hear of it
            error = raised
        numbers = np.zeros((self.ranks.size, 3), dtype=np.int64)
        numbers[:, 0], numbers[:, 1] = owned.counts, 0 if early is None else early.number
        numbers[:, 2] = error is not None
        with self.ranks.whole(what):
            came = self.ranks.counts(what, numbers)
            refusal = refusal_of(self.ranks, what, came[:, 2] != 0, error)
            if refusal is None:
                return self._answered(what, owned, early, came, len(row_ids), values_of)
        raise refusal

    def _answered(
        self,
        what: str,
        owned: kernels.OwnedRows,
        early: EarlyBatch | None,
        came: np.ndarray,
        num_references: int,
        values_of: Callable[[np.ndarray, torch.Tensor], torch.Tensor],
    ) -> tuple[SentLookup, torch.Tensor]:
        """Exchanges ids, unless they went early on all ranks, and values. came: int64 [W, 3], what ranks announced."""
        dim = self.spec.dim
        if early is not None and (came[:, 1] == early.number).all():
            asked = early.ticket.wait(self.ranks.timeout_s)
        else:
            asked = AskedRows.exchange(self.ranks, what, owned, came[:, 0], self.starts)
        room = self.ranks.scratch.take("values out", (len(asked.row_ids), dim), torch.float32)
        values = values_of(asked.row_ids, room)
        into = self.ranks.scratch.take("values in", (int(owned.counts.sum()), dim), values.dtype)
        self.ranks.all_to_all(what, values, asked.counts, owned.counts.tolist(), into)
        return SentLookup(num_references, owned, asked), into

    def gradient_norms(self, rows: np.ndarray, sums: np.ndarray) -> np.ndarray:
        """Returns the norms of all blocks of the table, float64; arguments are of this slice's rows. Blocks."""
        return self._norms.of(rows, sums)

    def backward(self, sent: SentLookup, gradients: np.ndarray, place: str) -> GradientPart:
        """Sends gradients, float32 [R, dim], to the owners of their rows; returns those of this slice's. Blocks.

        place: Which lookup of how many this is, the same on all ranks: "1 of 1".
        """
        what = f"gradient {place} of table {self.spec.name}"
        assert sent.asked is not None
        scratch, dim = self.ranks.scratch, self.spec.dim
        counts = sent.owned.sum_counts  # [W, G]
        given = counts.sum(axis=1)
        numbers = np.stack([given, np.full(len(given), counts.shape[1])], axis=1)
        sums = scratch.take(f"sums out {place}", (int(given.sum()), dim), torch.float32)
        sent.owned.sum(gradients, sums.numpy(), self._scale, self._threads)
        with self.ranks.whole(what):
            came = self.ranks.counts(what, numbers)
            into = scratch.take(f"sums in {place}", (int(came[:, 0].sum()), dim), torch.float32)
            under_way = self.ranks.start_all_to_all(what, sums, given.tolist(), came[:, 0].tolist(), into)
            rows, groups = sent.asked.row_ids, None
            if (came[:, 1] > 1).any():
                rows, groups = self._rows_of_sums(what, sent, came)
            elif self.ranks.size > 1:
                groups = np.repeat(np.arange(self.ranks.size, dtype=np.int32), came[:, 0])
            return GradientPart(rows, under_way.wait().numpy(), groups)

    def _rows_of_sums(self, what: str, sent: SentLookup, came: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns row ids, int64, and groups, int32, of the sums that come, [sums] each.

        A rank with several groups sends how many sums each group has, then which row each is of; one with one group
        sends a sum for each row that it asked for, in order.
        """
        counts = sent.owned.sum_counts
        num_groups = counts.shape[1]
        assert sent.asked is not None
        given = [0] * self.ranks.size
        message = np.empty(0, dtype=np.int32)
        if num_groups > 1:
            of_owner = counts.sum(axis=1)
            ends = np.cumsum(of_owner)
            places = sent.owned.rows_of_sums.view(np.int32)
            parts = [
                part
                for owner, end in enumerate(ends)
                for part in (counts[owner].astype(np.int32), places[end - of_owner[owner] : end])
            ]
            message, given = np.concatenate(parts), (of_owner + num_groups).tolist()
        sizes = np.where(came[:, 1] > 1, came[:, 0] + came[:, 1], 0)
        meta = self.ranks.all_to_all(what, torch.from_numpy(message), given, sizes.tolist()).numpy()
        rows, groups, first_group, at, first_row = [], [], 0, 0, 0
        for (num_sums, of_rank), num_asked in zip(came.tolist(), sent.asked.counts, strict=True):
            asked = sent.asked.row_ids[first_row : first_row + num_asked]
            if of_rank > 1:
                rows.append(asked[meta[at + of_rank : at + of_rank + num_sums]])
                groups.append(np.repeat(np.arange(of_rank, dtype=np.int32) + first_group, meta[at : at + of_rank]))
                at += of_rank + num_sums
            else:
                rows.append(asked)
                groups.append(np.full(num_sums, first_group, dtype=np.int32))
            first_group, first_row = first_group + of_rank, first_row + num_asked
        return np.concatenate(rows), np.concatenate(groups)


def expanded(sent: SentLookup, values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns values of all references, [R, dim], of those of distinct rows, which alone travel to a device."""
    if device.type == "cpu":
        out = torch.empty((sent.num_references, values.shape[1]), dtype=values.dtype, device="cpu")
        sent.owned.expand(_bytes_of(values), _bytes_of(out), torch.get_num_threads())
        return out
    with_zeros = torch.zeros((len(values) + 1, values.shape[1]), dtype=values.dtype, device=device)
    with_zeros[:-1] = values.to(device)
    return with_zeros[torch.from_numpy(sent.owned.places).to(device)]


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous tensor's memory, uint8 [rows, bytes of a row]."""
    array: np.ndarray = tensor.view(torch.uint8).numpy()
    return array


def _starts(ranks: Ranks, spec: Any, reduction: str) -> np.ndarray:
    """Returns where the slices of all ranks begin, and the last ends, int64 [W + 1]; raises `ConfigError`."""
    mine = [spec.name, spec.num_rows, spec.dim, spec.fingerprint, reduction, spec.row_start, spec.row_end]
    of_all: Sequence[list[Any]] = ranks.gather_objects(f"slices of table {spec.name}", mine)
    for rank, of_rank in enumerate(of_all):
        if of_rank[:5] != mine[:5]:
            raise ConfigError(
                f"table {spec.name}: rank {rank} has {of_rank[:5]}, rank {ranks.rank} has {mine[:5]} (name, rows, dim, "
                "hash, reduction): all ranks must open slices of one table"
            )
    starts = [0, *(of_rank[6] for of_rank in of_all)]
    if [of_rank[5] for of_rank in of_all] != starts[:-1] or starts[-1] != spec.num_rows:
        listed = "; ".join(f"rank {rank}: {of_rank[5]} to {of_rank[6]}" for rank, of_rank in enumerate(of_all))
        raise ConfigError(
            f"table {spec.name}: the slices of {ranks.size} ranks are not its {spec.num_rows} rows in order: {listed}; "
            f"rank I opens slice I/{ranks.size} (tierstore build --slice, tierstore reslice)"
        )
    return np.array(starts, dtype=np.int64)


def exchange_of(table: TrainingTable, process_group: Any, reduction: Reduction) -> TableExchange | None:
    """Returns the exchange of a table over the ranks of a group, or `Ranks`; None without a group.

    Raises as `TableExchange`; `ConfigError` for a slice without a group.
    """
    if process_group is not None:
        return TableExchange(Ranks.of(process_group), table, reduction)
    if table.spec.is_slice:
        raise ConfigError(
            f"table {table.spec.name} is a slice, rows {table.spec.row_start} to {table.spec.row_end} of "
            f"{table.spec.num_rows}: give process_group, the ranks that hold the other slices"
        )
    return None


def prefetch_over_ranks(
    requests: Sequence[tuple[Any, np.ndarray]], bring: Callable[[dict[str, np.ndarray]], Any]
) -> EarlyTicket:
    """Starts to exchange the row ids of a later batch, int64 [...] by table, and to bring what ranks will ask for."""
    batches = [exchange.early.begin(np.array(row_ids, copy=True).reshape(-1)) for exchange, row_ids in requests]
    return requests[0][0].early.thread.add(batches, bring)
