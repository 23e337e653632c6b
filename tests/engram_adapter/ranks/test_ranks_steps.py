"""What ranks do together around a step: refuse it, prefetch for it, notice that they are not together."""

from __future__ import annotations

import gc
import math
import os
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.marks import slow_but
from support.rank_processes import RankFailure, await_ranks, outcomes_of, run_ranks, start_ranks
from support.rank_training import RankTrainer, Sliced, joined, make_sliced, tokens_of
from support.trainable import make_trainable

import tierstore
from engram_adapter import TableOptimizer, TrainableEmbedding, TrainableRows
from engram_adapter.early_rows import AskedRows
from engram_adapter.exchange import Ranks
from engram_adapter.trainable import prefetch_training
from tierstore.errors import ConfigError, RankError, StoreNotReadyError
from tierstore.training.table import TrainingTable

SGD = tierstore.SGD(lr=0.5)


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Sliced:
    return make_sliced(tmp_path_factory.mktemp("sliced"), "fp8_e4m3_e8m0x32")


@pytest.fixture
def paths(sliced: Sliced) -> list[Path]:
    return sliced.slices(2)


@pytest.mark.parametrize("bad", slow_but([math.inf], [math.nan, math.inf]))
def test_a_gradient_of_one_rank_that_is_not_finite_refuses_the_step_on_all(
    sliced: Sliced, tmp_path: Path, bad: float
) -> None:
    paths = sliced.slices(3, f"three {bad}")

    def train(rank: int) -> Any:
        trainer = RankTrainer(paths[rank], sliced.spec, SGD, rank, 3, dist.group.WORLD)
        before = joined([trainer.rows()])
        first, second = trainer.embeddings
        ids = tokens_of(0, 0, 3, rank)
        loss = first(ids).sum() + second(ids).sum()
        if rank == 1:
            loss = loss + (second(ids[:1])[0, 0, 0, 0] * bad)
        else:
            loss = loss + second(ids[:0]).sum()
        loss.backward()
        with pytest.raises(ValueError, match=r"table layers\.4: the gradient of row \d+ is not finite; no table"):
            trainer.optimizer.step()
        assert joined([trainer.rows()]) == before
        assert [table.num_steps for table in trainer.training.tables.values()] == [0, 0]
        trainer.optimizer.zero_grad()
        trainer.step(1)
        return joined([trainer.rows()]) != before

    assert run_ranks(train, 3, tmp_path / "ranks") == [True] * 3


@pytest.mark.parametrize("where", slow_but(["before it"], ["before it", "within it"]))
def test_a_step_that_one_rank_did_not_apply_is_committed_by_none(sliced: Sliced, tmp_path: Path, where: str) -> None:
    paths = sliced.slices(2, f"half a step {where}")

    def train(rank: int) -> Any:
        trainer = RankTrainer(paths[rank], sliced.spec, SGD, rank, 2, Ranks(timeout_s=20))
        trainer.step(0, micros=1)
        trainer.optimizer.commit(step=1).wait()
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patched, name = (TableOptimizer, "_apply") if where == "before it" else (TrainingTable, "apply")
                patch.setattr(patched, name, _interrupted)
                with pytest.raises(KeyboardInterrupt):
                    trainer.step(1, micros=1)
            else:
                trainer.step(1, micros=1)
        if rank == 1 and where == "within it":
            with pytest.raises(StoreNotReadyError, match="cut on this rank alone by KeyboardInterrupt"):
                trainer.optimizer.commit(step=2)
        else:
            expected = (
                "have applied other numbers" if where == "before it" else "rank 1: StoreNotReadyError: .* was cut on"
            )
            with pytest.raises(RankError, match=expected):
                trainer.optimizer.commit(step=2)
        assert [commit.step for commit in trainer.training.commits] == [1]

    run_ranks(train, 2, tmp_path / "ranks")


