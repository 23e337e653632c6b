"""`TrainableEmbedding`: the rows of token ids in a training, with gradient. `TrainableRows` is the same for row ids.

Input: token ids, or row ids. Output: values in float32 or bfloat16, on the device of the ids; gradients go to the
table's sums, which a `TableOptimizer` applies. Errors: `FingerprintMismatchError` for a training whose table was built
with another hash, and what `TrainingTable.gather` raises.

With a process group, each rank holds a slice of the table: rows come from the ranks that own them, and gradients go
there (`table_exchange`). Then forward, backward and prefetch are called by all ranks in the same order.

Shapes: B sequences, T tokens, O orders, H rows per key, R references to rows in a batch, D distinct rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from tierstore.errors import ConfigError
from tierstore.training.ticket import TrainingTicket

from .hash_spec import HashSpec
from .lookup_call import LookupCall, as_int64
from .replicas import Replicas
from .store_module import check_fingerprint, named_table
from .table_exchange import Reduction, prefetch_over_ranks
from .token_shapes import check_integers
from .trainable_module import Groups, TrainableModule

if TYPE_CHECKING:
    from tierstore import Training

    from .early_rows import EarlyTicket


class TrainableEmbedding(TrainableModule):
    """Looks up the rows of token ids in a training: `TrainableEmbedding(training, layer, spec)(token_ids)`."""

    def __init__(
        self,
        training: Training | None,
        layer: int | str,
        spec: HashSpec,
        dtype: torch.dtype = torch.float32,
        quantized: bool = False,
        groups: Groups = "sequence",
        process_group: Any = None,
        reduction: Reduction = "mean",
        replica_group: Any = None,
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
                division of the batch gives the same bits, over ranks too. "batch": all in the order of the batch, which
                has the bits of a dense backward of torch; a rank's batch is one group.
            process_group: Of torch.distributed, or `Ranks`: rank I's training is of slice I of the table, and the ranks
                construct, call and step their modules in the same order. None: this process holds the whole table.
            reduction: Of gradients over ranks: "mean", divided by the number of ranks, as DDP and FSDP do for the dense
                weights; or "sum".
            replica_group: Ranks that see the same tokens, such as a tensor parallel group: of torch.distributed, a
                `DeviceMesh` of one dimension, or `Ranks` (with a longer limit than the process group's). Its rank 0 has
                the training and the process group; the others pass training=None, and receive. All must have the same
                gradient of the rows, which counts once.

        Raises:
            FingerprintMismatchError: `spec` is not the hash that the table was built with.
            ConfigError: There is no such table; another dtype or groups; slices that are not the whole table.
            RankError: The other ranks did not come.
        """
        try:
            name = spec.table_name(layer)
        except KeyError as error:
            raise ConfigError(f"{error.args[0]}: pass one of these, or the hash of another model") from None
        replicas = None if replica_group is None else Replicas(replica_group)
        if training is not None:
            check_fingerprint(named_table(training, name), spec, layer)
        super().__init__(training, name, dtype, quantized, groups, process_group, reduction, replicas)
        self._layer, self._hash_spec = layer, spec

    @property
    def features(self) -> int:
        """Values that one token gets: rows a token times values a row."""
        return self.num_heads * self.embedding_dim

    def prefetch(
        self, token_ids: torch.Tensor, history: torch.Tensor | None = None, dead: torch.Tensor | None = None
    ) -> TrainingTicket | EarlyTicket:
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

        def make_ids() -> tuple[np.ndarray, np.ndarray | None]:
            row_ids = self._row_ids(token_ids, history, dead)
            if self.groups == "batch" or len(row_ids) <= 1:
                return row_ids, None
            return row_ids, np.repeat(np.arange(len(row_ids), dtype=np.int32), row_ids[0].size)

        return self._values(make_ids, token_ids.device if isinstance(token_ids, torch.Tensor) else torch.device("cpu"))

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
        training: Training | None,
        layer: int | str,
        dtype: torch.dtype = torch.float32,
        quantized: bool = False,
        groups: Groups = "sequence",
        process_group: Any = None,
        reduction: Reduction = "mean",
        replica_group: Any = None,
    ) -> None:
        """Binds a table, by the index of the model's module or by name; else as `TrainableEmbedding`."""
        name = layer if isinstance(layer, str) else f"layers.{layer}"
        replicas = None if replica_group is None else Replicas(replica_group)
        super().__init__(training, name, dtype, quantized, groups, process_group, reduction, replicas)
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

        def make_ids() -> tuple[np.ndarray, np.ndarray | None]:
            check_integers(row_ids, "row ids")
            ids = as_int64(row_ids)
            if self.groups == "batch" or ids.ndim <= 1 or len(ids) <= 1:
                return ids, None
            return ids, np.repeat(np.arange(len(ids), dtype=np.int32), ids[0].size)

        return self._values(make_ids, row_ids.device if isinstance(row_ids, torch.Tensor) else torch.device("cpu"))


def prefetch_training(
    embeddings: Sequence[TrainableEmbedding],
    token_ids: torch.Tensor,
    history: torch.Tensor | None = None,
    dead: torch.Tensor | None = None,
) -> TrainingTicket | EarlyTicket:
    """Starts to bring the rows of a later forward into DRAM, of several layers as one request of their training.

    Arguments as in `TrainableEmbedding.forward`. Waits for no read. Raises `ValueError` if there is no layer, or the
    layers are of different trainings.
    """
    if not embeddings or any(each._training is not embeddings[0]._training for each in embeddings):
        raise ValueError("prefetch needs layers of one training: prefetch those of different trainings apart")
    rows = [(each, each._row_ids(token_ids, history, dead)) for each in embeddings]
    if embeddings[0]._training is None:  # a replica: the source prefetches
        ticket = TrainingTicket("a prefetch of the source")
        ticket.end()
        return ticket
    training = embeddings[0].training_store
    over_ranks = [(each.exchange, row_ids) for each, row_ids in rows if each.exchange is not None]
    if over_ranks:
        return prefetch_over_ranks(over_ranks, training.prefetch)
    return training.prefetch({each.table_spec.name: row_ids for each, row_ids in rows})


def trained_tables(model: torch.nn.Module) -> list[TrainableModule]:
    """Returns the modules of a model whose rows are in a training, for a `TableOptimizer`."""
    return [each for each in model.modules() if isinstance(each, TrainableModule)]
