"""profile: documents -> counted items + held-out documents -> one file; and profiles merged into one.

Flows in: documents, each as the items that it accesses, and the columns that a profile keeps of it where it is held
out. Flows out: a profile, whose analysis is computed by the caller from the `Group`s of what was counted. Memory is
bounded: items are counted by `ItemCounter`, and the held-out part is as small as its share says. Profiles made anywhere
of parts of the same documents merge to the profile of all. Refuses profiles that do not fit each other.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import kernels
from ..decisions.choose import ItemClasses, chosen_parts, is_chosen, item_hash
from ..decisions.curves import OnPhase
from ..decisions.ranking import Ranking
from ..decisions.tally import Group, OrderSplit, Tally
from ..errors import ConfigError, FingerprintMismatchError, FormatError
from ..formats.key_trace import KeyBlock, KeyTraceInfo, read_key_blocks
from ..formats.profile import BLOCK_VALUES, COUNTS, KEYS, Columns, Profile, ProfileHeader, ProfileWriter
from ..layout import TableLayout
from .count import ItemCounter

COUNTED, HELD_OUT = 0, 1  # columns of the sums
HELD_OUT_SHARE = 1 / 4  # less gives wider intervals, more a static set that is fitted to less
HELD_OUT_TOKENS_MAX = 4_000_000  # of a long trace a smaller share is held out
STRETCH_ACCESSES = 1 << 14  # of recorded keys, that count as one document
DOCUMENT_TOKENS_MAX = 1 << 20  # a longer document is a stream rather than a text: it is cut
STRETCH_TOKENS = 1 << 16  # of streams
DOCUMENTS_MIN = 8  # a trace of fewer documents is cut into STRETCHES: a part of one document cannot be held out
STRETCHES = 64
STRETCH_MIN = 64  # tokens or accesses; shorter stretches would be mostly n-grams that begin before them
ADDED_AT_ONCE = 1 << 17  # items that are handed to the counter together
MEMORY_BYTES = 256 << 20  # of the counter

Analyse = Callable[[list[Group], dict[str, int]], dict[str, Any]]
# Phases; the caller's analysis may have more.
COUNTING, MERGING, READING, SORTING, WRITING = "counting", "merging", "reading", "sorting", "writing"


@dataclass(frozen=True)
class Document:
    """One document: its items, uint64 [T, 2], in order; its columns, as the profile keeps them;
    its tokens (or lookups).

    Columns must say all of it, since a profile that is merged is read from them: of keys there are as many lookups as
    the last `batch` says, which counts from 0 in each document.
    """

    items: np.ndarray
    columns: Columns
    num_tokens: int

    @classmethod
    def of_keys(cls, columns: Columns) -> Document:
        """Makes a document of recorded accesses: table, order_index, keys, and batch, the lookup's number from 0 on."""
        high = columns["table"].astype(np.uint64) << np.uint64(32) | columns["order_index"].astype(np.uint64)
        items = np.stack([high, columns["keys"].astype(np.uint64)], axis=1)
        return cls(items, columns, int(columns["batch"].max(initial=-1)) + 1)


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


def key_profile_header(
    infos: Sequence[KeyTraceInfo], layouts: Mapping[str, TableLayout], held_out: float
) -> ProfileHeader:
    """Returns the header of a profile of key traces; raises `FingerprintMismatchError`
    where they are of other tables."""
    first = infos[0]
    for info in infos:
        if (info.tables, info.sample_rate) != (first.tables, first.sample_rate):
            raise ConfigError(
                f"{info.path} and {first.path} are of other tables or sample rates; profile each by itself"
            )
        for table in info.tables:
            spec = layouts[table.name].spec if table.name in layouts else None
            if spec is None or (spec.fingerprint, spec.orders) != (table.fingerprint, table.orders):
                raise FingerprintMismatchError(
                    f"{info.path}: recorded of table {table.name} with fingerprint {table.fingerprint}, the store has "
                    f"{spec.fingerprint if spec else 'no such table'}; profile it with the store that recorded it"
                )
    tables = tuple((table.name, table.fingerprint, table.orders) for table in first.tables)
    return ProfileHeader(KEYS, tables, 64, held_out, first.sample_rate)


def document_limits(num_tokens: int, num_documents: int) -> tuple[int, int]:
    """Returns (tokens above which a document is cut, into stretches of so many), for traces of so many in all.

    Of enough documents only streams are cut, which depends on the document alone, so that parts counted anywhere merge
    to the profile of all. A few documents, such as a corpus without document ends, are cut into some 64 stretches.
    """
    if num_documents >= DOCUMENTS_MIN:
        return DOCUMENT_TOKENS_MAX, STRETCH_TOKENS
    stretch = _stretch_of(num_tokens, STRETCH_TOKENS)
    return stretch, stretch


def stretch_accesses(num_accesses: int) -> int:
    """Returns how many accesses of recorded keys count as one document: of a short trace fewer,
    so that some are held out."""
    return _stretch_of(num_accesses, STRETCH_ACCESSES)


