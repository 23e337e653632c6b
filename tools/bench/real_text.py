"""Token ids of real text, with their token map, from wherever this machine has some.

Input: a trace file, or nothing. Output: documents of token ids and the map that their n-grams are hashed with. In turn:
the file that was given, the recorded trace in the folder shared/data beside the repository, this machine's own text
through a tokenizer trained on it. Errors: `ConfigError` for a file without token ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard

from engram_adapter import HashSpec, build_token_map
from tierstore.errors import ConfigError
from tierstore.formats.trace import TokenTraceWriter, read_token_documents, read_token_trace_info

from ..corpus import python_text_files, split_held_out, token_documents, train_tokenizer

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
TRACE_FILE, LENGTHS_FILE, TOKENIZER_FILE = (
    "trace_train.i32.zst",
    "trace_train_doclens.npy",
    "deepseek_v3_tokenizer.json",
)
TEST_FILE, TEST_LENGTHS_FILE = "trace_test.i32.zst", "trace_test_doclens.npy"
CORPUS_VOCAB = 8192
CORPUS_FILES_MAX = 2000
VOCAB_MAX = 1 << 24


@dataclass(frozen=True)
class RealText:
    """Documents of token ids, int64 each, the token map int32 [vocabulary], and where they come from, for people."""

    documents: list[np.ndarray]
    token_map: np.ndarray
    source: str

    def keys(self, spec: HashSpec, layer: int, num_tokens: int) -> np.ndarray:
        """Returns the keys, int64 [num_tokens, O], of the first tokens;
        the documents come round again where they end."""
        parts, left = [], num_tokens
        for document in self._endless():
            part = document[:left]
            parts.append(spec.keys(part[None], layer)[0])
            left -= len(part)
            if not left:
                return np.concatenate(parts)
        raise AssertionError("unreachable")

    def write_trace(self, file: Path) -> Path:
        """Writes the documents as a trace of tokens; returns its path."""
        with TokenTraceWriter(file, vocab_size=None, source=self.source) as writer:
            for document in self.documents:
                writer.add_document(document.astype(np.int32))
            writer.finish()
        return file

    def _endless(self) -> Iterator[np.ndarray]:
        while True:
            yield from self.documents


def load(trace: Path | None, num_tokens: int) -> RealText:
    """Returns at least `num_tokens` tokens of text, or all there are. Blocks: a token map takes seconds to make."""
    if trace is not None and trace.suffix == ".trace":
        return _recorded(trace, num_tokens)
    if trace is not None:
        documents = [_ids_of(trace, num_tokens)]
        vocab_size = int(documents[0].max()) + 1
        if documents[0].min() < 0 or vocab_size > VOCAB_MAX:
            raise ConfigError(
                f"{trace}: ids from {documents[0].min()} to {vocab_size - 1} are no token ids; give a token trace"
            )
        return RealText(documents, np.arange(vocab_size, dtype=np.int32), f"{trace} (ids hash as they are)")
    if (SHARED_DATA / TRACE_FILE).is_file():
        ids = _ids_of(SHARED_DATA / TRACE_FILE, num_tokens)
        ends = np.cumsum(np.load(SHARED_DATA / LENGTHS_FILE))
        documents = [part for part in np.split(ids, ends[ends < len(ids)]) if len(part)]
        return RealText(documents, build_token_map(SHARED_DATA / TOKENIZER_FILE), f"shared/data/{TRACE_FILE}")
    files = python_text_files()[:CORPUS_FILES_MAX]
    tokenizer = train_tokenizer(files, CORPUS_VOCAB)
    return RealText(
        token_documents(tokenizer, files), build_token_map(tokenizer), "text of this machine, a tokenizer trained on it"
    )


def load_split() -> tuple[RealText, RealText]:
    """Returns text to profile and text to run: the recorded traces where they are, else this machine's,
    a tenth held out."""
    if (SHARED_DATA / TEST_FILE).is_file():
        token_map = build_token_map(SHARED_DATA / TOKENIZER_FILE)
        parts = []
        for trace, lengths in ((TRACE_FILE, LENGTHS_FILE), (TEST_FILE, TEST_LENGTHS_FILE)):
            ends = np.cumsum(np.load(SHARED_DATA / lengths))
            ids = _ids_of(SHARED_DATA / trace, int(ends[-1]))
            parts.append(RealText(np.split(ids, ends[:-1]), token_map, f"shared/data/{trace}"))
        return parts[0], parts[1]
    text = load(None, 0)
    training, held_out = split_held_out(text.documents)
    return RealText(training, text.token_map, text.source), RealText(
        held_out, text.token_map, f"{text.source}, held out"
    )


def _recorded(trace: Path, num_tokens: int) -> RealText:
    """Returns the first documents of a token trace; ids hash as they are,
    since a trace does not say their token map."""
    info = read_token_trace_info(trace)
    vocab_size = info.vocab_size or info.token_id_max + 1
    if not info.num_tokens or vocab_size > VOCAB_MAX:
        raise ConfigError(
            f"{trace}: {info.num_tokens} tokens of a vocabulary of {vocab_size}; give a trace of 1 or more, of at most "
            f"{VOCAB_MAX} ids"
        )
    documents, left = [], num_tokens
    for document in read_token_documents(trace):
        documents.append(document[:left].astype(np.int64))
        left -= len(documents[-1])
        if not left:
            break
    return RealText(documents, np.arange(vocab_size, dtype=np.int32), f"{trace} (ids hash as they are)")


def _ids_of(file: Path, num_tokens: int) -> np.ndarray:
    if file.suffix == ".npy":
        ids = np.load(file, mmap_mode="r").reshape(-1)[:num_tokens]
    else:
        with file.open("rb") as stream:
            data = zstandard.ZstdDecompressor().stream_reader(stream).read(num_tokens * 4)
        ids = np.frombuffer(data[: len(data) // 4 * 4], dtype="<i4")
    if ids.dtype.kind not in "iu" or not len(ids):
        raise ConfigError(f"{file}: {len(ids)} values of {ids.dtype} are no token ids; give int32 or int64 ids")
    return ids.astype(np.int64)
