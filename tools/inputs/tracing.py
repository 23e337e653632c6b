"""From inputs to the pieces of a trace: read, tokenized, ended at --eos, and sampled, in the order of the inputs.

Input: `TokenInput`s and `Settings`. Output: pieces of ids with the ends of their documents. Errors: those of the
readers; `ConfigError` if somebody wrote to a file while it was read.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tierstore.errors import ConfigError

from .ids import Piece
from .reading import Reader
from .sampling import Sample
from .text import TextPart, text_pieces
from .token_input import TokenInput, file_identity
from .tokenizing import Tokenizing, default_jobs


@dataclass(frozen=True)
class Settings:
    """What the user chose. tokenizer: with the path that it came from; vocab_size: ids are below it; lengths: int64
    [documents], of the only input; bos, eos: ids; jobs: processes that tokenize, None: as many as the text needs."""

    tokenizer: Tokenizer | None = None
    tokenizer_path: Path | None = None
    vocab_size: int | None = None
    lengths: np.ndarray | None = None
    bos: int | None = None
    eos: int | None = None
    jobs: int | None = None


class Tracing:
    """Yields the pieces of a trace, once; counts what was found on the way."""

    def __init__(self, reader: Reader, settings: Settings, sample: Sample | None) -> None:
        self.num_eos = 0
        self._reader, self._settings, self._sample = reader, settings, sample

    def pieces(self, inputs: Sequence[TokenInput]) -> Generator[Piece]:
        """Yields the pieces of all inputs in order. Blocks."""
        for is_text, group in itertools.groupby(inputs, key=lambda source: source.is_text):
            together = list(group)
            yield from self._of_texts(together) if is_text else self._of_ids(together)

    def _of_texts(self, inputs: list[TokenInput]) -> Iterator[Piece]:
        settings = self._settings
        assert settings.tokenizer is not None
        assert settings.tokenizer_path is not None
        parts = ((source.path, part) for source in inputs for part in self._drawn_parts(source))
        jobs = settings.jobs
        if jobs is None:
            jobs = default_jobs(sum(source.num_bytes for source in inputs))
        with contextlib.ExitStack() as stack:
            if jobs == 0:
                yield from text_pieces(parts, settings.tokenizer, settings.bos)
            else:
                tokenizing = stack.enter_context(Tokenizing(settings.tokenizer, jobs, settings.tokenizer_path))
                yield from tokenizing.pieces(parts, settings.bos)

    def _drawn_parts(self, source: TokenInput) -> Iterator[TextPart]:
        parts = _unchanged(source, self._reader.text_parts(source))
        return parts if self._sample is None else self._sample.parts(parts)

    def _of_ids(self, inputs: list[TokenInput]) -> Iterator[Piece]:
        settings = self._settings
        for source in inputs:
            pieces = self._reader.id_pieces(source, settings.vocab_size, settings.lengths)
            for piece in _unchanged(source, pieces):
                ids, ends = piece.token_ids, np.asarray(piece.document_ends, dtype=np.int64)
                if settings.eos is not None:
                    found = np.flatnonzero(ids == settings.eos) + 1
                    self.num_eos += len(found)
                    ends = np.union1d(ends, found)
                if self._sample is not None:
                    ids, ends = self._sample.piece(ids, ends)
                yield Piece(ids, ends, piece.input_bytes)


def _unchanged(source: TokenInput, parts: Iterator[Any]) -> Iterator[Any]:
    """Yields what was read of a file; raises `ConfigError` at its end if somebody wrote to the file meanwhile."""
    before = file_identity(source.path)
    yield from parts
    if file_identity(source.path) != before:
        raise ConfigError(f"{source.path} was changed while it was read; trace it again once it is whole")
