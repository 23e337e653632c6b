"""The division of a DRAM budget: never above it, fair, and named where it is too small."""

from __future__ import annotations

import pytest
from support.stores import layout_in_place

from tierstore import BudgetError
from tierstore.decisions.budget import ALIGNMENT_BYTES, DEPTH_MAX, READERS_FEW, cache_set_bytes, divide_dram
from tierstore.formats.placement import TableShape, lay_out_placement
from tierstore.layout import PageShape, TableLayout
from tierstore.spec import TableSpec


def layout(name: str, num_rows: int, row_bytes: int = 264) -> TableLayout:
    spec = TableSpec.plain(name, num_rows, row_bytes, "raw", 1)
    shape = PageShape.of_rows(row_bytes)
    return TableLayout(spec, shape.page_bytes, shape.rows_per_page, shape.num_pages(num_rows), 10, 0, f"shards/{name}")


TABLES = {
    name: layout(name, rows) for name, rows in (("a", 10_000_000), ("b", 1000), ("c", 5_000_000), ("d", 20_000_000))
}


@pytest.mark.parametrize("budget_bytes", [100_000, 1 << 20, 64 << 20, 1 << 30, 2 << 30, 4 << 30, 16 << 30])
def test_the_parts_never_exceed_the_budget(budget_bytes: int) -> None:
    plan = divide_dram(TABLES, budget_bytes)
    assert plan.dram_bytes <= budget_bytes
    assert list(plan.shares) == list(TABLES)
    byte_end = 0
    for name, share in plan.shares.items():
        assert share.byte_start == byte_end
        assert share.byte_start % ALIGNMENT_BYTES == 0
        byte_end += share.num_bytes
        needed = TABLES[name].spec.table_bytes if share.resident else share.num_sets * cache_set_bytes(TABLES[name])
        assert needed <= share.num_bytes < needed + ALIGNMENT_BYTES
        assert share.resident == (share.num_sets == 0)
    assert byte_end == plan.block_bytes


def test_what_is_left_unused_is_less_than_one_set_a_table() -> None:
    plan = divide_dram(TABLES, 1 << 30)
    assert (1 << 30) - plan.dram_bytes < len(TABLES) * (cache_set_bytes(TABLES["a"]) + ALIGNMENT_BYTES)


def test_small_tables_are_resident_and_leave_their_rest_to_the_others() -> None:
    plan = divide_dram(TABLES, 5 << 30)
    assert [name for name, share in plan.shares.items() if share.resident] == ["b", "c"]
    assert plan.shares["a"].num_bytes == pytest.approx(plan.shares["d"].num_bytes, abs=10_000)


def test_all_tables_are_resident_where_they_fit() -> None:
    total = sum(table.spec.table_bytes for table in TABLES.values())
    assert all(share.resident for share in divide_dram(TABLES, total + (64 << 20)).shares.values())


@pytest.mark.parametrize("budget_bytes", [0, 1, 5000, 10_000])
def test_a_budget_below_the_least_names_one_that_is_enough(budget_bytes: int) -> None:
    with pytest.raises(BudgetError, match=f"dram: {budget_bytes} bytes") as caught:
        divide_dram(TABLES, budget_bytes)
    least = int(str(caught.value).split("below the ")[1].split()[0])
    assert divide_dram(TABLES, least).dram_bytes <= least


@pytest.mark.parametrize("row_bytes", [1, 84, 264, 4080, 5000, 100_000])
@pytest.mark.parametrize("budget_bytes", [4 << 20, 64 << 20, 1 << 30])
def test_a_page_reader_holds_the_pages_and_the_entry_of_at_least_one_key(row_bytes: int, budget_bytes: int) -> None:
    table = layout("w", 1_000_000, row_bytes)
    staging = divide_dram({"w": table}, budget_bytes).staging
    assert staging.page_bytes == table.page_bytes
    assert 1 <= staging.depth <= DEPTH_MAX
    assert 1 <= staging.num_readers <= READERS_FEW
    assert staging.assembly_bytes >= table.spec.entry_bytes
    assert staging.num_bytes <= budget_bytes


