"""A training gives and changes rows as plain NumPy does, in bits: any codec, any pressure, after any return."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.trainable import Pair, Trainable, in_bits, make_trainable, tiny_caches

import tierstore
from tierstore.kernels.reference_training import ReferenceTable
from tierstore.offline.init import init_store
from tierstore.training import base as base_module
from tierstore.training.optimizers import Optimizer
from tierstore.training.run_writer import RunWriter

OPTIMIZERS = {
    "sgd": tierstore.SGD(lr=0.1),
    "adagrad": tierstore.RowWiseAdagrad(lr=0.05, decay=0.99, initial=0.5),
    "lazy": tierstore.LazyAdam(lr=0.01),
    "dense": tierstore.DenseAdam(lr=0.01),
}
ADAGRAD = OPTIMIZERS["adagrad"]
NUM_ROWS, CODECS = 200, {"bf16": "bf16", "fp8": "fp8_e4m3_e8m0x32"}


@pytest.fixture
def pair(trainable: Trainable, store: Path) -> Iterator[Pair]:
    found = Pair(trainable, store, ADAGRAD, seed=1)
    yield found
    found.training.close()


@pytest.mark.parametrize("in_place", [False, True])
def test_every_codec_of_a_store_is_a_base_for_training(tmp_path: Path, *, in_place: bool) -> None:
    trainable = make_trainable(tmp_path / "model")
    trainable.model.build(tmp_path / "store", in_place=in_place)
    pair = Pair(trainable, tmp_path / "store", ADAGRAD, seed=0)
    with pair.training:
        pair.check_all()
        pair.steps(2)
        pair.check_all()


def test_rows_that_are_read_in_parts_are_those_that_are_read_at_once(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tierstore.open_training(store, ADAGRAD, dram="16MiB") as training:
        rng = np.random.default_rng(8)
        for name, table in training.tables.items():
            base, rows = table.rows.base, table.rows
            for row_ids in (np.arange(NUM_ROWS), np.sort(rng.permutation(NUM_ROWS)[:77]), rng.permutation(NUM_ROWS)):
                found = []
                for step in (1, 10, NUM_ROWS):
                    monkeypatch.setattr(base_module, "READ_ROWS", step)
                    out = np.full((len(row_ids), rows.layout.record_bytes), 0xAB, dtype=np.uint8)
                    base.read(row_ids, out)
                    found.append(out)
                np.testing.assert_array_equal(found[0], found[2], name)
                np.testing.assert_array_equal(found[1], found[2], name)
            base.read(np.empty(0, dtype=np.int64), np.empty((0, rows.layout.record_bytes), dtype=np.uint8))


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_steps_are_the_references_in_bits_and_a_reopened_training_goes_on_as_if_never_closed(
    trainable: Trainable, store: Path, rule: str
) -> None:
    pair = Pair(trainable, store, OPTIMIZERS[rule], seed=2)
    pair.steps(3)
    pair.check()
    assert pair.commit(3).wait().step == 3
    pair.steps(2)  # lost
    pair.reopen(3)
    assert [table.num_steps for table in pair.training.tables.values()] == [3, 3]
    pair.check_all()
    pair.steps(2)
    pair.check_all()
    pair.training.close()


@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("num_slots", [8, 40])
def test_a_cache_of_a_few_slots_changes_no_bit(
    trainable: Trainable, store: Path, rule: str, num_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_caches(monkeypatch, num_slots)
    pair = Pair(trainable, store, OPTIMIZERS[rule], seed=3)
    with pair.training:
        for size in (3, 50, 0, 8, 25):
            pair.steps(1, size)
            pair.check(30)
        assert pair.training.stats()["rows_spilled"] > 0  # in the middle of steps
        ticket = pair.commit(5)
        pair.steps(2, 12)
        ticket.wait()
        pair.check_all()
        pair.reopen(5)
        pair.check_all()
    pair.training.close()


@pytest.mark.slow
@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("num_slots", [8, 16, 50, 1000])
def test_a_long_random_walk_changes_no_bit(
    trainable: Trainable, store: Path, rule: str, num_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_caches(monkeypatch, num_slots, num_aside=4)
    pair = Pair(trainable, store, OPTIMIZERS[rule], seed=num_slots)
    rng = np.random.default_rng(num_slots)
    newest = None
    for number in range(300):
        name = str(rng.choice(list(pair.reference)))
        act = rng.choice(["check", "step", "commit", "prefetch", "pin", "reopen"], p=[0.3, 0.4, 0.1, 0.12, 0.06, 0.02])
        if act == "check":
            pair.check(int(rng.integers(0, 80)))
        elif act == "step":
            pair.step(name, int(rng.integers(0, 120)))
        elif act == "commit":
            newest, ticket = number, pair.commit(number)
            if rng.random() < 0.5:
                ticket.wait()
        elif act == "prefetch":
            pair.training.prefetch({name: pair.row_ids(name, 60)})
        elif act == "pin":
            with pair.training[name].pinned(pair.row_ids(name, 30)):
                pair.step(name, 60)
        elif newest is not None:
            pair.reopen(newest)
    pair.check_all()
    pair.training.close()


@pytest.mark.parametrize("distance", [0, 1, 4])
def test_prefetches_change_nothing(
    trainable: Trainable, store: Path, distance: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_caches(monkeypatch, 64)
    pair = Pair(trainable, store, ADAGRAD, seed=4)
    with pair.training:
        batches = [{name: pair.row_ids(name, 30) for name in pair.reference} for _ in range(12)]
        for number, batch in enumerate(batches):
            for ahead in batches[number + 1 : number + 1 + distance]:
                if pair.rng.random() < 0.7:
                    pair.training.prefetch(ahead)
            for name, row_ids in batch.items():
                found = pair.training[name].gather(row_ids)
                np.testing.assert_array_equal(in_bits(found), in_bits(pair.reference[name].gather(row_ids)))
                gradients = pair.rng.standard_normal(found.shape).astype(np.float32)
                pair.training[name].apply(row_ids, gradients)
                pair.reference[name].apply(row_ids, gradients)
        pair.check_all()
        assert (pair.training.stats()["rows_prefetched"] > 0) == (distance > 0)


def test_two_threads_give_the_bits_of_one(trainable: Trainable, built: Path, tmp_path: Path) -> None:
    found = []
    for threads in (1, 2):
        store = Path(shutil.copytree(built, tmp_path / f"store{threads}"))
        pair = Pair(trainable, store, ADAGRAD, seed=5, threads=threads)
        with pair.training:
            pair.steps(4, 3000)
            found.append(np.concatenate([pair.training[name].gather(np.arange(200)) for name in pair.reference]))
    np.testing.assert_array_equal(in_bits(found[0]), in_bits(found[1]))


def test_a_commit_is_of_one_moment_whatever_steps_are_taken_while_it_is_written(pair: Pair) -> None:
    pair.steps(2)
    ticket = pair.commit(2)
    pair.steps(5)
    ticket.wait()
    pair.check_all()
    pair.reopen(2)
    pair.check_all()


def test_rolling_back_drops_all_that_came_later(pair: Pair) -> None:
    pair.steps(1)
    first = pair.commit(1).wait()
    pair.steps(1)
    pair.commit(2).wait()
    pair.steps(1)
    pair.training.rollback(first.number)
    for reference in pair.reference.values():
        reference.rollback(1)
    pair.check_all()
    assert pair.training.at == first.number
    assert not pair.training.has_changes
    pair.steps(1)
    assert pair.commit(7).wait().number > first.number + 1, "a number was given twice"
    pair.reopen(7)
    pair.check_all()
    pair.training.rollback(0)
    for name, values in pair.trainable.values.items():
        np.testing.assert_array_equal(in_bits(pair.training[name].gather(np.arange(200))), in_bits(values))
    assert not pair.training.commits


def test_a_training_opens_at_a_named_commit_and_forgets_later_ones(pair: Pair) -> None:
    pair.steps(1)
    first = pair.commit(1).wait()
    pair.steps(1)
    pair.commit(2).wait()
    pair.reopen(1, at=first.number)
    pair.check_all()
    assert [commit.number for commit in pair.training.commits] == [first.number]
    pair.training.close()
    with pytest.raises(tierstore.TierStoreError, match="99"):
        tierstore.open_training(pair.store, at=99)


def test_a_commit_keeps_payload_step_and_what_is_pinned(pair: Pair) -> None:
    pair.steps(1)
    assert pair.training.has_changes
    first = pair.training.commit(10, b"dense 10").wait()
    assert (first.step, first.payload, pair.training.has_changes) == (10, b"dense 10", False)
    pair.training.pin(first.number)
    for step in (11, 12, 13):
        pair.steps(1)
        pair.training.commit(step).wait()
    assert [commit.step for commit in pair.training.commits] == [10, 12, 13]
    with pytest.raises(tierstore.ConfigError, match="payload"):
        pair.training.commit(14, bytes((1 << 20) + 1))


def test_a_gradient_that_is_not_finite_refuses_the_step_by_name(pair: Pair) -> None:
    pair.steps(1)
    gradients = np.zeros((40, 32), dtype=np.float32)
    for bad in (np.nan, np.inf):
        gradients[17, 3] = bad
        with pytest.raises(ValueError, match=r"row 17 .*not finite"):
            pair.training["bf16"].apply(np.arange(40), gradients)
    gradients[17:19, 3] = 3e38  # each is finite, their sum is not
    with pytest.raises(ValueError, match=r"row 17 .*not finite"):
        pair.training["bf16"].apply(np.where(np.arange(40) == 18, 17, np.arange(40)), gradients)
    assert not pair.training.is_broken
    pair.check_all()


def test_a_gradient_that_is_not_finite_refuses_a_step_in_parts_too(
    trainable: Trainable, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_caches(monkeypatch, 8)
    pair = Pair(trainable, store, ADAGRAD, seed=6)
    with pair.training:
        gradients = np.ones((40, 32), dtype=np.float32)
        gradients[39, 0] = np.nan
        with pytest.raises(ValueError, match=r"row 39 .*not finite"):
            pair.training["bf16"].apply(np.arange(40), gradients)
        pair.check_all()


def test_wrong_arguments_are_refused_and_change_nothing(pair: Pair) -> None:
    table = pair.training["bf16"]
    gradients = np.ones((2, 32), dtype=np.float32)
    for row_ids in (np.array([0, 200]), np.array([-2, 0])):
        with pytest.raises(ValueError, match="outside"):
            table.gather(row_ids)
        with pytest.raises(ValueError, match="outside"):
            table.apply(row_ids, gradients)
        with pytest.raises(ValueError, match="outside"):
            pair.training.prefetch({"bf16": row_ids})
    with pytest.raises(TypeError, match="int64"):
        table.gather(np.zeros(2, dtype=np.int32))
    with pytest.raises(TypeError, match="float32"):
        table.apply(np.zeros(2, dtype=np.int64), gradients.astype(np.float64))
    with pytest.raises(ValueError, match="expected"):
        table.apply(np.zeros(3, dtype=np.int64), gradients)
    with pytest.raises(ValueError, match="group"):
        table.apply(np.zeros(2, dtype=np.int64), gradients, np.array([0, -1], dtype=np.int32))
    with pytest.raises(ValueError, match="lr"):
        table.apply(np.zeros(2, dtype=np.int64), gradients, lr=float("nan"))
    with pytest.raises(KeyError, match="bf16"):
        pair.training["other"]
    assert table.num_steps == 0
    pair.check_all()


def test_row_ids_of_any_shape_and_stride_are_gathered_and_changed(pair: Pair) -> None:
    table = pair.training["fp8"]
    row_ids = np.arange(48).reshape(4, 12)[:, ::2]
    found = table.gather(row_ids)
    assert found.shape == (4, 6, 32)
    np.testing.assert_array_equal(in_bits(found[1, 2]), in_bits(pair.trainable.values["fp8"][row_ids[1, 2]]))
    table.apply(row_ids, np.ones((4, 6, 32), dtype=np.float32))
    pair.reference["fp8"].apply(row_ids, np.ones((4, 6, 32), dtype=np.float32))
    pair.check_all()


def test_a_second_training_of_a_store_is_refused_by_the_first_ones_process(pair: Pair) -> None:
    with pytest.raises(tierstore.ConfigError, match=str(os.getpid())):
        tierstore.open_training(pair.store)
    pair.check()


@pytest.mark.parametrize("other", [tierstore.SGD(lr=0.1), tierstore.RowWiseAdagrad(lr=0.05, decay=0.9, initial=0.5)])
def test_another_optimizer_than_the_commits_is_refused_but_for_its_rate(pair: Pair, other: Optimizer) -> None:
    pair.steps(1)
    pair.commit(1).wait()
    pair.training.close()
    with pytest.raises(tierstore.ConfigError, match="RowWiseAdagrad"):
        tierstore.open_training(pair.store, other)
    pair.training = tierstore.open_training(pair.store, tierstore.RowWiseAdagrad(lr=7.0, decay=0.99, initial=0.5))


def test_a_codec_that_cannot_be_written_again_is_refused_by_name(tmp_path: Path) -> None:
    int8 = make_trainable(tmp_path / "checkpoint", num_rows=20, codecs={"a": "int8_fp32"})
    int8.model.build(tmp_path / "store")
    with pytest.raises(tierstore.ConfigError, match="int8_fp32"):
        tierstore.open_training(tmp_path / "store", ADAGRAD)


def test_a_closed_training_refuses_calls_by_name_and_closes_twice(pair: Pair) -> None:
    table = pair.training["bf16"]
    pair.training.close()
    pair.training.close()
    for call in (
        lambda: table.gather(np.arange(2)),
        lambda: table.apply(np.arange(2), np.zeros((2, 32), dtype=np.float32)),
        lambda: pair.training.commit(1),
        lambda: pair.training.prefetch({"bf16": np.arange(2)}),
        lambda: table.num_steps,
    ):
        with pytest.raises(tierstore.StoreNotReadyError, match="closed"):
            call()


def test_closing_waits_for_a_commit_and_a_prefetch_under_way(pair: Pair) -> None:
    pair.steps(2)
    ticket = pair.commit(2)
    pair.training.prefetch({"bf16": np.arange(200)})
    pair.training.close()
    assert ticket.wait(0).step == 2
    pair.reopen(2)
    pair.check_all()


def test_pins_end_with_their_handle_and_leave_room_for_steps(
    trainable: Trainable, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_caches(monkeypatch, 16)
    pair = Pair(trainable, store, ADAGRAD, seed=7)
    with pair.training:
        pins = [pair.training["bf16"].pin_rows(np.arange(start, start + 6)) for start in (0, 6, 12)]
        assert pair.training["bf16"].stats()["num_pinned"] == 8
        pair.steps(2, 40)
        pair.check_all()
        pins[0].release()
        pins[0].release()
        assert pair.training["bf16"].stats()["num_pinned"] == 2
        del pins
        assert pair.training["bf16"].stats()["num_pinned"] == 0


def test_a_marked_training_is_broken_by_name_until_it_is_opened_again(pair: Pair) -> None:
    pair.steps(1)
    pair.commit(1).wait()
    pair.steps(1)
    pair.training.mark_broken("the step stopped between two tables")
    assert pair.training.is_broken
    with pytest.raises(tierstore.StoreNotReadyError, match="between two tables"):
        pair.training["bf16"].gather(np.arange(2))
    with pytest.raises(tierstore.StoreNotReadyError, match="between two tables"):
        pair.training.commit(2)
    pair.reopen(1)
    pair.check_all()


def test_runs_that_are_mostly_dead_are_merged_and_a_reopened_training_finds_all_rows(pair: Pair) -> None:
    def step(row_ids: np.ndarray) -> None:
        gradients = pair.rng.standard_normal((len(row_ids), 32)).astype(np.float32)
        pair.training["bf16"].apply(row_ids, gradients)
        pair.reference["bf16"].apply(row_ids, gradients)

    step(np.arange(200))
    first = pair.commit(1).wait().runs["bf16"][0]
    step(np.arange(150))
    for number in range(2, 60):  # a merge is published with the commit that comes after it
        newest = pair.commit(number).wait()
        if first not in newest.runs["bf16"]:
            break
        step(np.array([number]))
    assert first not in newest.runs["bf16"]
    pair.check_all()
    pair.reopen(number)
    pair.check_all()


def test_a_store_from_scratch_trains_from_drawn_values(tmp_path: Path) -> None:
    spec = tierstore.TableSpec.plain("a", 200, 128, "fp32", 32)
    init_store(tmp_path / "store", [spec], seed=5, deviation=0.02, origin={"digest": "ab" * 32})
    with tierstore.open_training(tmp_path / "store", ADAGRAD, dram="4MiB") as training:
        drawn = training["a"].gather(np.arange(200))
        assert 0.01 < drawn.std() < 0.03
        reference = ReferenceTable(lambda row_id: drawn[row_id], 32, ADAGRAD.to_dict())
        row_ids, gradients = np.array([3, 8, 3]), np.ones((3, 32), dtype=np.float32)
        training["a"].apply(row_ids, gradients)
        reference.apply(row_ids, gradients)
        training.commit(1).wait()
    with tierstore.open_training(tmp_path / "store", dram="4MiB") as training:
        found, expected = training["a"].gather(np.arange(200)), reference.gather(np.arange(200))
        np.testing.assert_array_equal(in_bits(found), in_bits(expected))


def test_a_commit_that_the_disk_has_no_room_for_is_refused_and_training_goes_on(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.steps(1)
    pair.commit(1).wait()
    pair.steps(1)
    usage = shutil.disk_usage(pair.store)
    with monkeypatch.context() as full:
        full.setattr("tierstore.training.commits.shutil.disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(tierstore.BudgetError, match="1000 bytes"):
            pair.training.commit(2)
    assert not pair.training.is_broken
    pair.steps(1)
    pair.commit(3).wait()
    pair.reopen(3)
    pair.check_all()


@pytest.mark.parametrize("call", ["buffer", "write", "finish", "sync", "rename"])
def test_a_write_that_fails_breaks_the_training_by_name_and_costs_no_commit(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    pair.steps(1)
    pair.commit(1).wait()
    pair.steps(1)

    def fail(*_: object) -> None:
        raise OSError(5, "the disk is gone")

    with monkeypatch.context() as failing:
        failing.setattr(RunWriter, call, fail)
        ticket = pair.training.commit(2)
        with pytest.raises(OSError, match="the disk is gone"):
            ticket.wait()
    assert pair.training.is_broken
    with pytest.raises(tierstore.StoreNotReadyError, match="the disk is gone"):
        pair.step("bf16")
    pair.reopen(1)
    pair.check_all()
    assert not [file for file in (pair.store / "training").iterdir() if file.suffix == ".new"]


def test_a_forked_child_cannot_use_its_parents_training(pair: Pair) -> None:
    pair.steps(1)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            pair.training["bf16"].gather(np.arange(3))
        except tierstore.StoreNotReadyError as error:
            status = 0 if "forked" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    pair.check_all()
    pair.commit(1).wait()
