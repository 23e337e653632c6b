"""TorchRec's EmbeddingCollection, sharded by rows over the ranks, with its fused row-wise Adagrad.

Input: the size of a table. Output: a step: forward, and a backward in which the rows are updated. Errors: `ImportError`
if TorchRec or FBGEMM is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

INSTALL = "pip install torchrec fbgemm-gpu-cpu"
LR = 0.01


def step_of(num_rows: int, dim: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Returns a step: row ids, int64 [R], and gradients, float32 [R, dim], in; rows before the step, [R, dim], out.

    All ranks of the default group call this, and then the step, together.
    """
    import torch
    import torch.distributed as dist
    from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
    from torchrec.distributed.types import ShardingEnv
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
    from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

    table = EmbeddingConfig(name="table", embedding_dim=dim, num_embeddings=num_rows, feature_names=["rows"])
    collection = EmbeddingCollection(tables=[table], device=torch.device("meta"))
    apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": LR})
    sharder: Any = EmbeddingCollectionSharder()
    constraints = {"table": ParameterConstraints(sharding_types=["row_wise"], compute_kernels=["fused"])}
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu", hbm_cap=0, ddr_cap=64 << 30)
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    plan = planner.collective_plan(collection, [sharder], dist.group.WORLD)
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    model = DistributedModelParallel(collection, env=env, device=torch.device("cpu"), plan=plan, sharders=[sharder])

    def step(row_ids: np.ndarray, gradients: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(row_ids)
        rows = model(KeyedJaggedTensor(["rows"], ids, lengths=torch.ones(len(ids), dtype=torch.int32)))
        values = rows["rows"].values()
        values.backward(torch.from_numpy(gradients))
        found: np.ndarray = values.detach().numpy()
        return found

    return step
