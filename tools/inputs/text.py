"""Text through a tokenizer, as pieces: files of text, a document each, and JSON lines, a document a line.

Input: documents in parts. Output: `Piece`s in order, in bounded memory. The tokenizer uses threads of its own.
"""

from __future__ import annotations

import io
import re
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
BATCH_CHARACTERS = 1 << 19
BATCH_PARTS_MAX = 1 << 14  # of short texts, and of those that are not drawn
_LINE_END = re.compile(r"\r\n?|\n")  # as files of text have them


class TextPart(NamedTuple):
    """A part of a document; the bytes of input that it took."""

    text: str
    starts_document: bool
    ends_document: bool
    input_bytes: int


def text_pieces(parts: Iterable[tuple[Path, TextPart]], tokenizer: Tokenizer, bos: int | None) -> Iterator[Piece]:
    """Yields the tokens of documents in batches; `bos`, if given, stands before each document. Blocks.

    parts: each with the file that it is of, for errors.
    """
    for paths, batch in batches_of(parts):
        remedy = "leave the input out that it cannot read, or update tokenizers"
        with naming_panics(f"text for the tokenizer, from {paths[0]} on", remedy):
            texts = [part.text for part in batch]
            encodings = aside(partial(tokenizer.encode_batch_fast, add_special_tokens=False), texts)  # takes a second
        yield joined_piece(batch, [np.array(encoding.ids, dtype=np.int32) for encoding in encodings], bos)


def batches_of(parts: Iterable[tuple[Path, TextPart]]) -> Iterator[tuple[list[Path], list[TextPart]]]:
    """Yields parts in batches of some BATCH_CHARACTERS, each with the files that they are of."""
    paths: list[Path] = []
    batch: list[TextPart] = []
    characters = 0
    for path, part in parts:
        paths.append(path)
        batch.append(part)
        characters += len(part.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_PARTS_MAX:
            yield paths, batch
            paths, batch, characters = [], [], 0
    if batch:
        yield paths, batch


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
    if not text:
        yield TextPart("", False, False, input_bytes)
    start = 0
    while start < len(text):  # not by way of a StringIO, which takes four bytes for every character
        end = min(len(text), start + PIECE_CHARACTERS)
        if end - start == PIECE_CHARACTERS:
            line_end = _LINE_END.search(text, end, end + PIECE_CHARACTERS)
            end = line_end.end() if line_end else min(len(text), end + PIECE_CHARACTERS)
        yield TextPart(text[start:end], start == 0, end == len(text), input_bytes)
        start, input_bytes = end, 0


def _some_lines(file: io.TextIOBase) -> str:
    text = file.read(PIECE_CHARACTERS)
    return text + file.readline(PIECE_CHARACTERS) if len(text) == PIECE_CHARACTERS else text


def joined_piece(parts: Sequence[TextPart], ids: Sequence[np.ndarray], bos: int | None) -> Piece:
    """Returns the piece of a batch of parts, of each of which the ids are given."""
    found: list[np.ndarray] = []
    ends: list[int] = []
    total = 0
    for part, part_ids in zip(parts, ids, strict=True):
        if bos is not None and part.starts_document:
            found.append(np.array([bos], dtype=np.int32))
            total += 1
        found.append(part_ids)
        total += len(part_ids)
        if part.ends_document:
            ends.append(total)
    return Piece(np.concatenate(found), ends, sum(part.input_bytes for part in parts))
