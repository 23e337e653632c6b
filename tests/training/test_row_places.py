"""RowPlaces equals a dictionary, in the memory that it promises."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tierstore import kernels

NO_RUN, NO_PLACE = 65535, 2**32 - 1


def find(places: kernels.RowPlaces, row_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    runs, found = np.empty(len(row_ids), dtype=np.uint16), np.empty(len(row_ids), dtype=np.uint32)
    return runs, found, places.find(row_ids, runs, found)


@pytest.mark.parametrize("num_rows", [10, 5_000, 1 << 22, (1 << 48) - 1])
def test_the_newest_record_is_found_as_by_a_dictionary(num_rows: int) -> None:
    rng = np.random.default_rng(num_rows)
    places, expected = kernels.RowPlaces(num_rows), dict[int, tuple[int, int]]()
    for run in range(40):
        row_ids = rng.integers(max(0, num_rows - 20_000), num_rows, 1 + run * 20)
        start = int(rng.integers(0, 2**31))
        if run % 4 == 3:
            some = np.array(list(expected)[:: run // 4 + 1])
            runs, found, _ = find(places, some)
            stale = rng.random(len(some)) < 0.5
            found[stale] ^= 1
            assert places.move(some, runs, found, run, start) == int((~stale).sum())
            expected |= {int(row): (run, start + i) for i, row in enumerate(some) if not stale[i]}
        else:
            places.put(row_ids, run, start)
            expected |= {int(row): (run, start + i) for i, row in enumerate(row_ids)}
        asked = np.unique(np.concatenate([row_ids, rng.integers(0, num_rows, 300)]))
        runs, found, num_found = find(places, asked)
        wanted = [expected.get(int(row), (NO_RUN, NO_PLACE)) for row in asked]
        assert list(zip(runs.tolist(), found.tolist(), strict=True)) == wanted
        assert num_found == sum(run != NO_RUN for run, _ in wanted)
        assert places.num_found == len(expected)
        for each in range(run + 1):
            assert places.live(each) == sum(of == each for of, _ in expected.values())


def test_memory_grows_by_a_segment_at_a_time_to_eighteen_bytes_a_row() -> None:
    rng = np.random.default_rng(0)
    places, most = kernels.RowPlaces(50_000_000), 0
    for run in range(40):
        row_ids = rng.integers(0, 50_000_000, 25_000)
        limit = places.num_bytes_with(len(row_ids))
        places.put(row_ids, run, 0)
        assert places.num_bytes <= limit
        most = max(most, limit)
    assert 16 <= places.num_bytes / places.num_found <= 20.5
    assert most <= places.num_found * 22


def test_row_ids_outside_the_table_are_refused() -> None:
    places = kernels.RowPlaces(10)
    for bad in (-1, 10):
        with pytest.raises(ValueError, match="row ids"):
            places.put(np.array([bad]), 0, 0)
    with pytest.raises(ValueError, match="below 65535"):
        places.put(np.array([1]), 65535, 0)
    with pytest.raises(ValueError, match="below 2"):
        places.put(np.array([1]), 1, 2**32 - 1)
    assert (places.num_found, places.num_bytes) == (0, 0)


@pytest.mark.slow
def test_ten_million_rows_take_less_than_a_microsecond_each() -> None:
    rng = np.random.default_rng(0)
    places, row_ids = kernels.RowPlaces(400_000_000), rng.permutation(400_000_000 // 40)
    begin = time.process_time()
    for run in range(10):
        places.put(row_ids[run * 1_000_000 : (run + 1) * 1_000_000] * 40, run, 0)
    assert time.process_time() - begin < 10
    assert places.num_found == 10_000_000
