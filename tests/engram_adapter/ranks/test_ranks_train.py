"""Training over ranks gives what one process gives, in bits, and refuses a step on all ranks or on none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.marks import slow_but
from support.rank_processes import run_ranks
from support.rank_training import RankTrainer, Sliced, joined, make_sliced

import tierstore
from engram_adapter import TableOptimizer, TrainableRows, build_checkpoint, export_checkpoint
from tierstore.tools.synth import write_checkpoint

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


@pytest.mark.slow
def test_ranks_export_the_checkpoint_of_one_process_byte_for_byte(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    write_checkpoint(checkpoint, "deepseek_v41", rows_per_head=60, hidden=16, layers=[1], dim=64)
    build_checkpoint(checkpoint, tmp_path / "whole")
    for rank in range(2):
        build_checkpoint(checkpoint, tmp_path / str(rank), slice=(rank, 2))

    def train(path: Path, group: Any, share: slice) -> None:
        training = tierstore.open_training(path, RULES["adagrad"], dram="8MiB", threads=1)
        (name,) = training.tables
        table = TrainableRows(training, name, process_group=group, reduction="sum")
        optimizer = TableOptimizer([table])
        rng = np.random.default_rng(3)
        for _ in range(3):
            ids = rng.integers(0, table.num_embeddings, (4, 30))
            above = rng.normal(size=(4, 30, table.embedding_dim)).astype(np.float32)
            table(torch.from_numpy(ids[share])).backward(torch.from_numpy(above[share]))
            optimizer.step()
            optimizer.zero_grad()
        optimizer.commit().wait()
        training.close()

    shares = [slice(0, 3), slice(3, 4)]
    run_ranks(lambda rank: train(tmp_path / str(rank), dist.group.WORLD, shares[rank]), 2, tmp_path / "ranks")
    train(tmp_path / "whole", None, slice(0, 4))
    export_checkpoint([tmp_path / "0", tmp_path / "1"], tmp_path / "of ranks", source=checkpoint)
    export_checkpoint(tmp_path / "whole", tmp_path / "of one", source=checkpoint)
    files = sorted(file.name for file in (tmp_path / "of one").iterdir() if file.is_file())
    assert sorted(file.name for file in (tmp_path / "of ranks").iterdir() if file.is_file()) == files
    for file in files:
        assert (tmp_path / "of ranks" / file).read_bytes() == (tmp_path / "of one" / file).read_bytes(), file
    tables = [file for file in files if (checkpoint / file).read_bytes() != (tmp_path / "of one" / file).read_bytes()]
    assert tables, "training changed nothing"