def _stretch_of(total: int, most: int) -> int:
    return min(max(-(-total // STRETCHES), STRETCH_MIN), most)


def key_documents(traces: Iterable[str | os.PathLike[str]], accesses_min: int = STRETCH_ACCESSES) -> Iterator[Document]:
    """Yields the accesses of key traces in stretches of whole lookups, `accesses_min` or a little more each."""
    for trace in traces:
        waiting: list[KeyBlock] = []
        for block in read_key_blocks(trace):
            waiting.append(block)
            accesses = KeyBlock(*(np.concatenate(columns) for columns in zip(*waiting, strict=True)))
            ends = np.flatnonzero(np.diff(accesses.batch)) + 1
            start = 0
            for end in ends.tolist():
                if end - start >= accesses_min:
                    yield _stretch(accesses, start, end)
                    start = end
            waiting = [KeyBlock(*(column[start:] for column in accesses))]
        if waiting and len(waiting[0].keys):
            accesses = KeyBlock(*(np.concatenate(columns) for columns in zip(*waiting, strict=True)))
            yield _stretch(accesses, 0, len(accesses.keys))


def _stretch(accesses: KeyBlock, start: int, end: int) -> Document:
    part = {name: getattr(accesses, name)[start:end] for name in ("table", "order_index", "keys", "batch")}
    return Document.of_keys(part | {"batch": part["batch"] - part["batch"][0]})


def held_out_share(num_tokens: int) -> float:
    """Returns the share of documents to hold out of a trace: a quarter,
    or about four million tokens where that is less."""
    return min(HELD_OUT_SHARE, HELD_OUT_TOKENS_MAX / max(num_tokens, 1))


def make_profile(
    path: str | os.PathLike[str],
    header: ProfileHeader,
    documents: Iterable[Document],
    analyse: Analyse,
    on_progress: OnPhase | None = None,
    memory_bytes: int = MEMORY_BYTES,
) -> dict[str, Any]:
    """Counts documents, analyses, writes the profile; returns its footer. Blocks.

    A document is held out if the checksum of its columns falls below the header's share: by content, so that equal
    documents share their fate, and parts of a trace counted anywhere agree. on_progress gets the phase: counting (in
    tokens), merging (in items), sorting, writing. memory_bytes: of the counter.
    Raises what `ItemCounter` and `ColumnWriter` raise.
    """
    tell = on_progress or _tell_nobody
    counts = dict.fromkeys(COUNTS, 0)
    held_out = HeldOut()
    folder = Path(path).resolve().parent
    with ProfileWriter(path, header) as writer:
        keeper = _HeldOutColumns(writer)
        with ItemCounter(folder, 2, memory_bytes) as counter:
            waiting = [_Waiting(counter, COUNTED), _Waiting(counter, HELD_OUT)]
            tell(COUNTING, 0, None)
            for document in documents:
                kind = HELD_OUT if _is_held_out(document, header.held_out) else COUNTED
                counts["tokens"] += document.num_tokens
                counts["documents"] += 1
                if kind == HELD_OUT:
                    counts["held_out_tokens"] += document.num_tokens
                    counts["held_out_documents"] += 1
                    held_out.add(document)
                    keeper.add(document)
                if waiting[kind].add(document.items):
                    tell(COUNTING, counts["tokens"], None)
            for rest in waiting:
                rest.flush()
            tell(COUNTING, counts["tokens"], None)
            tally = _write_items(writer, header, counter, tell)
        keeper.flush()
        return _finish(writer, tally, held_out, counts, analyse, tell)


def merge_profiles(
    path: str | os.PathLike[str],
    parts: Sequence[Profile],
    documents_of: Callable[[Profile], Iterator[Document]],
    analyse: Analyse,
    on_progress: OnPhase | None = None,
    memory_bytes: int = MEMORY_BYTES,
) -> dict[str, Any]:
    """Writes the profile of all documents of `parts`, in their order; returns its footer. Blocks.

    documents_of gives the held-out documents of a part; on_progress: as of `make_profile`, counting in items;
    memory_bytes: of the counter. Raises `ConfigError` where the parts differ in tables or settings.
    """
    tell = on_progress or _tell_nobody
    header = parts[0].header
    for part in parts[1:]:
        if part.header != header:
            raise ConfigError(
                f"{part.path} is of other tables or settings than {parts[0].path}: {part.header} and {header}; count "
                f"all parts with the same store and the same --held-out"
            )
    counts = {name: sum(part.counts[name] for part in parts) for name in COUNTS}
    held_out = HeldOut()
    folder = Path(path).resolve().parent
    with ProfileWriter(path, header) as writer:
        keeper = _HeldOutColumns(writer)
        with ItemCounter(folder, 2, memory_bytes) as counter:
            num_counted, num_items = 0, sum(part.num_items for part in parts)
            for part in parts:
                tell(COUNTING, num_counted, num_items)
                for document in documents_of(part):
                    held_out.add(document)
                    keeper.add(document)
                for items, sums in part.items():
                    counter.add(items, sums)
                    num_counted += len(items)
                    tell(COUNTING, num_counted, num_items)
            tally = _write_items(writer, header, counter, tell)
        keeper.flush()
        return _finish(writer, tally, held_out, counts, analyse, tell)


def groups_of(profile: Profile, documents: Iterable[Document], on_progress: OnPhase | None = None) -> list[Group]:
    """Reads a finished profile; documents are its held-out ones; on_progress gets reading (in items),
    sorting. Blocks."""
    tell = on_progress or _tell_nobody
    tally, held_out = Tally(profile.header), HeldOut()
    num_read = 0
    tell(READING, 0, profile.num_items)
    for items, sums in profile.items():
        tally.add(items, sums)
        num_read += len(items)
        tell(READING, num_read, profile.num_items)
    for document in documents:
        held_out.add(document)
    tell(SORTING, 0, None)
    return held_out.groups(tally)


class ItemRanking:
    """The items of a finished profile in the order in which a ranking places them, by all that was counted of them."""

    def __init__(self, profile: Profile, ranking: Ranking) -> None:
        """ranking: of a group of the profile's tables."""
        self._profile, self._ranking = profile, ranking
        counts = profile.counts
        # What the ranking says of counts holds for as much text as was counted without the held-out documents.
        self._scale = (counts["tokens"] - counts["held_out_tokens"]) / max(counts["tokens"], 1)
        names = [name for name, _, _ in profile.header.tables]
        self._table_index = names.index(ranking.group.tables[0])

    def first(self, num_entries: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the order index, uint8 [n], and the items, uint64 [n, 2], of the num_entries first, hottest first.

        Of a sample of keys, that share of them. Reads the profile twice; blocks.
        """
        classes = ItemClasses.of_parts(
            (order_index, totals, np.zeros_like(totals), np.ones_like(totals))
            for order_index, _, totals in self._of_orders()
        )
        values = self._values(classes.order_index, classes.counts)
        parts = chosen_parts(values, classes.num_items, round(num_entries * self._ranking.group.counted_rate))
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for order_index, items, totals in self._of_orders():
            orders = np.full(len(items), order_index, dtype=np.uint8)
            chosen = is_chosen(parts, classes.class_of(orders, totals), item_hash(items))
            found.append((orders[chosen], items[chosen], totals[chosen]))
        orders, items, totals = (np.concatenate(columns) for columns in zip(*found, strict=True))
        hottest = np.argsort(-self._values(orders, totals), kind="stable")
        hottest = hottest[:num_entries]  # of a class taken in part, hashes give about as many as were asked for
        return orders[hottest], items[hottest]

    def _values(self, order_index: np.ndarray, totals: np.ndarray) -> np.ndarray:
        return self._ranking.values(order_index, totals * self._scale)

    def _of_orders(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yields (order index, items, counts in all) of the group's items, block by block; never nothing at all."""
        split = OrderSplit(self._profile.header)
        yield 0, np.empty((0, 2), dtype=np.uint64), np.empty(0, dtype=np.int64)
        for parts in itertools.chain((split.add(*block) for block in self._profile.items()), [None]):
            for table_index, order_index, items, sums in split.end() if parts is None else parts:
                if table_index == self._table_index:
                    yield order_index, items, sums.sum(axis=1)


def held_out_documents(profile: Profile) -> Iterator[Columns]:
    """Yields the columns of each held-out document of a profile, `document_ends` left out; raises `FormatError`."""
    unfinished: list[Columns] = []
    start = 0
    for columns in profile.held_out():
        ends = columns["document_ends"] - start
        rest = {name: values for name, values in columns.items() if name != "document_ends"}
        num_values = len(next(iter(rest.values())))
        at = 0
        for end in ends.tolist():
            unfinished.append({name: values[at:end] for name, values in rest.items()})
            document = {name: np.concatenate([part[name] for part in unfinished]) for name in rest}
            if "batch" in document and np.any(np.diff(document["batch"], prepend=0) < 0):
                raise FormatError(f"{profile.path}: lookups of a held-out document go backwards; profile again")
            yield document
            unfinished.clear()
            at = end
        if at < num_values:
            unfinished.append({name: values[at:] for name, values in rest.items()})
        start += num_values


def _write_items(writer: ProfileWriter, header: ProfileHeader, counter: ItemCounter, tell: OnPhase) -> Tally:
    tally = Tally(header)
    num_items = 0
    tell(MERGING, 0, None)
    for items, sums in counter.merged():
        tally.add(items, sums)
        writer.write_items(items, sums)
        num_items += len(items)
        tell(MERGING, num_items, None)
    return tally


def _finish(
    writer: ProfileWriter, tally: Tally, held_out: HeldOut, counts: dict[str, int], analyse: Analyse, tell: OnPhase
) -> dict[str, Any]:
    tell(SORTING, 0, None)
    footer = {"kind": tally.kind, "counts": counts, "analysis": analyse(held_out.groups(tally), counts)}
    tell(WRITING, 0, None)
    writer.finish(footer)
    return footer


def _tell_nobody(_phase: str, _done: int, _total: int | None) -> None:
    pass


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
