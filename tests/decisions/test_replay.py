"""Replays: what was simulated is what plain loops count, in all, by order, by batch and by document."""

from __future__ import annotations

import numpy as np
import pytest

from tierstore.decisions.replay import Replay, interleaved, lru_hits, simulate

ORDERS = (2, 3)
EMPTY = np.zeros(0, dtype=np.int64)


def make_replay(seed: int, num_tokens: int = 600, num_items: int = 80, sample_rate: float = 1.0) -> Replay:
    """Two accesses a token, of skewed items of which the even are of the first order; the last 9 are never accessed."""
    rng = np.random.default_rng(seed)
    drawn = (rng.pareto(1.0, (num_tokens, 2)) * 4).astype(np.int64) % ((num_items - 9) // 2)
    counts = rng.integers(0, 3, num_items)
    return Replay(
        ORDERS,
        np.tile(np.array([0, 1], dtype=np.uint8), num_tokens),
        (drawn * 2 + [0, 1]).reshape(-1).astype(np.int32),
        counts,
        (np.arange(num_items) % 2).astype(np.uint8),
        np.repeat(np.arange(num_tokens), 2),
        np.array([num_tokens // 3, num_tokens // 2, num_tokens]),
        sample_rate,
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("batch_tokens", [1, 7, 1000])
def test_a_cache_that_never_fills_hits_what_an_earlier_batch_had(seed: int, batch_tokens: int) -> None:
    replay = make_replay(seed)
    static = replay.counts == 2
    outcome = simulate(replay, static, recency_sets=4096, batch_tokens=batch_tokens)
    seen: set[int] = set()
    told = {name: [0, 0] for name in ("static", "recency", "distinct", "misses", "first")}
    without_miss = 0
    for start in range(0, replay.num_tokens, batch_tokens):
        batch = [int(item) for item in replay.items[start * 2 : (start + batch_tokens) * 2]]
        for place, item in enumerate(batch):
            told["static"][item % 2] += bool(static[item])
            told["recency"][item % 2] += not static[item] and item in seen
            told["first"][item % 2] += item not in seen and item not in batch[:place] and replay.counts[item] == 0
        for item in set(batch):
            told["distinct"][item % 2] += 1
            told["misses"][item % 2] += not static[item] and item not in seen
        without_miss += all(static[item] or item in seen for item in batch)
        seen |= set(batch)
    for name, got in (
        ("static", outcome.static_hits),
        ("recency", outcome.recency_hits),
        ("distinct", outcome.distinct),
        ("misses", outcome.distinct_misses),
        ("first", outcome.first_touches),
    ):
        assert got.tolist() == [*told[name], sum(told[name])], name
    assert outcome.batches_without_miss == without_miss
    assert outcome.share_without_miss == without_miss / outcome.num_batches
    assert np.bincount(outcome.missed_items % 2, minlength=2).tolist() == told["misses"]
    assert outcome.misses_per_token[-1] == pytest.approx(sum(told["misses"]) / replay.num_tokens)
    assert outcome.shared_share[-1] == pytest.approx(1 - sum(told["distinct"]) / len(replay.items))


def test_hits_of_the_documents_add_up_to_all() -> None:
    replay = make_replay(5)
    outcome = simulate(replay, replay.counts > 1, recency_sets=2, batch_tokens=3)
    assert outcome.document_accesses.tolist() == [[200, 200], [100, 100], [300, 300]]
    assert outcome.document_hits.sum(axis=0).tolist() == (outcome.static_hits + outcome.recency_hits)[:2].tolist()
    alone = simulate(replay, replay.counts > 1, recency_sets=0, batch_tokens=3)
    in_first = replay.counts[replay.items[:400]].reshape(200, 2) > 1
    assert alone.document_hits[0].tolist() == in_first.sum(axis=0).tolist()
    assert alone.recency_hits.tolist() == [0, 0, 0]


def test_rates_are_shares_of_accesses() -> None:
    outcome = simulate(make_replay(1), np.arange(80) < 20, recency_sets=1, batch_tokens=1)
    assert np.allclose(outcome.hit_rate, outcome.static_share + outcome.recency_share)
    assert outcome.hit_rate[-1] == (outcome.static_hits + outcome.recency_hits)[-1] / 1200
    assert 0 < outcome.first_touch_share[-1] < 1 - outcome.hit_rate[-1]


@pytest.mark.parametrize("seed", range(3))
def test_lru_hits_are_those_of_a_list_of_what_was_used_last(seed: int) -> None:
    replay = make_replay(seed)
    capacities = [1, 2, 5, 17, 80]
    hits = lru_hits(replay, np.array(capacities))
    for capacity, got in zip(capacities, hits, strict=True):
        held: list[int] = []
        told = [0, 0]
        for item in replay.items.tolist():
            told[item % 2] += item in held
            held = [item, *(other for other in held if other != item)][:capacity]
        assert got.tolist() == [*told, sum(told)]


def test_interleaving_keeps_every_access_and_takes_one_token_of_each_sequence_a_step() -> None:
    replay = make_replay(2, num_tokens=10)
    side_by_side = interleaved(replay, 3)
    assert side_by_side.items.tolist() == [
        int(item) for token in (0, 3, 6, 1, 4, 7, 2, 5, 8) for item in replay.items[token * 2 : token * 2 + 2]
    ]
    assert side_by_side.tokens.tolist() == np.repeat(np.arange(9), 2).tolist()
    assert simulate(side_by_side, np.zeros(80, dtype=bool), 1, 3).num_batches == 3


@pytest.mark.parametrize("num_sequences", [1, 2, 64])
def test_interleaving_changes_no_share_of_a_static_set_where_nothing_is_left_out(num_sequences: int) -> None:
    replay = make_replay(4, num_tokens=640)
    static = replay.counts > 0
    alone = simulate(replay, static, 0, 1)
    side_by_side = simulate(interleaved(replay, num_sequences), static, 0, num_sequences)
    assert side_by_side.static_hits.tolist() == alone.static_hits.tolist()
    assert side_by_side.num_batches == 640 // num_sequences


def test_fewer_tokens_than_sequences_make_no_step() -> None:
    assert interleaved(make_replay(0, num_tokens=6), 7).num_tokens == 0


def test_a_share_of_the_items_meets_as_small_a_share_of_the_cache() -> None:
    """With a tenth of the items hit rates are near those of all; rates a token are scaled,
    shares of batches unknown."""
    rng = np.random.default_rng(3)
    num_tokens, num_items = 60_000, 20_000
    items = np.minimum((rng.pareto(0.9, num_tokens) * 20).astype(np.int64), num_items - 1)
    kept_items = rng.permutation(num_items) < num_items // 5
    whole = Replay(
        (2,),
        np.zeros(num_tokens, dtype=np.uint8),
        items,
        np.zeros(num_items, dtype=np.int64),
        np.zeros(num_items, dtype=np.uint8),
        np.arange(num_tokens),
        np.array([num_tokens]),
    )
    kept = kept_items[items]
    part = Replay(
        (2,),
        whole.order_index[kept],
        items[kept],
        whole.counts,
        whole.item_order,
        whole.tokens[kept],
        whole.document_ends,
        sample_rate=0.2,
    )
    static = np.arange(num_items) < 0
    all_of_it, some = simulate(whole, static, 250, 1), simulate(part, static, 250, 1)
    # The draw of items alone moves the rate by some points: the hottest are in or not (hence the tolerance).
    assert some.hit_rate[0] == pytest.approx(all_of_it.hit_rate[0], abs=0.1)
    assert some.misses_per_token[0] == pytest.approx(all_of_it.misses_per_token[0], rel=0.15)
    assert some.share_without_miss is None
    assert all_of_it.share_without_miss is not None
    sizes = np.array([500, 2000])
    whole_rates = lru_hits(whole, sizes)[:, 0] / len(items)
    assert lru_hits(part, sizes)[:, 0] / kept.sum() == pytest.approx(whole_rates, abs=0.1)


def test_a_replay_of_nothing_has_no_hits() -> None:
    replay = Replay(ORDERS, EMPTY.astype(np.uint8), EMPTY, EMPTY, EMPTY.astype(np.uint8), EMPTY, EMPTY)
    outcome = simulate(replay, EMPTY.astype(bool), 1, 1)
    assert outcome.hit_rate.tolist() == [0, 0, 0]
    assert lru_hits(replay, np.array([5])).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": np.array([0, 9])}, "items from 0 to 9"),
        ({"items": np.array([-1, 0])}, "items from -1"),
        ({"tokens": np.array([1, 0])}, "must not descend"),
        ({"tokens": np.array([0, 5])}, "tokens to 5"),
        ({"tokens": np.array([0])}, "equally long"),
        ({"sample_rate": 0.0}, "sample_rate"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    fields = {
        "orders": ORDERS,
        "order_index": np.zeros(2, dtype=np.uint8),
        "items": np.array([0, 1]),
        "counts": np.zeros(2, dtype=np.int64),
        "item_order": np.zeros(2, dtype=np.uint8),
        "tokens": np.array([0, 1]),
        "document_ends": np.array([2]),
    }
    with pytest.raises(ValueError, match=message):
        Replay(**(fields | change))  # type: ignore[arg-type]
