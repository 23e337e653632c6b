"""How an HBM budget is divided: never more than was asked, nearly all of it used,
refused with the least that would do."""

from __future__ import annotations

import pytest

from tierstore.decisions.hbm_budget import divide_hbm, pinned_bytes
from tierstore.errors import BudgetError
from tierstore.layout import TableLayout
from tierstore.spec import TableSpec


def layout(name: str, row_bytes: int = 264, heads: int = 8) -> TableLayout:
    num_heads = 3 * heads
    moduli = tuple(1_000_003 + i for i in range(num_heads))
    offsets = tuple(sum(moduli[:i]) for i in range(num_heads))
    spec = TableSpec(name, sum(moduli), row_bytes, (2, 3, 4), heads, moduli, offsets, "raw", 1, "0" * 64)
    return TableLayout(spec, 4096, 4080 // row_bytes, 1 << 22, 1 << 18, 1, name)


@pytest.mark.parametrize("budget_bytes", [300_000, 1 << 20, 10_000_019, 1 << 30, 3 << 30])
@pytest.mark.parametrize("static", [0, 1000, 2_000_000])
def test_the_parts_add_up_to_the_budget_and_no_more(budget_bytes: int, static: int) -> None:
    layouts = {name: layout(name) for name in ("a", "b", "c")}
    placed = {"a": 3_000_000, "b": 3_000_000}
    plan = divide_hbm(layouts, budget_bytes, placed, {"a": static, "b": static})
    assert plan.hbm_bytes <= budget_bytes
    at = plan.staging_bytes
    for share in plan.shares.values():
        assert share.byte_start == at
        at += share.num_bytes
        assert share.num_slots >= share.num_entries
        assert share.num_buckets * 3.5 >= share.num_entries + share.static_entries
    assert at == plan.hbm_bytes
    for name in ("a", "b"):
        share = plan.shares[name]
        assert share.static_entries <= static
        if share.num_entries < 3_000_000:
            assert budget_bytes - plan.hbm_bytes < 2 * (2 * share.stride + 2 * 64 + 3 * 256)
    assert plan.shares["c"].num_entries == 0


def test_memory_that_one_table_does_not_need_goes_to_the_others() -> None:
    layouts = {name: layout(name) for name in ("a", "b")}
    few = divide_hbm(layouts, 64 << 20, {"a": 100, "b": 3_000_000}, {})
    even = divide_hbm(layouts, 64 << 20, {"a": 3_000_000, "b": 3_000_000}, {})
    assert few.shares["a"].num_entries == 100
    assert few.shares["b"].num_entries > 1.9 * even.shares["b"].num_entries


def test_the_least_that_the_error_names_is_enough() -> None:
    layouts = {name: layout(name) for name in ("a", "b")}
    placed = {"a": 50, "b": 50}
    with pytest.raises(BudgetError, match=r"hbm: 10 bytes .* below the \d+ bytes") as caught:
        divide_hbm(layouts, 10, placed, {"a": 50})
    least = int(str(caught.value).split("below the ")[1].split()[0])
    assert divide_hbm(layouts, least, placed, {"a": 50}).hbm_bytes <= least
    with pytest.raises(BudgetError):
        divide_hbm(layouts, least - 1, placed, {"a": 50})


def test_without_a_placement_there_is_only_control() -> None:
    layouts = {"a": layout("a")}
    plan = divide_hbm(layouts, 1 << 30, {}, {})
    assert plan.shares["a"].num_slots == 0
    assert plan.hbm_bytes < 10 << 20


def test_page_locked_memory_is_a_sixteenth_of_dram_and_bounded() -> None:
    assert pinned_bytes(1 << 20) == (1 << 20) // 16
    assert pinned_bytes(1 << 40) == 256 << 20
