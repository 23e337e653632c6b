"""Training over ranks gives what one process gives, in bits, and refuses a step on all ranks or on none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from support.marks import slow_but
from support.rank_processes import run_ranks
from support.rank_training import RankTrainer, Sliced, joined, make_sliced

import tierstore

RULES = {
    "sgd": tierstore.SGD(lr=0.5),
    "adagrad": tierstore.RowWiseAdagrad(lr=0.05),
    "lazy adam": tierstore.LazyAdam(lr=0.01),
    "dense adam": tierstore.DenseAdam(lr=0.01),
}


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Sliced:
    return make_sliced(tmp_path_factory.mktemp("sliced"))


def in_one_process(sliced: Sliced, rule: str, steps: int, folder: Path) -> tuple[list[Any], dict[str, bytes]]:
    tierstore.reslice([sliced.whole], folder, 1)
    trainer = RankTrainer(folder, sliced.spec, RULES[rule], 0, 1, None)
    losses = [trainer.step(step) for step in range(steps)]
    rows = joined([trainer.rows()])
    trainer.training.close()
    return losses, rows


@pytest.mark.parametrize(
    ("rule", "size"),
    slow_but(
        [("adagrad", 2), ("dense adam", 4)],
        [(rule, size) for rule in RULES for size in (1, 2, 3, 4)],
        several=True,
    ),
)
def test_any_number_of_ranks_gives_the_losses_and_rows_of_one_process_in_bits(
    sliced: Sliced, tmp_path: Path, rule: str, size: int
) -> None:
    paths = sliced.slices(size, f"{rule} {size}")

    def train(rank: int) -> Any:
        trainer = RankTrainer(paths[rank], sliced.spec, RULES[rule], rank, size, dist.group.WORLD)
        losses = [trainer.step(step) for step in range(4)]
        norms = trainer.optimizer.grad_norm_squared()
        return losses, trainer.rows(), norms

    found = run_ranks(train, size, tmp_path / "ranks")
    losses, rows = in_one_process(sliced, rule, 4, tmp_path / "one")
    for step, micros in enumerate(losses):
        for micro, expected in enumerate(micros):
            of_ranks = [of_rank[step][micro] for of_rank, *_ in found]
            assert np.concatenate(of_ranks).tobytes() == expected.tobytes(), (step, micro)
    assert joined([of_rank for _, of_rank, _ in found]) == rows
