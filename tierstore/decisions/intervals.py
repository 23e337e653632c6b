"""How far the hit rate of another stream may lie from the one that was predicted: text differs from text.

Input: hits and accesses by document, and a generator. Output: 95 % intervals. What is drawn are whole documents:
within one, accesses depend on each other, and a few long ones outweigh many short ones, so that intervals from single
accesses would be far too narrow (cluster bootstrap: Davison, Hinkley, "Bootstrap Methods and their Application",
1997, ch. 3.8).

Shapes: D documents, K quantities that share the documents, such as hit rates of the orders at several budgets.
"""

from __future__ import annotations

import numpy as np

RESAMPLES = 1000
TAIL = 0.025  # on either side of a 95 % interval
# Few documents say little of how much they differ. Student's t asks for 1.2 here; on heavy-tailed lengths, measured,
# 2 holds.
WIDENING = 2.0
LEVERAGE_MAX = 0.9
# A stream longer than so many times the held-out documents adds no knowledge: what is left is their own error.
STREAMS_MAX = 16


def prediction_intervals(
    hits: np.ndarray,
    accesses: np.ndarray,
    document_tokens: np.ndarray,
    num_tokens: int,
    generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns between which hit rates another stream of about `num_tokens` tokens of the same source lies,
    in 95 of 100 cases.

    hits, accesses: [D, K]; document_tokens: [D]. Returns two float arrays [K], low and high, within 0 and 1. Two
    things are uncertain: the estimate, known from D documents only (redrawn, D of them), and what the other stream
    happens to be (documents drawn until they have its tokens, the last one cut). The interval is the estimate and the
    quantiles of their difference, widened if a few documents have most of the accesses; of fewer than 100 documents
    of hugely different lengths it still is right less often than it says. Of fewer than two documents, which say
    nothing of how they differ, it is 0 to 1. Blocks, a tenth of a second
    for hundreds of documents.
    """
    num_documents, num_quantities = hits.shape
    if num_tokens <= 0 or np.count_nonzero(document_tokens) < 2:
        return np.zeros(num_quantities), np.ones(num_quantities)
    num_tokens = min(num_tokens, STREAMS_MAX * int(document_tokens.sum()))
    estimate = _rates(hits.sum(axis=0), accesses.sum(axis=0))
    off = _left_out(hits - accesses * estimate, accesses)
    both = np.concatenate([off, accesses], axis=1)
    of_own, of_other = np.empty((2, RESAMPLES, 2 * num_quantities))
    for draw in range(RESAMPLES):
        own = np.bincount(generator.integers(num_documents, size=num_documents), minlength=num_documents)
        of_own[draw] = own @ both
        of_other[draw] = _stream_weights(document_tokens, num_tokens, generator) @ both
    differences = _rates(*np.split(of_other, 2, axis=1)) - _rates(*np.split(of_own, 2, axis=1))
    low, high = np.quantile(differences, [TAIL, 1 - TAIL], axis=0) * _widening(document_tokens)
    return np.clip(estimate + low, 0, 1), np.clip(estimate + high, 0, 1)


def _left_out(off: np.ndarray, accesses: np.ndarray) -> np.ndarray:
    """Hits that each document has beyond the estimate, had it been left out of it: a long one has drawn it to itself.

    Two documents of 9 and 1 accesses with rates 0 and 1 make 0.1: the first lies 0.1 off, but 1 off the rate of the
    other. That is HC3 of MacKinnon and White (1985), for means.
    """
    leverage = np.minimum(accesses / np.maximum(accesses.sum(axis=0), 1), LEVERAGE_MAX)
    return np.asarray(off / (1 - leverage))


def _widening(document_tokens: np.ndarray) -> float:
    """The factor for how few documents these are in effect: as many equally long ones as
    would vary as much (Kish 1965)."""
    weights = document_tokens / document_tokens.sum()
    effective = 1 / np.square(weights).sum()
    return float(1 + WIDENING / max(effective - 1, 1))


def _rates(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    return np.divide(parts, wholes, out=np.zeros(parts.shape), where=wholes > 0)


def _stream_weights(document_tokens: np.ndarray, num_tokens: int, generator: np.random.Generator) -> np.ndarray:
    """How often each document is in a stream of drawn documents, float [D]; the last one is in it in part."""
    num_documents, mean_tokens = len(document_tokens), document_tokens.sum() / len(document_tokens)
    drawn, ends = np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64)
    while ends[-1] < num_tokens:
        more = 1 + int((num_tokens - ends[-1]) / mean_tokens)
        drawn = np.concatenate([drawn, generator.integers(num_documents, size=more)])
        ends = document_tokens[drawn].cumsum()
    last = int(ends.searchsorted(num_tokens))  # the first document to end there or later
    weights = np.bincount(drawn[:last], minlength=num_documents).astype(np.float64)
    cut = document_tokens[drawn[last]]
    weights[drawn[last]] += (num_tokens - (ends[last] - cut)) / cut
    return weights
