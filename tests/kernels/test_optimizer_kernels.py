"""Distinct rows, sums of gradients and the four optimizers: compiled, with AVX2 and without, against the reference."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from tierstore import kernels
from tierstore.kernels import reference_training as reference
from tierstore.training.optimizers import SGD, DenseAdam, LazyAdam, Optimizer, RowWiseAdagrad

OPTIMIZERS: dict[str, Optimizer] = {
    "SGD": SGD(0.05),
    "RowWiseAdagrad": RowWiseAdagrad(0.05, decay=0.99, initial=0.01),
    "LazyAdam": LazyAdam(0.01),
    "DenseAdam": DenseAdam(0.01),
    "DenseAdam, momentum of 0.4": DenseAdam(0.01, beta1=0.4, beta2=0.9),
}
WAYS = {"fastest": False, "plain": True}
DIMS = (1, 7, 16, 33, 128)


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.int32)


def history_of(optimizer: Optimizer, rates: list[float]) -> kernels.StepHistory:
    history = kernels.StepHistory(kernels.Optimizer(**optimizer.to_dict()))
    for rate in rates:
        history.append(rate)
    return history


def new_records(optimizer: Optimizer, num_rows: int, dim: int, generator: np.random.Generator) -> np.ndarray:
    """Records of rows that no step has touched, with two floats more than they need."""
    records = np.full((num_rows, dim + optimizer.state_floats(dim) + 2), 77, np.float32)
    records[:, :dim] = generator.normal(size=(num_rows, dim))
    records[:, dim:-2] = kernels.Optimizer(**optimizer.to_dict()).initial_state(dim)
    return records


def rows_of(records: np.ndarray, dim: int) -> reference.Rows:
    return reference.Rows(records[:, :dim].copy(), records[:, dim:-2].copy())


def assert_same(records: np.ndarray, rows: reference.Rows) -> None:
    dim = rows.values.shape[1]
    assert np.array_equal(bits(records[:, :dim]), bits(rows.values))
    assert np.array_equal(bits(records[:, dim:-2]), bits(rows.state))
    assert (records[:, -2:] == 77).all()


# ----------------------------------------------------------------------------------------------------------------------
# Which rows, and their sums.


@pytest.mark.parametrize("num_references", [0, 1, 5, 900])
def test_distinct_rows_come_in_the_order_of_first_reference(num_references: int) -> None:
    row_ids = np.random.default_rng(num_references).integers(-1, 700, num_references)
    found, starts, places, repeated = kernels.distinct_rows(row_ids, 700)
    expected = {row_id: [p for p in range(num_references) if row_ids[p] == row_id] for row_id in row_ids if row_id >= 0}
    assert found.tolist() == list(expected)
    assert [places[a:b].tolist() for a, b in itertools.pairwise(starts)] == list(expected.values())
    assert repeated.tolist() == np.cumsum([0] + [len(each) > 1 for each in expected.values()]).tolist()


def test_references_of_a_row_are_sorted_by_group_and_stay_in_order_within_one() -> None:
    generator = np.random.default_rng(3)
    row_ids = generator.integers(0, 40, 2_000)
    groups = generator.choice(np.array([0, 3, 255, 256, 70_000, 2**31 - 1], np.int32), 2_000)
    found, starts, places, _ = kernels.distinct_rows(row_ids, 40, groups)
    for row_id, a, b in zip(found, starts[:-1], starts[1:], strict=True):
        expected = sorted(np.flatnonzero(row_ids == row_id), key=lambda place: groups[place])
        assert places[a:b].tolist() == expected


def test_row_ids_that_share_a_hash_bucket_are_told_apart() -> None:
    row_ids = np.arange(0, 2**50, 2**40)  # the upper bits of their hashes run in few values
    assert kernels.distinct_rows(np.concatenate([row_ids, row_ids]), 2**62)[0].tolist() == row_ids.tolist()


@pytest.mark.parametrize(
    ("row_ids", "groups", "named"),
    [
        ([0, 5, 10], None, r"row_ids\[2\] is 10, must be -1 or at least 0 and below 10"),
        ([0, -2], None, r"row_ids\[1\] is -2"),
        ([0, 1], [0, -1], r"groups\[1\] is negative"),
        ([0, 1], [0], r"groups must be"),
    ],
)
def test_references_that_are_wrong_are_refused_by_place(row_ids: list[int], groups: Any, named: str) -> None:
    given = None if groups is None else np.array(groups, np.int32)
    with pytest.raises(ValueError, match=named):
        kernels.distinct_rows(np.array(row_ids), 10, given)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dim", DIMS)
def test_one_group_sums_to_the_bits_of_a_dense_backward(way: str, dim: int) -> None:
    generator = np.random.default_rng(dim)
    row_ids = generator.integers(0, 60, 900)
    gradients = generator.normal(size=(900, dim)).astype(np.float32)
    gradients[::7] = -0.0  # a sum starts at 0 and so is never -0
    embedding = torch.nn.Embedding(60, dim)
    embedding(torch.from_numpy(row_ids)).backward(torch.from_numpy(gradients))
    assert embedding.weight.grad is not None
    found, sums, bad = kernels.sum_gradients(row_ids, gradients, 60, plain=WAYS[way])
    assert bad == -1
    assert np.array_equal(bits(sums), bits(embedding.weight.grad.numpy()[found]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("order", ["ascending", "mixed"])
def test_groups_are_summed_one_by_one_and_then_in_their_order(way: str, dim: int, order: str) -> None:
    generator = np.random.default_rng(dim)
    row_ids, groups = generator.integers(-1, 30, 500), generator.integers(0, 6, 500).astype(np.int32)
    if order == "ascending":
        groups.sort()
    gradients = generator.normal(size=(500, dim)).astype(np.float32)
    found, sums, _ = kernels.sum_gradients(row_ids, gradients, 30, groups, 0.3, WAYS[way])
    expected = reference.sums_of(row_ids, gradients, groups)
    assert found.tolist() == list(expected)
    assert np.array_equal(bits(sums), bits(np.stack(list(expected.values())) * np.float32(0.3)))


# ----------------------------------------------------------------------------------------------------------------------
# The rules.


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rule_gives_the_bits_of_its_reference(name: str, dim: int, way: str) -> None:
    optimizer, generator = OPTIMIZERS[name], np.random.default_rng(dim)
    records = new_records(optimizer, 20, dim, generator)
    rows = rows_of(records, dim)
    rates: list[float] = []
    for step in range(6):
        sums = (generator.normal(size=(20, dim)) * 10.0 ** generator.integers(-6, 3, (20, 1))).astype(np.float32)
        rates.append(0.01 * (step + 1))
        kernels.update_rows(history_of(optimizer, rates), dim, records, sums, 0.7, plain=WAYS[way])
        reference.update_rows(optimizer.to_dict(), rows, sums, rates, 0.7)
        assert_same(records, rows)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["DenseAdam", "DenseAdam, momentum of 0.4"])
def test_a_row_that_comes_back_has_replayed_each_step_at_its_own_rate(name: str, way: str) -> None:
    optimizer, generator, dim = OPTIMIZERS[name], np.random.default_rng(5), 35
    records = new_records(optimizer, 3, dim, generator)
    records[:, :5] = 0  # what has no moment stays where it is
    rows = rows_of(records, dim)
    rates = [0.01]
    gradients = generator.normal(size=(3, dim)).astype(np.float32)
    gradients[:, :5] = 0
    gradients[2] = 0
    kernels.update_rows(history_of(optimizer, rates), dim, records, gradients, plain=WAYS[way])
    reference.update_rows(optimizer.to_dict(), rows, gradients, rates)
    for gap in (1, 17, 900):  # the last long enough for values to come to rest
        rates += list(0.01 * generator.random(gap))
        kernels.catch_up_rows(history_of(optimizer, rates), dim, records, plain=WAYS[way])
        with np.errstate(under="ignore"):
            reference.catch_up(optimizer.to_dict(), rows, rates, len(rates))
        assert_same(records, rows)
    kernels.catch_up_rows(history_of(optimizer, rates[:5]), dim, records)  # nothing goes back
    assert_same(records, rows)


def test_a_history_that_starts_over_has_the_steps_of_one_that_went_on() -> None:
    optimizer, generator, dim = DenseAdam(0.01), np.random.default_rng(6), 16
    rates = list(generator.random(300))
    gone_on = history_of(optimizer, rates)
    resumed = kernels.StepHistory(kernels.Optimizer(**optimizer.to_dict()))
    resumed.restart(299, np.array(rates[:-1]))
    resumed.append(rates[-1])
    assert resumed.last == gone_on.last == 300
    records = new_records(optimizer, 2, dim, generator)
    kernels.update_rows(history_of(optimizer, rates[:1]), dim, records, np.ones((2, dim), np.float32))
    other = records.copy()
    kernels.update_rows(gone_on, dim, records, np.ones((2, dim), np.float32))
    kernels.update_rows(resumed, dim, other, np.ones((2, dim), np.float32))
    assert np.array_equal(bits(records), bits(other))
    with pytest.raises(ValueError, match="rates of all steps"):
        resumed.restart(3)


def test_flushing_subnormals_in_the_callers_thread_changes_no_bit() -> None:
    records = np.full((1, 8), 1e-39, np.float32)
    sums, other = np.full((1, 8), 1e-40, np.float32), records.copy()
    kernels.update_rows(history_of(SGD(0.5), [0.5]), 8, records, sums)
    try:
        assert torch.set_flush_denormal(True)
        kernels.update_rows(history_of(SGD(0.5), [0.5]), 8, other, sums)
        assert float(torch.tensor(1e-39) * 0.5) == 0.0  # and the caller's own arithmetic is as it asked for
    finally:
        torch.set_flush_denormal(False)
    assert np.array_equal(bits(records), bits(other))
    assert (bits(records) != bits(np.full((1, 8), 1e-39, np.float32))).all()


# ----------------------------------------------------------------------------------------------------------------------
# Whole steps.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_equal_the_reference_trainer(name: str) -> None:
    optimizer, generator, dim = OPTIMIZERS[name], np.random.default_rng(8), 24
    records = new_records(optimizer, 50, dim, generator)
    base = records[:, :dim].copy()
    table = reference.ReferenceTable(lambda row_id: base[row_id], dim, optimizer.to_dict())
    history = history_of(optimizer, [])
    for step in range(8):
        row_ids = generator.integers(-1, 50, 60)
        groups = generator.integers(0, 4, 60).astype(np.int32) if step % 2 else None
        gradients = generator.normal(size=(60, dim)).astype(np.float32)
        history.append(0.02 * (step + 1))
        assert kernels.apply_gradients(history, row_ids, gradients, records, groups, scratch_floats=5 * dim) == -1
        table.apply(row_ids, gradients, groups, 0.02 * (step + 1))
    kernels.catch_up_rows(history, dim, records)
    assert np.array_equal(bits(records[:, :dim]), bits(table.gather(np.arange(50))))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_neither_threads_nor_scratch_nor_the_processor_change_a_bit(name: str) -> None:
    optimizer, generator, dim = OPTIMIZERS[name], np.random.default_rng(9), 64
    first = new_records(optimizer, 4_000, dim, generator)
    row_ids, groups = generator.integers(0, 4_000, 9_000), generator.integers(0, 9, 9_000).astype(np.int32)
    gradients = generator.normal(size=(9_000, dim)).astype(np.float32)
    found = []
    for scratch, threads, plain in ((1 << 24, 1, False), (0, 1, False), (999 * dim, 3, False), (1 << 24, 2, True)):
        records = first.copy()
        history = history_of(optimizer, [0.1, 0.2])
        kernels.apply_gradients(history, row_ids, gradients, records, groups, 1.0, scratch, threads, plain)
        found.append(bits(records))
    assert not np.array_equal(found[0], bits(first))
    assert all(np.array_equal(found[0], each) for each in found[1:])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])  # two of the last are beyond float32
@pytest.mark.parametrize("scratch", [1, 1 << 20])
def test_a_sum_that_is_not_finite_is_named_and_changes_no_row(way: str, value: float, scratch: int) -> None:
    optimizer, generator, dim = OPTIMIZERS["LazyAdam"], np.random.default_rng(10), 19
    records = new_records(optimizer, 300, dim, generator)
    before = records.copy()
    row_ids = np.concatenate([np.arange(300), [7, 298, 298]])
    gradients = generator.normal(size=(303, dim)).astype(np.float32)
    gradients[-2:, -1] = value
    history = history_of(optimizer, [0.1])
    bad = kernels.apply_gradients(history, row_ids, gradients, records, scratch_floats=scratch, plain=WAYS[way])
    assert bad == 298
    assert np.array_equal(bits(records), bits(before))
    assert kernels.sum_gradients(row_ids, gradients, 300, plain=WAYS[way])[2] == 298


def test_a_scale_that_makes_a_sum_infinite_is_found_too() -> None:
    records = np.ones((1, 4), np.float32)
    history = history_of(SGD(0.1), [0.1])
    assert kernels.apply_gradients(history, np.array([0]), np.full((1, 4), 1e30, np.float32), records, scale=1e20) == 0
    assert (records == 1).all()


def test_arguments_that_do_not_fit_are_refused() -> None:
    history = history_of(LazyAdam(0.1), [])
    records, sums = np.zeros((2, 12), np.float32), np.zeros((2, 4), np.float32)
    with pytest.raises(ValueError, match="no step yet"):
        kernels.update_rows(history, 4, records, sums)
    history.append(0.1)
    with pytest.raises(ValueError, match="the rule's state"):
        kernels.update_rows(history, 5, records, sums)
    with pytest.raises(ValueError, match="sums must be"):
        kernels.update_rows(history, 4, records, sums[:, :3])
    with pytest.raises(ValueError, match="contiguous float32"):
        kernels.update_rows(history, 4, records.astype(np.float64), sums)
    with pytest.raises(ValueError, match="rule must be"):
        kernels.Optimizer("adam")
