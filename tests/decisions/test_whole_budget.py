"""The budget that is said to hold tables whole does, and hardly any smaller one does."""

from __future__ import annotations

import pytest

from tests.decisions.test_budget import layout
from tierstore.decisions.budget import divide_dram
from tierstore.decisions.plan import usable_bytes, whole_budget
from tierstore.errors import BudgetError
from tierstore.layout import TableLayout
from tierstore.tools.report.tables import exact_bytes
from tierstore.units import parse_bytes

STORES = [
    {"a": 1},
    {"a": 100},
    {"a": 123_457},
    {"a": 400_000_000},
    {"a": 1000, "b": 1000},
    {"a": 3_000_000, "b": 3_000_017},
    {"a": 50_000, "b": 70_000_000, "c": 12},
    {f"layers.{number}": 500_000 + 1000 * number for number in range(12)},
]


def is_whole(tables: dict[str, TableLayout], names: tuple[str, ...], num_bytes: int) -> bool:
    try:
        shares = divide_dram(tables, num_bytes).shares
    except BudgetError:
        return False
    return all(shares[name].resident for name in names)


@pytest.mark.parametrize("rows", STORES, ids=lambda rows: "-".join(map(str, rows.values())))
def test_the_budget_holds_the_tables_whole_and_a_hundredth_less_does_not(rows: dict[str, int]) -> None:
    tables = {name: layout(name, count) for name, count in rows.items()}
    for names in [tuple(tables), *((name,) for name in tables)]:
        found = whole_budget(tables, names)
        assert is_whole(tables, names, found)
        assert not is_whole(tables, names, found * 127 // 128 - 1)


@pytest.mark.parametrize("rows", STORES, ids=lambda rows: "-".join(map(str, rows.values())))
def test_the_budget_is_one_that_people_can_write(rows: dict[str, int]) -> None:
    tables = {name: layout(name, count) for name, count in rows.items()}
    found = whole_budget(tables, tuple(tables))
    written = exact_bytes(found)
    assert parse_bytes(written, "--dram") == found
    assert len(written) <= len("1,234.25 MiB")


def test_what_a_budget_leaves_to_entries_is_what_the_store_divides() -> None:
    tables = {name: layout(name, count) for name, count in (("a", 50_000), ("b", 9_000_000), ("c", 7_000_000))}
    for num_bytes in (1 << 20, 64 << 20, 1 << 30):
        shares = divide_dram(tables, num_bytes).shares
        assert usable_bytes(tables, ("b",), num_bytes) == 3 * shares["b"].num_bytes
    with pytest.raises(BudgetError):
        usable_bytes(tables, ("b",), 1000)
