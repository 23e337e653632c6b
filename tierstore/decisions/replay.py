"""A replay: the accesses of held-out documents in order, and what a static set and a recency cache would make of them.

Input: a `Replay` (which items are accessed when, how often training documents counted each), a static set, a number
of recency sets. Output: an `Outcome`, by order and in all. Nothing here guesses: the recency cache's own code runs
on the accesses; a replay of a share of the items runs against as small a share of the cache (miniature simulation:
Waldspurger et al., "Cache Modeling and Optimization using Miniature Simulations", USENIX ATC 2017).
Errors: arrays that do not fit.

Shapes: A accesses, U items, D documents, O orders; [O + 1]: the orders, and last all of them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from .. import kernels
from ..process.workers import aside, check_stopped

ROOMY_ITEMS_PER_SET = 2  # a cache with sets for so few of its 8 entries each evicts nothing: a larger one hits no more


@dataclass(frozen=True, eq=False)
class Replay:
    """Accesses of held-out documents, in order. Immutable; any thread may use it.

    order_index: uint8 [A]. items: int32 or int64 [A], below U, dense over all orders: what the cache takes for keys.
    counts: int64 [U], how often counted documents had the item, 0 for never. item_order: uint8 [U]. tokens: int64 [A],
    each access's token, nondecreasing. document_ends: int64 [D], in tokens. sample_rate: the share of items that were
    kept, 1 for all.
    """

    orders: tuple[int, ...]
    order_index: np.ndarray
    items: np.ndarray
    counts: np.ndarray
    item_order: np.ndarray
    tokens: np.ndarray
    document_ends: np.ndarray
    sample_rate: float = 1.0

    def __post_init__(self) -> None:
        num_accesses, num_items = len(self.items), len(self.counts)
        if not len(self.order_index) == len(self.tokens) == num_accesses or len(self.item_order) != num_items:
            raise ValueError(
                f"a replay of {num_accesses} items has {len(self.order_index)} orders and {len(self.tokens)} tokens "
                f"for them, {num_items} counts and {len(self.item_order)} orders of items; "
                "each pair must be equally long"
            )
        if num_accesses and not 0 <= self.items.min() <= self.items.max() < num_items:
            raise ValueError(f"items from {self.items.min()} to {self.items.max()} must be within 0 to {num_items - 1}")
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate {self.sample_rate} must be above 0 and at most 1")
        if np.any(np.diff(self.tokens) < 0) or np.any(np.diff(self.document_ends) < 0):
            raise ValueError("the tokens of a replay and the ends of its documents must not descend")
        if num_accesses and not 0 <= self.tokens[0] <= self.tokens[-1] < self.num_tokens:
            raise ValueError(f"tokens to {self.tokens[-1]} must lie before the last document's end, {self.num_tokens}")

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, those of which no item was kept included."""
        return int(self.document_ends[-1]) if len(self.document_ends) else 0

    @property
    def document_tokens(self) -> np.ndarray:
        """Tokens of each document, int64 [D]."""
        return np.diff(self.document_ends, prepend=0)

    @functools.cached_property
    def previous(self) -> np.ndarray:
        """For each access the index of the one before it to the same item, -1 for the first: int64 [A]."""
        by_item = np.argsort(self.items, kind="stable")
        again = self.items[by_item[1:]] == self.items[by_item[:-1]]
        previous = np.full(len(self.items), -1, dtype=np.int64)
        previous[by_item[1:][again]] = by_item[:-1][again]
        return previous

    @functools.cached_property
    def first_touches(self) -> np.ndarray:
        """Accesses to items never seen before, neither counted in training nor accessed earlier: bool [A]."""
        return (self.previous < 0) & (self.counts[self.items] == 0)

    @functools.cached_property
    def documents(self) -> np.ndarray:
        """The document of each access, int64 [A]."""
        return np.searchsorted(self.document_ends, self.tokens, side="right")

    def per_order(self, accesses: np.ndarray) -> np.ndarray:
        """Returns how many of some accesses, bool [A] or their indexes, are of each order, and in all: int64 [O +
        1]."""
        counts = np.bincount(self.order_index[accesses], minlength=len(self.orders))
        return np.append(counts, counts.sum()).astype(np.int64)

    def per_document(self, accesses: np.ndarray) -> np.ndarray:
        """Returns how many of some accesses, bool [A] or their indexes, are of each document and order: int64 [D,
        O]."""
        shape = len(self.document_ends), len(self.orders)
        return np.bincount(self._cells[accesses], minlength=shape[0] * shape[1]).reshape(shape)

    @functools.cached_property
    def _cells(self) -> np.ndarray:
        """The index of each access in an array [D, O], int64 [A]."""
        return np.asarray(self.documents * len(self.orders) + self.order_index)

    # What every simulation says alike: computed once.

    @functools.cached_property
    def num_accesses(self) -> np.ndarray:
        """Accesses of each order, and in all: int64 [O + 1]."""
        return self.per_order(np.ones(len(self.items), dtype=bool))

    @functools.cached_property
    def num_first_touches(self) -> np.ndarray:
        """First touches of each order, and in all: int64 [O + 1]."""
        return self.per_order(self.first_touches)

    @functools.cached_property
    def document_accesses(self) -> np.ndarray:
        """Accesses of each document and order: int64 [D, O]."""
        return self.per_document(np.ones(len(self.items), dtype=bool))

    def batched(self, batch_tokens: int) -> Batches:
        """Returns the accesses in batches of so many tokens."""
        if batch_tokens not in self._batched:
            batches = self.tokens // batch_tokens
            # Equal items of a batch share their fate: all of a batch are probed before any is put in.
            distinct = (self.previous < 0) | (batches[self.previous] != batches)
            ends = np.append(np.flatnonzero(np.diff(batches)) + 1, len(batches))
            self._batched[batch_tokens] = Batches(ends, distinct, self.per_order(distinct))
        return self._batched[batch_tokens]

    @functools.cached_property
    def _batched(self) -> dict[int, Batches]:
        return {}


