"""Token traces: the ids of recorded text, with the ends of its documents; and what all traces have in common.

Input: token ids in pieces of any length. Output: the same, streamed; what a trace is about is known without reading its
data. Errors: `ValueError` for token ids outside the vocabulary; `FormatError` for files of columns that are not a trace
or whose numbers contradict each other.

A document has at least one token: an empty one leaves no mark. Key traces are in `key_trace`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import FormatError
from .columns import ColumnReader, ColumnWriter
from .packing import Packing

TRACE_KIND = "trace"
BLOCK_VALUES = 1 << 20  # tokens or accesses of one block
TOKEN_ID_MAX = 2**31 - 1
TRACE_LEVEL = 1  # of zstd: half the time of level 3, for 8 % more bytes of real text
TOKENS, KEYS = "tokens", "keys"  # the two sorts of traces, and their sections
TOKEN_COLUMNS = {"token_ids": "int32", "document_ends": "int64"}


@dataclass(frozen=True)
class TokenTraceInfo:
    """What a token trace is about. vocab_size: None if it is not known; token_id_max: -1 if there are no tokens."""

    path: Path
    vocab_size: int | None
    source: str
    num_tokens: int
    num_documents: int
    token_id_max: int


def check_token_ids(token_ids: np.ndarray, vocab_size: int | None, where: str, token_start: int = 0) -> int:
    """Checks token ids, [T], against a vocabulary; returns the largest, or -1 for no ids.

    Args:
        token_ids: The ids.
        vocab_size: Ids are below it; None: below 2^31.
        where: What they are of, for the error.
        token_start: The index of the first of them in `where`.

    Raises:
        TypeError: They are not integers.
        ValueError: An id is negative or outside the vocabulary; names its index.
    """
    if token_ids.dtype.kind not in "iu":
        raise TypeError(f"{where}: token ids are {token_ids.dtype}, expected integers")
    limit = TOKEN_ID_MAX + 1 if vocab_size is None else vocab_size
    if not len(token_ids):
        return -1
    wide = token_ids.dtype.itemsize >= 4
    # Read as unsigned, a negative id of 4 or 8 bytes is at least 2^31, beyond every vocabulary: one pass finds both.
    largest = int((token_ids.view(token_ids.dtype.str.replace("i", "u")) if wide else token_ids).max())
    if largest >= limit or (not wide and token_ids.min() < 0):
        index = int(np.flatnonzero((token_ids < 0) | (token_ids >= limit))[0])
        raise ValueError(
            f"{where}: token {token_start + index} has id {token_ids[index]}, the vocabulary has {limit} ids from 0 "
            f"on; give the text's own tokenizer or vocabulary size, or the right dtype"
        )
    return largest


class TokenTraceWriter:
    """Writes a token trace; use it with `with`, and `finish` it. One thread at a time."""

    def __init__(self, path: str | os.PathLike[str], *, vocab_size: int | None, source: str, threads: int = 0) -> None:
        """vocab_size: ids are below it, None if it is not known. source: where the text comes from, for people.
        threads: that compress while tokens are added; 0: whoever adds them does it. The bytes are the same.

        Raises what `ColumnWriter` raises, and `ValueError` for a vocabulary that there cannot be.
        """
        if vocab_size is not None and not 1 <= vocab_size <= TOKEN_ID_MAX + 1:
            raise ValueError(
                f"vocab_size {vocab_size} is outside 1 to {TOKEN_ID_MAX + 1}; give the number of token ids"
            )
        self.num_tokens, self.num_documents, self.token_id_max = 0, 0, -1
        self._vocab_size = vocab_size
        header = {"trace": TOKENS, "vocab_size": vocab_size, "source": source}
        self._writer = ColumnWriter(path, TRACE_KIND, header)
        self._packing = Packing(self._writer, TOKENS, TRACE_LEVEL, threads)
        self._block = np.empty(BLOCK_VALUES, dtype=np.int32)
        self._filled = 0  # of the block
        self._ends: list[np.ndarray] = []  # of documents, over the whole trace, within the block
        self._last_end = 0

    def add(self, token_ids: np.ndarray, document_ends: np.ndarray | Sequence[int] = ()) -> None:
        """Appends tokens to the document under way, and ends documents. Blocks on the disk.

        Args:
            token_ids: Integers [T].
            document_ends: Indexes in them, ascending, 0 to T: 0 ends the document before, T with the last token.

        Raises:
            TypeError: The ids are not integers.
            ValueError: Ids outside the vocabulary, or ends outside the tokens.
        """
        largest = check_token_ids(token_ids, self._vocab_size, str(self._writer.path), self.num_tokens)
        ends = np.asarray(document_ends, dtype=np.int64)
        if len(ends) and (ends[0] < 0 or ends[-1] > len(token_ids) or (ends[1:] < ends[:-1]).any()):
            raise ValueError(f"document ends are not ascending from 0 to {len(token_ids)}, the tokens given")
        token_end = self.num_tokens + len(token_ids)
        ends = ends + self.num_tokens
        ends = ends[ends > np.concatenate([[self._last_end], ends[:-1]])]  # an end twice is a document without tokens
        taken = 0
        while True:
            within = int(np.searchsorted(ends, self.num_tokens, side="right"))
            self._end_documents(ends[:within])
            ends = ends[within:]
            if self.num_tokens == token_end:
                break
            if self._filled == BLOCK_VALUES:  # only now: an end at a block's last token belongs to that block
                self._write_block()
            count = min(BLOCK_VALUES - self._filled, token_end - self.num_tokens)
            self._block[self._filled : self._filled + count] = token_ids[taken : taken + count]
            self._filled += count
            self.num_tokens += count
            taken += count
        self.token_id_max = max(self.token_id_max, largest)

    def add_document(self, token_ids: np.ndarray) -> None:
        """Appends one whole document, integers [T]; see `add`."""
        self.add(token_ids, [len(token_ids)])

    def _end_documents(self, ends: np.ndarray) -> None:
        if len(ends):
            self._ends.append(ends)
            self._last_end = int(ends[-1])
            self.num_documents += len(ends)

    def _write_block(self) -> None:
        ends = np.concatenate([np.empty(0, dtype=np.int64), *self._ends])
        columns = {"token_ids": self._block[: self._filled], "document_ends": ends}
        self._block = self._packing.put(columns, self._block)
        self._filled = 0
        self._ends.clear()

    def finish(self) -> TokenTraceInfo:
        """Ends the last document and the trace, which has its name from then on. Blocks on the disk."""
        self.add(self._block[:0], [0])
        if self._filled:
            self._write_block()
        self._packing.finish()
        footer = {"tokens": self.num_tokens, "documents": self.num_documents, "token_id_max": self.token_id_max}
        self._writer.finish(footer)
        return read_token_trace_info(self._writer.path)

    def __enter__(self) -> TokenTraceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._packing.close()
        finally:
            self._writer.abandon()


def sort_of_trace(path: str | os.PathLike[str]) -> str:
    """Returns TOKENS or KEYS, without reading a trace's data. Raises `FormatError` if the file is not a trace."""
    with ColumnReader.open(path, TRACE_KIND) as reader:
        return _sort_of(reader)


