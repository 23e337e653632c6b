"""The map of ranks' slices says who answers what, and refuses slices that are not one table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engram_adapter.lockstep_forms import distinct
from engram_adapter.slice_map import SliceMap
from tierstore.errors import ConfigError
from tierstore.spec import KEY_MAX, TableSpec

MODULI = tuple(range(101, 125))  # 3 orders of 8 heads
OFFSETS = tuple(int(offset) for offset in np.cumsum([0, *MODULI[:-1]]))
WHOLE = TableSpec("layers.1", sum(MODULI), 16, (2, 3, 4), 8, MODULI, OFFSETS, "raw", 4, "0" * 64)
PLAIN = TableSpec.plain("plain", 100, 16, "raw", 4)


def cut(spec: TableSpec, num_slices: int) -> list[TableSpec]:
    return [spec.cut_slice(index, num_slices) for index in range(num_slices)]


@pytest.mark.parametrize("num_slices", [1, 2, 3, 5, 24])
def test_every_head_is_answered_by_one_rank_from_the_column_of_its_order(num_slices: int) -> None:
    slices = SliceMap.of(cut(WHOLE, num_slices))
    assert slices.by_key
    answered = []
    for share in slices.shares:
        assert len(share.columns) * share.rows_per_key == share.num_heads
        for number in range(share.num_heads):
            head = share.head_start + number
            assert share.columns[number // share.rows_per_key] == head // 8
            answered.append(head)
    assert answered == list(range(24))


def test_ranks_may_hold_slices_in_any_order() -> None:
    specs = cut(WHOLE, 3)
    slices = SliceMap.of([specs[2], specs[0], specs[1]])
    assert [share.head_start for share in slices.shares] == [17, 0, 9]
    ids = np.array([0, specs[1].row_start - 1, specs[1].row_start, specs[2].row_start, WHOLE.num_rows - 1])
    assert slices.owners(ids).tolist() == [1, 1, 2, 0, 0]


@pytest.mark.parametrize("specs", [cut(WHOLE, 25), cut(PLAIN, 3), [WHOLE.cut(0, 150), WHOLE.cut(150, WHOLE.num_rows)]])
def test_slices_that_cut_a_head_are_asked_by_row_id(specs: list[TableSpec]) -> None:
    slices = SliceMap.of(specs)
    assert not slices.by_key
    ids = np.arange(specs[0].num_rows)
    assert all(
        specs[rank].row_start <= row < specs[rank].row_end for row, rank in zip(ids, slices.owners(ids), strict=True)
    )


def test_slices_that_are_not_one_table_are_refused() -> None:
    first, second, third = cut(WHOLE, 3)
    for specs, why in [
        ([first, third], f"rows {second.row_start} to {second.row_end} of {WHOLE.num_rows} are in no rank's slice"),
        ([first, second], "are in no rank's slice"),
        ([first, second, second, third], "are in two ranks' slices"),
        ([first, second, replace(WHOLE, name="layers.4").cut_slice(2, 3)], "rank 2 has a slice of another table"),
        ([first, second, replace(WHOLE, fingerprint="1" * 64).cut_slice(2, 3)], "rank 2 has a slice of another table"),
    ]:
        with pytest.raises(ConfigError, match=why):
            SliceMap.of(specs)


@pytest.mark.parametrize("most", [5, KEY_MAX])
def test_distinct_ids_and_their_places_give_the_ids_back(most: int) -> None:
    generator = np.random.default_rng(1)
    for size in (0, 1, 7, 500):
        ids = generator.integers(-1, 9, size)
        ids[ids == 8] = most
        found, places = distinct(ids, KEY_MAX)
        assert len(set(found.tolist())) == len(found)
        assert -1 not in found
        assert np.where(places < 0, -1, np.append(found, 0)[places]).tolist() == ids.tolist()