@dataclass(frozen=True, eq=False)
class Batches:
    """A replay cut into batches. ends: int64 [B], in accesses. distinct: bool [A],
    the first access to its item in its batch.

    num_distinct: those of each order, and in all: int64 [O + 1].
    """

    ends: np.ndarray
    distinct: np.ndarray
    num_distinct: np.ndarray


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a replay's accesses. Numbers of accesses are of the kept items;
    rates a token are scaled up to all.

    accesses, static_hits, recency_hits, first_touches, distinct, distinct_misses: int64 [O + 1]; the last two count an
    item once a batch. missed_items: int64 [M], the item of each distinct miss. document_hits, document_accesses: int64
    [D, O]. batches_without_miss: None if only a share of the items was kept, of which it says nothing.
    """

    accesses: np.ndarray
    static_hits: np.ndarray
    recency_hits: np.ndarray
    first_touches: np.ndarray
    distinct: np.ndarray
    distinct_misses: np.ndarray
    missed_items: np.ndarray
    document_hits: np.ndarray
    document_accesses: np.ndarray
    num_tokens: int
    num_batches: int
    batches_without_miss: int | None
    sample_rate: float

    @property
    def hit_rate(self) -> np.ndarray:
        """Share of accesses that hit, float [O + 1]."""
        return shares(self.static_hits + self.recency_hits, self.accesses)

    @property
    def static_share(self) -> np.ndarray:
        """Share of accesses that the static set answers, float [O + 1]."""
        return shares(self.static_hits, self.accesses)

    @property
    def recency_share(self) -> np.ndarray:
        """Share of accesses that the recency cache answers, float [O + 1]."""
        return shares(self.recency_hits, self.accesses)

    @property
    def first_touch_share(self) -> np.ndarray:
        """Share of accesses to items never seen before, which no cache answers, float [O + 1]."""
        return shares(self.first_touches, self.accesses)

    @property
    def shared_share(self) -> np.ndarray:
        """Share of accesses whose item another access of the same batch has already asked for, float [O + 1]."""
        return shares(self.accesses - self.distinct, self.accesses)

    @property
    def misses_per_token(self) -> np.ndarray:
        """Distinct misses a token, those of items that were not kept reckoned in, float [O + 1]."""
        return shares(self.distinct_misses, self.num_tokens * self.sample_rate)

    @property
    def share_without_miss(self) -> float | None:
        """Share of batches without any miss; None if only a share of the items was kept."""
        return None if self.batches_without_miss is None else self.batches_without_miss / max(self.num_batches, 1)


def simulate(replay: Replay, static: np.ndarray, recency_sets: int, batch_tokens: int) -> Outcome:
    """Returns what a static set and a recency cache of one table make of a replay. Blocks, about 100 ns an access.

    static: bool [U]. recency_sets: of the real cache; a replay of a share of the items meets as small a share of them.
    batch_tokens: tokens that are looked up at once; an item that misses is read once a batch.
    """
    check_stopped()
    num_sets = max(1, round(recency_sets * replay.sample_rate)) if recency_sets else 0
    num_sets = min(num_sets, 1 + len(replay.counts) // ROOMY_ITEMS_PER_SET)
    batches = replay.batched(batch_tokens)
    in_static = static[replay.items]
    hits = in_static
    if num_sets and len(replay.items):
        keys = np.where(in_static, -1, replay.items).astype(np.int64, copy=False)
        hits = in_static | aside(kernels.simulate_cache, replay.order_index, keys, batches.ends, num_sets)
    missed = np.flatnonzero(batches.distinct & ~hits)
    static_hits, all_hits = replay.per_order(in_static), replay.per_order(hits)
    num_batches = -(-replay.num_tokens // batch_tokens)
    without_miss = None
    if replay.sample_rate == 1:
        batches_missing = np.unique(np.searchsorted(batches.ends, missed, side="right"))
        without_miss = num_batches - len(batches_missing)
    return Outcome(
        accesses=replay.num_accesses,
        static_hits=static_hits,
        recency_hits=all_hits - static_hits,
        first_touches=replay.num_first_touches,
        distinct=batches.num_distinct,
        distinct_misses=replay.per_order(missed),
        missed_items=replay.items[missed].astype(np.int64),
        document_hits=replay.per_document(hits),
        document_accesses=replay.document_accesses,
        num_tokens=replay.num_tokens,
        num_batches=num_batches,
        batches_without_miss=without_miss,
        sample_rate=replay.sample_rate,
    )


def lru_hits(replay: Replay, capacity_entries: np.ndarray) -> np.ndarray:
    """Returns the hits of caches that keep what was used last, by size: int64 [C, O + 1]. Blocks;
    one pass for all sizes.

    capacity_entries: [C], of the real caches; a share of the items meets as small a share of each. The caches are empty
    at first and shared by the orders (Mattson et al., "Evaluation techniques for storage hierarchies", 1970).
    """
    accessed = np.flatnonzero(replay.previous < 0)
    dense = np.zeros(len(replay.counts), dtype=np.int64)  # the kernel takes ids below A, and U may be more
    dense[replay.items[accessed]] = np.arange(len(accessed))
    distances = aside(kernels.stack_distances, dense[replay.items])
    hits = np.empty((len(capacity_entries), len(replay.orders) + 1), dtype=np.int64)
    for index, capacity in enumerate(capacity_entries):
        hits[index] = replay.per_order((distances >= 0) & (distances < capacity * replay.sample_rate))
    return hits


def interleaved(replay: Replay, num_sequences: int) -> Replay:
    """Returns the same accesses as `num_sequences` sequences decoded side by side make them, one token of each a step.

    The stream is cut into as many runs of documents, equally long, so that every step is full; a document on a cut is
    decoded by two. Of three sequences of 10 tokens step 0 has the tokens 0, 3 and 6, and token 9 is left out. Simulated
    with `batch_tokens=num_sequences` every batch is one step. The result counts as one document.
    """
    num_steps = replay.num_tokens // num_sequences
    kept = replay.tokens < num_steps * num_sequences
    lane, step = np.divmod(replay.tokens[kept], max(num_steps, 1))
    tokens = step * num_sequences + lane
    by_step = np.argsort(tokens, kind="stable")
    return Replay(
        orders=replay.orders,
        order_index=replay.order_index[kept][by_step],
        items=replay.items[kept][by_step],
        counts=replay.counts,
        item_order=replay.item_order,
        tokens=tokens[by_step],
        document_ends=np.array([num_steps * num_sequences], dtype=np.int64),
        sample_rate=replay.sample_rate,
    )


def shares(parts: np.ndarray, wholes: np.ndarray | float) -> np.ndarray:
    """Returns parts / wholes, float, 0 if the whole is 0."""
    wholes = np.broadcast_to(np.asarray(wholes, dtype=np.float64), np.shape(parts))
    return np.divide(parts, wholes, out=np.zeros(np.shape(parts)), where=wholes > 0)
