"""The index and the records of placed entries: compiled equal to NumPy's, and both to plain dictionaries."""

from __future__ import annotations

import numpy as np
import pytest
from support.shapes import POISON

from tierstore import kernels
from tierstore.kernels import reference_placed

IMPLEMENTATIONS = [reference_placed, kernels]


def distinct_keys(seed: int, count: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    keys = np.unique(np.append(rng.integers(0, 2**63 - 1, count, dtype=np.int64, endpoint=True), [0, 2**63 - 1]))
    return rng.permutation(keys)[:count] if count > 2 else keys[:count]


def buckets_of(num_buckets: int) -> np.ndarray:
    return np.full((num_buckets, 64), POISON, dtype=np.uint8)


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS, ids=lambda module: module.__name__.rpartition(".")[2])
@pytest.mark.parametrize(
    ("count", "num_buckets"), [(0, 0), (0, 1), (1, 1), (5, 1), (6, 2), (10, 2), (500, 100), (700, 200)]
)
def test_every_key_is_found_and_no_other(kernel, count: int, num_buckets: int) -> None:
    keys = distinct_keys(1, count)
    places = np.random.default_rng(2).permutation(count).astype(np.uint32)
    buckets = buckets_of(num_buckets)
    assert kernel.index_entries(keys, places, buckets)
    np.testing.assert_array_equal(kernel.find_entries(buckets, keys), places)
    strangers = np.append(np.setdiff1d(distinct_keys(3, 2000), keys), -1)
    assert (kernel.find_entries(buckets, strangers) == -1).all()


@pytest.mark.parametrize(
    ("count", "num_buckets"), [(0, 3), (1, 1), (5, 1), (35, 10), (50, 10), (997, 200), (1000, 200)]
)
def test_the_compiled_index_is_the_references_byte_for_byte(count: int, num_buckets: int) -> None:
    keys, places = distinct_keys(4, count), np.arange(count, dtype=np.uint32)
    one, other = buckets_of(num_buckets), buckets_of(num_buckets)
    assert kernels.index_entries(keys, places, one)
    assert reference_placed.index_entries(keys, places, other)
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_an_index_without_room_says_so(kernel) -> None:
    keys = distinct_keys(5, 11)
    assert not kernel.index_entries(keys, np.arange(11, dtype=np.uint32), buckets_of(2))
    assert not kernel.index_entries(keys[:1], np.zeros(1, dtype=np.uint32), buckets_of(0))


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_a_key_taken_out_does_not_hide_those_that_it_displaced(kernel) -> None:
    keys = distinct_keys(6, 40)
    buckets = buckets_of(8)
    assert kernel.index_entries(keys, np.arange(40, dtype=np.uint32), buckets)
    records = np.zeros((40, 24), dtype=np.uint8)
    kernel.seal_records(records, keys, np.zeros(40, dtype=np.uint32), 8, 7)
    records[::3, 0] ^= 1
    assert kernel.invalidate_bad_records(records, 8, 7) == 14
    assert kernel.drop_bad_entries(buckets, 0, records, 40, 8) == 14
    found = kernel.find_entries(buckets, keys)
    np.testing.assert_array_equal(found, np.where(np.arange(40) % 3 == 0, -1, np.arange(40)))


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_a_record_under_another_key_order_or_place_is_left_out(kernel) -> None:
    keys = distinct_keys(7, 6)
    buckets = buckets_of(3)
    records = np.zeros((4, 24), dtype=np.uint8)
    kernel.seal_records(records, keys[[0, 2, 2, 3]], np.array([1, 1, 1, 0], dtype=np.uint32), 8, 7)
    places = np.array([0, 1, 2, 3, 4, 9], dtype=np.uint32)
    assert kernel.index_entries(keys, places, buckets)
    assert kernel.invalidate_bad_records(records, 8, 7) == 0
    assert (
        kernel.drop_bad_entries(buckets, 1, records, 6, 8) == 3
    )  # key 1 has key 2's record, 3 is of order 0, 9 is no place
    np.testing.assert_array_equal(kernel.find_entries(buckets, keys), [0, -1, 2, -1, 4, -1])


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_places_below_the_first_loaded_record_are_kept_unseen(kernel) -> None:
    keys = distinct_keys(9, 7)
    buckets = buckets_of(3)
    records = np.zeros((3, 24), dtype=np.uint8)  # of places 2, 3 and 4
    kernel.seal_records(records, keys[[2, 0, 4]], np.zeros(3, dtype=np.uint32), 8, 7)
    places = np.array([0, 1, 2, 3, 4, 5, 6], dtype=np.uint32)
    assert kernel.index_entries(keys, places, buckets)
    assert kernel.drop_bad_entries(buckets, 0, records, 6, 8, 2) == 2  # 3 is key 0's, 6 is no place
    np.testing.assert_array_equal(kernel.find_entries(buckets, keys), [0, 1, 2, -1, 4, 5, -1])


@pytest.mark.parametrize("entry_bytes", [1, 7, 8, 9, 264, 2112])
def test_compiled_records_are_the_references_byte_for_byte(entry_bytes: int) -> None:
    rng = np.random.default_rng(entry_bytes)
    record_bytes = -(-entry_bytes // 8) * 8 + 16
    one = rng.integers(0, 256, (9, record_bytes), dtype=np.uint8)
    other = one.copy()
    keys, order_index = distinct_keys(8, 9), rng.integers(0, 16, 9).astype(np.uint32)
    kernels.seal_records(one, keys, order_index, entry_bytes, 99)
    reference_placed.seal_records(other, keys, order_index, entry_bytes, 99)
    np.testing.assert_array_equal(one, other)
    assert (
        kernels.invalidate_bad_records(one, entry_bytes, 98)
        == reference_placed.invalidate_bad_records(other, entry_bytes, 98)
        == 9
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_flipped_bit_of_a_record_is_noticed(kernel) -> None:
    whole = np.arange(24, dtype=np.uint8).reshape(1, 24)
    kernel.seal_records(whole, np.array([5]), np.array([2], dtype=np.uint32), 8, 3)
    for bit in range(24 * 8):
        damaged = whole.copy()
        damaged[0, bit // 8] ^= 1 << bit % 8
        assert kernel.invalidate_bad_records(damaged, 8, 3) == 1


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_shapes_that_do_not_fit_are_refused(kernel) -> None:
    with pytest.raises(ValueError, match="buckets"):
        kernel.find_entries(np.zeros((2, 63), dtype=np.uint8), np.zeros(1, dtype=np.int64))
    with pytest.raises(ValueError, match="keys and record_numbers"):
        kernel.index_entries(np.zeros(2, dtype=np.int64), np.zeros(1, dtype=np.uint32), buckets_of(1))
    with pytest.raises(ValueError, match="keys"):
        kernel.index_entries(np.full(1, -1), np.zeros(1, dtype=np.uint32), buckets_of(1))
    with pytest.raises(ValueError, match="a record is"):
        kernel.invalidate_bad_records(np.zeros((1, 23), dtype=np.uint8), 8, 0)
    with pytest.raises(TypeError):
        kernel.find_entries(np.zeros((2, 64), dtype=np.int8), np.zeros(1, dtype=np.int64))
