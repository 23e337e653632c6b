"""A daemon's budget is never exceeded and its parts never overlap, whatever tables,
placements and budgets there are."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stores import layout_in_place

from tierstore import BudgetError
from tierstore.decisions.budget import cache_set_bytes
from tierstore.decisions.shared_budget import SharedPlan, divide_shared
from tierstore.formats.placement import Placement, TableShape, lay_out_placement
from tierstore.layout import BUCKET_KEYS, PageShape, TableLayout
from tierstore.spec import TableSpec

LINE_BYTES = 64


def layout(name: str, num_rows: int, row_bytes: int, orders: int) -> TableLayout:
    heads = orders * 2
    moduli, offsets = (1,) * heads, (0,) * heads
    spec = (
        TableSpec.plain(name, num_rows, row_bytes, "raw", 1)
        if orders == 1
        else TableSpec(name, num_rows, row_bytes, tuple(range(2, orders + 2)), 2, moduli, offsets, "raw", 1, "f" * 64)
    )
    shape = PageShape.of_rows(row_bytes)
    return TableLayout(spec, shape.page_bytes, shape.rows_per_page, shape.num_pages(num_rows), 10, 0, f"shards/{name}")


tables_drawn = st.lists(
    st.tuples(st.integers(2, 3_000_000), st.integers(1, 3000), st.sampled_from([1, 1, 2, 3, 4])), min_size=1, max_size=4
)
placements_drawn = st.lists(st.tuples(st.integers(0, 2_000), st.floats(0, 1)), min_size=4, max_size=4)


def placement_of(layouts: dict[str, TableLayout], drawn: list[tuple[int, float]]) -> Placement:
    shapes = {
        name: TableShape((count,) * len(table.spec.orders), fraction, 0)
        for (name, table), (count, fraction) in zip(layouts.items(), drawn, strict=False)
        if count
    }
    return lay_out_placement(1, layouts, shapes, {})


def parts_of(plan: SharedPlan, layouts: dict[str, TableLayout]) -> dict[str, list[tuple[int, int]]]:
    """(start, end) of all parts in each block, by what the shares say, with sizes counted here."""
    parts: dict[str, list[tuple[int, int]]] = {"resident": [], "static": [], "recency": []}
    for name, share in plan.shares.items():
        table, spec = layouts[name], layouts[name].spec
        if share.resident:
            parts["resident"].append((share.resident_start, share.resident_start + spec.num_rows * spec.row_bytes))
            continue
        record = -(-spec.rows_per_key * spec.row_bytes // 8) * 8 + 16
        static = parts["static"]
        static.append((share.records_start, share.records_start + share.num_slots * record))
        static += [(start, start + 128) for start in (*share.head_starts, share.file_head_start)]
        static += [(start, start + 64 * share.area_buckets) for start in share.area_starts]
        static.append((share.file_start, share.file_start + 64 * share.file_buckets))
        parts["recency"].append((share.recency_start, share.recency_start + share.num_sets * cache_set_bytes(table)))
    return parts


def assert_sound(plan: SharedPlan, layouts: dict[str, TableLayout], budget_bytes: int) -> None:
    sizes = {"resident": plan.resident_bytes, "static": plan.static_bytes, "recency": plan.recency_bytes}
    total = plan.staging.num_bytes + plan.counts_bytes + 2 * sizes["resident"] + sizes["static"] + sizes["recency"]
    total += sum(-(-32 * share.num_slots // 4096) * 4096 for share in plan.shares.values())
    assert plan.dram_bytes == total <= budget_bytes == plan.budget_bytes
    assert list(plan.shares) == list(layouts)
    assert all(size % 4096 == 0 for size in sizes.values())
    assert plan.counts_bytes > 0
    assert plan.counts_bytes % LINE_BYTES == 0
    for block, parts in parts_of(plan, layouts).items():
        used = sorted(part for part in parts if part[0] < part[1])
        assert all(start >= 0 and start % LINE_BYTES == 0 for start, _ in used)
        assert all(end <= next_start for (_, end), (next_start, _) in pairwise(used)), (block, used)
        assert max((end for _, end in used), default=0) <= sizes[block]
    for name, share in plan.shares.items():
        if not share.resident:
            assert 1 <= share.capacity < share.num_slots
            assert share.num_sets >= 1
            orders = len(layouts[name].spec.orders)
            worst = [share.capacity - (orders - 1), *[1] * (orders - 1)]  # one order nearly alone: most round up
            assert sum(int(count / BUCKET_KEYS) + 1 for count in worst if count > 0) <= share.area_buckets


@settings(max_examples=150, deadline=None)
@given(drawn=tables_drawn, placed=placements_drawn, budget_bytes=st.integers(1, 1 << 31), with_placement=st.booleans())
def test_no_plan_exceeds_its_budget_and_no_parts_overlap(
    drawn: list[tuple[int, int, int]], placed: list[tuple[int, float]], budget_bytes: int, with_placement: bool
) -> None:
    layouts = {f"t{i}": layout(f"t{i}", rows, size, orders) for i, (rows, size, orders) in enumerate(drawn)}
    placement = placement_of(layouts, placed) if with_placement else None
    try:
        plan = divide_shared(layouts, budget_bytes, placement)
    except BudgetError as error:
        least = int(str(error).split("below the ")[1].split()[0])
        assert budget_bytes < least
        assert_sound(divide_shared(layouts, least, placement), layouts, least)
        return
    assert_sound(plan, layouts, budget_bytes)


@pytest.mark.parametrize("budget_bytes", [1 << 20, 64 << 20, 1 << 30, 8 << 30])
def test_little_of_a_budget_is_left_unused(budget_bytes: int) -> None:
    layouts = {name: layout(name, 40_000_000, 264, 4) for name in ("a", "b")}
    plan = divide_shared(layouts, budget_bytes)
    assert budget_bytes - plan.dram_bytes < 2 * 32 * 1024


def test_a_table_is_kept_whole_only_where_two_versions_of_it_fit() -> None:
    small, large = layout("small", 1000, 264, 1), layout("large", 40_000_000, 264, 4)
    layouts = {"large": large, "small": small}
    shares = divide_shared(layouts, 16 << 20).shares
    assert (shares["small"].resident, shares["large"].resident) == (True, False)
    only = {"small": small}
    whole_bytes = -(-1000 * 264 // 4096) * 4096
    budgets = range(2 * whole_bytes, 4 * whole_bytes, 4096)
    kept = [divide_shared(only, budget).shares["small"].resident for budget in budgets]
    assert kept == sorted(kept)
    assert set(kept) == {False, True}
    first = divide_shared(only, budgets[kept.index(True)])
    assert first.resident_bytes == whole_bytes
    assert first.dram_bytes >= 2 * whole_bytes


def test_the_static_fraction_of_a_placement_is_kept() -> None:
    layouts = {"a": layout("a", 40_000_000, 264, 4)}
    for fraction in (0.1, 0.5, 0.9):
        plan = divide_shared(layouts, 256 << 20, placement_of(layouts, [(1000, fraction)]))
        static_bytes = plan.static_bytes + plan.work_bytes
        assert static_bytes / (static_bytes + plan.recency_bytes) == pytest.approx(fraction, abs=0.01)


@pytest.mark.parametrize("num_placed", [0, 2000, 8000])
def test_copied_planes_in_memory_never_exceed_the_budget(num_placed: int) -> None:
    layouts: dict[str, TableLayout] = {"w": layout_in_place("w", 10_000, (96, 3))}
    placement = placement_of(layouts, [(num_placed, 0.5)])
    kept = set()
    for budget_bytes in range(100_000, 2_000_000, 4096):
        try:
            plan = divide_shared(layouts, budget_bytes, placement)
        except BudgetError:
            continue
        assert_sound(plan, layouts, budget_bytes)
        kept.add(plan.shares["w"].side_bytes)
    assert len(kept) == 2  # with copied planes, and without