def test_staging_of_a_large_budget_is_at_most_16_mib() -> None:
    staging = divide_dram(TABLES, 16 << 30).staging
    assert staging.num_readers == READERS_FEW
    assert staging.num_bytes <= 16 << 20


@pytest.mark.parametrize("readers", [1, 2, 3, 5, 16, 128])
@pytest.mark.parametrize("budget_bytes", [100_000, 4 << 20, 16 << 20, 64 << 20, 256 << 20, 16 << 30])
def test_readers_are_as_many_as_asked_for_if_a_sixteenth_of_the_budget_pays_for_them(
    budget_bytes: int, readers: int
) -> None:
    staging = divide_dram(TABLES, budget_bytes, readers=readers).staging
    assert 1 <= staging.num_readers <= readers
    one_key = 4096 + 2 * 320
    assert staging.num_bytes <= max(budget_bytes // 16, one_key)
    if staging.num_readers > READERS_FEW:
        assert staging.depth == DEPTH_MAX
    if staging.num_readers < readers:
        another = 512 << 10 if staging.num_readers < READERS_FEW else DEPTH_MAX * (4096 + 4 * 264)
        assert (staging.num_readers + 1) * another > min(budget_bytes // 16, readers * another)


@pytest.mark.parametrize("row_bytes", [84, 264, 1024, 4080])
@pytest.mark.parametrize("budget_bytes", [8 << 20, 64 << 20, 1 << 30])
def test_either_read_batch_has_room_for_more_rows_than_pages_are_in_flight(row_bytes: int, budget_bytes: int) -> None:
    staging = divide_dram({"w": layout("w", 10_000_000, row_bytes)}, budget_bytes).staging
    assert staging.assembly_bytes >= 2 * staging.depth * row_bytes - 64


@pytest.mark.parametrize("in_hbm", [0, 1, 511, 512, 5000, 100_000, 200_000])
def test_a_static_set_behind_hbm_begins_at_a_whole_unit_and_ends_with_the_placement(in_hbm: int) -> None:
    placement = lay_out_placement(0, TABLES, {"a": TableShape((100_000,), 0.5), "d": TableShape((2000,), 0.5)}, {})
    plan = divide_dram(TABLES, 64 << 20, placement, {"a": in_hbm})
    share, table = plan.shares["a"], placement.tables["a"]
    first = min(in_hbm, 100_000)
    assert first - 512 < share.static_start <= first
    assert (table.byte_start + share.static_start * table.record_bytes) % ALIGNMENT_BYTES == 0
    whole = divide_dram(TABLES, 64 << 20, placement).shares["a"]
    assert share.static_entries == min(whole.static_entries, 100_000 - share.static_start)
    assert share.num_sets >= whole.num_sets
    assert plan.shares["d"].static_start == 0
    assert plan.dram_bytes <= 64 << 20


@pytest.mark.parametrize("num_placed", [0, 100, 2000, 8000])
def test_copied_planes_in_memory_leave_room_for_the_index_and_one_set(num_placed: int) -> None:
    tables = {"w": layout_in_place("w", 10_000, (96, 3))}
    placement = lay_out_placement(0, tables, {"w": TableShape((num_placed,), 0.5)}, {}) if num_placed else None
    with pytest.raises(BudgetError) as caught:
        divide_dram(tables, 1, placement)
    least = int(str(caught.value).split("below the ")[1].split()[0])
    kept = []
    for budget_bytes in range(least, 1_000_000, 4096):
        plan = divide_dram(tables, budget_bytes, placement)
        share = plan.shares["w"]
        assert plan.dram_bytes <= budget_bytes
        assert share.resident or share.num_sets >= 1
        parts = share.static_bytes + share.index_bytes + share.side_bytes
        assert share.resident or parts + share.num_sets * cache_set_bytes(tables["w"]) <= share.num_bytes
        kept.append(share.side_bytes > tables["w"].checksum_bytes + 4096)
    assert True in kept
