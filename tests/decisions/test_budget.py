"""The division of a DRAM budget: never above it, fair, and named where it is too small."""

from __future__ import annotations

import pytest

from tierstore import BudgetError
from tierstore.decisions.budget import CACHE_WAYS, SLOT_OVERHEAD_BYTES, STAGING_BUFFERS, divide_dram, staging_unit_bytes
from tierstore.formats.catalog import TableLayout
from tierstore.formats.page import PageShape
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
    for name, share in plan.shares.items():
        spec = TABLES[name].spec
        slots = share.num_sets * CACHE_WAYS
        assert share.num_bytes == (
            spec.table_bytes if share.resident else slots * (spec.entry_bytes + SLOT_OVERHEAD_BYTES)
        )
        assert share.resident or share.num_sets >= 1


def test_what_is_left_unused_is_less_than_one_set_a_table() -> None:
    plan = divide_dram(TABLES, 1 << 30)
    assert (1 << 30) - plan.dram_bytes < len(TABLES) * CACHE_WAYS * (264 + SLOT_OVERHEAD_BYTES)


def test_small_tables_are_resident_and_leave_their_rest_to_the_others() -> None:
    plan = divide_dram(TABLES, 5 << 30)
    assert [name for name, share in plan.shares.items() if share.resident] == ["b", "c"]
    assert plan.shares["a"].num_bytes == pytest.approx(plan.shares["d"].num_bytes, abs=10_000)


def test_all_tables_are_resident_where_they_fit() -> None:
    total = sum(table.spec.table_bytes for table in TABLES.values())
    assert all(share.resident for share in divide_dram(TABLES, total + (64 << 20)).shares.values())


@pytest.mark.parametrize("budget_bytes", [0, 1, 5000, 17_000])
def test_a_budget_below_the_least_names_one_that_is_enough(budget_bytes: int) -> None:
    with pytest.raises(BudgetError, match=f"dram: {budget_bytes} bytes") as caught:
        divide_dram(TABLES, budget_bytes)
    least = int(str(caught.value).split("below the ")[1].split()[0])
    assert divide_dram(TABLES, least).dram_bytes <= least


def test_staging_holds_the_pages_of_at_least_one_key() -> None:
    wide = {"w": layout("w", 100, 100_000)}
    plan = divide_dram(wide, 4 << 20)
    assert plan.staging_bytes >= staging_unit_bytes(wide["w"])
    assert STAGING_BUFFERS * plan.staging_bytes <= 4 << 20
