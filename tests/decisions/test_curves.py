"""Curves: every point is the simulation of its budget, and no byte is counted twice."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from tierstore.decisions.curves import Curves, build_curves, ladder
from tierstore.decisions.hit_rates import EntryCost, GroupCurves
from tierstore.decisions.replay import Replay, lru_hits, simulate

COST = EntryCost(static_bytes=100, recency_set_bytes=1000, reads=8, packed_reads=1)
BUDGETS = [2_000, 8_000, 32_000, 128_000]


def skewed_replay(seed: int, num_tokens: int = 4000) -> Replay:
    """Two orders drawn from a skewed law; training counted another draw from the same."""
    rng = np.random.default_rng(seed)
    num_items = 1000
    drawn = (rng.pareto(0.7, (2, num_tokens, 2)) * 5).astype(np.int64) % (num_items // 2) * 2 + [0, 1]
    return Replay(
        (2, 3),
        np.tile(np.array([0, 1], dtype=np.uint8), num_tokens),
        drawn[0].reshape(-1),
        np.bincount(drawn[1].reshape(-1), minlength=num_items),
        (np.arange(num_items) % 2).astype(np.uint8),
        np.repeat(np.arange(num_tokens), 2),
        np.arange(100, num_tokens + 1, 100),
    )


class WholeRanking:
    """A ranking whose population is the replay's own items, hottest first by count: of a group, all that curves use."""

    def __init__(self, replay: Replay) -> None:
        self.group = SimpleNamespace(replay=replay)
        self.class_values = replay.counts
        self.num_valued = round(np.count_nonzero(replay.counts) / replay.sample_rate)
        self._hottest = np.argsort(-replay.counts, kind="stable")

    def static(self, num_entries: int) -> np.ndarray:
        chosen = np.zeros(len(self.class_values), dtype=bool)
        chosen[self._hottest[: round(num_entries * self.group.replay.sample_rate)]] = True
        return chosen & (self.class_values > 0)


def curves_of(replay: Replay, **options: object) -> Curves:
    generator = np.random.default_rng(0)
    return build_curves(WholeRanking(replay), COST, BUDGETS, 2000, generator, **options)  # type: ignore[arg-type]


def described(curves: Curves) -> GroupCurves:
    return curves.described(["t"], {"2": 500, "3": 500}, None, {})


@pytest.fixture(scope="module")
def curves() -> Curves:
    return curves_of(skewed_replay(0))


