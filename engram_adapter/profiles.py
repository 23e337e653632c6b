"""The model's side of profiles: documents of token ids -> items that are counted; counted n-grams -> a layer's keys.

Flows in: a store's hash, documents of token ids. Flows out: what `tierstore.offline.profile` counts. Layers of a model
share their n-grams, so they are counted once for all of them.
Refuses models whose longest n-gram has no room in an item.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from tierstore.errors import ConfigError, FingerprintMismatchError
from tierstore.formats.profile import NGRAMS, ProfileHeader
from tierstore.offline.profile import Document

from .hash_spec import HashSpec
from .ngrams import ngram_windows, window_bits

DOCUMENT_TOKENS_MAX = 1 << 20  # 30 MB of windows and ids; longer texts are several documents


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
    """Raises `FingerprintMismatchError` where a profile's n-grams are of another hash: its keys would be other ones."""
    own = profile_header(spec, header.held_out)
    if header.kind != NGRAMS:
        raise ConfigError("the profile counts keys; its keys need no hash")
    if header != own:
        theirs, mine = {name: digest for name, digest, _ in header.tables}, {n: d for n, d, _ in own.tables}
        raise FingerprintMismatchError(
            f"the profile is of another hash: tables {theirs}, {header.bits} bits an id; the store has {mine}, "
            f"{own.bits} bits: profile again with this store"
        )