def open_trace(path: str | os.PathLike[str], sort: str) -> ColumnReader:
    """Opens the columns of a trace of the given sort, TOKENS or KEYS. Raises `FormatError` if the file is not one."""
    reader = ColumnReader.open(path, TRACE_KIND)
    try:
        if _sort_of(reader) != sort:
            raise FormatError(f"{reader.path} is a trace of {_sort_of(reader)}, expected one of {sort}; give one")
    except BaseException:
        reader.close()
        raise
    return reader


def _sort_of(reader: ColumnReader) -> str:
    sort = reader.header.get("trace")
    if sort not in (TOKENS, KEYS):
        raise FormatError(f"{reader.path}: a trace of {sort!r:.100}, this tierstore knows {TOKENS} and {KEYS}; upgrade")
    assert isinstance(sort, str)
    return sort


def read_token_trace_info(path: str | os.PathLike[str]) -> TokenTraceInfo:
    """Returns what a token trace is about, without reading its data. Raises `FormatError` if it is not one."""
    with open_trace(path, TOKENS) as reader:
        return _token_info(reader)


def read_token_pieces(path: str | os.PathLike[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (token ids, int32 [T]; the indexes in them, int64, 1 to T, at which documents end), a block at a time.

    Memory is bounded by a block, however long the documents are.
    Raises `FormatError` if the file is not a whole token trace.
    """
    with open_trace(path, TOKENS) as reader:
        info = _token_info(reader)
        token_start, last_end = 0, 0
        for block in reader.blocks(TOKENS):
            token_ids, ends = block["token_ids"], block["document_ends"]
            _check_tokens(info, token_ids, ends, token_start)
            yield token_ids, ends - token_start
            token_start += len(token_ids)
            last_end = int(ends[-1]) if len(ends) else last_end
        if last_end != info.num_tokens:
            raise FormatError(
                f"{info.path}: its last document ends at token {last_end} of {info.num_tokens}; write the trace again"
            )


def _check_tokens(info: TokenTraceInfo, token_ids: np.ndarray, ends: np.ndarray, token_start: int) -> None:
    if len(token_ids) and not 0 <= token_ids.min() <= token_ids.max() <= info.token_id_max:
        raise FormatError(
            f"{info.path}: ids {token_ids.min()} to {token_ids.max()} from token {token_start} on, its footer says 0 "
            f"to {info.token_id_max}; write the trace again"
        )
    bounded = not len(ends) or (ends[0] > token_start and ends[-1] <= token_start + len(token_ids))
    if not bounded or (ends[1:] <= ends[:-1]).any():  # compared, for differences may wrap round
        raise FormatError(
            f"{info.path}: document ends of the block from token {token_start} on are not ascending within its "
            f"{len(token_ids)} tokens; write the trace again"
        )


def read_token_documents(
    path: str | os.PathLike[str], tokens_max: int | None = None, stretch_tokens: int | None = None
) -> Iterator[np.ndarray]:
    """Yields the documents of a token trace in order, token ids int32 [T] each, T >= 1.

    Memory is bounded by a block and the longest document, or tokens_max of it. Raises as `read_token_pieces` does.

    Args:
        path: The trace.
        tokens_max: A longer document is cut into stretches and a last one of the rest; None: never.
        stretch_tokens: Of one stretch, by default tokens_max.
    """
    stretch = stretch_tokens or tokens_max or 0
    unfinished: list[np.ndarray] = []
    num_unfinished, is_cut = 0, False
    for token_ids, ends in read_token_pieces(path):
        start = 0
        for end, is_end in [*((end, True) for end in ends.tolist()), (len(token_ids), False)]:
            unfinished.append(token_ids[start:end])
            num_unfinished += end - start
            start = end
            is_cut = is_cut or (tokens_max is not None and num_unfinished > tokens_max)
            if is_cut or is_end:
                ids = np.concatenate(unfinished) if len(unfinished) > 1 else unfinished[0]
                taken = 0
                while is_cut and num_unfinished - taken >= stretch:
                    yield ids[taken : taken + stretch]
                    taken += stretch
                if is_end and taken < num_unfinished:
                    yield ids[taken:]
                unfinished = [] if is_end else [ids[taken:]]
                num_unfinished = 0 if is_end else num_unfinished - taken
                is_cut = is_cut and not is_end


def _token_info(reader: ColumnReader) -> TokenTraceInfo:
    reader.require(TOKENS, TOKEN_COLUMNS)
    vocab_size, source = reader.header.get("vocab_size"), reader.header.get("source")
    tokens, documents = reader.count("tokens"), reader.count("documents")
    found = tuple(reader.num_values(TOKENS, name) for name in TOKEN_COLUMNS)
    if (tokens, documents) != found:
        raise FormatError(
            f"{reader.path}: {found[0]} tokens of {found[1]} documents, its footer says {tokens} of {documents}; "
            f"write the trace again"
        )
    limit = TOKEN_ID_MAX + 1 if vocab_size is None else vocab_size
    id_max = reader.footer.get("token_id_max")
    if (
        not isinstance(source, str)
        or not (type(limit) is int and 1 <= limit <= TOKEN_ID_MAX + 1)
        or not (type(id_max) is int and (-1 if not tokens else 0) <= id_max < limit)
    ):
        raise FormatError(
            f"{reader.path}: source {source!r:.100}, vocabulary {vocab_size!r:.100}, largest id {id_max!r:.100}; no "
            f"trace says that: write it again"
        )
    return TokenTraceInfo(reader.path, vocab_size, source, tokens, documents, id_max)
