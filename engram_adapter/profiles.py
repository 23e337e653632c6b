"""Profiles of a model's tokens: documents of token ids -> n-grams that are counted; counted n-grams -> a layer's keys.

Input: a store's hash, traces of tokens. Output: `tierstore`'s profiles, with what their n-grams mean to the store.
Layers of a model share their n-grams, so they are counted once for all of them. Errors: models whose longest n-gram has
no room in an item, ids outside the vocabulary, profiles of another hash.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

import tierstore
from tierstore.errors import ConfigError, FingerprintMismatchError
from tierstore.formats.catalog import CatalogImage, read_catalog
from tierstore.formats.profile import KEYS, NGRAMS, ProfileHeader, ProfileReader
from tierstore.formats.trace import TokenTraceInfo, read_token_documents, read_token_trace_info
from tierstore.layout import TableLayout
from tierstore.offline.count_documents import MEMORY_BYTES
from tierstore.offline.documents import Document, ItemMapping, KeyItems, document_limits, held_out_documents
from tierstore.offline.profile import Profile, checked_fraction, profile_documents, trace_paths
from tierstore.process.progress import OnPhase

from .hash_spec import HashSpec
from .ngrams import keys_of_windows, ngram_windows, window_bits

DOCUMENT_TOKENS_MAX = 1 << 20  # 30 MB of windows and ids; longer texts are several documents


def token_profile(
    store_path: str | os.PathLike[str],
    traces: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    held_out: float | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    memory_bytes: int = MEMORY_BYTES,
    on_progress: OnPhase | None = None,
) -> Profile:
    """Counts the n-grams of traces of tokens, as the store's model looks them up; also `engram_adapter.token_profile`.

    Blocks: seconds a million tokens. An interrupt leaves no file.

    Args:
        store_path: a store that was built from the model's checkpoint.
        traces: one or several files, as `tierstore trace` writes them.
        held_out: the fraction of documents to keep back for testing predictions, above 0 and below 1; by default a
            quarter, and of long traces about four million tokens.
        output: the profile's file, replaced if there is one; by default a temporary one, which goes with the result.
        memory_bytes: of the counter; the held-out part comes on top, some 60 bytes a token.
        on_progress: called with (phase, done, of how many or None), on any thread.

    Returns:
        The profile: counts, hit-rate curves and recommended budgets, for `tierstore.plan`.

    Raises:
        StoreNotReadyError, FormatError: there is no finished store, or a file is damaged or of another kind.
        ConfigError: the store holds plain tables, or a file cannot be written.
        BudgetError: the disk is full.
        ValueError: a trace has ids outside the model's vocabulary, or `held_out` is not such a fraction.
    """
    image = read_catalog(store_path)
    spec = HashSpec.from_catalog(image)
    paths = trace_paths(traces)
    infos = [read_token_trace_info(path) for path in paths]
    _check_vocabulary(spec, infos)
    num_tokens = sum(info.num_tokens for info in infos)
    limits = document_limits(num_tokens, sum(info.num_documents for info in infos))
    texts = (ids for path in paths for ids in read_token_documents(path, *limits))
    return profile_documents(
        image,
        profile_header(spec, checked_fraction(held_out, num_tokens)),
        token_documents(spec, texts),
        NgramItems(spec),
        num_tokens,
        output=output,
        memory_bytes=memory_bytes,
        on_progress=on_progress,
    )


def open_profile(store_path: str | os.PathLike[str], path: str | os.PathLike[str]) -> Profile:
    """Opens a finished profile of a store's use, of tokens or of keys; also `engram_adapter.open_profile`.

    Raises:
        StoreNotReadyError, FormatError: there is no finished store, or the file is not a profile, or damaged.
        FingerprintMismatchError: the profile is of other tables, or of another hash.
        ConfigError: the file cannot be read.
    """
    image = read_catalog(store_path)
    with ProfileReader(path) as reader:
        mapping = _mapping_of(image, reader.header)
        mapping.check(image.tables, reader.header)
    return tierstore.open_profile(path, mapping)


def replan(
    store_path: str | os.PathLike[str],
    token_traces: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    dram: int | str | None,
    *,
    hbm: int | str = 0,
    nvme_entries: int | str = 0,
    batch_tokens: int = 1,
    held_out: float | None = None,
    on_progress: OnPhase | None = None,
) -> int | None:
    """Profiles, plans and places in one call: the nightly job; also `engram_adapter.replan`. Blocks, minutes.

    Processes that have the store open keep what they read; those that open it later start warm with the new epoch. A
    daemon takes it over by `tierstore swap`.

    Args and errors are those of `token_profile`, `tierstore.plan` and `tierstore.place`.

    Returns:
        The number of the new epoch; None if the tables fit in DRAM whole, so that the store opens without a placement.
    """
    counted = token_profile(store_path, token_traces, held_out, on_progress=on_progress)
    planned = tierstore.plan(
        store_path, counted, dram, hbm, nvme_entries, batch_tokens=batch_tokens, on_progress=on_progress
    )
    return tierstore.place(store_path, planned, on_progress=on_progress)


@dataclass(frozen=True)
class NgramItems:
    """The items of a model's n-grams, as `tierstore.offline.documents.ItemMapping` asks: windows of mapped ids."""

    spec: HashSpec

    def check(self, layouts: Mapping[str, TableLayout], header: ProfileHeader) -> None:
        """See `ItemMapping`."""
        check_profile(self.spec, header)
        for name, fingerprint, _ in header.tables:
            theirs = layouts[name].spec.fingerprint if name in layouts else "no such table"
            if theirs != fingerprint:
                raise _another_hash({name: fingerprint}, {name: theirs}, header.bits, header.bits)

    def documents(self, profile: ProfileReader) -> Iterator[Document]:
        """See `ItemMapping`."""
        return token_documents(self.spec, (columns["token_ids"] for columns in held_out_documents(profile)))

    def keys_of(self, items: np.ndarray, order_index: np.ndarray, table: str) -> np.ndarray:
        """See `ItemMapping`."""
        keys = np.empty(len(items), dtype=np.int64)
        for index in range(len(self.spec.orders)):
            of_order = order_index == index
            keys[of_order] = keys_of_windows(self.spec, items[of_order], index, table)
        return keys


