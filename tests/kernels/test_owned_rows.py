"""What ranks exchange of a batch: the reference's rows, places and bits, and back to every reference."""

from __future__ import annotations

import numpy as np
import pytest

from tierstore import kernels
from tierstore.kernels.reference_gradient_norms import gradient_norms
from tierstore.kernels.reference_owned_rows import owned_rows

STARTS = {1: [0, 900], 2: [0, 450, 900], 3: [0, 0, 700, 900], 4: [0, 1, 2, 3, 900]}


@pytest.mark.parametrize("num_owners", list(STARTS))
@pytest.mark.parametrize("num_groups", [1, 4])
def test_rows_and_sums_are_the_references(num_owners: int, num_groups: int) -> None:
    rng = np.random.default_rng(num_owners)
    row_ids = (900 * rng.random(3000) ** 3).astype(np.int64)
    row_ids[rng.random(3000) < 0.1] = -1
    groups = np.sort(rng.integers(0, num_groups, 3000)).astype(np.int32)
    gradients = rng.normal(size=(3000, 36)).astype(np.float32)
    starts = np.array(STARTS[num_owners])
    owned = kernels.OwnedRows(row_ids, starts, groups)
    rows, counts, sum_counts, places, sums = owned_rows(row_ids, starts, groups, gradients, 0.5)
    assert owned.row_ids.tolist() == rows
    assert owned.counts.tolist() == counts
    assert owned.sum_counts.tolist() == sum_counts.tolist()
    assert owned.rows_of_sums.tolist() == (places if num_groups > 1 else [])
    assert [[*rows, -1][place] for place in owned.places.tolist()] == row_ids.tolist()
    for threads in (1, 3):
        out = np.full(sums.shape, 7, dtype=np.float32)
        owned.sum(gradients, out, 0.5, threads)
        assert out.tobytes() == sums.tobytes()
    values = rng.integers(0, 256, (len(rows), 20), dtype=np.uint8)
    out_rows = np.full((3000, 20), 7, dtype=np.uint8)
    owned.expand(values, out_rows, 2)
    by_row = dict(zip(rows, values, strict=True))
    assert out_rows.tolist() == [(by_row[row].tolist() if row >= 0 else [0] * 20) for row in row_ids.tolist()]


def test_a_batch_of_nothing_has_no_row_for_any_owner() -> None:
    for row_ids in (np.empty(0, dtype=np.int64), np.full(3, -1)):
        owned = kernels.OwnedRows(row_ids, np.array([0, 5, 9]), np.zeros(len(row_ids), dtype=np.int32))
        assert (owned.row_ids.tolist(), owned.counts.tolist(), owned.sum_counts.tolist()) == ([], [0, 0], [[0], [0]])
        owned.sum(np.ones((len(row_ids), 2), dtype=np.float32), np.empty((0, 2), dtype=np.float32))


@pytest.mark.parametrize(
    ("row_ids", "starts", "groups", "message"),
    [
        ([0, 9], [0, 5, 9], None, r"row_ids\[1\] is 9, must be -1 or at least 0 and below 9"),
        ([-2], [0, 9], None, r"row_ids\[0\] is -2"),
        ([0, 1], [0, 9], [1, 0], "groups must ascend"),
        ([0], [0, 9], [-1], r"groups\[0\] is negative"),
        ([0], [1, 9], None, "starts must begin with 0"),
        ([0], [0, 9, 8], None, "starts must ascend"),
        ([0], [0], None, "of one owner at least"),
        ([0, 1], [0, 9], [0], r"groups must be \[references\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    row_ids: list[int], starts: list[int], groups: list[int] | None, message: str
) -> None:
    given = None if groups is None else np.array(groups, dtype=np.int32)
    with pytest.raises(ValueError, match=message):
        kernels.OwnedRows(np.array(row_ids), np.array(starts), given)


def test_buffers_of_another_size_are_refused_before_they_are_written() -> None:
    owned = kernels.OwnedRows(np.array([4, 4, 1]), np.array([0, 9]))
    gradients, out = np.ones((3, 2), dtype=np.float32), np.full((3, 2), 7, dtype=np.float32)
    with pytest.raises(ValueError, match="out must be"):
        owned.sum(gradients, out)
    with pytest.raises(ValueError, match="gradients must be"):
        owned.sum(gradients[:2], out[:2])
    with pytest.raises(ValueError, match="values must be"):
        owned.expand(np.ones((3, 2), dtype=np.uint8), np.ones((3, 2), dtype=np.uint8))
    assert (out == 7).all()


def test_squares_of_a_blocks_rows_add_up_to_the_square_of_its_norm_in_bits() -> None:
    rng = np.random.default_rng(3)
    rows = rng.choice(5000, size=400, replace=False).astype(np.int64)
    sums = rng.normal(size=(400, 37)).astype(np.float32)
    out = np.full(400, -1.0)
    kernels.gradient_squares(rows, sums, out)
    whole = np.sqrt(np.add.accumulate(np.concatenate([[0.0], out]))[-1])
    assert whole == gradient_norms(rows, sums, np.zeros(1, dtype=np.int64))[0]
    with pytest.raises(ValueError, match="out must be"):
        kernels.gradient_squares(rows, sums, out[:5])
