"""Curves: what each budget of DRAM buys, by policy and by order, and which budgets to choose.

Input: a `Ranking`, what an entry costs, a ladder of budgets. Output: `Curves`, which `described` turns into what a
profile keeps. Every point is simulated by itself; the caller may give a `map` that runs several at once. The mixed
policy's static fraction is the best of a grid, chosen on the very accesses that it is then rated by: with six to choose
from, that flatters by less than the intervals are wide. Errors: none of its own.

Shapes: U items, D documents, O orders; [O + 1]: the orders, and last all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import kernels
from ..process.progress import DECODING, INTERVALS, REPLAYING, OnPhase, no_report
from .hit_rates import (
    CurvePoint,
    EntryCost,
    GroupCurves,
    Interval,
    MixedPolicy,
    ReplaySize,
    Sampling,
    Steps,
    rates_by_order,
)
from .intervals import prediction_intervals
from .ranking import Ranking
from .recommend import Recommendation, recommend
from .replay import Outcome, Replay, interleaved, lru_hits, shares, simulate

RECENCY_WAYS = kernels.CACHE_WAYS
STATIC_FRACTIONS = (0.0, 0.5, 0.75, 0.875, 0.95, 1.0)
SEQUENCES = (1, 4, 16, 64, 256)
STEPS_MIN = 64  # fewer steps say nothing of their share without a read
LADDER_BYTES_MIN = 16 << 20
LADDER_POINTS_MAX = 20
INTERVAL_LEVEL = 0.95  # of `prediction_intervals`

MapLike = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True, eq=False)
class Point:
    """One budget. Rates: float [O + 1]. `outcome` is the mixed policy's,
    its static part `static_fraction` of the bytes.

    resident: the budget stores the tables whole, so that every access hits; what single caches of its bytes would do
    stands beside it all the same.
    """

    dram_bytes: int
    static: np.ndarray
    recency: np.ndarray
    lru: np.ndarray
    static_fraction: float
    static_entries: int
    recency_sets: int
    outcome: Outcome
    reads_per_token: float
    packed_reads_per_token: float
    resident: bool = False


@dataclass(frozen=True, eq=False)
class Curves:
    """All of it, points by ascending budget; low and high: float [P, O + 1],
    the 95 % interval of the mixed hit rate."""

    replay: Replay
    cost: EntryCost
    points: list[Point]
    low: np.ndarray
    high: np.ndarray
    interval_tokens: int
    recommended: list[Recommendation]
    steps: list[Steps]

    def described(
        self, tables: Sequence[str], distinct: Mapping[str, int], sampling: Sampling | None, source: Mapping[str, str]
    ) -> GroupCurves:
        """Returns the curves as a profile keeps them, of `tables`, with what the caller knows about them."""
        replay = self.replay
        size = ReplaySize(
            replay.num_tokens,
            len(replay.document_ends),
            len(replay.items),
            len(replay.counts),
            replay.sample_rate,
        )
        return GroupCurves(
            tables=tuple(tables),
            orders=replay.orders,
            replay=size,
            first_touch=self._rates(self.points[0].outcome.first_touch_share),
            cost=self.cost,
            interval=Interval(INTERVAL_LEVEL, self.interval_tokens),
            points=tuple(self._point(index) for index in range(len(self.points))),
            steps=tuple(self.steps),
            recommended=tuple(self.recommended),
            distinct=distinct,
            sampling=sampling,
            source=source,
        )

    def _point(self, index: int) -> CurvePoint:
        point = self.points[index]
        outcome = point.outcome
        mixed = MixedPolicy(
            hit_rate=self._rates(outcome.hit_rate),
            low=self._rates(self.low[index]),
            high=self._rates(self.high[index]),
            static_share=self._rates(outcome.static_share),
            recency_share=self._rates(outcome.recency_share),
            static_fraction=point.static_fraction,
            static_entries=point.static_entries,
            recency_entries=point.recency_sets * RECENCY_WAYS,
            misses_per_token=float(outcome.misses_per_token[-1]),
            reads_per_token=point.reads_per_token,
            packed_reads_per_token=point.packed_reads_per_token,
        )
        static, recency, lru = (self._rates(rates) for rates in (point.static, point.recency, point.lru))
        return CurvePoint(point.dram_bytes, point.resident, static, recency, lru, mixed)

    def _rates(self, rates: np.ndarray) -> dict[str, float]:
        return rates_by_order(self.replay.orders, rates)


def build_curves(
    ranking: Ranking,
    cost: EntryCost,
    ladder_bytes: Sequence[int],
    interval_tokens: int,
    generator: np.random.Generator,
    *,
    packed: np.ndarray | None = None,
    batch_tokens: int = 1,
    fractions: Sequence[float] = STATIC_FRACTIONS,
    sequences: Sequence[int] = SEQUENCES,
    steps_ranking: Ranking | None = None,
    usable_bytes: Sequence[int] | None = None,
    whole_bytes: int | None = None,
    map_over: MapLike = map,
    on_progress: OnPhase | None = None,
) -> Curves:
    """Returns the curves of a replay over the budgets `ladder_bytes`, ascending. Blocks, seconds a million accesses.

    interval_tokens: the length of the streams that intervals are for. packed: bool [U], items that a placement would
    contain, by default those counted twice or more. batch_tokens: of the points; `sequences` are those of the steps,
    over each recommended budget; steps_ranking: what steps are taken from, if it is another replay than that of the
    points. usable_bytes: what each budget leaves to entries, by default all of it. whole_bytes: a budget that stores
    the tables whole, the last point; then `ladder_bytes`, which lie below it, may be none. map_over: such as an
    executor's map; what it calls, `on_progress` too, may run on any thread.
    """
    assert len(ladder_bytes) or whole_bytes, "a curve has a point"
    replay = ranking.group.replay
    budgets = [*ladder_bytes, whole_bytes] if whole_bytes else list(ladder_bytes)
    usable = [*(usable_bytes or ladder_bytes), *budgets[len(ladder_bytes) :]]
    report = on_progress or no_report
    simulator = _Simulator(ranking, cost, packed, batch_tokens, sorted({0.0, 1.0, *fractions}))
    simulator.begin(REPLAYING, len(budgets) * len(simulator.fractions), report)
    capacities = np.array([n // cost.recency_set_bytes * RECENCY_WAYS for n in usable])
    lru = shares(lru_hits(replay, capacities), replay.per_order(np.ones(len(replay.items), dtype=bool)))
    points: list[Point] = list(map_over(simulator.point, zip(budgets, usable, lru, strict=True)))
    if whole_bytes:
        points[-1] = simulator.whole(points[-1])
    report(INTERVALS, 0, None)
    low, high = _intervals(replay, points, interval_tokens, generator)
    cached = [point for point in points if not point.resident]
    recommended = recommend(
        [p.dram_bytes for p in cached], [float(p.outcome.hit_rate[-1]) for p in cached], whole_bytes
    )
    chosen = [p for p in cached if p.dram_bytes in {choice.dram_bytes for choice in recommended}]
    stepper = _Simulator(steps_ranking, cost, None, batch_tokens, ()) if steps_ranking else simulator
    wide = [number for number in sequences if stepper.num_tokens >= number * STEPS_MIN]
    stepper.begin(DECODING, len(wide) * len(chosen), report)
    steps = [each for several in map_over(lambda n: list(stepper.steps(n, chosen)), wide) for each in several]
    return Curves(replay, cost, points, low, high, interval_tokens, recommended, steps)


def ladder(ranking: Ranking, cost: EntryCost, per_doubling: int = 1, first_bytes: int = LADDER_BYTES_MIN) -> list[int]:
    """Returns budgets in geometric steps to the first with room for every counted item, 20 at most, ascending."""
    whole_bytes = ranking.num_valued * cost.static_bytes
    budgets = [max(first_bytes, cost.recency_set_bytes)]
    while budgets[-1] < whole_bytes and len(budgets) < LADDER_POINTS_MAX:
        budgets.append(round(budgets[0] * 2 ** (len(budgets) / per_doubling)))
    return budgets


class _Simulator:
    """What all points share. Immutable after construction, so that any thread may run any of them."""

    def __init__(
        self,
        ranking: Ranking,
        cost: EntryCost,
        packed: np.ndarray | None,
        batch_tokens: int,
        fractions: Sequence[float],
    ) -> None:
        self._ranking, self._replay, self._cost = ranking, ranking.group.replay, cost
        self._packed = self._replay.counts >= 2 if packed is None else packed
        self._batch_tokens, self.fractions = batch_tokens, fractions
        self._report_run: Callable[[], None] = lambda: None
        # Computed here, once, and not by every thread.
        _ = self._replay.batched(batch_tokens), self._replay.document_accesses, self._replay.num_first_touches
        _ = self._replay.num_accesses, ranking.class_values

    @property
    def num_tokens(self) -> int:
        """Tokens of the replay."""
        return self._replay.num_tokens

    def begin(self, phase: str, num_runs: int, report: OnPhase) -> None:
        """Begins a phase of so many simulations, each of which is reported, from any thread."""
        done = itertools.count(1)  # its next number is taken in one step, whatever the thread
        self._report_run = lambda: report(phase, next(done), num_runs)
        report(phase, 0, num_runs)

    def point(self, rung: tuple[int, int, np.ndarray]) -> Point:
        """Simulates one budget over all fractions and keeps the best.

        rung: the budget, what it leaves to entries, and LRU's rates there.
        """
        dram_bytes, usable_bytes, lru = rung
        runs = {fraction: self._run(usable_bytes, fraction) for fraction in self.fractions}
        best = max(runs, key=lambda fraction: (runs[fraction][0].hit_rate[-1], fraction))
        outcome, static_entries, recency_sets = runs[best]
        return Point(
            dram_bytes,
            runs[1.0][0].hit_rate,
            runs[0.0][0].hit_rate,
            lru,
            best,
            static_entries,
            recency_sets,
            outcome,
            *self._reads(outcome),
        )

    def whole(self, point: Point) -> Point:
        """Returns a point's budget with whole tables instead of entries: every access hits."""
        everything = np.ones(len(self._replay.counts), dtype=bool)
        outcome = simulate(self._replay, everything, 0, self._batch_tokens)
        return replace(
            point,
            static_fraction=1.0,
            static_entries=0,
            recency_sets=0,
            outcome=outcome,
            reads_per_token=0.0,
            packed_reads_per_token=0.0,
            resident=True,
        )

    def steps(self, sequences: int, points: Sequence[Point]) -> Iterator[Steps]:
        """Simulates `sequences` decoded side by side, over each point's budget."""
        replay = interleaved(self._replay, sequences)
        for point in points:
            outcome = simulate(replay, self._ranking.static(point.static_entries), point.recency_sets, sequences)
            self._report_run()
            yield Steps(
                point.dram_bytes,
                sequences,
                outcome.share_without_miss,
                float(outcome.shared_share[-1]),
                float(outcome.hit_rate[-1]),
                *self._reads(outcome),
            )

    def _run(self, usable_bytes: int, fraction: float) -> tuple[Outcome, int, int]:
        """The outcome, static entries and recency sets; what the static set cannot use is recency's,
        unless it is all static."""
        static_entries = min(int(usable_bytes * fraction) // self._cost.static_bytes, self._ranking.num_valued)
        left_bytes = usable_bytes - static_entries * self._cost.static_bytes
        recency_sets = 0 if fraction == 1 else left_bytes // self._cost.recency_set_bytes
        outcome = simulate(self._replay, self._ranking.static(static_entries), recency_sets, self._batch_tokens)
        self._report_run()
        return outcome, static_entries, recency_sets

    def _reads(self, outcome: Outcome) -> tuple[float, float]:
        """NVMe reads a token, without and with packed entries."""
        kept_tokens = max(outcome.num_tokens * outcome.sample_rate, 1e-9)
        num_missed = len(outcome.missed_items)
        num_packed = int(np.count_nonzero(self._packed[outcome.missed_items]))
        with_packed = num_packed * self._cost.packed_reads + (num_missed - num_packed) * self._cost.reads
        return num_missed * self._cost.reads / kept_tokens, with_packed / kept_tokens


def _intervals(
    replay: Replay, points: Sequence[Point], interval_tokens: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """All points from the same draws of documents, so that the bands of neighbours move together."""

    def columns(name: str) -> np.ndarray:
        per_document = [getattr(point.outcome, name) for point in points]
        return np.hstack([np.column_stack([each, each.sum(axis=1)]) for each in per_document])

    low, high = prediction_intervals(
        columns("document_hits"), columns("document_accesses"), replay.document_tokens, interval_tokens, generator
    )
    shape = (len(points), len(replay.orders) + 1)
    return low.reshape(shape), high.reshape(shape)
