"""A sample of documents: which of them are traced, drawn by their number and a seed, so that it can be drawn again.

Input: documents in order, as texts in parts or as pieces of ids. Output: those that are drawn. Errors: none.

A document without text or tokens has no number: the same documents give the same sample whatever container they are in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from .text import TextPart


class Sample:
    """Draws documents, one after the other. One thread."""

    def __init__(self, fraction: float, seed: int) -> None:
        """fraction: above 0, at most 1: the probability of each document."""
        self._limit = round(fraction * 2.0**64)
        self._seed = seed
        self._number = 0  # of the document under way
        self._has_tokens = False  # of it, in pieces before

    def parts(self, parts: Iterable[TextPart]) -> Iterator[TextPart]:
        """Yields the parts of drawn documents; of the others only the bytes of input that they took."""
        kept = False
        for part in parts:
            if part.starts_document:
                kept = self._kept(self._number, self._number + 1)[0]
                self._number += 1
            yield part if kept or not part.text else part._replace(text="", starts_document=False, ends_document=False)

    def piece(self, token_ids: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (the ids of drawn documents in a piece, the ends of documents in them).

        token_ids: [T]. ends: ascending, 0 to T, at which documents end.
        """
        bounds = np.union1d(ends, [0, len(token_ids)])
        lengths = np.diff(bounds)
        is_end = np.isin(bounds[1:], ends)
        if len(ends) and ends[0] == 0 and self._has_tokens:
            self._number, self._has_tokens = self._number + 1, False
        if not len(lengths):
            return token_ids, ends
        kept = np.array(self._kept(self._number, self._number + len(lengths)))
        self._number += int(np.count_nonzero(is_end))
        self._has_tokens = not is_end[-1]
        kept_lengths = np.where(kept, lengths, 0)
        new_ends = np.cumsum(kept_lengths)[is_end & kept]
        return token_ids[np.repeat(kept, lengths)], np.concatenate([ends[:1][ends[:1] == 0], new_ends])

    def _kept(self, start: int, end: int) -> list[bool]:
        """Whether documents start to end are drawn: SplitMix64 (Steele and others, 2014) of their numbers."""
        if self._limit >= 1 << 64:
            return [True] * (end - start)
        with np.errstate(over="ignore"):
            value = np.arange(start, end, dtype=np.uint64) + np.uint64(1)
            value = value * np.uint64(0x9E3779B97F4A7C15) + np.uint64(self._seed)
            value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            value = value ^ (value >> np.uint64(31))
        return (value < np.uint64(self._limit)).tolist()
