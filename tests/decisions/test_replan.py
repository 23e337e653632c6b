"""A replan moves what is clearly hotter and nothing else, never past capacity, in steps that fit,
and once is enough."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierstore.decisions.replan import (
    Entries,
    Replan,
    caught,
    choose_static,
    fresh_choice,
    hotter,
    hottest_indexes,
    joined,
    steps,
)

Name = tuple[int, int]  # order index, key
COUNTS = st.one_of(st.integers(0, 6), st.integers(0, 60), st.integers(2**32 - 4, 2**32 - 1))
COUNTED = st.dictionaries(st.tuples(st.integers(0, 2), st.integers(0, 12)), COUNTS, max_size=30)
HYSTERESIS = st.sampled_from([1.0, 1.25, 3.0])


def entries_of(counted: dict[Name, int]) -> Entries:
    names = list(counted)
    return Entries(
        np.array([order for order, _ in names], dtype=np.uint8),
        np.array([key for _, key in names], dtype=np.int64),
        np.array(list(counted.values()), dtype=np.uint32),
    )


def names_of(entries: Entries) -> list[Name]:
    return list(zip(entries.order_index.tolist(), entries.keys.tolist(), strict=True))


@st.composite
def situations(draw: st.DrawFn) -> tuple[dict[Name, int], set[Name], int]:
    """Counts of all keys, those that are static now, and a capacity that holds these at least."""
    counted = draw(COUNTED)
    static = {name for name in counted if draw(st.booleans())}
    return counted, static, len(static) + draw(st.integers(0, 8))


def split(counted: dict[Name, int], static: set[Name]) -> tuple[Entries, Entries]:
    """The static entries, and all as candidates: what is counted is not told apart."""
    return entries_of({name: counted[name] for name in counted if name in static}), entries_of(counted)


def replanned_by_hand(
    counted: dict[Name, int], static: set[Name], capacity: int, hysteresis: float, least_count: int
) -> tuple[list[Name], list[Name]]:
    """Entry by entry: what enters and what leaves, in order. Of equal counts the smaller name is the hotter."""
    coming = sorted(
        (name for name in counted if name not in static and counted[name] >= least_count),
        key=lambda name: (-counted[name], name),
    )
    staying = sorted(static, key=lambda name: (-counted[name], name))
    enter, leave = [], []
    for name in coming:
        if len(static) + len(enter) - len(leave) < capacity:
            enter.append(name)
        elif staying and counted[name] > hysteresis * counted[staying[-1]] + 1:
            enter.append(name)
            leave.append(staying.pop())
        else:
            break
    return enter, leave


@settings(max_examples=500, deadline=None)
@given(situations(), HYSTERESIS, st.integers(1, 4))
def test_a_replan_is_what_is_chosen_entry_by_entry(
    situation: tuple[dict[Name, int], set[Name], int], hysteresis: float, least_count: int
) -> None:
    counted, static, capacity = situation
    current, candidates = split(counted, static)
    replan = choose_static(current, candidates, capacity, hysteresis, least_count)
    enter, leave = replanned_by_hand(counted, static, capacity, hysteresis, least_count)
    assert names_of(replan.enter) == enter
    assert replan.enter.counts.tolist() == [counted[name] for name in enter]
    assert names_of(current[replan.coldest]) == leave
    assert set(names_of(current[replan.leave])) == set(leave)
    assert len(replan.leave) == len(static)


@settings(max_examples=300, deadline=None)
@given(situations(), HYSTERESIS)
def test_capacity_is_never_exceeded_nothing_leaves_while_there_is_room_and_once_is_enough(
    situation: tuple[dict[Name, int], set[Name], int], hysteresis: float
) -> None:
    counted, static, capacity = situation
    current, candidates = split(counted, static)
    replan = choose_static(current, candidates, capacity, hysteresis)
    after = replan.applied(current)
    assert len(set(names_of(after))) == len(after) <= capacity
    assert len(after) == capacity or not replan.leave.any()
    if len(after) < capacity:
        assert {name for name in counted if counted[name] >= 2} <= set(names_of(after))
    assert caught(after, candidates) >= caught(current, candidates)
    again = choose_static(after, candidates, capacity, hysteresis)
    assert len(again.enter) == again.leave.sum() == 0


@settings(max_examples=300, deadline=None)
@given(situations(), st.integers(1, 9), st.randoms(use_true_random=False))
def test_the_order_of_what_comes_in_does_not_matter(
    situation: tuple[dict[Name, int], set[Name], int], spare: int, random: st.randoms
) -> None:
    counted, static, capacity = situation
    shuffled = list(counted)
    random.shuffle(shuffled)
    told = []
    for names in (list(counted), shuffled):
        current, candidates = split({name: counted[name] for name in names}, static)
        replan = choose_static(current, candidates, capacity)
        told.append([(names_of(step.enter), names_of(current[step.leave])) for step in steps(replan, capacity, spare)])
    assert told[0] == told[1]


@settings(max_examples=300, deadline=None)
@given(situations(), st.integers(1, 9))
def test_steps_fit_the_spare_slots_keep_to_capacity_and_end_at_the_target(
    situation: tuple[dict[Name, int], set[Name], int], spare: int
) -> None:
    counted, static, capacity = situation
    current, candidates = split(counted, static)
    replan = choose_static(current, candidates, capacity)
    live, left_before = set(static), -1
    for step in steps(replan, capacity, spare):
        entering, leaving = names_of(step.enter), names_of(current[step.leave])
        assert 0 < len(entering) <= spare
        assert (
            len(live) + len(entering) <= capacity + spare
        )  # slots that are taken until readers have left the epoch before
        assert live.isdisjoint(entering)
        assert live.issuperset(leaving)
        live = (live | set(entering)) - set(leaving)
        assert len(live) <= capacity
        assert not leaving or len(live) == capacity
        for name in leaving:
            assert counted[name] >= left_before
            left_before = counted[name]
    assert live == set(names_of(replan.applied(current)))


@settings(max_examples=200, deadline=None)
@given(COUNTED, st.integers(0, 40), st.integers(1, 4))
def test_a_fresh_choice_is_the_hottest_and_what_an_empty_set_takes(
    counted: dict[Name, int], capacity: int, least_count: int
) -> None:
    hottest = sorted(
        (name for name in counted if counted[name] >= least_count), key=lambda name: (-counted[name], name)
    )
    candidates = entries_of(counted)
    assert names_of(fresh_choice(candidates, capacity, least_count)) == hottest[:capacity]
    replan = choose_static(entries_of({}), candidates, capacity, least_count=least_count)
    assert names_of(replan.enter) == hottest[:capacity]


def zipf_counts(
    rng: np.random.Generator, hot_from: int, num_keys: int = 20_000, num_accesses: int = 200_000
) -> Entries:
    """What a stream asked for in which key `hot_from` is the hottest, and so on round."""
    weights = 1 / np.arange(1, num_keys + 1)
    drawn = (rng.choice(num_keys, num_accesses, p=weights / weights.sum()) + hot_from) % num_keys
    counts = np.bincount(drawn, minlength=num_keys).astype(np.uint32)
    return Entries((np.arange(num_keys) % 3).astype(np.uint8), np.arange(num_keys, dtype=np.int64), counts)


def test_after_a_shift_one_replan_regains_nearly_all_that_a_fresh_plan_would() -> None:
    rng = np.random.default_rng(0)
    before, after = zipf_counts(rng, 0), zipf_counts(rng, 10_000)
    static = fresh_choice(before, 2000)
    now = after[static.keys]
    assert caught(static, before) > 0.7
    assert caught(now, after) < 0.2
    regained = choose_static(now, after, 2000).applied(now)
    fresh = fresh_choice(after, 2000)
    assert caught(regained, after) > 0.98 * caught(fresh, after)


@pytest.mark.parametrize("seed", range(3))
def test_hysteresis_moves_less_for_noise_and_costs_few_hits(seed: int) -> None:
    """Two counts of one and the same stream: whatever moves between them moves for nothing."""
    rng = np.random.default_rng(seed)
    first, second = zipf_counts(rng, 0), zipf_counts(rng, 0)
    now = second[fresh_choice(first, 2000).keys]
    moved = {h: choose_static(now, second, 2000, hysteresis=h) for h in (1.0, 1.25, 2.0)}
    assert len(moved[1.0].enter) > 250
    assert len(moved[1.25].enter) < 0.8 * len(moved[1.0].enter)
    assert len(moved[2.0].enter) < 0.4 * len(moved[1.0].enter)
    assert caught(moved[1.25].applied(now), second) > caught(fresh_choice(second, 2000), second) - 0.002


def test_an_entry_gives_way_only_to_one_that_was_counted_clearly_more_often() -> None:
    static = {(0, 1): 8}
    for count, enters in ((11, False), (12, True)):  # 1.25 * 8 + 1 = 11
        replan = choose_static(entries_of(static), entries_of({(0, 2): count}), 1)
        assert names_of(replan.enter) == ([(0, 2)] if enters else [])
        assert replan.leave.tolist() == [enters]


def test_equal_keys_of_different_orders_are_different_entries() -> None:
    replan = choose_static(entries_of({(0, 5): 9}), entries_of({(0, 5): 9, (1, 5): 9}), 4)
    assert names_of(replan.enter) == [(1, 5)]


def test_of_nothing_nothing_comes() -> None:
    nothing = entries_of({})
    replan = choose_static(nothing, nothing, 0)
    assert len(replan.enter) == len(replan.leave) == 0
    assert list(steps(replan, 0, 1)) == []
    assert caught(nothing, nothing) == 0
    assert names_of(choose_static(nothing, entries_of({(0, 1): 5}), 0).enter) == []
    assert len(fresh_choice(entries_of({(0, 1): 5}), 0)) == 0


def test_what_does_not_fit_is_refused() -> None:
    two, nothing = entries_of({(0, 1): 5, (0, 2): 6}), entries_of({})
    with pytest.raises(ValueError, match="2 static entries exceed the capacity of 1"):
        choose_static(two, nothing, 1)
    for change in ({"hysteresis": 0.9}, {"least_count": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            choose_static(two, nothing, 2, **change)  # type: ignore[arg-type]
    grown = Replan(two, np.zeros(2, dtype=bool), np.zeros(0, dtype=np.int64))
    for capacity, spare in ((3, 1), (4, 0)):
        with pytest.raises(ValueError, match="spare slots"):
            list(steps(grown, capacity, spare))
    assert len(list(steps(grown, 4, 1))) == 2
    with pytest.raises(ValueError, match="must all be"):
        Entries(np.zeros(1, dtype=np.uint8), np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.uint32))
    assert len(joined(two, nothing)) == 2


@given(COUNTED, st.integers(1, 12), st.integers(1, 5))
def test_the_hottest_found_piece_by_piece_are_those_of_the_whole(
    counted: dict[Name, int], most: int, size: int
) -> None:
    whole = entries_of(counted)
    best = whole[:0]
    for start in range(0, len(whole), size):
        best = hotter(best, whole[start : start + size], most)
    assert sorted(best.counts.tolist()) == sorted(whole.hottest(most).counts.tolist())
    assert {name: counted[name] for name in names_of(best)} == dict(
        zip(names_of(best), best.counts.tolist(), strict=True)
    )
    assert len(set(names_of(best))) == len(best)


@given(st.lists(COUNTS, max_size=30), st.integers(0, 40))
def test_the_places_of_the_highest_counts(counts: list[int], most: int) -> None:
    places = hottest_indexes(np.array(counts, dtype=np.uint32), most).tolist()
    assert places == sorted(sorted(range(len(counts)), key=lambda place: (-counts[place], place))[:most])
