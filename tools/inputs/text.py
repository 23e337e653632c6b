"""Text through a tokenizer, as pieces: files of text, a document each, and JSON lines, a document a line.

Input: documents in parts. Output: `Piece`s in order, in bounded memory. The tokenizer uses threads of its own.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from tierstore.causes import naming_panics
from tierstore.process.workers import aside

from .byte_streams import ChunkFile
from .ids import Piece

PIECE_CHARACTERS = 1 << 20  # text beyond it is cut at the end of a line
BATCH_CHARACTERS = 1 << 21


class TextPart(NamedTuple):
    """A part of a document; the bytes of input that it took."""

    text: str
    starts_document: bool
    ends_document: bool
    input_bytes: int


def text_pieces(parts: Iterable[TextPart], tokenizer: Tokenizer, bos: int | None) -> Iterator[Piece]:
    """Yields the tokens of documents in batches; `bos`, if given, stands before each document. Blocks."""
    batch: list[TextPart] = []
    characters = 0
    for part in parts:
        batch.append(part)
        characters += len(part.text)
        if characters >= BATCH_CHARACTERS:
            yield _tokenized(batch, tokenizer, bos)
            batch, characters = [], 0
    if batch:
        yield _tokenized(batch, tokenizer, bos)


def parts_of_file(path: Path, codec: str, num_bytes: int) -> Iterator[TextPart]:
    """Yields a file as one document: UTF-8, invalid bytes as U+FFFD, a mark of the byte order left out.

    One of more than PIECE_CHARACTERS is cut at ends of lines, where its tokens may differ from those of the whole.
    """
    with ChunkFile(path, codec) as raw, io.BufferedReader(raw) as buffered:
        file = io.TextIOWrapper(buffered, encoding="utf-8", errors="replace", newline="")
        starts, consumed, text = True, 0, _some_lines(file).removeprefix("\ufeff")
        while text:
            following = _some_lines(file)
            now = raw.consumed if following else num_bytes
            yield TextPart(text, starts, not following, now - consumed)
            starts, consumed, text = False, now, following


def parts_of_document(text: str, input_bytes: int) -> Iterator[TextPart]:
    """Yields one document that is in memory, cut as a file is; nothing of an empty one but its bytes."""
    file = io.StringIO(text, newline="")
    starts, part = True, _some_lines(file)
    if not part:
        yield TextPart("", False, False, input_bytes)
    while part:
        following = _some_lines(file)
        yield TextPart(part, starts, not following, input_bytes)
        starts, part, input_bytes = False, following, 0


def _some_lines(file: io.TextIOBase) -> str:
    text = file.read(PIECE_CHARACTERS)
    return text + file.readline(PIECE_CHARACTERS) if len(text) == PIECE_CHARACTERS else text


def _tokenized(parts: Sequence[TextPart], tokenizer: Tokenizer, bos: int | None) -> Piece:
    with naming_panics("text for the tokenizer", "leave the input out that it cannot read, or update tokenizers"):
        texts = [part.text for part in parts]
        encodings = aside(partial(tokenizer.encode_batch_fast, add_special_tokens=False), texts)  # takes a second
    ids: list[np.ndarray] = []
    ends: list[int] = []
    total = 0
    for part, encoding in zip(parts, encodings, strict=True):
        start = [bos] if bos is not None and part.starts_document else []
        ids.append(np.array(start + encoding.ids, dtype=np.int64))
        total += len(ids[-1])
        if part.ends_document:
            ends.append(total)
    return Piece(np.concatenate(ids), ends, sum(part.input_bytes for part in parts))
