"""Counting documents into a profile's file: items and sums, and the held-out documents beside them.

Input: documents, or finished profiles to merge. Output: the sections of the file, and a `CountedText`: how much there
was, and the `TableGroup`s that decisions need. Memory is bounded: items are counted by `ItemCounter`, and the held-out
part is as small as its fraction says. Profiles made anywhere of parts of the same documents merge to the profile of
all. Errors: what `ItemCounter` and `ColumnWriter` raise, and profiles that do not fit each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .. import kernels
from ..decisions.item_statistics import ItemStatistics, TableGroup
from ..errors import ConfigError
from ..formats.profile import BLOCK_VALUES, COUNTS, Columns, ProfileReader, ProfileWriter
from ..process.progress import COUNTING, MERGING, READING, SORTING, OnPhase, no_report
from .count import ItemCounter
from .documents import Document, ItemMapping

COUNTED, HELD_OUT = 0, 1  # columns of the sums
ADDED_AT_ONCE = 1 << 17  # items that are handed to the counter together
MEMORY_BYTES = 256 << 20  # of the counter


@dataclass(frozen=True)
class ProfileCounts:
    """How much was counted in all, and how much of it was held out. Of recorded keys, a token is a lookup."""

    tokens: int = 0
    documents: int = 0
    held_out_tokens: int = 0
    held_out_documents: int = 0

    def plus(self, document: Document, *, is_held_out: bool) -> ProfileCounts:
        """Returns the counts with one more document."""
        return ProfileCounts(
            self.tokens + document.num_tokens,
            self.documents + 1,
            self.held_out_tokens + document.num_tokens * is_held_out,
            self.held_out_documents + is_held_out,
        )


@dataclass(frozen=True, eq=False)
class CountedText:
    """What was counted: how much, and the table groups that decisions need."""

    counts: ProfileCounts
    groups: list[TableGroup]


def count_documents(
    writer: ProfileWriter,
    documents: Iterable[Document],
    on_progress: OnPhase | None = None,
    memory_bytes: int = MEMORY_BYTES,
) -> CountedText:
    """Counts documents into a profile that is being written. Blocks.

    A document is held out if the checksum of its columns falls below the header's fraction: by content, so that equal
    documents share their fate, and parts of a trace counted anywhere agree.

    Args:
        writer: the profile; the caller finishes it.
        on_progress: gets the phases counting (in tokens), merging (in items) and sorting.
        memory_bytes: of the counter.

    Raises:
        BudgetError, ConfigError: the disk is full, or fails.
    """
    report = on_progress or no_report
    counts = ProfileCounts()
    held_out = HeldOut()
    keeper = _HeldOutColumns(writer)
    with ItemCounter(writer.path.resolve().parent, 2, memory_bytes) as counter:
        waiting = [_Waiting(counter, COUNTED), _Waiting(counter, HELD_OUT)]
        report(COUNTING, 0, None)
        for document in documents:
            kind = HELD_OUT if _is_held_out(document, writer.header.held_out) else COUNTED
            counts = counts.plus(document, is_held_out=kind == HELD_OUT)
            if kind == HELD_OUT:
                held_out.add(document)
                keeper.add(document)
            if waiting[kind].add(document.items):
                report(COUNTING, counts.tokens, None)
        for rest in waiting:
            rest.flush()
        report(COUNTING, counts.tokens, None)
        statistics = _write_items(writer, counter, report)
    keeper.flush()
    report(SORTING, 0, None)
    return CountedText(counts, held_out.groups(statistics))


def count_profiles(
    writer: ProfileWriter,
    parts: Sequence[ProfileReader],
    mapping: ItemMapping,
    on_progress: OnPhase | None = None,
    memory_bytes: int = MEMORY_BYTES,
) -> CountedText:
    """Counts all documents of `parts`, in their order, into a profile that is being written. Blocks.

    Args:
        mapping: of the parts' items; gives their held-out documents.
        on_progress: as of `count_documents`, counting in items.

    Raises:
        ConfigError: the parts differ in tables or settings.
        BudgetError: the disk is full.
    """
    report = on_progress or no_report
    _check_alike(parts)
    counts = ProfileCounts(**{name: sum(part.counts[name] for part in parts) for name in COUNTS})
    held_out = HeldOut()
    keeper = _HeldOutColumns(writer)
    with ItemCounter(writer.path.resolve().parent, 2, memory_bytes) as counter:
        num_counted, num_items = 0, sum(part.num_items for part in parts)
        for part in parts:
            report(COUNTING, num_counted, num_items)
            for document in mapping.documents(part):
                held_out.add(document)
                keeper.add(document)
            for items, sums in part.items():
                counter.add(items, sums)
                num_counted += len(items)
                report(COUNTING, num_counted, num_items)
        statistics = _write_items(writer, counter, report)
    keeper.flush()
    report(SORTING, 0, None)
    return CountedText(counts, held_out.groups(statistics))


def read_groups(profile: ProfileReader, mapping: ItemMapping, on_progress: OnPhase | None = None) -> list[TableGroup]:
    """Reads the table groups of a finished profile. Blocks. on_progress gets reading (in items), then sorting."""
    report = on_progress or no_report
    statistics, held_out = ItemStatistics(profile.header), HeldOut()
    num_read = 0
    report(READING, 0, profile.num_items)
    for items, sums in profile.items():
        statistics.add(items, sums)
        num_read += len(items)
        report(READING, num_read, profile.num_items)
    for document in mapping.documents(profile):
        held_out.add(document)
    report(SORTING, 0, None)
    return held_out.groups(statistics)


@dataclass
class HeldOut:
    """The held-out documents of a profile in the making: their items, ends, and tokens where items do not say them."""

    items: list[np.ndarray] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    tokens: list[np.ndarray] = field(default_factory=list)

    def add(self, document: Document) -> None:
        """Takes the next held-out document."""
        start = self.ends[-1] if self.ends else 0
        self.items.append(document.items)
        self.ends.append(start + document.num_tokens)
        if "batch" in document.columns:
            self.tokens.append(start + document.columns["batch"])

    def groups(self, statistics: ItemStatistics) -> list[TableGroup]:
        """Returns the table groups of these documents and what was counted."""
        items = np.concatenate([np.empty((0, 2), dtype=np.uint64), *self.items])
        tokens = np.concatenate(self.tokens).astype(np.int64) if self.tokens else None
        return statistics.groups(items, np.array(self.ends, dtype=np.int64), tokens)


def _write_items(writer: ProfileWriter, counter: ItemCounter, report: OnPhase) -> ItemStatistics:
    statistics = ItemStatistics(writer.header)
    report(MERGING, 0, None)  # the last buffer is sorted first
    for items, sums in counter.merged():
        statistics.add(items, sums)
        writer.write_items(items, sums)
        report(MERGING, *counter.num_merged)
    return statistics


def _check_alike(parts: Sequence[ProfileReader]) -> None:
    first = parts[0]
    for part in parts[1:]:
        if part.header != first.header:
            raise ConfigError(
                f"{part.path} is of other tables or settings than {first.path}: {part.header} and {first.header}; "
                f"count all parts with the same store and the same --held-out"
            )


def _is_held_out(document: Document, fraction: float) -> bool:
    checksum = 0
    for name, values in document.columns.items():
        if name != "batch":
            checksum = kernels.crc32c(np.ascontiguousarray(values), checksum)
    return checksum < fraction * 2**32


class _Waiting:
    """Items of short documents on their way to the counter, which takes many at a time."""

    def __init__(self, counter: ItemCounter, column: int) -> None:
        self._counter, self._column = counter, column
        self._items: list[np.ndarray] = []
        self._num_items = 0

    def add(self, items: np.ndarray) -> bool:
        """Takes items; returns whether they went on."""
        self._items.append(items)
        self._num_items += len(items)
        if self._num_items < ADDED_AT_ONCE:
            return False
        self.flush()
        return True

    def flush(self) -> None:
        """Hands on what is waiting."""
        if self._items:
            self._counter.add(np.concatenate(self._items), self._column)
        self._items.clear()
        self._num_items = 0


class _HeldOutColumns:
    """Gathers the columns of held-out documents into blocks."""

    def __init__(self, writer: ProfileWriter) -> None:
        self._writer = writer
        self._columns: list[Columns] = []
        self._ends: list[int] = []
        self._num_values = self._written = 0

    def add(self, document: Document) -> None:
        """Takes the next document."""
        num_values = len(next(iter(document.columns.values())))
        at = 0
        while True:  # once for a document without values too: it has an end
            if self._num_values == BLOCK_VALUES:
                self.flush()
            part = min(num_values - at, BLOCK_VALUES - self._num_values)
            self._columns.append({name: values[at : at + part] for name, values in document.columns.items()})
            self._num_values += part
            at += part
            if at == num_values:
                break
        self._ends.append(self._written + self._num_values)

    def flush(self) -> None:
        """Writes what is gathered."""
        if self._columns:
            columns = {name: np.concatenate([part[name] for part in self._columns]) for name in self._columns[0]}
            self._writer.write_held_out(columns | {"document_ends": np.array(self._ends, dtype=np.int64)})
        self._written += self._num_values
        self._columns.clear()
        self._ends.clear()
        self._num_values = 0
