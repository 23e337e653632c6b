"""Documents: what a profile counts, and how traces are cut into them.

Input: key traces, or the held-out documents of a profile's file. Output: `Document`s: the items that each accesses, and
the columns that a profile keeps of it if it is held out. What items mean is an `ItemMapping`'s to say: here of recorded
keys, in `engram_adapter` of a model's n-grams. Errors: traces of other tables, damaged profiles.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..errors import ConfigError, FingerprintMismatchError, FormatError
from ..formats.key_trace import KeyBlock, KeyTraceInfo, read_key_blocks
from ..formats.profile import KEYS, Columns, ProfileHeader, ProfileReader
from ..layout import TableLayout
from ..spec import TableSpec

HELD_OUT_FRACTION = 1 / 4  # less gives wider intervals, more a static set that is fitted to less
HELD_OUT_TOKENS_MAX = 4_000_000  # of a long trace a smaller fraction is held out
STRETCH_ACCESSES = 1 << 14  # of recorded keys, that count as one document
DOCUMENT_TOKENS_MAX = 1 << 20  # a longer document is a stream rather than a text: it is cut
STRETCH_TOKENS = 1 << 16  # of streams
DOCUMENTS_MIN = 8  # a trace of fewer documents is cut into STRETCHES: a part of one document cannot be held out
STRETCHES = 64
STRETCH_MIN = 64  # tokens or accesses; shorter stretches would be mostly n-grams that begin before them


@dataclass(frozen=True)
class Document:
    """One document: its items, uint64 [T, 2], in order; its columns, as the profile keeps them; its tokens (or
    lookups).

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


class ItemMapping(Protocol):
    """What the items of a profile mean to a store. Any thread may use it."""

    def check(self, layouts: Mapping[str, TableLayout], header: ProfileHeader) -> None:
        """Raises `FingerprintMismatchError` if a profile is of other tables than a store's."""

    def documents(self, profile: ProfileReader) -> Iterator[Document]:
        """Yields the held-out documents of a profile as they were counted; raises `FormatError` if they are damaged."""

    def keys_of(self, items: np.ndarray, order_index: np.ndarray, table: str) -> np.ndarray:
        """Returns a table's keys, int64 [n], of items, uint64 [n, 2], each of the order at its index, uint8 [n]."""


class KeyItems:
    """The items of recorded keys: the low word is the key."""

    def check(self, layouts: Mapping[str, TableLayout], header: ProfileHeader) -> None:
        """See `ItemMapping`."""
        if header.kind != KEYS:
            raise ConfigError(
                "the profile counts a model's n-grams, and its keys need the model's hash; open it with "
                "engram_adapter.open_profile(store_path, path)"
            )
        check_tables(layouts, header)

    def documents(self, profile: ProfileReader) -> Iterator[Document]:
        """See `ItemMapping`."""
        return (Document.of_keys(columns) for columns in held_out_documents(profile))

    def keys_of(self, items: np.ndarray, order_index: np.ndarray, table: str) -> np.ndarray:  # noqa: ARG002
        """See `ItemMapping`."""
        return items[:, 1].view(np.int64)


def check_tables(layouts: Mapping[str, TableLayout], header: ProfileHeader) -> None:
    """Raises `FingerprintMismatchError` if a store lacks a profile's tables, or has others of their names."""
    for name, fingerprint, orders in header.tables:
        spec = layouts[name].public_spec if name in layouts else None
        if spec is None or spec.fingerprint != fingerprint or orders not in orders_of_keys(spec):
            raise FingerprintMismatchError(
                f"the profile's keys are of table {name} with fingerprint {fingerprint}, the store has "
                f"{spec.fingerprint if spec else 'no such table'}; record its own keys"
            )


def orders_of_keys(spec: TableSpec) -> list[tuple[int, ...]]:
    """Returns the orders of keys that can be taken for a table's: its own, and of a slice the whole table's."""
    return [spec.orders] if spec.whole is None else [spec.orders, spec.whole.orders]


def key_profile_header(
    infos: Sequence[KeyTraceInfo], layouts: Mapping[str, TableLayout], held_out: float
) -> ProfileHeader:
    """Returns the header of a profile of key traces; raises `FingerprintMismatchError` if they are of other
    tables."""
    first = infos[0]
    for info in infos:
        if (info.tables, info.sample_rate) != (first.tables, first.sample_rate):
            raise ConfigError(
                f"{info.path} and {first.path} are of other tables or sample rates; profile each by itself"
            )
        for table in info.tables:
            spec = layouts[table.name].public_spec if table.name in layouts else None
            if spec is None or spec.fingerprint != table.fingerprint or table.orders not in orders_of_keys(spec):
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
    """Returns how many accesses of recorded keys count as one document: of a short trace fewer, so that some are held
    out."""
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


def held_out_fraction(num_tokens: int) -> float:
    """Returns the share of documents to hold out of a trace: a quarter, or about four million tokens if that is
    less."""
    return min(HELD_OUT_FRACTION, HELD_OUT_TOKENS_MAX / max(num_tokens, 1))


def held_out_documents(profile: ProfileReader) -> Iterator[Columns]:
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
