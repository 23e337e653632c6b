"""Other trainers of a table in memory: torch's sparse optimizers on nn.Embedding, and FBGEMM's tables on the CPU.

Input: a number of rows. Output: sides whose step is what their users write: forward, backward with the gradient that is
given, step. Errors: `ImportError` if the library is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .work import LR, Batches, Seconds, timed

FBGEMM_INSTALL = "pip install fbgemm-gpu-cpu"
Side = Callable[[], Seconds]


def torch_side(name: str, batches: Batches, threads: int) -> Side:
    """Returns a side of torch: "SGD", "Adagrad" or "SparseAdam", over sparse gradients."""
    import torch

    embedding = torch.nn.Embedding(batches.num_rows, batches.dim, sparse=True, _weight=_weight(batches))
    optimizer = getattr(torch.optim, name)(embedding.parameters(), lr=LR)
    gradients = torch.from_numpy(batches.gradients)

    def step(row_ids: Any) -> None:
        optimizer.zero_grad()
        embedding(row_ids).backward(gradients)
        optimizer.step()

    def side() -> Seconds:
        row_ids = torch.from_numpy(batches.draw())
        torch.set_num_threads(threads)
        return timed(lambda: step(row_ids))

    return side


def fbgemm_side(rule: str, batches: Batches, threads: int) -> Side:
    """Returns a side of FBGEMM's table batched embeddings: "EXACT_ROWWISE_ADAGRAD" or "EXACT_SGD"."""
    import torch
    from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(batches.num_rows, batches.dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=getattr(EmbOptimType, rule),
        learning_rate=LR,
        eps=1e-8,
        weights_precision=SparseType.FP32,
        output_dtype=SparseType.FP32,
        pooling_mode=PoolingMode.NONE,
    )
    table.split_embedding_weights()[0].data.copy_(_weight(batches))
    gradients, offsets = torch.from_numpy(batches.gradients), torch.tensor([0, batches.references])

    def side() -> Seconds:
        row_ids = torch.from_numpy(batches.draw())
        torch.set_num_threads(threads)
        return timed(lambda: table(row_ids, offsets).backward(gradients))

    return side


def _weight(batches: Batches) -> Any:
    import torch

    return torch.from_numpy(np.zeros((batches.num_rows, batches.dim), dtype=np.float32))
