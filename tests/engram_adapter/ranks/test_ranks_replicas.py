"""Replicas: ranks that see the same tokens. One holds the slice, the others receive, and no gradient counts twice."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.rank_processes import RankFailure, await_ranks, outcomes_of, run_ranks, start_ranks
from support.rank_training import RankTrainer, Sliced, gradients_of, joined, make_sliced, tokens_of
from support.tiny_store import LAYERS
from torch.distributed.device_mesh import init_device_mesh

import tierstore
from engram_adapter import TableOptimizer, TrainableEmbedding
from tierstore.errors import RankError
from tierstore.training.optimizers import Optimizer

RULE = tierstore.RowWiseAdagrad(lr=0.05)
SIZE = 2  # of either dimension


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Sliced:
    return make_sliced(tmp_path_factory.mktemp("sliced"))


class MeshTrainer(RankTrainer):
    """One rank of 2 x 2: slices over the first dimension, replicas over the second."""

    def __init__(self, paths: list[Path], sliced: Sliced, rule: Optimizer) -> None:
        mesh = init_device_mesh("cpu", (SIZE, SIZE), mesh_dim_names=("dp", "tp"))
        self.rank, self.size = mesh["dp"].get_local_rank(), SIZE
        self.is_source = mesh["tp"].get_local_rank() == 0
        self.training: Any = None
        if self.is_source:
            self.training = tierstore.open_training(paths[self.rank], rule, dram="8MiB", threads=1)
        self.embeddings = [
            TrainableEmbedding(
                self.training,
                layer,
                sliced.spec,
                process_group=mesh["dp"],
                reduction="sum",
                replica_group=mesh["tp"],
            )
            for layer in LAYERS
        ]
        self.optimizer = TableOptimizer(self.embeddings)

    def own_rows(self) -> dict[str, np.ndarray] | None:
        return self.rows() if self.is_source else None


def test_two_slices_of_two_replicas_give_the_values_losses_and_rows_of_one_process_in_bits(
    sliced: Sliced, tmp_path: Path
) -> None:
    paths = sliced.slices(SIZE, "bits")

    def train(_: int) -> Any:
        trainer = MeshTrainer(paths, sliced, RULE)
        trainer.embeddings[0].prefetch(tokens_of(0, 0, SIZE, trainer.rank)).wait(30)
        losses = [trainer.step(step, clip=5.0) for step in range(3)]
        state = trainer.optimizer.state_dict()
        trainer.optimizer.pin(state)
        losses.append(trainer.step(3, clip=5.0))
        trainer.optimizer.load_state_dict(state)
        losses.append(trainer.step(3, clip=5.0))
        trainer.backward(4, 0)
        return losses, trainer.optimizer.grad_norm_squared(), state, trainer.optimizer.num_steps, trainer.own_rows()

    found = run_ranks(train, SIZE * SIZE, tmp_path / "ranks")
    tierstore.reslice([sliced.whole], tmp_path / "one", 1)
    one = RankTrainer(tmp_path / "one", sliced.spec, RULE, 0, 1, None)
    expected = [one.step(step, clip=5.0) for step in range(4)]
    rows = joined([one.rows()])
    one.backward(4, 0)
    for tp in range(SIZE):
        of_dp = [found[SIZE * dp + tp][0] for dp in range(SIZE)]
        for step, micros in enumerate([*expected, expected[3]]):
            for micro, losses in enumerate(micros):
                assert np.concatenate([each[step][micro] for each in of_dp]).tobytes() == losses.tobytes(), (
                    step,
                    micro,
                )
    assert {norm for _, norm, *_ in found} == {one.optimizer.grad_norm_squared()}
    assert all(state == found[0][2] and steps == 4 for _, _, state, steps, _ in found)
    assert joined([each[4] for each in found if each[4] is not None]) == rows


def test_a_gradient_of_one_replica_that_is_not_finite_refuses_the_step_on_all(sliced: Sliced, tmp_path: Path) -> None:
    paths = sliced.slices(SIZE, "not finite")

    def train(rank: int) -> Any:
        trainer = MeshTrainer(paths, sliced, RULE)
        before = trainer.own_rows()
        values = trainer.embeddings[0](tokens_of(0, 0, SIZE, trainer.rank))
        above = gradients_of(0, 0, LAYERS[0], trainer.embeddings[0].num_heads, SIZE, trainer.rank)
        if rank == 3:  # no source
            above[0, 0, 0, 0] = float("nan")
        values.backward(above)
        with pytest.raises(ValueError, match=r"the gradient of row \d+ is not finite; no table was changed"):
            trainer.optimizer.step()
        if before is not None:
            assert joined([trainer.rows()]) == joined([before])
        trainer.optimizer.zero_grad()
        trainer.step(1)
        return trainer.optimizer.num_steps

    assert run_ranks(train, SIZE * SIZE, tmp_path / "ranks") == [1] * 4


def test_replicas_with_other_tokens_or_other_gradients_are_refused_by_name(sliced: Sliced, tmp_path: Path) -> None:
    paths = sliced.slices(SIZE, "others")

    def train(rank: int) -> Any:
        trainer = MeshTrainer(paths, sliced, RULE)
        table, ids = trainer.embeddings[0], tokens_of(0, 0, SIZE, trainer.rank)
        with pytest.raises(RankError, match=r"among replicas 2, 3: replicas have other ids|could not: rank 1: RankErr"):
            table(ids + (rank == 3))
        bad = ids.float() if rank == 3 else ids
        with pytest.raises(TypeError if rank == 3 else RankError, match=r"integer|rank 1: TypeError|rank 1: RankError"):
            table(bad)
        above = torch.ones(())
        if rank == 3:
            above = above / 2  # a part, that was not all-reduced
        values = table(ids)
        if trainer.rank == 1:
            with pytest.raises(RankError, match=r"among replicas 2, 3: norms of the gradients are"):
                (values.sum() * above).backward()

    run_ranks(train, SIZE * SIZE, tmp_path / "ranks")


@pytest.mark.parametrize("victim", [1, 2])
def test_a_killed_replica_or_source_ends_all_ranks_by_name(sliced: Sliced, tmp_path: Path, victim: int) -> None:
    paths = sliced.slices(SIZE, f"killed {victim}")

    def train(rank: int) -> None:
        trainer = MeshTrainer(paths, sliced, RULE)
        trainer.step(0)
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        trainer.step(1)

    statuses = await_ranks(start_ranks(train, SIZE * SIZE, tmp_path / "ranks"))
    assert statuses[victim] == -signal.SIGKILL
    outcomes = outcomes_of(tmp_path / "ranks", SIZE * SIZE)
    beside = outcomes[victim ^ 1]
    for rank, outcome in enumerate(outcomes):
        assert rank == victim or (isinstance(outcome, RankFailure) and outcome.kind == "RankError")
    assert f"rank {victim % SIZE} left" in beside.message
    assert f"among replicas {victim // SIZE * SIZE}, " in beside.message


def test_a_commit_that_one_slice_has_no_room_for_is_refused_on_all_replicas(
    sliced: Sliced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sliced.slices(SIZE, "no room")

    def full(*_: Any) -> None:
        raise tierstore.BudgetError("the disk has 1 B left, a commit takes 9 B")

    def train(rank: int) -> Any:
        trainer = MeshTrainer(paths, sliced, RULE)
        trainer.step(0)
        with monkeypatch.context() as patch:
            if rank == 2:
                patch.setattr("tierstore.training.training.check_room", full)
            with pytest.raises(tierstore.BudgetError, match="rank 1: the disk has 1 B left"):
                trainer.optimizer.commit()
        trainer.step(1)
        trainer.optimizer.commit().wait()
        return trainer.training.commits[-1].step if trainer.is_source else None

    assert run_ranks(train, SIZE * SIZE, tmp_path / "ranks") == [2, None, 2, None]
