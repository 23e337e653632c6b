"""Replicas: ranks that see the same tokens, as those of a tensor parallel group. One holds the tables, others receive.

Input: a group of such ranks; the same row ids on all. Output: the same values, norms and refusals on all. Errors:
`RankError` for replicas that differ, and what the source raised: its own class if it is one of `SHARED`, else
`RankError`.

Rank 0 of the group is the source: it has the training, and alone takes part in the exchange of the process group. In
backward its gradient counts, once; all replicas must have the same, as those of a replicated layer do.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tierstore import kernels
from tierstore.errors import BudgetError, ConfigError, FingerprintMismatchError, FormatError, RankError
from tierstore.spec import TableSpec

from .exchange import TIMEOUT_S, Ranks
from .rank_agreement import TableStep, agree_on_step, refuse_failed
from .table_exchange import SentLookup, TableExchange
from .table_gradient import GradientPart

if TYPE_CHECKING:
    from .early_rows import EarlyRows

SHARED: tuple[type[Exception], ...] = (ValueError, BudgetError, ConfigError, FingerprintMismatchError, FormatError)
NORM_SPREAD_MAX = 1e-3  # relative, between replicas' gradients: rounding leaves far less, a missing all-reduce far more


class Replicas:
    """The ranks of a replica group. Of one thread; all call the same in the same order."""

    def __init__(self, replica_group: Any) -> None:
        """replica_group: of torch.distributed, a `DeviceMesh` of one dimension, or `Ranks`. Raises as `Ranks`."""
        self.ranks = Ranks.of(replica_group, 2 * TIMEOUT_S)  # the source waits for the process group meanwhile
        self.is_source = self.ranks.rank == 0

    def named(self, what: str) -> str:
        """What an exchange is for, with these ranks as the default group numbers them."""
        return f"{what}, among replicas {', '.join(map(str, self.ranks.members))}"

    def from_source(self, what: str, call: Callable[[], Any]) -> Any:
        """Calls on the source; returns on all what it returned, which JSON holds, or raises its error. Blocks."""
        result, error = None, None
        if self.is_source:
            try:
                result = call()
            except Exception as raised:  # the others wait: they must hear of it
                error = raised
            except BaseException as raised:
                self.ranks.end(f"{what} ended with {type(raised).__name__}")
                raise
        failure = None if error is None else [type(error).__name__, str(error)]
        (of_source, value), *_ = self.ranks.gather_objects(self.named(what), [failure, result])
        if error is not None:
            raise error
        if of_source is not None:
            kind = next((each for each in SHARED if each.__name__ == of_source[0]), RankError)
            raise kind(of_source[1])
        return value

    def agree_on_step(self, ranks: Ranks | None, number: int, steps: list[TableStep]) -> None:
        """As `rank_agreement.agree_on_step`, of the process group's ranks and all replicas. ranks: the source's."""
        error: Exception | None = None
        try:
            agree_on_step(self.ranks, number, steps)
        except Exception as raised:  # the other ranks of the source wait
            error = raised

        def agree() -> None:
            assert ranks is not None
            agree_on_step(ranks, number, steps, error)

        self.from_source(f"step {number} of the tables", agree)


class ReplicatedExchange:
    """What `TableExchange` is, for one replica: of the source it goes to other ranks, the others hear from it."""

    def __init__(self, replicas: Replicas, spec: TableSpec, exchange: TableExchange | None) -> None:
        """exchange: of the source. All replicas construct together. spec: of the whole table."""
        self.replicas, self.spec, self._exchange = replicas, spec, exchange
        own = None if exchange is None else exchange.starts.tolist()
        starts = replicas.from_source(f"slices of table {spec.name}", lambda: own)
        self.starts = np.array(starts, dtype=np.int64)

    @property
    def ranks(self) -> Ranks | None:
        """The ranks of the process group, on the source."""
        return None if self._exchange is None else self._exchange.ranks

    @property
    def early(self) -> EarlyRows | None:
        """What prefetches, on the source."""
        return None if self._exchange is None else self._exchange.early

    def forward(
        self,
        make_ids: Callable[[], tuple[np.ndarray, np.ndarray | None]],
        with_gradient: bool,
        values_of: Callable[[np.ndarray, torch.Tensor], torch.Tensor],
    ) -> tuple[SentLookup, torch.Tensor]:
        """As `TableExchange.forward`; ids must be the same on all replicas."""
        what = self.replicas.named(
            f"forward of table {self.spec.name}, {'with' if with_gradient else 'without'} gradient"
        )
        found: list[tuple[SentLookup, torch.Tensor]] = []
        errors: list[Exception] = []

        def same_ids() -> tuple[np.ndarray, np.ndarray | None]:
            return self._same_ids(what, make_ids, errors)

        def on_source() -> str:
            assert self._exchange is not None
            found.append(self._exchange.forward(same_ids, with_gradient, values_of))
            return str(found[0][1].dtype).removeprefix("torch.")

        if not self.replicas.is_source:
            try:
                row_ids, groups = same_ids()
            except Exception as raised:
                errors.append(raised)
        try:
            dtype = self.replicas.from_source(what, on_source)
        except Exception:
            if errors:
                raise errors[0] from None
            raise
        with self.replicas.ranks.whole(what):
            if not found:
                owned = kernels.OwnedRows(row_ids, self.starts, groups if with_gradient else None)
                shape = (len(owned.row_ids), self.spec.dim)
                room = self.replicas.ranks.scratch.take("values in", shape, getattr(torch, dtype))
                found.append((SentLookup(len(row_ids), owned, None), room))
            self.replicas.ranks.broadcast(what, found[0][1])
        return found[0]

    def _same_ids(
        self, what: str, make_ids: Callable[[], tuple[np.ndarray, np.ndarray | None]], errors: list[Exception]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns the ids, once all replicas have the same; raises on all replicas if one refuses them."""
        row_ids, groups = np.empty(0, dtype=np.int64), None
        try:
            row_ids, groups = make_ids()
            kernels.OwnedRows(row_ids, self.starts, groups)
        except Exception as raised:
            errors.append(raised)
        ranks = self.replicas.ranks
        numbers = np.array([bool(errors), len(row_ids), zlib.crc32(row_ids.tobytes())], dtype=np.int64)
        came = ranks.counts(what, np.tile(numbers, (ranks.size, 1)))
        refuse_failed(ranks, what, came[:, 0] != 0, errors[0] if errors else None)
        if (came[:, 1:] != came[0, 1:]).any():
            others = tuple(np.flatnonzero((came[:, 1:] != came[ranks.rank, 1:]).any(axis=1)).tolist())
            raise RankError(
                f"{what}: replicas have other ids: {came[:, 1].tolist()} of them, checksums {came[:, 2].tolist()}. "
                "All ranks of a replica group must look up the same tokens",
                others,
                what,
            )
        return row_ids, groups

    def backward(self, sent: SentLookup, gradients: np.ndarray, place: str) -> GradientPart:
        """As `TableExchange.backward`, with the source's gradient, once. One that is not finite on any replica is
        none on all. Raises `RankError` if replicas have other gradients, by their norms."""
        what, ranks = self.replicas.named(f"gradient {place} of table {self.spec.name}"), self.replicas.ranks
        with np.errstate(over="ignore", invalid="ignore"):
            norm = np.sqrt(np.einsum("rd,rd->", gradients, gradients, dtype=np.float64))
        bad = -1
        if not np.isfinite(norm):
            of_rows = sent.owned.places < len(sent.owned.row_ids)
            bad = next(iter(np.flatnonzero(of_rows & ~np.isfinite(gradients).all(axis=1)).tolist()), -1)
        numbers = np.array([bad, np.float64(norm).view(np.int64)], dtype=np.int64)
        came = ranks.counts(what, np.tile(numbers, (ranks.size, 1)))
        norms = came[:, 1].copy().view(np.float64)
        if np.isfinite(norms).all() and (np.abs(norms - norms[0]) > NORM_SPREAD_MAX * norms.max()).any():
            raise RankError(
                f"{what}: norms of the gradients are {norms.tolist()}: all replicas must have the same gradient of the "
                "rows. All-reduce it over the replica group where a sharded layer takes them",
                waited_for=what,
            )
        if self._exchange is None:
            return GradientPart(np.empty(0, np.int64), np.empty((0, self.spec.dim), np.float32), None)
        places = came[came[:, 0] >= 0, 0]
        if len(places):
            gradients = gradients.copy()
            gradients[places] = np.nan
        return self._exchange.backward(sent, gradients, place)

    def gradient_norms(self, rows: np.ndarray, sums: np.ndarray) -> np.ndarray:
        """Returns the norms of all blocks of the table, float64, the source's. Blocks."""

        def norms() -> Any:
            assert self._exchange is not None
            return self._exchange.gradient_norms(rows, sums).tolist()

        of_source = self.replicas.from_source(f"gradient norms of table {self.spec.name}", norms)
        return np.array(of_source, dtype=np.float64)


def replicated_exchange(
    replicas: Replicas, training: Any, name: str, bind: Callable[[], TableExchange | None]
) -> ReplicatedExchange:
    """Returns the exchange of a table for one replica. All replicas call it; blocks.

    bind: Called on the source; returns its exchange with the process group. What it raises comes to all.
    """
    if (training is not None) != replicas.is_source:
        raise ConfigError(
            f"rank {replicas.ranks.rank} of replicas {list(replicas.ranks.members)}: rank 0 of the group, and no "
            "other, has the training; give the others training=None"
        )
    names = [each.name for each in fields(TableSpec) if each.name not in ("row_start", "row_end", "whole", "public")]
    found: list[TableExchange | None] = []

    def numbers() -> list[Any]:
        found.append(bind())
        if found[0] is None:
            raise ConfigError("replica_group needs process_group: the ranks with the slices, if only this one")
        spec = found[0].spec.whole or found[0].spec
        return [getattr(spec, each) for each in names]

    values = replicas.from_source(f"table {name}", numbers)
    as_tuples: list[Any] = [tuple(each) if isinstance(each, list) else each for each in values]
    spec = TableSpec(**dict(zip(names, as_tuples, strict=True)))
    return ReplicatedExchange(replicas, spec, found[0] if found else None)
