"""What modules over a training share: rows out of one table, with gradient, from this process or from other ranks.

Input: row ids. Output: values in float32 or bfloat16; gradients go to the table's sums, which a `TableOptimizer`
applies. Errors: `ConfigError` for a table that the training has not, and what `TrainingTable.gather` and exchanges
raise.

Shapes: R references to rows in a batch, D distinct rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from tierstore.errors import ConfigError

from .replicas import Replicas, ReplicatedExchange, replicated_exchange
from .rounded_rows import rounded_values
from .store_module import named_table
from .table_exchange import Reduction, TableExchange, exchange_of, expanded
from .table_gradient import TableGradient, TableLookup

if TYPE_CHECKING:
    from tierstore import TableSpec, Training
    from tierstore.training.table import TrainingTable

Groups = Literal["sequence", "batch"]
MakeIds = Callable[[], tuple[np.ndarray, np.ndarray | None]]
OUT_DTYPES = (torch.float32, torch.bfloat16)


class TrainableModule(torch.nn.Module):
    """A module that looks rows up in one table of a training, and takes their gradients.

    It has one parameter, `gradient_norms`, which stands for the table where torch expects a parameter (see
    `table_gradient`): give it to a `TableOptimizer`, not to another optimizer. It is not in the state_dict, because
    rows are in the training's commits. A copy shares the training; a module cannot be pickled, because a training is of
    one process. To torch.compile it is a graph break.
    """

    gradient_norms: torch.nn.Parameter

    def __init__(
        self,
        training: Training | None,
        name: str,
        dtype: torch.dtype,
        quantized: bool,
        groups: Groups,
        process_group: Any,
        reduction: Reduction,
        replicas: Replicas | None,
    ) -> None:
        """Binds the table `name`. Raises `ConfigError` if it is missing, or for another dtype or another `groups`."""
        super().__init__()
        if dtype not in OUT_DTYPES:
            raise ConfigError(f"dtype {dtype}: rows come out in torch.float32 or torch.bfloat16")
        if groups not in ("sequence", "batch"):
            raise ConfigError(f"groups {groups!r}: 'sequence' (a group for each) or 'batch' (one group)")
        self._replicas, self._training = replicas, training
        self._table: TrainingTable | None = None
        self._table_spec: TableSpec
        self._exchange: TableExchange | ReplicatedExchange | None
        if replicas is None:
            self._exchange = self._bind(name, process_group, reduction)
        else:
            found = replicated_exchange(replicas, training, name, lambda: self._bind(name, process_group, reduction))
            self._exchange, self._table_spec = found, self._table_spec if replicas.is_source else found.spec
        self.dtype, self.groups, self.quantized = dtype, groups, quantized
        whole = self._table_spec.whole or self._table_spec
        self.num_embeddings, self.num_heads = whole.num_rows, whole.num_heads
        self.embedding_dim = self._table_spec.dim
        self._collect()

    def _bind(self, name: str, process_group: Any, reduction: Reduction) -> TableExchange | None:
        """Binds the table of this rank's training, and returns its exchange."""
        if not hasattr(self._training, "commit"):
            raise TypeError(f"training: a {type(self._training).__name__}; give what tierstore.open_training returned")
        self._table = named_table(self.training_store, name)
        self._table_spec = self._table.spec
        return exchange_of(self._table, process_group, reduction)

    def _collect(self) -> None:
        self._gradient = TableGradient(self._table_spec, self._exchange)
        self.gradient_norms = self._gradient.parameter

    @property
    def training_store(self) -> Training:
        """The training that it looks up in; `training` is torch's flag of the module.

        Raises `ConfigError` on a replica that has none.
        """
        if self._training is None:
            raise ConfigError("this replica has no training: rank 0 of its replica group has it")
        return self._training

    @property
    def table(self) -> TrainingTable:
        """The table of the training. Raises `ConfigError` on a replica that has none."""
        if self._table is None:
            raise ConfigError("this replica has no table: rank 0 of its replica group has it")
        return self._table

    @property
    def replicas(self) -> Replicas | None:
        """The ranks that see the same tokens; None without a replica group."""
        return self._replicas

    @property
    def table_spec(self) -> TableSpec:
        """What its table is."""
        return self._table_spec

    @property
    def gradient(self) -> TableGradient:
        """What backward has brought for the table."""
        return self._gradient

    @property
    def exchange(self) -> TableExchange | ReplicatedExchange | None:
        """What brings rows from other ranks; None without a process group."""
        return self._exchange

    def _values(self, make_ids: MakeIds, device: torch.device) -> torch.Tensor:
        """Returns values [..., dim] of row ids [...], with gradient if torch asks for it.

        make_ids: Returns the row ids and their groups. What it raises, other ranks hear of.
        """
        self._gradient.begin_forward()
        with_gradient = torch.is_grad_enabled() and self.gradient_norms.requires_grad
        lookup: TableLookup | None = None
        values: Callable[[], torch.Tensor]
        if self._exchange is not None:
            lookup, values = self._exchanged(make_ids, with_gradient, device)
        else:
            row_ids, groups = make_ids()
            values = partial(self._gathered, row_ids, device)
            if with_gradient:
                flat = row_ids.reshape(-1)
                lookup = TableLookup(flat, groups, self.table.pin_rows(flat))
        if not with_gradient:
            return values()
        apply: Any = _TableRows.apply
        of_rows: torch.Tensor = apply(self.gradient_norms, self._gradient, lookup, values)
        return of_rows

    def _exchanged(
        self, make_ids: MakeIds, with_gradient: bool, device: torch.device
    ) -> tuple[TableLookup, Callable[[], torch.Tensor]]:
        """Brings rows from their owners; returns the lookup, and what makes values [..., dim] of them."""
        assert self._exchange is not None
        lookup, shape = TableLookup(np.empty(0, dtype=np.int64), None, None), [0]

        def flat_ids() -> tuple[np.ndarray, np.ndarray | None]:
            row_ids, lookup.groups = make_ids()
            lookup.row_ids, shape[:] = row_ids.reshape(-1), [*row_ids.shape, self.embedding_dim]
            return lookup.row_ids, lookup.groups

        def values_of(own: np.ndarray, room: torch.Tensor) -> torch.Tensor:
            if with_gradient:
                lookup.pins = self.table.pin_rows(own)
            return self._rows_out(own, room)

        lookup.sent, distinct = self._exchange.forward(flat_ids, with_gradient, values_of)
        return lookup, lambda: expanded(lookup.sent, distinct, device).reshape(shape)

    def _gathered(self, row_ids: np.ndarray, device: torch.device) -> torch.Tensor:
        """Returns values [..., dim] as they are now. To another device than the CPU, each distinct row travels once."""
        if device.type == "cpu":
            return self._rows_out(row_ids)
        distinct, places = np.unique(row_ids, return_inverse=True)
        values = self._rows_out(distinct).to(device)
        return values[torch.from_numpy(places.reshape(row_ids.shape)).to(device)]

    def _rows_out(self, row_ids: np.ndarray, room: torch.Tensor | None = None) -> torch.Tensor:
        """Returns values [..., dim]; room: float32 of that shape, which may be used for them."""
        if self.quantized:
            distinct, places = np.unique(row_ids, return_inverse=True)
            rounded = torch.from_numpy(rounded_values(self.table, distinct)).to(self.dtype)
            return rounded[torch.from_numpy(places.reshape(row_ids.shape))]
        if room is None:
            room = torch.empty((*row_ids.shape, self.embedding_dim), dtype=torch.float32, device="cpu")
        self.table.gather(row_ids, room.numpy())
        return room.to(self.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves and casts nothing: rows come to where the ids are, and `gradient_norms` stays float64 on the CPU."""
        del fn, recurse
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Saves nothing: the rows are in the training's commits, which a `TableOptimizer`'s state_dict names."""

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        """Loads nothing, and misses nothing."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        shared = {
            "_training",
            "_table",
            "_table_spec",
            "_hash_spec",
            "_gradient",
            "_parameters",
            "_exchange",
            "_replicas",
        }
        copied.__dict__.update(
            {name: value if name in shared else copy.deepcopy(value, memo) for name, value in self.__dict__.items()}
        )
        copied._parameters = {}
        copied._collect()
        copied.gradient_norms.requires_grad_(self.gradient_norms.requires_grad)
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        raise TypeError(
            f"{type(self).__name__} over table {self._table_spec.name} cannot be pickled: a training is of one "
            "process; save model.state_dict() and the TableOptimizer's, and open the training where it goes on"
        )


class _TableRows(torch.autograd.Function):
    """Values of rows out, gradients into the table's sums. To autograd they hang on `gradient_norms`."""

    @staticmethod
    def forward(
        ctx: Any,
        gradient_norms: torch.Tensor,
        gradient: TableGradient,
        lookup: TableLookup,
        values: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        ctx.gradient, ctx.lookup, ctx.num_norms = gradient, lookup, len(gradient_norms)
        return values()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.gradient.arrive(ctx.lookup, gradient)
        return torch.zeros(ctx.num_norms, dtype=torch.float64), None, None, None
