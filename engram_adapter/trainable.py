"""`TrainableEmbedding`: the rows of token ids in a training, with gradient. `TrainableRows` is the same for row ids.

Input: token ids, or row ids. Output: values in float32 or bfloat16, on the device of the ids; gradients go to the
table's sums, which a `TableOptimizer` applies. Errors: `FingerprintMismatchError` for a training whose table was built
with another hash, and what `TrainingTable.gather` raises.

Shapes: B sequences, T tokens, O orders, H rows per key, R references to rows in a batch, D distinct rows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from tierstore.errors import ConfigError

from .hash_spec import HashSpec
from .lookup_call import LookupCall, as_int64
from .rounded_rows import rounded_values
from .store_module import check_fingerprint, named_table
from .table_gradient import TableGradient, TableLookup
from .token_shapes import check_integers

if TYPE_CHECKING:
    from tierstore import TableSpec, Training
    from tierstore.training.table import TrainingTable
    from tierstore.training.ticket import TrainingTicket

Groups = Literal["sequence", "batch"]
OUT_DTYPES = (torch.float32, torch.bfloat16)


class TrainableModule(torch.nn.Module):
    """A module that looks rows up in one table of a training, and takes their gradients.

    It has one parameter, `gradient_norms`, which stands for the table where torch expects a parameter (see
    `table_gradient`): give it to a `TableOptimizer`, not to another optimizer. It is not in the state_dict, because
    rows are in the training's commits. A copy shares the training; a module cannot be pickled, because a training is of
    one process. To torch.compile it is a graph break.
    """

    gradient_norms: torch.nn.Parameter

    def __init__(self, training: Training, name: str, dtype: torch.dtype, quantized: bool, groups: Groups) -> None:
        """Binds the table `name`. Raises `ConfigError` if it is missing, or for another dtype or another `groups`."""
        super().__init__()
        if not hasattr(training, "commit"):
            raise TypeError(f"training: a {type(training).__name__}; give what tierstore.open_training returned")
        if dtype not in OUT_DTYPES:
            raise ConfigError(f"dtype {dtype}: rows come out in torch.float32 or torch.bfloat16")
        if groups not in ("sequence", "batch"):
            raise ConfigError(f"groups {groups!r}: 'sequence' (a group for each) or 'batch' (one group)")
        self._training: Training = training
        self._table: TrainingTable = named_table(training, name)
        self._table_spec = self._table.spec
        self.dtype, self.groups, self.quantized = dtype, groups, quantized
        self.num_embeddings, self.num_heads = self._table_spec.num_rows, self._table_spec.num_heads
        self.embedding_dim = self._table_spec.dim
        self._collect()

    def _collect(self) -> None:
        self._gradient = TableGradient(self._table_spec)
        self.gradient_norms = self._gradient.parameter

    @property
    def training_store(self) -> Training:
        """The training that it looks up in; `training` is torch's flag of the module."""
        return self._training

    @property
    def table(self) -> TrainingTable:
        """The table of the training."""
        return self._table

    @property
    def table_spec(self) -> TableSpec:
        """What its table is."""
        return self._table_spec

    @property
    def gradient(self) -> TableGradient:
        """What backward has brought for the table."""
        return self._gradient

    def _values(self, row_ids: np.ndarray, groups: np.ndarray | None, device: torch.device) -> torch.Tensor:
        """Returns values [..., dim] of row ids [...], with gradient if torch asks for it."""
        self._gradient.begin_forward()
        if torch.is_grad_enabled() and self.gradient_norms.requires_grad:
            flat = row_ids.reshape(-1)
            lookup = TableLookup(flat, groups, self._table.pin_rows(flat))
            apply: Any = _TableRows.apply
            values: torch.Tensor = apply(self.gradient_norms, self, lookup, row_ids, device)
            return values
        return self._gathered(row_ids, device)

    def _gathered(self, row_ids: np.ndarray, device: torch.device) -> torch.Tensor:
        """Returns values [..., dim] as they are now. To another device than the CPU, each distinct row travels once."""
        if device.type == "cpu":
            return self._rows_out(row_ids)
        distinct, places = np.unique(row_ids, return_inverse=True)
        values = self._rows_out(distinct).to(device)
        return values[torch.from_numpy(places.reshape(row_ids.shape)).to(device)]

    def _rows_out(self, row_ids: np.ndarray) -> torch.Tensor:
        if self.quantized:
            distinct, places = np.unique(row_ids, return_inverse=True)
            rounded = torch.from_numpy(rounded_values(self._table, distinct)).to(self.dtype)
            return rounded[torch.from_numpy(places.reshape(row_ids.shape))]
        values = torch.empty((*row_ids.shape, self.embedding_dim), dtype=torch.float32, device="cpu")
        self._table.gather(row_ids, values.numpy())
        return values.to(self.dtype)

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
        shared = {"_training", "_table", "_table_spec", "_hash_spec", "_gradient", "_parameters"}
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