def _interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_fork_of_a_rank_is_refused_and_its_parent_goes_on(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        ranks = Ranks()
        child = os.fork()
        if child == 0:
            try:
                ranks.gather_objects("a child's", rank)
            except RankError as error:
                os._exit(7 if f"is a fork of rank {rank}" in str(error) else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        return ranks.gather_objects("a parent's", rank)

    assert run_ranks(work, 2, tmp_path / "ranks") == [[0, 1]] * 2


def test_tables_of_a_group_that_ended_leave_no_thread_and_no_training(tmp_path: Path, sliced: Sliced) -> None:
    paths = sliced.slices(2, "ended")

    def train(rank: int) -> Any:
        group = dist.new_group([0, 1])
        trainer = RankTrainer(paths[rank], sliced.spec, SGD, rank, 2, group)
        trainer.backward(0, 0)  # its gradient is pending
        training = weakref.ref(trainer.training)
        trainer.training.close()
        dist.destroy_process_group(group)
        del trainer, group
        gc.collect()
        assert training() is None
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("tierstore")]

    assert run_ranks(train, 2, tmp_path / "ranks") == [[], []]


def test_gradients_that_ranks_scale_differently_are_refused_by_name(
    sliced: Sliced, paths: list[Path], tmp_path: Path
) -> None:
    def train(rank: int) -> None:
        trainer = RankTrainer(paths[rank], sliced.spec, SGD, rank, 2, dist.group.WORLD)
        trainer.backward(0, 0)
        for embedding in trainer.embeddings:
            embedding.gradient_norms.grad *= 1 + rank
        before = joined([trainer.rows()])
        with pytest.raises(RankError, match="step 1 of the tables: the norms, once scaled, differ between ranks"):
            trainer.optimizer.step()
        assert joined([trainer.rows()]) == before

    run_ranks(train, 2, tmp_path / "ranks")


@pytest.mark.parametrize("size", [3])
def test_tables_without_heads_are_cut_anywhere_and_clipped_as_in_one_process(size: int, tmp_path: Path) -> None:
    """Their one block lies on all ranks: its norm is a sum that goes from rank to rank."""
    model = make_trainable(tmp_path / "model", codecs={"bf16": "bf16", "fp32": "fp32"}).model
    model.build(tmp_path / "whole")
    for rank in range(size):
        model.build(tmp_path / str(rank), slice=(rank, size))

    def train(share: slice, path: Path, group: Any) -> Any:
        training = tierstore.open_training(path, SGD, dram="8MiB", threads=1)
        tables = [TrainableRows(training, name, process_group=group, reduction="sum") for name in ("bf16", "fp32")]
        optimizer = TableOptimizer(tables)
        rng = np.random.default_rng(5)
        norms = []
        for _ in range(3):
            ids = torch.from_numpy(rng.integers(-1, 500, (6, 40))[share])
            for table in tables:
                above = torch.from_numpy(rng.normal(size=(6, 40, 32)).astype(np.float32)[share])
                table(ids).backward(above)
            norm = torch.nn.utils.clip_grad_norm_([each.gradient_norms for each in tables], 3.0)
            norms.append(float(norm))
            optimizer.step()
            optimizer.zero_grad()
        of = {name: training[name].spec for name in ("bf16", "fp32")}
        rows = {name: training[name].gather(np.arange(spec.row_start, spec.row_end)) for name, spec in of.items()}
        training.close()
        return norms, rows

    shares = [slice(0, 1), slice(1, 4), slice(4, 6)]
    found = run_ranks(
        lambda rank: train(shares[rank], tmp_path / str(rank), dist.group.WORLD), size, tmp_path / "ranks"
    )
    norms, rows = train(slice(0, 6), tmp_path / "whole", None)
    assert [of_rank for of_rank, _ in found] == [norms] * size
    assert joined([of_rank for _, of_rank in found]) == joined([rows])


def test_a_prefetch_sends_ids_early_and_changes_no_bit(sliced: Sliced, tmp_path: Path) -> None:
    def train(rank: int, ahead: bool, paths: list[Path]) -> Any:
        trainer = RankTrainer(paths[rank], sliced.spec, SGD, rank, 2, dist.group.WORLD)
        exchanged = []
        real = AskedRows.exchange
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                AskedRows, "exchange", lambda ranks, what, *rest: exchanged.append(what) or real(ranks, what, *rest)
            )
            for step in range(3):
                if ahead:
                    ticket = prefetch_training(trainer.embeddings, tokens_of(step + 1, 0, 2, rank))
                trainer.step(step, micros=1)
                if ahead:
                    ticket.wait(30)
                    assert ticket.done()
        return exchanged, trainer.rows()

    found = {}
    for ahead in (True, False):
        paths = sliced.slices(2, f"ahead {ahead}")
        found[ahead] = run_ranks(lambda rank: train(rank, ahead, paths), 2, tmp_path / str(ahead))  # noqa: B023
    assert joined([rows for _, rows in found[True]]) == joined([rows for _, rows in found[False]])
    for exchanged, _ in found[True]:
        assert [what for what in exchanged if what.startswith("forward")] == [
            f"forward of table {name}, with gradient" for name in ("layers.1", "layers.4")
        ]
        assert sum(what.startswith("prefetch") for what in exchanged) == 6
    assert all(len(exchanged) == 6 for exchanged, _ in found[False])


def test_ids_that_one_rank_refuses_are_named_on_the_other_and_the_next_batch_is_right(
    sliced: Sliced, paths: list[Path], tmp_path: Path
) -> None:
    """The caller of the rank that refuses goes on: its next batch must not meet the present one of the other."""

    def train(rank: int) -> Any:
        trainer = RankTrainer(paths[rank], sliced.spec, SGD, rank, 2, Ranks(timeout_s=60))
        table, ids, errors = trainer.embeddings[0], tokens_of(0, 0, 2, rank), []
        for bad in (ids * 0 - 5, ids.float()):
            try:
                table(bad if rank == 1 else ids + 1)
            except (ValueError, TypeError, RankError) as error:
                errors.append((type(error).__name__, str(error)))
        return errors, table(ids).detach().numpy()

    found = run_ranks(train, 2, tmp_path / "ranks")
    assert [kind for kind, _ in found[1][0]] == ["ValueError", "TypeError"]
    assert [kind for kind, _ in found[0][0]] == ["RankError", "RankError"]
    assert all("because other ranks could not: rank 1: " in text for _, text in found[0][0])
    with tierstore.open_training(sliced.whole, SGD, dram="8MiB", at=0) as training:
        whole = TrainableEmbedding(training, "layers.1", sliced.spec)
        for rank in range(2):
            np.testing.assert_array_equal(found[rank][1], whole(tokens_of(0, 0, 2, rank)).detach().numpy())


