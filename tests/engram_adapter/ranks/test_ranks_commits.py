"""Ranks resume from the newest commit that all hold, wherever they were killed, and on another number of ranks."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.rank_processes import RankFailure, await_ranks, outcomes_of, run_ranks, start_ranks
from support.rank_training import RankTrainer, Sliced, joined, make_sliced

import tierstore
from engram_adapter import TableOptimizer, TrainableRows
from engram_adapter.exchange import Ranks
from tierstore.errors import BudgetError, ConfigError, RankError
from tierstore.formats.catalog import read_catalog
from tierstore.offline.fold import fold_versions
from tierstore.offline.verify import verify_store
from tierstore.training.publish import publish

RULE = tierstore.DenseAdam(lr=0.01)
STEPS = 12


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Sliced:
    return make_sliced(tmp_path_factory.mktemp("sliced"))


@pytest.fixture(scope="module")
def undisturbed(sliced: Sliced, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The rows after STEPS steps in one process."""
    path = tmp_path_factory.mktemp("undisturbed") / "store"
    tierstore.reslice([sliced.whole], path, 1)
    trainer = RankTrainer(path, sliced.spec, RULE, 0, 1, None)
    for step in range(STEPS):
        trainer.step(step, micros=1)
    rows = joined([trainer.rows()])
    trainer.training.close()
    return rows


def commits_of(trainer: RankTrainer) -> list[tuple[int, int]]:
    return [(commit.number, commit.step) for commit in trainer.training.commits]


def go_on(trainer: RankTrainer, until: int = STEPS, every: int = 2) -> None:
    """Trains from where it stands, commits at each `every`-th step, and waits for the last one."""
    ticket = None
    for step in range(trainer.optimizer.num_steps, until):
        trainer.step(step, micros=1)
        if (step + 1) % every == 0:
            ticket = trainer.optimizer.commit()
    if ticket is not None:
        ticket.wait()