def test_ends_of_the_mix_are_static_alone_and_recency_alone(curves: Curves) -> None:
    replay = curves.replay
    hottest = np.argsort(-replay.counts, kind="stable")
    for point in curves.points:
        static = np.zeros(len(replay.counts), dtype=bool)
        static[hottest[: point.dram_bytes // 100]] = True
        static &= replay.counts > 0
        assert np.array_equal(point.static, simulate(replay, static, 0, 1).hit_rate)
        assert np.array_equal(point.recency, simulate(replay, static & False, point.dram_bytes // 1000, 1).hit_rate)
        assert np.all(point.outcome.hit_rate[-1] >= [point.static[-1], point.recency[-1]])


def test_a_mix_takes_no_more_than_its_budget(curves: Curves) -> None:
    for point in curves.points:
        assert 0 <= point.dram_bytes - point.static_entries * 100 - point.recency_sets * 1000 < 1000 + 100
        assert point.static_entries <= np.count_nonzero(curves.replay.counts)


def test_lru_has_as_many_entries_as_the_recency_cache_alone(curves: Curves) -> None:
    for point in curves.points:
        hits = lru_hits(curves.replay, np.array([point.dram_bytes // 1000 * 8]))[0]
        assert point.lru[-1] == hits[-1] / len(curves.replay.items)


def test_reads_are_those_of_the_missed_items(curves: Curves) -> None:
    for point in curves.points:
        missed = curves.replay.counts[point.outcome.missed_items]
        assert point.reads_per_token == pytest.approx(8 * len(missed) / 4000)
        assert point.packed_reads_per_token == pytest.approx(((missed >= 2) + 8 * (missed < 2)).sum() / 4000)


def test_intervals_hold_the_estimate_and_are_narrower_than_nothing(curves: Curves) -> None:
    rates = np.array([point.outcome.hit_rate for point in curves.points])
    assert np.all((curves.low <= rates) & (rates <= curves.high))
    assert np.all(curves.high - curves.low < 0.2)


def test_steps_of_more_sequences_are_seldom_without_a_read(curves: Curves) -> None:
    largest = [steps for steps in curves.steps if steps.dram_bytes == curves.recommended[-1].dram_bytes]
    assert [steps.sequences for steps in largest] == [1, 4, 16]  # of 64 sequences there would be but 62 steps
    shares = [steps.without_read for steps in largest]
    assert None not in shares
    assert shares == sorted(shares, reverse=True)  # type: ignore[type-var]
    assert largest[0].entries_shared == 0 < largest[2].entries_shared


def test_two_threads_draw_the_same_curves() -> None:
    with ThreadPoolExecutor(2) as threads:
        at_once = described(curves_of(skewed_replay(3), map_over=threads.map))
    assert at_once == described(curves_of(skewed_replay(3)))


def test_curves_survive_json(curves: Curves) -> None:
    made = described(curves)
    record = json.loads(json.dumps(made.to_dict()))
    assert GroupCurves.from_dict(record) == made
    assert list(record["points"][0]["mixed"]["hit_rate"]) == ["2", "3", "all"]
    assert set(record["points"][0]) == {"dram_bytes", "resident", "static", "recency", "lru", "mixed"}
    assert record["replay"] == {"tokens": 4000, "documents": 40, "accesses": 8000, "items": 1000, "sample_rate": 1.0}
    del record["points"][0]["resident"]  # profiles of older versions do not say it
    assert GroupCurves.from_dict(record) == made


def test_a_share_of_the_items_leaves_unknown_what_it_says_nothing_of() -> None:
    whole = skewed_replay(1)
    kept = (whole.items // 2 * 7919) % 4 < 3
    part = Replay(
        whole.orders,
        whole.order_index[kept],
        whole.items[kept],
        np.where((np.arange(1000) // 2 * 7919) % 4 < 3, whole.counts, 0),
        whole.item_order,
        whole.tokens[kept],
        whole.document_ends,
        sample_rate=0.75,
    )
    curves = curves_of(part)
    assert {steps.without_read for steps in curves.steps} == {None}
    for point in curves.points:
        assert point.static_entries * 100 + point.recency_sets * 1000 <= point.dram_bytes


def test_whole_tables_are_the_last_point_and_answer_everything() -> None:
    replay = skewed_replay(0)
    *cached, whole = curves_of(replay, whole_bytes=500_000).points
    assert [point.dram_bytes for point in cached] == BUDGETS
    assert (whole.dram_bytes, whole.resident) == (500_000, True)
    assert whole.outcome.hit_rate.tolist() == [1.0, 1.0, 1.0]
    assert (whole.reads_per_token, whole.packed_reads_per_token) == (0.0, 0.0)
    assert whole.lru[-1] == lru_hits(replay, np.array([500 * 8]))[0][-1] / len(replay.items)
    made = described(curves_of(replay, whole_bytes=500_000))
    assert made.points[-1].mixed.low == {"2": 1.0, "3": 1.0, "all": 1.0}
    assert 500_000 not in {steps.dram_bytes for steps in made.steps}
    assert made.recommended[-1].name == "whole"


def test_tables_so_small_that_only_whole_ones_are_worth_a_thought_have_one_point() -> None:
    ranking = WholeRanking(skewed_replay(0))
    curves = build_curves(ranking, COST, [], 2000, np.random.default_rng(0), whole_bytes=4096)  # type: ignore[arg-type]
    assert [(point.dram_bytes, point.resident) for point in curves.points] == [(4096, True)]
    assert [choice.name for choice in curves.recommended] == ["whole"]
    assert curves.steps == []


def test_a_budget_counts_by_what_it_leaves_to_entries() -> None:
    whole = curves_of(skewed_replay(0)).points
    half = curves_of(skewed_replay(0), usable_bytes=[size // 2 for size in BUDGETS]).points
    for point in half:
        assert 0 <= point.dram_bytes // 2 - point.static_entries * 100 - point.recency_sets * 1000 < 1000 + 100
    assert [point.dram_bytes for point in half] == BUDGETS
    assert half[0].outcome.hit_rate[-1] < whole[0].outcome.hit_rate[-1]


def test_every_simulation_is_told() -> None:
    told: list[tuple[str, int, int | None]] = []
    with ThreadPoolExecutor(2) as threads:
        curves_of(
            skewed_replay(0), map_over=threads.map, on_progress=lambda *args: told.append(args), whole_bytes=500_000
        )
    assert list(dict.fromkeys(phase for phase, _, _ in told)) == ["replaying", "intervals", "decoding"]
    for phase in ("replaying", "decoding"):
        counts = [done for name, done, _ in told if name == phase]
        totals = {total for name, _, total in told if name == phase}
        assert sorted(counts) == list(range(max(counts) + 1))
        assert totals == {max(counts)}


def test_a_ladder_doubles_until_all_that_was_counted_fits() -> None:
    replay = skewed_replay(0)
    cost = EntryCost(1 << 20, 8 << 20, 8, 1)
    budgets = ladder(WholeRanking(replay), cost)  # type: ignore[arg-type]
    counted = np.count_nonzero(replay.counts)
    assert budgets[0] == 16 << 20
    assert all(after == 2 * before for before, after in itertools.pairwise(budgets))
    assert budgets[-2] < counted << 20 <= budgets[-1]
    assert ladder(WholeRanking(replay), EntryCost(1, 8, 8, 1))  # type: ignore[arg-type] == [16 << 20]