def _mapping_of(image: CatalogImage, header: ProfileHeader) -> ItemMapping:
    return KeyItems() if header.kind == KEYS else NgramItems(HashSpec.from_catalog(image))


def _check_vocabulary(spec: HashSpec, infos: Sequence[TokenTraceInfo]) -> None:
    """Raises `ValueError` for ids outside the vocabulary, before hours of counting."""
    for info in infos:
        if info.token_id_max >= spec.vocab_size:
            raise ValueError(
                f"{info.path}: token ids go up to {info.token_id_max}, the vocabulary of the store's model has "
                f"{spec.vocab_size}; profile with the store that the trace's tokenizer is of"
            )


def profile_header(spec: HashSpec, held_out: float) -> ProfileHeader:
    """Returns the header of a profile of a model's n-grams: all its tables, and the share of documents to hold out."""
    tables = tuple((spec.table_name(n), spec.fingerprint(n), spec.orders) for n in spec.layers)
    return ProfileHeader(NGRAMS, tables, window_bits(spec), held_out, 1.0)


def token_documents(spec: HashSpec, documents: Iterable[np.ndarray]) -> Iterator[Document]:
    """Yields documents of token ids, integers [T] each, as what is counted of them.

    One of more than DOCUMENT_TOKENS_MAX tokens, such as a whole trace without document ends, is cut into several, so
    that memory stays bounded and a share of it can be held out. Raises `ValueError` for ids outside the vocabulary,
    naming document, position and id.
    """
    for number, whole in enumerate(documents):
        for start in range(0, max(len(whole), 1), DOCUMENT_TOKENS_MAX):
            token_ids = whole[start : start + DOCUMENT_TOKENS_MAX]
            try:
                items = ngram_windows(spec, token_ids)
            except ValueError as error:
                where = f"document {number}" + (f" from token {start} on" if start else "")
                raise ValueError(
                    f"{where}: {error}; profile with the store that the trace's tokenizer is of"
                ) from error
            yield Document(items, {"token_ids": token_ids.astype(np.int32)}, len(token_ids))


def check_profile(spec: HashSpec, header: ProfileHeader) -> None:
    """Raises `FingerprintMismatchError` if a profile's n-grams are of another hash: its keys would be other ones."""
    own = profile_header(spec, header.held_out)
    if header.kind != NGRAMS:
        raise ConfigError("the profile counts keys; its keys need no hash")
    if header != own:
        theirs, mine = {name: digest for name, digest, _ in header.tables}, {n: d for n, d, _ in own.tables}
        raise _another_hash(theirs, mine, header.bits, own.bits)


def _another_hash(
    theirs: Mapping[str, str], mine: Mapping[str, str], bits: int, own_bits: int
) -> FingerprintMismatchError:
    return FingerprintMismatchError(
        f"the profile is of another hash: tables {dict(theirs)}, {bits} bits an id; the store has {dict(mine)}, "
        f"{own_bits} bits: profile again with this store"
    )
