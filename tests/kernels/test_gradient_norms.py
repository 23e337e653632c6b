"""Norms of a table's gradient: the reference's bits, in whatever order the rows come."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tierstore import kernels
from tierstore.kernels.reference_gradient_norms import gradient_norms as reference


def norms(rows: np.ndarray, sums: np.ndarray, starts: list[int]) -> np.ndarray:
    out = np.full(len(starts), -1.0)
    kernels.gradient_norms(rows, sums, np.array(starts, dtype=np.int64), out)
    return out


@pytest.mark.parametrize("dim", [1, 15, 16, 17, 64, 250])
def test_norms_are_the_references_bits_in_any_order_of_rows(dim: int) -> None:
    rng = np.random.default_rng(dim)
    rows = rng.choice(5000, size=700, replace=False).astype(np.int64)
    sums = (rng.normal(size=(700, dim)) * 10.0 ** rng.integers(-20, 18, (700, 1))).astype(np.float32)
    starts = [0, 1000, 1000, 4999]
    expected = reference(rows, sums, np.array(starts))
    assert np.array_equal(norms(rows, sums, starts), expected)
    order = rng.permutation(700)
    assert np.array_equal(norms(rows[order], sums[order], starts), expected)
    exact = [math.sqrt(math.fsum((sums[inside].astype(float) ** 2).ravel())) for inside in (
        rows < 1000, np.zeros(700, bool), (rows >= 1000) & (rows < 4999), rows >= 4999)]  # fmt: skip
    assert np.allclose(expected, exact, rtol=1e-13, atol=0)


def test_a_block_without_rows_has_norm_zero_and_one_block_has_all() -> None:
    none, of_none = np.empty(0, dtype=np.int64), np.empty((0, 4), dtype=np.float32)
    assert norms(none, of_none, [0, 7]).tolist() == [0, 0]
    assert norms(np.array([9, 2]), np.array([[3.0, 0.0], [0.0, 4.0]], dtype=np.float32), [0]).tolist() == [5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_its_block_alone(bad: float) -> None:
    sums = np.ones((3, 20), dtype=np.float32)
    sums[1, 18] = bad
    found = norms(np.array([1, 11, 21]), sums, [0, 10, 20])
    assert np.isfinite(found).tolist() == [True, False, True]


def test_arrays_that_do_not_fit_are_refused_before_anything_is_written() -> None:
    rows, sums, out = np.arange(3), np.ones((3, 2), dtype=np.float32), np.full(1, -1.0)
    starts = np.zeros(1, dtype=np.int64)
    for arguments in (
        (rows[:2], sums, starts, out), (rows, sums[0], starts, out), (rows, sums, starts[:0], out[:0]),
        (rows, sums, starts, np.empty(2)), (rows, sums, np.array([5, 4]), np.full(2, -1.0)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="must"):
            kernels.gradient_norms(*arguments)
    with pytest.raises(ValueError, match="float64"):
        kernels.gradient_norms(rows, sums, starts, np.empty(1, dtype=np.float32))
    assert out[0] == -1
