"""Ctrl-C and MemoryError at any line of the ranks' own files: all ranks go on alike, or stop by name; none is mixed."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.interrupted import Interrupted
from support.rank_processes import run_ranks
from support.rank_training import RankTrainer, Sliced, joined, make_sliced, tokens_of

import engram_adapter
import tierstore
from engram_adapter.exchange import Ranks
from tierstore.errors import RankError, StoreNotReadyError

RULE = tierstore.SGD(lr=0.5)
LINES_MAX = 3000
NAMES = ("exchange", "rank_", "table_", "trainable", "early_rows", "optimizer_state")
TRACED = tuple(str(Path(engram_adapter.__file__).parent / name) for name in NAMES)


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Sliced:
    return make_sliced(tmp_path_factory.mktemp("sliced"))


@pytest.fixture(scope="module")
def right(sliced: Sliced) -> list[dict[str, bytes]]:
    """The rows after both steps, and after the second alone, in one process."""
    found = []
    for steps in ((0, 1), (1,)):
        trainer = RankTrainer(sliced.whole, sliced.spec, RULE, 0, 1, None)
        for step in steps:
            trainer.step(step, micros=1)
        found.append(joined([trainer.rows()]))
        trainer.training.close()
    return found


def interrupted_step(sliced: Sliced, paths: list[Path], rank: int, number: int, error: Any) -> Any:
    """Rank 1 is interrupted in step 0; both go on with step 1, and agree on a commit."""
    trainer = RankTrainer(paths[rank], sliced.spec, RULE, rank, 2, Ranks(timeout_s=20))
    was_raised = False
    try:
        if rank == 0:
            trainer.step(0, micros=1)
        else:
            with Interrupted(number, error, TRACED) as interrupted:
                trainer.step(0, micros=1)
    except error:
        was_raised = True
    except RankError:
        pass
    trainer.optimizer.zero_grad()
    ended = "went on"
    try:
        trainer.step(1, micros=1)
        trainer.optimizer._ranks.counts("both are here", np.zeros((2, 0), dtype=np.int64))
    except (RankError, StoreNotReadyError) as raised:
        ended = type(raised).__name__
    trainer.optimizer.zero_grad()
    torch.zeros(1, requires_grad=True).sum().backward()  # torch 2.13 keeps a failed pass's nodes until the next one
    gc.collect()
    assert not any(table.stats()["num_pinned"] for table in trainer.training.tables.values())
    rows = trainer.rows() if not trainer.training.is_broken else {}
    steps = [table.num_steps for table in trainer.training.tables.values()] if rows else []
    trainer.training.close()
    return was_raised or (rank == 1 and interrupted.was_raised), ended, rows, steps


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_step_of_a_rank_that_is_interrupted_anywhere_is_taken_alike_or_ends_by_name(
    sliced: Sliced, right: list[dict[str, bytes]], tmp_path: Path, error: Any
) -> None:
    paths = sliced.slices(2, error.__name__)
    for number in range(1, LINES_MAX, 43):
        first, second = run_ranks(
            lambda rank: interrupted_step(sliced, paths, rank, number, error),  # noqa: B023
            2,
            tmp_path / str(number),
        )
        if first[1] == second[1] == "went on" and first[3] == second[3]:
            assert joined([first[2], second[2]]) in right, number
        if not second[0]:
            assert number > 1
            assert joined([first[2], second[2]]) == right[0]
            return
    raise AssertionError("the step has more lines than the sweep")


@pytest.mark.parametrize("goes_on", [True, False])
def test_an_error_between_forward_and_backward_of_one_rank_is_named_on_the_others(
    sliced: Sliced, tmp_path: Path, goes_on: bool
) -> None:
    """Whether its caller takes the next batch or ends: no gradient of the two batches is mixed, no row is changed."""
    paths = sliced.slices(2, f"between {goes_on}")

    def train(rank: int) -> str:
        trainer = RankTrainer(paths[rank], sliced.spec, RULE, rank, 2, Ranks(timeout_s=60))
        before = joined([trainer.rows()])
        values = trainer.embeddings[0](tokens_of(0, 0, 2, rank))
        found = ""
        try:
            if rank == 1:
                del values
                if goes_on:
                    trainer.backward(1, 0)
            else:
                values.sum().backward()
        except RankError as error:
            found = str(error)
        assert joined([trainer.rows()]) == before
        return found

    first, second = run_ranks(train, 2, tmp_path / "ranks")
    if goes_on:
        for found in (first, second):
            assert "rank 0 is in gradient 1 of 1 of table layers.1" in found
            assert "rank 1 is in forward of table layers.1, with gradient" in found
    else:
        assert "rank 1 left" in first
