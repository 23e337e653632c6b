"""A profile: how often each item was accessed, and a part of the accesses themselves, kept back to test predictions on.

Input: counted items, sorted, and held-out documents. Output: the same, block by block, and what was computed from them
(`analysis`). Errors: `FormatError` for what `columns` refuses, and for numbers that contradict each other.

An *item* is a row of uint64 [N, 2], high word first. In a profile of n-grams it is the n-gram of the largest order,
packed so that its high bits are the n-grams of lower orders. In a profile of keys it is (table index << 32 | order
index, key).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import FormatError
from .columns import ColumnReader, ColumnWriter

KIND = "profile"
NGRAMS, KEYS = "ngrams", "keys"
ITEMS, HELD_OUT = "items", "held_out"
COUNTS = ("tokens", "documents", "held_out_tokens", "held_out_documents")  # of a profile of keys, tokens are lookups
BLOCK_ITEMS = 1 << 20
BLOCK_VALUES = 1 << 20  # of held-out documents
_ITEM_COLUMNS = {"high": "uint64", "low": "uint64", "counted": "int64", "held_out": "int64"}
_HELD_OUT_COLUMNS = {
    NGRAMS: {"token_ids": "int32", "document_ends": "int64"},
    KEYS: {"table": "uint16", "order_index": "uint8", "keys": "int64", "batch": "int64", "document_ends": "int64"},
}

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class ProfileHeader:
    """What was profiled. tables: (name, fingerprint, orders) of each; `held_out`: the share of documents kept back,
    by content.

    bits: of one id in an n-gram's item. sample_rate: the share of keys that a recorded trace kept (1 for n-grams).
    accesses: of tokens, or of keys in a profile of keys; documents: whole texts, or recorded stretches.
    """

    kind: str
    tables: tuple[tuple[str, str, tuple[int, ...]], ...]
    bits: int
    held_out: float
    sample_rate: float

    @property
    def orders(self) -> tuple[int, ...]:
        """Orders of the tables of a profile of n-grams, which are all alike."""
        return self.tables[0][2]

    def shift(self, order: int) -> int:
        """Returns by how many bits the item of an n-gram of the largest order is shifted to that of `order`."""
        return self.bits * (self.orders[-1] - order)

    @classmethod
    def from_dict(cls, record: dict[str, Any], where: str) -> ProfileHeader:
        """Reads what `asdict` gave; raises `FormatError` for anything else."""
        try:
            tables = tuple(
                (str(name), str(digest), tuple(map(int, orders))) for name, digest, orders in record["tables"]
            )
            header = cls(
                str(record["kind"]),
                tables,
                int(record["bits"]),
                float(record["held_out"]),
                float(record["sample_rate"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise FormatError(f"{where}: the profile's header is damaged ({error!r}); profile again") from error
        good = (
            header.kind in (NGRAMS, KEYS)
            and 1 <= len({name for name, _, _ in tables}) == len(tables)
            and all(orders and min(orders) >= 1 for _, _, orders in tables)
        )
        if not good or not 0 <= header.held_out <= 1 or not 0 < header.sample_rate <= 1:
            raise FormatError(f"{where}: the profile's header contradicts itself: {record}; profile again")
        if header.kind == NGRAMS and not (
            header.bits >= 1
            and list(header.orders) == sorted(header.orders)
            and header.bits * header.orders[-1] <= 128
            and len({orders for _, _, orders in tables}) == 1
        ):
            raise FormatError(
                f"{where}: n-grams of {header.bits} bits an id and orders {tables} cannot be; profile again"
            )
        return header


class ProfileWriter:
    """Writes a profile; use it with `with`. Unfinished, it leaves nothing behind."""

    def __init__(self, path: str | os.PathLike[str], header: ProfileHeader) -> None:
        self.header = header
        self._file = ColumnWriter(path, KIND, asdict(header))
        self.path = self._file.path
        self._items: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_buffered = 0

    def write_items(self, items: np.ndarray, sums: np.ndarray) -> None:
        """Takes items, uint64 [M, 2], sorted over all calls and all different, and sums, int64 [M, 2]: counted,
        held out."""
        self._items.append((items, sums))
        self._num_buffered += len(items)
        if self._num_buffered >= BLOCK_ITEMS:
            self._write_items(all_of_them=False)

    def write_held_out(self, columns: Columns) -> None:
        """Takes a stretch of held-out documents, of at most BLOCK_VALUES accesses,
        with the ends of those that end in it."""
        self._file.write_block(HELD_OUT, columns)

    def finish(self, footer: dict[str, Any]) -> None:
        """Makes the profile whole and durable; footer: `counts` (of COUNTS) and `analysis`."""
        self._write_items(all_of_them=True)
        self._file.finish(footer)

    def _write_items(self, *, all_of_them: bool) -> None:
        if not self._items:
            return
        items, sums = (np.concatenate(parts) for parts in zip(*self._items, strict=True))
        start = 0
        while len(items) - start >= (1 if all_of_them else BLOCK_ITEMS):
            part = slice(start, start + BLOCK_ITEMS)
            columns = {
                "high": items[part, 0],
                "low": items[part, 1],
                "counted": sums[part, 0],
                "held_out": sums[part, 1],
            }
            self._file.write_block(ITEMS, columns)
            start += BLOCK_ITEMS
        rest = items[start:], sums[start:]
        self._items = [rest] if len(rest[0]) else []
        self._num_buffered = len(rest[0])

    def __enter__(self) -> ProfileWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.abandon()


class ProfileReader:
    """A finished profile; use it with `with`. Reads stream, block by block."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens a profile; raises `FormatError` if it is not one, damaged or newer,
        `OSError` if it cannot be read."""
        self._file = ColumnReader.open(path, KIND)
        try:
            self.header = ProfileHeader.from_dict(self._file.header, str(path))
            self.footer = self._file.footer
            self._file.require(ITEMS, _ITEM_COLUMNS)
            self._file.require(HELD_OUT, _HELD_OUT_COLUMNS[self.header.kind])
            counts = _checked_counts(self.footer.get("counts"), str(path))
        except BaseException:
            self._file.close()
            raise
        self.path = self._file.path
        self.counts = counts

    @property
    def num_items(self) -> int:
        """Items in the profile."""
        return self._file.num_values(ITEMS, "high")

    def items(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (items, uint64 [M, 2], sums, int64 [M, 2]: counted, held out), sorted;
        raises `FormatError` if damaged."""
        last = -1, -1
        for block in self._file.blocks(ITEMS):
            high, low, counted, held_out = (block[name] for name in _ITEM_COLUMNS)
            if not 1 <= len(high) == len(low) == len(counted) == len(held_out):
                raise FormatError(f"{self.path}: a block of items has columns of different lengths; profile again")
            ascending = (high[1:] > high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] > low[:-1]))
            if (int(high[0]), int(low[0])) <= last or not ascending.all():
                raise FormatError(f"{self.path}: its items are out of order; profile again")
            if min(counted.min(), held_out.min()) < 0 or not self._fits_in_profile(high, low):
                raise FormatError(f"{self.path}: it counts items that its tables cannot have; profile again")
            last = int(high[-1]), int(low[-1])
            yield np.stack([high, low], axis=1), np.stack([counted, held_out], axis=1)

    def _fits_in_profile(self, high: np.ndarray, low: np.ndarray) -> bool:
        """Whether items, sorted, are n-grams of no more bits than there are,
        or keys of the profile's tables and orders."""
        header = self.header
        if header.kind == NGRAMS:
            return (int(high[-1]) << 64 | int(low[-1])) >> header.bits * header.orders[-1] == 0
        marks = {
            table_index << 32 | order_index
            for table_index, (_, _, orders) in enumerate(header.tables)
            for order_index in range(len(orders))
        }
        return marks.issuperset(np.unique(high).tolist()) and int(low.max()) < 1 << 63

    def held_out(self) -> Iterator[Columns]:
        """Yields stretches of the held-out documents: columns, and `document_ends` over the whole section.

        Raises `FormatError` if damaged, the number of documents once all were yielded.
        """
        start = last_end = num_documents = 0
        for columns in self._file.blocks(HELD_OUT):
            ends = columns["document_ends"]
            lengths = {len(values) for name, values in columns.items() if name != "document_ends"}
            end = start + max(lengths)
            if len(lengths) != 1 or np.any(np.diff(ends, prepend=start) < 0) or (len(ends) and ends[-1] > end):
                raise FormatError(f"{self.path}: its held-out documents do not end where they may; profile again")
            num_documents += len(ends)
            last_end = int(ends[-1]) if len(ends) else last_end
            start = end
            yield columns
        if last_end != start or num_documents != self.counts["held_out_documents"]:
            raise FormatError(
                f"{self.path}: {num_documents} held-out documents end at {last_end}, its counts say "
                f"{self.counts['held_out_documents']}, its columns {start}; profile again"
            )

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> ProfileReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _checked_counts(counts: Any, where: str) -> dict[str, int]:
    """Returns the counts of a footer; raises `FormatError` if they are missing or contradict each other."""
    good = isinstance(counts, dict) and all(type(counts.get(name)) is int for name in COUNTS)
    if not good or not (
        0 <= counts["held_out_tokens"] <= counts["tokens"] and 0 <= counts["held_out_documents"] <= counts["documents"]
    ):
        raise FormatError(f"{where}: the profile's counts {counts!r:.200} are damaged; profile again")
    return {name: counts[name] for name in COUNTS}
