"""The gradient of one table, from backward to the optimizer's step: distinct rows, and the sums of their gradients.

Input: the gradients of lookups, as autograd brings them. Output: sums in float32 and a parameter of the model whose
`.grad` stands for them. Errors: `ValueError` if that `.grad` was changed in a way that no gradient can follow.

The parameter is how torch's own tools see a gradient that is no tensor of the table's shape. Its `.grad` holds the L2
norm of each block of the table (a head's rows), in float64. So `torch.nn.utils.clip_grad_norm_` finds the right norm
over tables and dense weights; whatever scales the `.grad` (clipping, `GradScaler.unscale_`) scales the gradient, when
the optimizer takes it; `.grad = None`, by whichever `zero_grad`, drops it; a gradient that is not finite makes the
`.grad` infinite or NaN.
"""

from __future__ import annotations

import itertools
import math
import weakref
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from tierstore import kernels
from tierstore.spec import TableSpec

SCALE_SPREAD_MAX = 1e-9  # relative, between the blocks' factors: float64 leaves 1e-15, and other changes far more

_numbers = itertools.count()


class TableLookup:
    """One lookup of a forward. Its graph owns it, and it owns the pins of its rows and the gradient that came for it:
    when the graph dies, they end."""

    def __init__(self, row_ids: np.ndarray, groups: np.ndarray | None, pins: Any) -> None:
        """row_ids: int64 [R]; groups: int32 [R], None for one group; pins: keep the rows in DRAM until released."""
        self.row_ids, self.groups, self.pins = row_ids, groups, pins
        self.sent: Any = None  # over ranks, what `GradientExchange.backward` needs
        self.number = next(_numbers)  # forwards in their order: backward goes through them in another one
        self.gradients: np.ndarray | None = None  # float32 [R, dim], of the newest backward pass


class GradientPart(NamedTuple):
    """The gradients of one lookup, of all ranks: those of rows that this rank holds."""

    row_ids: np.ndarray  # int64 [R]
    gradients: np.ndarray  # float32 [R, dim]
    groups: np.ndarray | None  # int32 [R]; None: one group


class GradientExchange(Protocol):
    """What makes the gradient of all ranks out of that of each."""

    def backward(self, sent: Any, gradients: np.ndarray, place: str) -> GradientPart:
        """Sends float32 [R, dim] of a lookup, "1 of 1", to the ranks that hold its rows; returns what comes here."""

    def gradient_norms(self, rows: np.ndarray, sums: np.ndarray) -> np.ndarray:
        """Returns the norms of all blocks, float64 [blocks], of what each rank holds."""


class RowGradients(NamedTuple):
    """What backward has brought since the last `zero_grad`."""

    rows: np.ndarray  # int64 [D], distinct; over ranks, those of this rank's slice
    sums: np.ndarray  # float32 [D, dim]
    norms: np.ndarray  # float64 [blocks], of the whole table; NaN or infinite if a sum is
    pins: list[Any]  # keep the rows in DRAM; empty once their step was taken


