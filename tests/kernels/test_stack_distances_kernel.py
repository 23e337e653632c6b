"""Reuse distances against a plain list, the item used last at its head."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tierstore import kernels
from tierstore.kernels import reference

IMPLEMENTATIONS: dict[str, Any] = {"reference": reference, "compiled": kernels}


def distances_by_list(items: np.ndarray) -> list[int]:
    stack: list[int] = []
    distances = []
    for item in items.tolist():
        distances.append(stack.index(item) if item in stack else -1)
        if item in stack:
            stack.remove(item)
        stack.insert(0, item)
    return distances


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_accesses", [0, 1, 2, 63, 64, 65, 127, 128, 129, 2000])
@pytest.mark.parametrize("num_items", [1, 2, 40, 2000])
def test_distances_equal_those_of_a_list(name: str, num_accesses: int, num_items: int) -> None:
    rng = np.random.default_rng([num_accesses, num_items])
    items = rng.integers(0, max(1, min(num_items, num_accesses)), num_accesses)
    found = IMPLEMENTATIONS[name].stack_distances(items)
    assert found.dtype == np.int64
    assert found.tolist() == distances_by_list(items)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_distances_of_one_item_of_all_and_of_all_in_turn_are_known(name: str) -> None:
    kernel = IMPLEMENTATIONS[name].stack_distances
    turn = np.tile(np.arange(500), 3)
    assert kernel(np.zeros(1000, dtype=np.int64)).tolist() == [-1] + [0] * 999
    assert kernel(np.arange(1000)[::-1]).tolist() == [-1] * 1000
    assert kernel(turn).tolist() == [-1] * 500 + [499] * 1000
    assert kernel(np.concatenate([turn[:500], turn[:500][::-1]])).tolist() == [-1] * 500 + list(range(500))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [np.int32, np.uint8, ">i8"])
def test_strided_and_other_integers_are_taken(name: str, dtype: Any) -> None:
    items = np.random.default_rng(0).integers(0, 50, 300).astype(dtype)
    assert IMPLEMENTATIONS[name].stack_distances(items[::3]).tolist() == distances_by_list(items[::3])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_items_that_are_not_dense_are_refused(name: str) -> None:
    for bad in ([-1], [1], [0, 2], [0, 2**62], [0, -(2**63)], [[0, 0]]):
        with pytest.raises(ValueError):
            IMPLEMENTATIONS[name].stack_distances(np.array(bad))


def test_distances_agree_over_a_long_skewed_stream() -> None:
    rng = np.random.default_rng(1)
    items = (3000 ** rng.random(30_000)).astype(np.int64)
    np.testing.assert_array_equal(kernels.stack_distances(items), reference.stack_distances(items))
