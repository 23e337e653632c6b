"""A budget is divided fairly: nobody gets less than an equal part of the whole, unless it needs less."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tierstore.decisions.fair_division import divide_fairly


def shares_of_needs(total: int, needs: list[int]) -> list[int]:
    """Each takes what it needs, as far as its part goes."""

    def take(name: str, part: int) -> tuple[int, int]:
        taken = min(part, needs[int(name)])
        return taken, taken

    shares = divide_fairly(total, {str(i): need for i, need in enumerate(needs)}, take)
    assert list(shares) == [str(i) for i in range(len(needs))]
    return list(shares.values())


def divided_by_rounds(total: int, needs: list[int]) -> list[int]:
    """The oracle: equal parts for all who still need something, again and again, until nothing can be given."""
    shares = [0] * len(needs)
    while True:
        hungry = [i for i in range(len(needs)) if shares[i] < needs[i]]
        part = (total - sum(shares)) // len(hungry) if hungry else 0
        if part == 0:
            return shares
        for i in hungry:
            shares[i] += min(part, needs[i] - shares[i])


@given(st.integers(0, 10**6), st.lists(st.integers(0, 10**5), min_size=1, max_size=9))
def test_shares_are_those_of_a_division_by_rounds(total: int, needs: list[int]) -> None:
    shares, expected = shares_of_needs(total, needs), divided_by_rounds(total, needs)
    assert sum(shares) <= total
    # Fewer bytes than there are tables may be left over, and go to one or to none.
    assert all(abs(share - other) <= len(needs) for share, other in zip(shares, expected, strict=True))


@given(st.integers(0, 10**6), st.lists(st.integers(0, 10**5), min_size=1, max_size=9))
def test_who_needs_more_than_an_equal_part_gets_no_less_than_that(total: int, needs: list[int]) -> None:
    for share, need in zip(shares_of_needs(total, needs), needs, strict=True):
        assert share >= min(need, total // len(needs))


def test_what_a_small_one_leaves_goes_to_the_others_and_the_order_stays() -> None:
    assert shares_of_needs(90, [100, 10, 100]) == [40, 10, 40]


def test_a_share_may_round_what_it_takes() -> None:
    taken = divide_fairly(100, {"a": 5, "b": 1, "c": 1}, lambda _, part: (part, part // 10 * 10))
    assert taken == {"b": 33, "c": 35, "a": 40}