def test_ranks_go_back_to_the_newest_commit_that_all_hold(
    sliced: Sliced, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    paths = sliced.slices(2, "one is ahead")

    def train(rank: int) -> Any:
        trainer = RankTrainer(paths[rank], sliced.spec, RULE, rank, 2, dist.group.WORLD)
        go_on(trainer, 4)
        for step in (4, 5):
            trainer.step(step, micros=1)
        trainer.optimizer._ranks.counts("all have taken step 6", np.zeros((2, 0), dtype=np.int64))
        if rank == 1:  # it alone commits, as if the others had been killed before
            trainer.training.commit(6).wait()
        trainer.training.close()

        again = RankTrainer(paths[rank], sliced.spec, RULE, rank, 2, Ranks())
        before = commits_of(again), again.optimizer.num_steps
        go_on(again)
        numbers = again.optimizer.state_dict()["commits"]
        assert numbers[1] == numbers[0] + 1  # rank 1 gave one more
        return before, again.rows()

    found = run_ranks(train, 2, tmp_path / "ranks")
    assert [(commits[-1], steps) for (commits, steps), _ in found] == [((2, 4), 4)] * 2
    assert joined([rows for _, rows in found]) == undisturbed


def published(paths: list[Path], commits: list[int | None] | None = None) -> set[str]:
    """Publishes on every rank; returns the digests by which readers tell whether slices are of one version."""
    for path, commit in zip(paths, commits or [None] * len(paths), strict=True):
        publish(path, commit)
    return {read_catalog(path).common_identity for path in paths}


def test_ranks_whose_commits_have_other_numbers_publish_one_version(sliced: Sliced, tmp_path: Path) -> None:
    paths = sliced.slices(2, "publish")

    def train(rank: int) -> Any:
        trainer = RankTrainer(paths[rank], sliced.spec, RULE, rank, 2, dist.group.WORLD)
        trainer.step(0, micros=1)
        trainer.optimizer.commit().wait()
        if rank == 1:  # it alone, as if the other had been killed before
            trainer.training.commit(2).wait()
        trainer.training.close()
        again = RankTrainer(paths[rank], sliced.spec, RULE, rank, 2, Ranks())
        again.step(1, micros=1)
        again.optimizer.commit().wait()
        state = again.optimizer.state_dict()
        again.optimizer.pin(state)
        again.optimizer.load_state_dict(state | {"commits": [1, 1], "digests": firsts(again, 2), "step": 1})
        again.step(7, micros=1)
        again.optimizer.commit().wait()  # of step 2, as that which was left
        return state["commits"], again.training.at

    (left, first), (_, second) = run_ranks(train, 2, tmp_path / "ranks")
    assert (left, first, second) == ([2, 3], 3, 4)
    of_left = published(paths, left)
    of_newest = published(paths)
    assert (len(of_left), len(of_newest)) == (1, 1)
    assert of_left != of_newest  # of equal steps
    publish(paths[0], left[0])  # a version more on one rank alone
    publish(paths[0])
    assert published(paths) == of_newest
    fold_versions(paths[0], keep=1)
    assert read_catalog(paths[0]).common_identity in of_newest


def firsts(trainer: RankTrainer, size: int) -> list[str]:
    """The digests of all ranks' first commits."""
    digest = trainer.training.commits[0].digest
    return list(trainer.optimizer._ranks.gather_objects("first commits", digest))[:size]


def test_a_slice_without_changed_rows_has_a_version_of_the_commit_all_the_same(sliced: Sliced, tmp_path: Path) -> None:
    paths = sliced.slices(2, "one rank changes nothing")

    def train(rank: int) -> Any:
        training = tierstore.open_training(paths[rank], tierstore.SGD(lr=1.0), dram="8MiB", threads=1)
        name = next(iter(training.tables))
        rows = TrainableRows(training, name, process_group=dist.group.WORLD)
        optimizer = TableOptimizer([rows])
        rows(torch.zeros(3 * (rank == 0), dtype=torch.int64)).sum().backward()  # row 0, which rank 0 has
        optimizer.step()
        optimizer.commit().wait()
        return [training.publish() for _ in range(2)]

    assert run_ranks(train, 2, tmp_path / "ranks") == [[1, 1], [1, 1]]
    assert len({read_catalog(path).common_identity for path in paths}) == 1
    assert not read_catalog(paths[1]).versions[1].tables
    assert not verify_store(paths[1]).faults
    for path in paths:
        with tierstore.open(path, dram="4MiB") as store:
            row = store[next(iter(read_catalog(path).tables))].spec.row_start
            store[next(iter(read_catalog(path).tables))].rows(np.array([row]))


def test_before_any_commit_of_all_ranks_start_from_the_store_and_later_they_refuse(
    sliced: Sliced, tmp_path: Path
) -> None:
    paths = sliced.slices(2, "no common commit")

    def train(rank: int) -> Any:
        with tierstore.open_training(paths[rank], RULE, dram="8MiB") as training:
            if rank == 0:
                training.commit(1).wait()
        trainer = RankTrainer(paths[rank], sliced.spec, RULE, rank, 2, dist.group.WORLD)
        assert (trainer.training.at, trainer.optimizer.num_steps) == (0, 0)
        if rank == 0:
            for step in (1, 2, 3):
                trainer.training.commit(step).wait()
        trainer.training.close()
        with pytest.raises(ConfigError, match=r"none is held by all: rank 0: steps \[2, 3\]; rank 1: steps none"):
            RankTrainer(paths[rank], sliced.spec, RULE, rank, 2, Ranks())

    run_ranks(train, 2, tmp_path / "ranks")


def test_a_commit_that_one_rank_has_no_room_for_is_begun_by_none(
    sliced: Sliced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sliced.slices(2, "no room")

    def train(rank: int) -> None:
        trainer = RankTrainer(paths[rank], sliced.spec, RULE, rank, 2, dist.group.WORLD)
        trainer.step(0, micros=1)

        def full(*_: Any) -> None:
            raise BudgetError("the disk has 1 B left, a commit takes 9 B")

        with monkeypatch.context() as patch:
            if rank == 1:
                patch.setattr("tierstore.training.training.check_room", full)
            with pytest.raises(BudgetError, match="rank 1: the disk has 1 B left"):
                trainer.optimizer.commit()
        assert commits_of(trainer) == []
        trainer.step(1, micros=1)
        trainer.optimizer.commit().wait()
        assert commits_of(trainer) == [(1, 2)]

    run_ranks(train, 2, tmp_path / "ranks")


def test_a_commit_that_one_rank_cannot_begin_is_named_on_the_others_and_the_next_one_works(
    sliced: Sliced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank that failed goes on living: nothing but its word ends the wait of the others."""
    paths = sliced.slices(2, "cannot commit")

    def fails(*_: Any) -> None:
        raise OSError(5, "no such device any more")

    def train(rank: int) -> None:
        trainer = RankTrainer(paths[rank], sliced.spec, RULE, rank, 2, dist.group.WORLD)
        trainer.step(0, micros=1)
        expected = RankError if rank == 0 else OSError
        with monkeypatch.context() as patch:
            if rank == 1:
                patch.setattr(trainer.training, "prepare_commit", fails)
            with pytest.raises(expected, match="no such device any more") as raised:
                trainer.optimizer.commit()
        if rank == 0:
            assert raised.value.ranks == (1,)
        assert commits_of(trainer) == []
        trainer.step(1, micros=1)
        trainer.optimizer.commit().wait()
        assert commits_of(trainer) == [(1, 2)]

    run_ranks(train, 2, tmp_path / "ranks")


def test_a_checkpoint_of_dcp_names_the_commits_of_all_ranks_and_loads_on_all(sliced: Sliced, tmp_path: Path) -> None:
    paths = sliced.slices(2, "dcp")

    def train(rank: int) -> Any:
        trainer = RankTrainer(paths[rank], sliced.spec, RULE, rank, 2, dist.group.WORLD)
        for step in range(3):
            trainer.step(step, micros=1)
        dcp.save({"tables": trainer.optimizer}, checkpoint_id=tmp_path / "saved")
        state = trainer.optimizer.state_dict()
        trainer.optimizer.pin(state)
        saved = trainer.rows()
        for step in range(3, 6):
            trainer.step(step, micros=1)
            trainer.optimizer.commit().wait()
        dcp.load({"tables": trainer.optimizer}, checkpoint_id=tmp_path / "saved")
        assert (trainer.optimizer.num_steps, trainer.training.at) == (3, 1)
        assert joined([trainer.rows()]) == joined([saved])
        with pytest.raises(ConfigError, match="the checkpoint names 0000"):
            trainer.optimizer.load_state_dict(state | {"digests": ["0" * 64] * 2})
        return state

    first, second = run_ranks(train, 2, tmp_path / "ranks")
    assert first == second
    assert first["step"] == 3
    assert len(set(first["digests"])) == 2


@pytest.mark.parametrize(("before", "after"), [(2, 4), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_training_goes_on_on_another_number_of_ranks(
    sliced: Sliced, undisturbed: dict[str, bytes], tmp_path: Path, before: int, after: int
) -> None:
    """Before, dense weights were saved with the state of the tables; it loads where the new slices are."""
    paths = sliced.slices(before, f"{before} before")

    def first_half(rank: int) -> None:
        trainer = RankTrainer(paths[rank], sliced.spec, RULE, rank, before, dist.group.WORLD)
        go_on(trainer, 6)
        state = trainer.optimizer.state_dict()
        if rank == 0:
            torch.save(state, tmp_path / "state.pt")
        trainer.step(6, micros=1)
        trainer.optimizer.commit().wait()
        trainer.training.close()

    run_ranks(first_half, before, tmp_path / "first")
    new = tierstore.reslice(paths, tmp_path / "new-{}", after, step=6).stores

    def second_half(rank: int) -> Any:
        trainer = RankTrainer(new[rank], sliced.spec, RULE, rank, after, dist.group.WORLD)
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        with pytest.raises(ConfigError, match="was not made of their commits of step 6"):
            trainer.optimizer.load_state_dict(state | {"digests": ["0" * 64] * before})
        trainer.optimizer.load_state_dict(state)
        go_on(trainer)
        return trainer.rows()

    assert joined(run_ranks(second_half, after, tmp_path / "second")) == undisturbed


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.slow] * (seed > 0)) for seed in range(50)])
def test_ranks_of_which_one_is_killed_resume_and_end_as_if_none_had_been(
    sliced: Sliced, undisturbed: dict[str, bytes], tmp_path: Path, seed: int
) -> None:
    generator = random.Random(seed)
    size = generator.choice([2, 3])
    paths = sliced.slices(size, f"killed {seed}")
    victim, delay_s = generator.randrange(size), generator.uniform(0.0, 1.2)

    def train(rank: int) -> Any:
        trainer = RankTrainer(paths[rank], sliced.spec, RULE, rank, size, Ranks(timeout_s=30))
        resumed = trainer.optimizer.num_steps, trainer.training.at
        (tmp_path / f"began{rank}").touch()
        go_on(trainer, every=generator.choice([1, 2]))
        return resumed, trainer.rows()

    children = start_ranks(train, size, tmp_path / "first")
    until = time.monotonic() + 30
    while not (tmp_path / f"began{victim}").exists() and time.monotonic() < until:
        time.sleep(0.005)
    time.sleep(delay_s)
    os.kill(children[victim], signal.SIGKILL)
    statuses = await_ranks(children, 90)
    for rank, outcome in enumerate(outcomes_of(tmp_path / "first", size)):
        if isinstance(outcome, RankFailure):
            assert outcome.kind == "RankError", outcome
            assert rank != victim
    assert statuses[victim] in (0, -signal.SIGKILL)
    found = run_ranks(train, size, tmp_path / "second", 90)
    assert len({resumed for resumed, _ in found}) == 1
    assert joined([rows for _, rows in found]) == undisturbed