class TableGradient:
    """Collects the gradient of one table. Of one thread at a time, as a model's steps are.

    Attributes:
        parameter: float64 [blocks], on the CPU. Its values mean nothing; its `.grad` is described above.
    """

    def __init__(self, spec: TableSpec, exchange: GradientExchange | None = None) -> None:
        """exchange: with the other ranks. Takes no memory until a gradient comes."""
        self._blocks, self._num_rows, self._exchange = block_starts(spec), spec.num_rows, exchange
        self.parameter = torch.nn.Parameter(torch.zeros(len(self._blocks), dtype=torch.float64, device="cpu"))
        accumulated = weakref.WeakMethod(self._accumulated)  # torch holds hooks where the collector finds no cycle
        self.parameter.register_post_accumulate_grad_hook(lambda parameter: (accumulated() or _nothing)(parameter))
        # By backward pass, because passes nest (activation checkpointing) and some never reach `parameter.grad`.
        self._arrived: dict[int, list[weakref.ref[TableLookup]]] = {}
        self._pending: RowGradients | None = None

    def begin_forward(self) -> None:
        """Forgets what backward passes left that ended without `parameter.grad`, such as `torch.autograd.grad`."""
        if _backward_pass() == -1:
            self._arrived.clear()

    def arrive(self, lookup: TableLookup, gradient: torch.Tensor) -> None:
        """Takes the gradient of a lookup, [..., dim] of any float type and device, inside a backward pass."""
        values = gradient.detach().to("cpu", torch.float32).contiguous().numpy()
        lookup.gradients = values.reshape(-1, values.shape[-1])
        self._arrived.setdefault(_backward_pass(), []).append(weakref.ref(lookup))

    def _accumulated(self, parameter: torch.Tensor) -> None:
        """Adds what has arrived to what was pending. Torch calls it when this pass has added its zeros to `.grad`."""
        living = (each() for each in self._arrived.pop(_backward_pass(), []))
        arrived = sorted((each for each in living if each is not None), key=lambda each: each.number)
        grad = parameter.grad
        assert grad is not None
        before = self._scaled(grad)
        if arrived:
            parts = [self._part(lookup, f"{i + 1} of {len(arrived)}") for i, lookup in enumerate(arrived)]
            rows, sums = _summed(self._num_rows, before, parts)
            norms = self._norms(rows, sums)
            pins = [*([] if before is None else before.pins), *(lookup.pins for lookup in arrived)]
            for lookup in arrived:
                lookup.pins = lookup.gradients = None
            self._pending = RowGradients(rows, sums, norms, [each for each in pins if each is not None])
        else:
            self._pending = before
        if self._pending is not None:
            grad.copy_(torch.from_numpy(self._pending.norms))

    def _part(self, lookup: TableLookup, place: str) -> GradientPart:
        assert lookup.gradients is not None
        if self._exchange is None:
            return GradientPart(lookup.row_ids, lookup.gradients, lookup.groups)
        return self._exchange.backward(lookup.sent, lookup.gradients, place)

    def _norms(self, rows: np.ndarray, sums: np.ndarray) -> np.ndarray:
        if self._exchange is not None:
            return self._exchange.gradient_norms(rows, sums)
        norms = np.empty(len(self._blocks), dtype=np.float64)
        kernels.gradient_norms(rows, sums, self._blocks, norms)
        return norms

    def taken(self) -> RowGradients | None:
        """Returns the gradient, scaled as `.grad` was; None without any. It stays pending until it is dropped.

        Raises `ValueError` if `.grad` is no multiple of what it was.
        """
        grad = self.parameter.grad
        if grad is None:
            self.drop()
            return None
        return self._scaled(grad)

    def grad_norm_squared(self) -> float:
        """Returns the square of the gradient's L2 norm, in float64; 0 without a gradient."""
        found = self.taken()
        return 0.0 if found is None else float(np.square(found.norms).sum())

    def release_pins(self) -> None:
        """Lets the rows of the pending gradient leave DRAM: its step was taken."""
        if self._pending is not None:
            while self._pending.pins:
                self._pending.pins.pop().release()

    def drop(self) -> None:
        """Forgets the pending gradient, as `zero_grad` does, and gives its memory back."""
        self.release_pins()
        self._pending = None

    def _scaled(self, grad: torch.Tensor) -> RowGradients | None:
        """Returns the pending gradient times what `grad` was scaled by since; None if it was dropped meanwhile."""
        pending = self._pending
        if pending is None:
            return None
        now = grad.detach().to("cpu", torch.float64).numpy()
        if not now.any() and pending.norms.any():  # zeroed, or a new tensor of zeros
            self.drop()
            return None
        if np.array_equal(now, pending.norms, equal_nan=True):
            return pending
        scale = np.float32(_scale_between(pending.norms, now))
        with np.errstate(over="ignore", invalid="ignore"):
            return RowGradients(pending.rows, pending.sums * scale, now.copy(), pending.pins)


def _nothing(parameter: torch.Tensor) -> None:
    """The hook of a parameter whose module, and graphs, are gone."""


def block_starts(spec: TableSpec) -> np.ndarray:
    """Returns the first row of each block of a table, int64: its heads, or one block of all rows."""
    return np.array((spec.whole or spec).offsets or (0,), dtype=np.int64)


def _summed(num_rows: int, before: RowGradients | None, parts: list[GradientPart]) -> tuple[np.ndarray, np.ndarray]:
    """Returns distinct rows and the sums of their gradients: those before first, then part by part, group by group.

    So gradients that accumulate over several backward passes have the bits of one pass over all their sequences.
    """
    if before is None and len(parts) == 1:
        return kernels.sum_gradients(parts[0].row_ids, parts[0].gradients, num_rows, parts[0].groups)[:2]
    if before is not None:
        parts = [GradientPart(before.rows, before.sums, None), *parts]
    groups, next_group = [], 0
    for part in parts:
        own = np.zeros(len(part.row_ids), dtype=np.int32) if part.groups is None else part.groups
        groups.append(own + np.int32(next_group))
        next_group += int(own.max(initial=0)) + 1
    row_ids, gradients = [part.row_ids for part in parts], [part.gradients for part in parts]
    of_all = (np.concatenate(row_ids), np.concatenate(gradients), num_rows, np.concatenate(groups))
    return kernels.sum_gradients(*of_all)[:2]


def _scale_between(norms: np.ndarray, now: np.ndarray) -> float:
    """Returns by what all norms were multiplied. Raises `ValueError` if not all by one number."""
    if not (np.isfinite(norms).all() and np.isfinite(now).all()):
        return math.nan
    largest = int(np.argmax(norms))
    scale = float(now[largest] / norms[largest]) if norms[largest] else math.inf
    allowed = SCALE_SPREAD_MAX * abs(scale) * norms[largest]
    if not (np.abs(now - scale * norms) <= allowed).all():
        raise ValueError(
            f"the .grad of a table's gradient_norms is {now.tolist()}, which is no multiple of {norms.tolist()}: it "
            "holds norms, which only a factor over all of them can change; clip by norm, not by value, and add nothing"
        )
    return scale


def _backward_pass() -> int:
    """Returns a number of the backward pass that this thread is in; -1 outside of one."""
    number: int = torch._C._current_graph_task_id()
    return number
