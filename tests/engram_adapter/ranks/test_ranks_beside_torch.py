"""Tables over ranks beside torch's own ways to train the dense weights over ranks: DDP, FSDP2, GradScaler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.marks import slow_but
from support.rank_processes import run_ranks
from support.rank_training import Sliced, make_sliced, tokens_of
from support.tiny_store import DIM
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tierstore
from engram_adapter import TableOptimizer, TrainableEmbedding, dense_parameters, trained_tables

SIZE = 2
STEPS = 3


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Sliced:
    return make_sliced(tmp_path_factory.mktemp("sliced"))


class Model(torch.nn.Module):
    """Two dense layers over the rows of one table."""

    def __init__(self, embedding: TrainableEmbedding) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.rows = embedding
        self.first, self.last = torch.nn.Linear(8 * DIM, 16), torch.nn.Linear(16, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = self.last(torch.tanh(self.first(self.rows(ids).flatten(2))))
        return values.mean()


Wrap = Callable[[Model], torch.nn.Module]


def train(sliced: Sliced, path: Path, rank: int, size: int, group: Any, wrap: Wrap) -> tuple[list[float], bytes]:
    """Trains with clipping of all gradients together; returns the norms, and this rank's rows."""
    training = tierstore.open_training(path, tierstore.RowWiseAdagrad(lr=0.05), dram="8MiB", threads=1)
    model = Model(TrainableEmbedding(training, 1, sliced.spec, process_group=group))
    wrapped = wrap(model)
    tables = TableOptimizer(trained_tables(model))
    dense = torch.optim.SGD(dense_parameters(model), lr=0.1)
    norms = []
    for step in range(STEPS):
        loss = sum(wrapped(tokens_of(step, 0, 1, 0)[4 * each : 4 * each + 4]) for each in parts_of(rank, size))
        (loss * size / 2).backward()  # means of equal parts: two in all
        norms.append(clip(model, tables, 0.05))
        tables.step()
        dense.step()
        tables.zero_grad()
        dense.zero_grad()
    spec = training["layers.1"].spec
    rows = training["layers.1"].gather(np.arange(spec.row_start, spec.row_end))
    training.close()
    return norms, rows.tobytes()


def parts_of(rank: int, size: int) -> list[int]:
    return [0, 1] if size == 1 else [rank]


def clip(model: torch.nn.Module, tables: TableOptimizer, largest: float) -> float:
    """Clips tables and dense weights by their common norm, whatever the dense weights are."""
    dense = dense_parameters(model)
    norm = torch.nn.utils.get_total_norm([each.grad for each in dense if each.grad is not None])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    total = (norm.double() ** 2 + tables.grad_norm_squared()).sqrt()
    for each in (dense, [each.gradient_norms for each in trained_tables(model)]):
        torch.nn.utils.clip_grads_with_norm_(each, largest, total)
    return float(total)


def sharded(model: Model) -> torch.nn.Module:
    mesh = dist.device_mesh.init_device_mesh("cpu", (SIZE,))
    ignored = {each.gradient_norms for each in trained_tables(model)}
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    return model


WRAPS: dict[str, Wrap] = {
    "ddp": lambda model: DistributedDataParallel(model),
    "ddp, gradients in buckets": lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True),
    "fsdp2": sharded,
}


@pytest.mark.parametrize("kind", slow_but(["ddp", "fsdp2"], WRAPS))
def test_beside_data_parallel_dense_weights_a_step_is_that_of_one_process(
    sliced: Sliced, tmp_path: Path, kind: str
) -> None:
    """Within 1e-5, since the dense weights' own sums depend on the number of ranks."""
    paths = sliced.slices(SIZE, kind)
    found = run_ranks(
        lambda rank: train(sliced, paths[rank], rank, SIZE, dist.group.WORLD, WRAPS[kind]), SIZE, tmp_path / "ranks"
    )
    tierstore.reslice([sliced.whole], tmp_path / "one", 1)
    norms, rows = train(sliced, tmp_path / "one", 0, 1, None, lambda model: model)
    assert found[0][0] == found[1][0]
    np.testing.assert_allclose(found[0][0], norms, rtol=1e-5)
    of_ranks = np.frombuffer(b"".join(each for _, each in found), dtype=np.float32)
    np.testing.assert_allclose(of_ranks, np.frombuffer(rows, dtype=np.float32), atol=1e-5)


def test_grad_scaler_skips_the_step_of_all_ranks_if_one_overflows(sliced: Sliced, tmp_path: Path) -> None:
    paths = sliced.slices(SIZE, "scaler")

    def scaled(rank: int) -> Any:
        training = tierstore.open_training(paths[rank], tierstore.SGD(lr=0.5), dram="8MiB", threads=1)
        embedding = TrainableEmbedding(training, 1, sliced.spec, process_group=dist.group.WORLD)
        tables = TableOptimizer([embedding])
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        spec = training["layers.1"].spec
        seen = [training["layers.1"].gather(np.arange(spec.row_start, spec.row_end)).tobytes()]
        for step in range(2):
            loss = embedding(tokens_of(step, 0, SIZE, rank)).sum()
            scaler.scale(loss * (float("inf") if (rank, step) == (1, 0) else 1.0)).backward()
            scaler.unscale_(tables)
            scaler.step(tables)
            scaler.update()
            tables.zero_grad()
            seen.append(training["layers.1"].gather(np.arange(spec.row_start, spec.row_end)).tobytes())
        assert seen[0] == seen[1] != seen[2]
        return scaler.get_scale(), training["layers.1"].num_steps

    assert run_ranks(scaled, SIZE, tmp_path / "ranks") == [(32.0, 1)] * SIZE
