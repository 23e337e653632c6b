"""Intervals hold other streams about as often as they say, for documents whose lengths differ hugely too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tierstore.decisions.intervals import prediction_intervals

STREAM_TOKENS = 300_000


def documents(rng: np.random.Generator, number: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Lengths, log-normal of median 1,100 (shared/data: spread 1.5), and hits, a rate of its own for each document."""
    lengths = np.maximum(20, np.exp(rng.normal(7, spread, number))).astype(np.int64)
    return lengths, rng.binomial(lengths, rng.beta(6, 4, number))


def rate_of_a_stream(lengths: np.ndarray, hits: np.ndarray, num_tokens: int) -> float:
    """The hit rate of the first `num_tokens` tokens, hits spread evenly over a document."""
    ends = np.cumsum(lengths)
    assert ends[-1] >= num_tokens
    parts = np.clip((num_tokens - (ends - lengths)) / lengths, 0, 1)
    return float((parts * hits).sum() / (parts * lengths).sum())


OTHERS = [(100, 0.5), (100, 1.0), (240, 0.5), (240, 1.0), (240, 1.5)]


@pytest.mark.parametrize(
    ("number", "spread"), [(100, 1.5), *(pytest.param(*each, marks=pytest.mark.slow) for each in OTHERS)]
)
def test_the_interval_holds_nine_streams_of_ten_and_more(number: int, spread: float) -> None:
    rng = np.random.default_rng(number)
    held, widths = [], []
    for _ in range(50):
        lengths, hits = documents(rng, number, spread)
        low, high = prediction_intervals(hits[:, None], lengths[:, None], lengths, STREAM_TOKENS, rng)
        widths.append(high[0] - low[0])
        for _ in range(10):
            rate = rate_of_a_stream(*documents(rng, 1000, spread), STREAM_TOKENS)
            held.append(low[0] <= rate <= high[0])
    assert 0.9 <= np.mean(held) <= 0.99  # of 500 streams, in groups of 10 that share an interval
    assert np.mean(widths) < 0.4  # holds by being right, not by being wide


def test_intervals_of_single_accesses_would_hold_few() -> None:
    """The story behind: accesses of a document go together, so that 95 % by accesses are far less by streams."""
    rng = np.random.default_rng(1)
    held = []
    for _ in range(30):
        lengths, hits = documents(rng, 240, 1.5)
        rate = hits.sum() / lengths.sum()
        half_width = 1.96 * np.sqrt(rate * (1 - rate) * (1 / lengths.sum() + 1 / STREAM_TOKENS))
        other = rate_of_a_stream(*documents(rng, 1000, 1.5), STREAM_TOKENS)
        held.append(abs(other - rate) <= half_width)
    assert np.mean(held) < 0.3


def test_longer_streams_have_narrower_intervals() -> None:
    lengths, hits = documents(np.random.default_rng(0), 300, 1.0)
    widths = []
    for num_tokens in (1_000, 30_000, 10**6, 10**12):
        low, high = prediction_intervals(hits[:, None], lengths[:, None], lengths, num_tokens, np.random.default_rng(0))
        assert low < hits.sum() / lengths.sum() < high
        widths.append(float(high[0] - low[0]))
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] > 0.02  # never below the error of the estimate itself


def test_a_document_that_outweighs_all_others_does_not_vouch_for_itself() -> None:
    lengths = np.array([100_000, 500, 500, 500])
    hits = np.array([[50_000], [400], [450], [500]])
    low, high = prediction_intervals(hits, lengths[:, None], lengths, 10_000, np.random.default_rng(0))
    assert high[0] - low[0] > 0.3


def test_quantities_are_drawn_together_and_stay_apart() -> None:
    lengths, hits = documents(np.random.default_rng(2), 100, 1.0)
    both = np.stack([hits, hits // 2], axis=1)
    accesses = np.stack([lengths, lengths], axis=1)
    low, high = prediction_intervals(both, accesses, lengths, 50_000, np.random.default_rng(3))
    alone = prediction_intervals(both[:, :1], accesses[:, :1], lengths, 50_000, np.random.default_rng(3))
    assert (low[0], high[0]) == pytest.approx((alone[0][0], alone[1][0]))
    assert high[1] < low[0]


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_the_interval_of_no_documents_is_zero_to_one(lengths: list[int]) -> None:
    nothing = np.zeros((len(lengths), 2), dtype=np.int64)
    low, high = prediction_intervals(nothing, nothing, np.array(lengths), 1000, np.random.default_rng(0))
    assert low.tolist() == [0, 0]
    assert high.tolist() == [1, 1]


def test_documents_of_one_rate_leave_no_doubt() -> None:
    lengths = np.array([100, 5000, 700])
    low, high = prediction_intervals(lengths[:, None] // 2, lengths[:, None], lengths, 10_000, np.random.default_rng(0))
    assert (low[0], high[0]) == pytest.approx((0.5, 0.5))


def test_intervals_of_part_of_real_documents_hold_other_documents(shared_data: Path) -> None:
    """Lengths of shared/data with rates that fall with length, as those of repeated n-grams do."""
    lengths = np.load(shared_data / "trace_train_doclens.npy").astype(np.int64)
    rng = np.random.default_rng(4)
    rates = np.clip(rng.normal(0.55, 0.12, len(lengths)) - 0.02 * np.log(lengths / 1000), 0.05, 0.95)
    hits = (lengths * rates).astype(np.int64)
    held = []
    for _ in range(30):
        shuffled = rng.permutation(len(lengths))
        mine, others = shuffled[:470], shuffled[470:]
        low, high = prediction_intervals(hits[mine, None], lengths[mine, None], lengths[mine], STREAM_TOKENS, rng)
        for _ in range(10):
            stream = rng.permutation(others)
            held.append(low[0] <= rate_of_a_stream(lengths[stream], hits[stream], STREAM_TOKENS) <= high[0])
    assert np.mean(held) >= 0.9


@pytest.mark.parametrize("hits", [0, 3, 10])
def test_one_document_says_nothing_of_how_documents_differ(hits: int) -> None:
    """Redrawn, it is always itself: the interval had no width."""
    one = np.array([[hits]]), np.array([[10]]), np.array([10])
    for hits_of, accesses, tokens in (one, tuple(np.concatenate([part, part * 0]) for part in one)):
        low, high = prediction_intervals(hits_of, accesses, tokens, 10, np.random.default_rng(0))
        assert (low[0], high[0]) == (0, 1)
