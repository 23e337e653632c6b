"""profile: documents -> counted items + held-out documents -> one file; and profiles merged into one.

Flows in: documents, each as the items that it accesses, and the columns that a profile keeps of it where it is held out.
Flows out: a profile, whose analysis is computed by the caller from the `Group`s of what was counted. Memory is bounded: items
are counted by `ItemCounter`, and the held-out part is as small as its share says. Profiles made anywhere of parts of the same
documents merge to the profile of all. Refuses profiles that do not fit each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import kernels
from .counting import ItemCounter
from .decisions.tally import Group, Tally
from .errors import ConfigError
from .formats.profile import BLOCK_VALUES, COUNTS, Columns, Profile, ProfileHeader, ProfileWriter

COUNTED, HELD_OUT = 0, 1  # columns of the sums
HELD_OUT_SHARE = 1 / 4  # less gives wider intervals, more a static set that is fitted to less
HELD_OUT_TOKENS_MAX = 4_000_000  # of a long trace a smaller share is held out
ADDED_AT_ONCE = 1 << 17  # items that are handed to the counter together

Analyse = Callable[[list[Group], dict[str, int]], dict[str, Any]]


@dataclass(frozen=True)
class Document:
    """One document: its items, uint64 [T, 2], in order; its columns, as the profile keeps them; its tokens (or lookups)."""

    items: np.ndarray
    columns: Columns
    num_tokens: int


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

    def groups(self, tally: Tally) -> list[Group]:
        """Returns what decisions need."""
        items = np.concatenate([np.empty((0, 2), dtype=np.uint64), *self.items])
        tokens = np.concatenate(self.tokens).astype(np.int64) if self.tokens else None
        return tally.groups(items, np.array(self.ends, dtype=np.int64), tokens)


def held_out_share(num_tokens: int) -> float:
    """Returns the share of documents to hold out of a trace: a quarter, or about four million tokens where that is less."""
    return min(HELD_OUT_SHARE, HELD_OUT_TOKENS_MAX / max(num_tokens, 1))


def make_profile(
    path: str | os.PathLike[str],
    header: ProfileHeader,
    documents: Iterable[Document],
    analyse: Analyse,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Counts documents, analyses, writes the profile; returns its footer. Blocks.

    A document is held out if the checksum of its columns falls below the header's share: by content, so that equal documents
    share their fate, and parts of a trace counted anywhere agree. on_progress gets the tokens counted so far. Raises what
    `ItemCounter` and `ColumnWriter` raise.
    """
    counts = dict.fromkeys(COUNTS, 0)
    held_out = HeldOut()
    folder = Path(path).resolve().parent
    with ProfileWriter(path, header) as writer, ItemCounter(folder, 2) as counter:
        keeper = _HeldOutColumns(writer)
        waiting = [_Waiting(counter, COUNTED), _Waiting(counter, HELD_OUT)]
        for document in documents:
            kind = HELD_OUT if _is_held_out(document, header.held_out) else COUNTED
            counts["tokens"] += document.num_tokens
            counts["documents"] += 1
            if kind == HELD_OUT:
                counts["held_out_tokens"] += document.num_tokens
                counts["held_out_documents"] += 1
                held_out.add(document)
                keeper.add(document)
            if waiting[kind].add(document.items) and on_progress:
                on_progress(counts["tokens"])
        for rest in waiting:
            rest.flush()
        keeper.flush()
        return _finish(writer, header, counter.merged(), held_out, counts, analyse)


def merge_profiles(
    path: str | os.PathLike[str],
    parts: Sequence[Profile],
    documents_of: Callable[[Profile], Iterator[Document]],
    analyse: Analyse,
) -> dict[str, Any]:
    """Writes the profile of all documents of `parts`, in their order; returns its footer. Blocks.

    documents_of gives the held-out documents of a part. Raises `ConfigError` where the parts differ in tables or settings.
    """
    header = parts[0].header
    for part in parts[1:]:
        if part.header != header:
            raise ConfigError(
                f"{part.path} is of other tables or settings than {parts[0].path}: {part.header} and {header}; count all "
                f"parts with the same store and the same --held-out"
            )
    counts = {name: sum(part.counts[name] for part in parts) for name in COUNTS}
    held_out = HeldOut()
    with ProfileWriter(path, header) as writer, ItemCounter(Path(path).resolve().parent, 2) as counter:
        keeper = _HeldOutColumns(writer)
        for part in parts:
            for document in documents_of(part):
                held_out.add(document)
                keeper.add(document)
            for items, sums in part.items():
                counter.add(items, sums)
        keeper.flush()
        return _finish(writer, header, counter.merged(), held_out, counts, analyse)


def groups_of(profile: Profile, documents: Iterable[Document]) -> list[Group]:
    """Reads a finished profile; documents are its held-out ones. Blocks."""
    tally, held_out = Tally(profile.header), HeldOut()
    for items, sums in profile.items():
        tally.add(items, sums)
    for document in documents:
        held_out.add(document)
    return held_out.groups(tally)


def held_out_documents(profile: Profile) -> Iterator[Columns]:
    """Yields the columns of each held-out document of a profile, `document_ends` left out."""
    unfinished: list[Columns] = []
    start = 0
    for columns in profile.held_out():
        ends = columns["document_ends"] - start
        rest = {name: values for name, values in columns.items() if name != "document_ends"}
        num_values = len(next(iter(rest.values())))
        at = 0
        for end in ends.tolist():
            unfinished.append({name: values[at:end] for name, values in rest.items()})
            yield {name: np.concatenate([part[name] for part in unfinished]) for name in rest}
            unfinished.clear()
            at = end
        if at < num_values:
            unfinished.append({name: values[at:] for name, values in rest.items()})
        start += num_values


def _finish(
    writer: ProfileWriter,
    header: ProfileHeader,
    merged: Iterator[tuple[np.ndarray, np.ndarray]],
    held_out: HeldOut,
    counts: dict[str, int],
    analyse: Analyse,
) -> dict[str, Any]:
    tally = Tally(header)
    for items, sums in merged:
        tally.add(items, sums)
        writer.write_items(items, sums)
    footer = {"counts": counts, "analysis": analyse(held_out.groups(tally), counts)}
    writer.finish(footer)
    return footer


def _is_held_out(document: Document, share: float) -> bool:
    checksum = 0
    for name, values in document.columns.items():
        if name != "batch":
            checksum = kernels.crc32c(np.ascontiguousarray(values), checksum)
    return checksum < share * 2**32


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
        while at < num_values:
            part = min(num_values - at, BLOCK_VALUES - self._num_values)
            self._columns.append({name: values[at : at + part] for name, values in document.columns.items()})
            self._num_values += part
            at += part
            if at == num_values:
                self._ends.append(self._written + self._num_values)
            if self._num_values == BLOCK_VALUES:
                self.flush()

    def flush(self) -> None:
        """Writes what is gathered."""
        if self._columns:
            columns = {name: np.concatenate([part[name] for part in self._columns]) for name in self._columns[0]}
            self._writer.write_held_out(columns | {"document_ends": np.array(self._ends, dtype=np.int64)})
        self._written += self._num_values
        self._columns.clear()
        self._ends.clear()
        self._num_values = 0