class TrainableEmbedding(TrainableModule):
    """Looks up the rows of token ids in a training: `TrainableEmbedding(training, layer, spec)(token_ids)`."""

    def __init__(
        self,
        training: Training,
        layer: int | str,
        spec: HashSpec,
        dtype: torch.dtype = torch.float32,
        quantized: bool = False,
        groups: Groups = "sequence",
    ) -> None:
        """Binds a table to a hash; reads nothing.

        Args:
            training: An open training; it stays open as long as this module lives.
            layer: The 0-based index of the model's module, or the table's name.
            spec: The model's hash.
            dtype: Of the values, float32 or bfloat16 (rounded half to even). The rows are trained in float32.
            quantized: Hand out values as `publish` and `export` would round them to the table's codec; gradients go
                straight through. So what is trained is what will be served.
            groups: How gradients of one row are summed: "sequence", each sequence of a batch first by itself; then any
                division of the batch gives the same bits. "batch": all in the order of the batch, which has the bits of
                a dense backward of torch.

        Raises:
            FingerprintMismatchError: `spec` is not the hash that the table was built with.
            ConfigError: There is no such table; another dtype or groups.
        """
        try:
            name = spec.table_name(layer)
        except KeyError as error:
            raise ConfigError(f"{error.args[0]}: pass one of these, or the hash of another model") from None
        check_fingerprint(named_table(training, name), spec, layer)
        self._layer, self._hash_spec = layer, spec
        super().__init__(training, name, dtype, quantized, groups)

    @property
    def features(self) -> int:
        """Values that one token gets: rows a token times values a row."""
        return self.num_heads * self.embedding_dim

    def prefetch(
        self, token_ids: torch.Tensor, history: torch.Tensor | None = None, dead: torch.Tensor | None = None
    ) -> TrainingTicket:
        """Starts to bring the rows of a later forward into DRAM; waits for no read. Results do not depend on it."""
        return prefetch_training([self], token_ids, history, dead)

    @torch.compiler.disable
    def forward(
        self, token_ids: torch.Tensor, history: torch.Tensor | None = None, dead: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the rows of token ids as [B, T, O * H, dim], on their device, with gradient. Blocks on the reads.

        The rows stay in DRAM until the optimizer's step, or until the graph dies. Arguments and errors are those of
        `TieredEmbedding.forward`.
        """
        row_ids = self._row_ids(token_ids, history, dead)
        groups = None
        if self.groups == "sequence" and len(row_ids) > 1:
            groups = np.repeat(np.arange(len(row_ids), dtype=np.int32), row_ids[0].size)
        return self._values(row_ids, groups, token_ids.device)

    def _row_ids(self, token_ids: torch.Tensor, history: torch.Tensor | None, dead: torch.Tensor | None) -> np.ndarray:
        call = LookupCall(token_ids, history, dead, self._hash_spec.history_tokens)
        return self._hash_spec.row_ids(call.token_ids, self._layer, history=call.history, dead=call.dead)


class TrainableRows(TrainableModule):
    """Drop-in for an `nn.Embedding` whose caller has row ids, with gradient: `TrainableRows(training, layer)(row_ids)`.

    `weight` is empty, [0, dim]: it says device and dtype to whoever asks, and is not in the state_dict.
    """

    weight: torch.Tensor

    def __init__(
        self,
        training: Training,
        layer: int | str,
        dtype: torch.dtype = torch.float32,
        quantized: bool = False,
        groups: Groups = "sequence",
    ) -> None:
        """Binds a table, by the index of the model's module or by name; else as `TrainableEmbedding`."""
        name = layer if isinstance(layer, str) else f"layers.{layer}"
        super().__init__(training, name, dtype, quantized, groups)
        empty = torch.empty((0, self.embedding_dim), dtype=dtype, device="cpu")
        self.register_buffer("weight", empty, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves `weight`, which says where the model is; its dtype stays that of the output."""
        del recurse
        self.weight = fn(self.weight).to(self.dtype)
        return self

    @torch.compiler.disable
    def forward(self, row_ids: torch.Tensor) -> torch.Tensor:
        """Returns the rows of `row_ids`, integers [...], as [..., dim] on their device; row id -1 gives zeros.

        With groups "sequence", the first axis of ids of two or more axes is the sequences'. Blocks on the reads. Raises
        `ValueError` for ids outside the table.
        """
        check_integers(row_ids, "row ids")
        ids = as_int64(row_ids)
        groups = None
        if self.groups == "sequence" and ids.ndim > 1 and len(ids) > 1:
            groups = np.repeat(np.arange(len(ids), dtype=np.int32), ids[0].size)
        return self._values(ids, groups, row_ids.device)


class _TableRows(torch.autograd.Function):
    """Values of rows out, gradients into the table's sums. To autograd they hang on `gradient_norms`."""

    @staticmethod
    def forward(
        ctx: Any,
        gradient_norms: torch.Tensor,
        module: TrainableModule,
        lookup: TableLookup,
        row_ids: np.ndarray,
        device: torch.device,
    ) -> torch.Tensor:
        ctx.gradient, ctx.lookup, ctx.num_norms = module._gradient, lookup, len(gradient_norms)
        return module._gathered(row_ids, device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.gradient.arrive(ctx.lookup, gradient)
        return torch.zeros(ctx.num_norms, dtype=torch.float64), None, None, None, None


def prefetch_training(
    embeddings: Sequence[TrainableEmbedding],
    token_ids: torch.Tensor,
    history: torch.Tensor | None = None,
    dead: torch.Tensor | None = None,
) -> TrainingTicket:
    """Starts to bring the rows of a later forward into DRAM, of several layers as one request of their training.

    Arguments as in `TrainableEmbedding.forward`. Waits for no read. Raises `ValueError` if there is no layer, or the
    layers are of different trainings.
    """
    if not embeddings or any(each._training is not embeddings[0]._training for each in embeddings):
        raise ValueError("prefetch needs layers of one training: prefetch those of different trainings apart")
    requests: Mapping[str, np.ndarray] = {
        each._table_spec.name: each._row_ids(token_ids, history, dead) for each in embeddings
    }
    return embeddings[0]._training.prefetch(requests)


def trained_tables(model: torch.nn.Module) -> list[TrainableModule]:
    """Returns the modules of a model whose rows are in a training, for a `TableOptimizer`."""
    return [each for each in model.modules() if isinstance(each, TrainableModule)]
