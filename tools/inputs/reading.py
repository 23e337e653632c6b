"""From a `TokenInput` to its documents: texts in parts, or pieces of ids, whatever contains them.

Input: `TokenInput`s, the reader of columns, the chat template. Output: `TextPart`s or `Piece`s in order, in bounded
memory. Errors: those of the readers, each by file and place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from tierstore.errors import ConfigError
from tierstore.formats.trace import check_token_ids

from .chat import ChatTemplate
from .columns import KINDS as COLUMN_KINDS
from .columns import ColumnReader
from .ids import LLMC_HEADER_BYTES, Piece, npy_pieces, raw_pieces
from .json_lines import documents_of_lines
from .megatron_pairs import read_index
from .samples import documents_of_samples
from .spool import Spool
from .tar_members import documents_of_members
from .text import TextPart, parts_of_document, parts_of_file
from .token_input import Document, TokenInput

BATCH_TOKENS = 1 << 18  # of documents that come one by one, as a piece


@dataclass(frozen=True)
class Reader:
    """What reading needs besides the input itself. spool: has copies of compressed files whose readers seek."""

    columns: ColumnReader
    chat: ChatTemplate
    spool: Spool

    def text_parts(self, source: TokenInput) -> Iterator[TextPart]:
        """Yields the text of an input that needs a tokenizer."""
        if source.unfolds:
            with self.spool.unfolded(source.path, source.unfolds) as copy:
                yield from self.text_parts(replace(source, path=copy, unfolds=""))
            return
        if source.kind == "text":
            yield from parts_of_file(source.path, source.codec, source.num_bytes)
            return
        for number, (content, input_bytes, _) in enumerate(self._documents(source)):
            assert isinstance(content, str), "the field holds text"
            text = self.chat.render(source.path, number, content) if source.is_chat else content
            yield from parts_of_document(text, input_bytes)

    def id_pieces(self, source: TokenInput, vocab_size: int | None, lengths: np.ndarray | None) -> Iterator[Piece]:
        """Yields the ids of an input that holds ids.

        lengths: int64 [documents], tokens of each document, if the file does not say it itself. vocab_size: ids are
        below it.
        """
        if source.unfolds:
            return self._unfolded_pieces(source, vocab_size, lengths)
        if lengths is not None and source.kind not in ("npy", "raw", "llmc"):
            raise ConfigError(f"{source.path} says itself where its documents end; leave --doclens out")
        if source.kind == "npy":
            return npy_pieces(source.path, lengths, vocab_size)
        if source.kind in COLUMN_KINDS:
            assert source.field is not None
            return self.columns.id_pieces(source.path, source.kind, source.field, vocab_size, source.part)
        if source.field is not None:
            return self._gathered(source, vocab_size)
        _check_width(source, vocab_size)
        skip_bytes = LLMC_HEADER_BYTES if source.kind == "llmc" else 0
        if source.index is not None:
            lengths = read_index(source.index, source.path).lengths
        return raw_pieces(source.path, source.codec, source.dtype, lengths, vocab_size, skip_bytes)

    def _unfolded_pieces(
        self, source: TokenInput, vocab_size: int | None, lengths: np.ndarray | None
    ) -> Iterator[Piece]:
        with self.spool.unfolded(source.path, source.unfolds) as copy:
            yield from self.id_pieces(replace(source, path=copy, unfolds=""), vocab_size, lengths)

    def _documents(self, source: TokenInput) -> Iterator[Document]:
        """Yields the documents of inputs with a field."""
        assert source.field is not None
        if source.kind in COLUMN_KINDS:
            return self.columns.texts(source.path, source.kind, source.field, source.part)
        if source.layout is not None:
            return documents_of_samples(source)
        if source.kind == "tar":
            return documents_of_members(source.path, source.codec, source.field)
        return documents_of_lines(source.path, source.codec, source.field)

    def _gathered(self, source: TokenInput, vocab_size: int | None) -> Iterator[Piece]:
        """Yields pieces of some BATCH_TOKENS of documents that come one by one."""
        ids: list[np.ndarray] = []
        num_gathered = taken = 0
        for content, input_bytes, where in self._documents(source):
            assert isinstance(content, np.ndarray), "the field holds ids"
            check_token_ids(content, vocab_size, where)
            num_gathered += len(content)
            taken += input_bytes
            ids.append(content.astype(np.int32))  # int64 and uint64 side by side would become floats
            if num_gathered >= BATCH_TOKENS:
                yield _piece(ids, taken)
                ids, num_gathered, taken = [], 0, 0
        if ids:
            yield _piece(ids, taken)


def _check_width(source: TokenInput, vocab_size: int | None) -> None:
    """Raises `ConfigError` for uint16 of a larger vocabulary: those who write it wrap larger ids round, silently."""
    most = 1 << 16
    if vocab_size is not None and vocab_size > most and np.dtype(source.dtype) == np.uint16:
        raise ConfigError(
            f"{source.path} holds uint16, and the vocabulary has {vocab_size} ids: ids from {most} on wrapped round "
            f"when it was written, if there were any; write it as int32, or give --vocab-size {most} if there were none"
        )


def _piece(ids: list[np.ndarray], input_bytes: int) -> Piece:
    return Piece(np.concatenate(ids), np.cumsum([len(document) for document in ids]), input_bytes)
