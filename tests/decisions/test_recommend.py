"""Recommended budgets: where curves bend, and where memory stops to pay."""

from __future__ import annotations

import pytest

from tierstore.decisions.recommend import Recommendation, default_choice, knee, recommend

BUDGETS = [1 << (24 + place) for place in range(8)]


def test_the_knee_is_where_a_bent_line_bends() -> None:
    assert knee(BUDGETS, [0.1, 0.3, 0.5, 0.7, 0.72, 0.74, 0.76, 0.78]) == 3


def test_a_dip_moves_no_knee() -> None:
    assert knee(BUDGETS, [0.1, 0.3, 0.5, 0.7, 0.69, 0.71, 0.72, 0.72]) == 3


@pytest.mark.parametrize("rates", [[0.4] * 8, [0.4]])
def test_a_flat_curve_recommends_the_smallest_budget(rates: list[float]) -> None:
    assert knee(BUDGETS[: len(rates)], rates) == 0
    (only,) = recommend(BUDGETS[: len(rates)], rates)
    assert only.dram_bytes == BUDGETS[0]


def test_choices_ascend_and_say_what_they_bring() -> None:
    chosen = recommend(BUDGETS, [0.1, 0.3, 0.5, 0.7, 0.72, 0.74, 0.741, 0.742])
    assert [choice.name for choice in chosen] == ["frugal", "knee", "generous"]
    assert [choice.dram_bytes for choice in chosen] == [BUDGETS[2], BUDGETS[3], BUDGETS[5]]
    assert chosen[1].why.startswith("70.0 % of accesses hit")
    assert "beyond 512.00 MiB" in chosen[2].why


def test_nothing_is_frugal_that_asks_for_more_than_the_knee() -> None:
    chosen = recommend(BUDGETS, [0.1, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.75])
    assert [(choice.name, choice.dram_bytes) for choice in chosen] == [("knee", BUDGETS[1]), ("generous", BUDGETS[7])]


def test_where_the_curve_still_rises_at_its_end_nothing_is_said_of_beyond() -> None:
    chosen = recommend(BUDGETS, [0.1 * place for place in range(8)])
    assert chosen[-1].dram_bytes == BUDGETS[-1]
    assert "nothing larger was tried" in chosen[-1].why


def test_whole_tables_come_last_whatever_the_curve_says() -> None:
    rates = [0.1, 0.3, 0.5, 0.7, 0.72, 0.74, 0.76, 0.98]
    *others, whole = recommend(BUDGETS, rates, 3 << 30)
    assert [choice.name for choice in others] == [choice.name for choice in recommend(BUDGETS, rates)]
    assert (whole.name, whole.dram_bytes) == ("whole", 3 << 30)
    assert "the next size tried holds the tables whole" in others[-1].why
    assert [choice.name for choice in recommend([], [], 1 << 20)] == ["whole"]


def test_plan_without_dram_takes_the_largest_knee_of_all_tables() -> None:
    def group(*recommended: tuple[str, int]) -> list[Recommendation]:
        return [Recommendation(name, size, "") for name, size in recommended]

    knee_of_two = default_choice([group(("frugal", 1), ("knee", 2), ("whole", 9)), group(("knee", 3), ("whole", 9))])
    assert knee_of_two.dram_bytes == 3
    assert default_choice([group(("frugal", 1), ("generous", 4), ("whole", 9))]).dram_bytes == 1
    assert default_choice([group(("whole", 9))]).dram_bytes == 9