@pytest.mark.parametrize("where", slow_but(["forward"], ["forward", "backward", "step"]))
def test_ranks_that_do_different_things_say_which(
    sliced: Sliced, paths: list[Path], tmp_path: Path, where: str
) -> None:
    def train(rank: int) -> None:
        trainer = RankTrainer(paths[rank], sliced.spec, SGD, rank, 2, Ranks(timeout_s=20))
        ids = tokens_of(0, 0, 2, rank)
        tables = trainer.embeddings if rank == 0 or where != "forward" else trainer.embeddings[::-1]
        first, second = (table(ids).sum() for table in tables)
        if where == "backward":
            (first if rank == 0 else second).backward()
        (first + second).backward()
        if where == "step" and rank == 1:
            trainer.optimizer.num_steps = 7
        trainer.optimizer.step()

    assert await_ranks(start_ranks(train, 2, tmp_path / "ranks")) == [0, 0]
    expected = {
        "forward": ("forward of table layers.1, with gradient", "forward of table layers.4, with gradient"),
        "backward": ("gradient 1 of 1 of table layers.1", "gradient 1 of 1 of table layers.4"),
        "step": ("step 1 of the tables", "step 8 of the tables"),
    }[where]
    for outcome in outcomes_of(tmp_path / "ranks", 2):
        assert isinstance(outcome, RankFailure)
        assert outcome.kind == "RankError"
        for rank, place in enumerate(expected):
            assert f"rank {rank} is in {place}" in outcome.message


@pytest.mark.slow
def test_a_rank_that_hangs_in_its_model_is_named_by_the_others_in_time(
    sliced: Sliced, paths: list[Path], tmp_path: Path
) -> None:
    def train(rank: int) -> None:
        trainer = RankTrainer(paths[rank], sliced.spec, SGD, rank, 2, Ranks(timeout_s=1.5))
        trainer.step(0)
        if rank == 1:
            time.sleep(6)
        start = time.monotonic()
        with pytest.raises(RankError, match=r"rank 1 did not come within 1.5 s: .* in forward of table layers\.1"):
            trainer.step(1)
        assert time.monotonic() - start < 5
        with pytest.raises(RankError, match="no exchange of these ranks is possible any more"):
            trainer.step(1)

    assert await_ranks(start_ranks(train, 2, tmp_path / "ranks")) == [0, 0]
    first, second = outcomes_of(tmp_path / "ranks", 2)
    assert first is None, first
    assert isinstance(second, RankFailure)  # its group is gone


@pytest.mark.parametrize(
    ("dtype", "quantized"),
    slow_but(
        [(torch.bfloat16, True)], [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)], several=True
    ),
)
def test_values_are_those_of_one_process_rounded_or_not(
    sliced: Sliced, paths: list[Path], tmp_path: Path, dtype: torch.dtype, quantized: bool
) -> None:
    def look(rank: int, size: int, path: Path, group: Any) -> Any:
        training = tierstore.open_training(path, SGD, dram="8MiB", threads=1)
        embedding = TrainableEmbedding(training, 1, sliced.spec, dtype, quantized, process_group=group)
        assert (embedding.num_embeddings, embedding.num_heads) == (sliced.spec.num_rows(1), 8)
        ids = tokens_of(0, 0, size, rank)
        with torch.no_grad():
            values = embedding(ids)
        assert not values.requires_grad
        assert torch.equal(embedding(ids), values)
        training.close()
        return values.float().numpy()

    found = run_ranks(lambda rank: look(rank, 2, paths[rank], dist.group.WORLD), 2, tmp_path / "ranks")
    assert np.concatenate(found).tobytes() == look(0, 1, sliced.whole, None).tobytes()


def test_slices_that_do_not_make_the_table_are_refused_on_all_ranks(
    sliced: Sliced, paths: list[Path], tmp_path: Path
) -> None:
    def train(rank: int) -> None:
        RankTrainer(paths[1 - rank], sliced.spec, SGD, rank, 2, dist.group.WORLD)

    assert await_ranks(start_ranks(train, 2, tmp_path / "ranks")) == [0, 0]
    for outcome in outcomes_of(tmp_path / "ranks", 2):
        assert outcome.kind == "ConfigError"
        assert "the slices of 2 ranks are not its" in outcome.message
    with (
        tierstore.open_training(paths[0], SGD, dram="8MiB") as training,
        pytest.raises(ConfigError, match=r"table layers\.1 is a slice, rows 0 to \d+ of \d+: give process_group"),
    ):
        TrainableEmbedding(training, 1, sliced.spec)
