"""Files that token ids can be had from: text through a tokenizer, NumPy arrays, raw integers, compressed or not.

Flows in: paths of files and folders. Flows out: pieces of token ids with the ends of their documents, in order, in bounded
memory. Refuses, with `ConfigError` or `FormatError`, what is none of these, or cut; with `ValueError`, naming file and place, ids
outside the vocabulary.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import zstandard
from tokenizers import Tokenizer

from tierstore.causes import naming_panics
from tierstore.errors import ConfigError, FormatError
from tierstore.formats.trace import check_token_ids

RAW_DTYPES = {"int32": "<i4", "int64": "<i8", "uint16": "<u2", "uint32": "<u4"}
RAW_SUFFIXES = {".i32": "int32", ".i64": "int64", ".u16": "uint16", ".u32": "uint32"}
PIECE_TOKENS = 1 << 20
RAW_READ_BYTES = 1 << 22
COMPRESSED_READ_BYTES = (
    1 << 13
)  # zstd makes at most 32 KiB of a byte: no piece grows past 256 MiB, whatever the file says
TEXT_PIECE_CHARACTERS = 1 << 20  # text beyond it is cut at the end of a line
TEXT_BATCH_CHARACTERS = 1 << 21
LOOK_BYTES = 1 << 13  # of a file, to see whether it is text


class Piece(NamedTuple):
    """Token ids, [T] of any integer type; places in them, 0 to T, at which documents end; bytes of input that they took."""

    token_ids: np.ndarray
    document_ends: np.ndarray | list[int]
    input_bytes: int


@dataclass(frozen=True)
class TokenInput:
    """One file: kind "text", "npy" or "raw"; of raw ones NumPy's name of the integers, and whether zstd compressed them."""

    path: Path
    kind: str
    num_bytes: int
    dtype: str = ""
    compressed: bool = False


def find_inputs(paths: Sequence[Path], dtype: str | None) -> tuple[list[TokenInput], list[Path]]:
    """Returns the files that paths name, folders walked in sorted order, and those of folders that are left out.

    dtype: what files hold whose names do not say it; None: text. Of folders, what is hidden is not looked at, and what is
    empty or no text is left out; named by itself, it is refused. Raises `ConfigError`; `OSError` where it cannot be read.
    """
    inputs: list[TokenInput] = []
    left_out: list[Path] = []
    for path in paths:
        if not path.is_dir():
            inputs.append(_input_of(path, dtype))
            continue
        for file in _files_under(path):
            if file.stat().st_size and (_kind_of(file, dtype)[0] != "text" or _is_text(file)):
                inputs.append(_input_of(file, dtype))
            else:
                left_out.append(file)
    return inputs, left_out


def _files_under(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = (Path(parent, name) for name in sorted(names) if not name.startswith("."))
        yield from (file for file in files if file.is_file())


def _kind_of(path: Path, dtype: str | None) -> tuple[str, str, bool]:
    """Returns (kind, dtype of raw integers, compressed) by a file's name."""
    compressed = path.suffix == ".zst"
    suffix = path.with_suffix("").suffix if compressed else path.suffix
    if suffix == ".npy":
        if compressed:
            raise ConfigError(f"{path} is a compressed .npy file; decompress it first")
        return "npy", "", False
    raw = RAW_SUFFIXES.get(suffix, dtype)
    if raw is not None:
        return "raw", raw, compressed
    if compressed or suffix == ".bin":
        raise ConfigError(f"{path} does not say which integers it holds; give --dtype, one of {', '.join(RAW_DTYPES)}")
    return "text", "", False


def _input_of(path: Path, dtype: str | None) -> TokenInput:
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no regular file; write what comes out of it to a file first")
    num_bytes = path.stat().st_size
    kind, raw, compressed = _kind_of(path, dtype)
    if kind == "text" and not _is_text(path):
        raise ConfigError(f"{path} is no text: it has zero bytes; where it holds token ids, give --dtype")
    return TokenInput(path, kind, num_bytes, raw, compressed)


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" not in file.read(LOOK_BYTES)


def pieces_of_text(inputs: Sequence[TokenInput], tokenizer: Tokenizer, bos: int | None) -> Iterator[Piece]:
    """Yields the tokens of text files, a document each, in batches; `bos`, if given, stands before each document.

    Text is read as UTF-8, bytes that are none as U+FFFD. A file of more than TEXT_PIECE_CHARACTERS is cut at ends of lines, where
    its tokens may differ from those of the whole. Blocks; the tokenizer uses threads of its own.
    """
    batch: list[_TextPart] = []
    characters = 0
    for part in (part for source in inputs for part in _text_parts(source)):
        batch.append(part)
        characters += len(part.text)
        if characters >= TEXT_BATCH_CHARACTERS:
            yield _tokenized(batch, tokenizer, bos)
            batch, characters = [], 0
    if batch:
        yield _tokenized(batch, tokenizer, bos)


class _TextPart(NamedTuple):
    text: str
    starts_document: bool
    ends_document: bool
    input_bytes: int


def _text_parts(source: TokenInput) -> Iterator[_TextPart]:
    with source.path.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8", errors="replace", newline="") as file:
        starts, read_bytes, text = True, 0, _some_lines(file)
        while text:
            following = _some_lines(file)
            now = raw.tell() if following else source.num_bytes
            yield _TextPart(text, starts, not following, now - read_bytes)
            starts, read_bytes, text = False, now, following


def _some_lines(file: io.TextIOWrapper) -> str:
    text = file.read(TEXT_PIECE_CHARACTERS)
    return text + file.readline(TEXT_PIECE_CHARACTERS) if len(text) == TEXT_PIECE_CHARACTERS else text


def _tokenized(parts: Sequence[_TextPart], tokenizer: Tokenizer, bos: int | None) -> Piece:
    with naming_panics("text for the tokenizer", "leave the input out that it cannot read, or update tokenizers"):
        encodings = tokenizer.encode_batch_fast([part.text for part in parts], add_special_tokens=False)
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


def pieces_of_ids(source: TokenInput, vocab_size: int | None, lengths: np.ndarray | None) -> Iterator[Piece]:
    """Yields the ids of a file of integers. It is one document, or, where it is a 2-D array, one a row.

    lengths: int64 [documents], tokens of each document of a file that is not 2-D. vocab_size: ids are below it. Raises
    `ValueError` for ids outside it, `ConfigError` where lengths do not add up to the file's tokens, or the file is cut.
    """
    if source.kind == "npy":
        array = _NpyFile(source.path)
        if len(array.shape) == 2:
            if lengths is not None:
                raise ConfigError(f"{source.path} is 2-D, one document a row; leave --doclens out")
            yield from _rows(source, array, vocab_size)
            return
        arrays = _slices(array)
    else:
        arrays = _raw_arrays(source)
    ends = None if lengths is None else np.cumsum(lengths, dtype=np.int64)
    token_start = 0
    for token_ids, input_bytes in arrays:
        check_token_ids(token_ids, vocab_size, str(source.path), token_start)
        token_end = token_start + len(token_ids)
        here: np.ndarray | list[int] = []
        if ends is not None:
            first, last = np.searchsorted(ends, [token_start, token_end], side="right")
            here = ends[first:last] - token_start
        yield Piece(token_ids, here, input_bytes)
        token_start = token_end
    if ends is not None and (int(ends[-1]) if len(ends) else 0) != token_start:
        raise ConfigError(
            f"{source.path} has {token_start} tokens, its document lengths add up to {ends[-1] if len(ends) else 0}; "
            f"give the lengths that belong to it"
        )
    yield Piece(np.empty(0, dtype=np.int32), [0], 0)


def _slices(array: _NpyFile) -> Iterator[tuple[np.ndarray, int]]:
    for start in range(0, array.shape[0], PIECE_TOKENS):
        part = array.read(start, start + PIECE_TOKENS)
        yield part, part.nbytes


def _rows(source: TokenInput, array: _NpyFile, vocab_size: int | None) -> Iterator[Piece]:
    num_rows, width = array.shape
    step = max(1, PIECE_TOKENS // max(1, width))
    for start in range(0, num_rows, step):
        rows = array.read(start, start + step)
        check_token_ids(rows.reshape(-1), vocab_size, str(source.path), start * width)
        yield Piece(rows.reshape(-1), np.arange(1, len(rows) + 1) * width, rows.nbytes)


class _NpyFile:
    """A .npy file of integers, 1-D or 2-D, read in parts and never mapped: cutting it meanwhile is an error, not a signal."""

    def __init__(self, path: Path) -> None:
        """Reads the header; raises `ConfigError` for other arrays, `FormatError` if it is no array or its end is missing."""
        self._path = path
        try:
            with path.open("rb") as file:
                if file.read(2) == b"PK":
                    raise ConfigError(f"{path} is NpzFile, expected integers; save its array alone, with numpy.save")
                file.seek(0)
                major, _ = np.lib.format.read_magic(file)
                read_header = getattr(np.lib.format, f"read_array_header_{major}_0")
                self.shape, self._is_fortran, self._dtype = read_header(file)
                self._byte_start = file.tell()
        except (AttributeError, ValueError, EOFError) as error:
            raise FormatError(f"{path} is no NumPy array of numbers, or cut ({error}); copy it again") from error
        if self._dtype.hasobject:
            raise FormatError(f"{path} is no NumPy array of numbers, but of objects; save it as integers")
        if len(self.shape) not in (1, 2) or self._dtype.kind not in "iu":
            raise ConfigError(
                f"{path} is {self._dtype} {list(self.shape)}, expected integers, 1-D, or 2-D with a document a row"
            )
        self._check_bytes(path.stat().st_size)

    def read(self, row_start: int, row_end: int) -> np.ndarray:
        """Returns rows (of a 1-D array: elements) from row_start on, as many as there are before row_end. Blocks."""
        if self._is_fortran and len(self.shape) == 2:
            return np.ascontiguousarray(self._read(0, self.shape[0]).reshape(self.shape[::-1]).T[row_start:row_end])
        return self._read(row_start, min(row_end, self.shape[0])).reshape(-1, *self.shape[1:])

    def _read(self, row_start: int, row_end: int) -> np.ndarray:
        width = int(np.prod(self.shape[1:], dtype=np.int64))
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._byte_start + row_start * width * self._dtype.itemsize)
            found = np.fromfile(file, self._dtype, (row_end - row_start) * width)
        if len(found) < (row_end - row_start) * width:
            self._check_bytes(self._byte_start + (row_start * width + len(found)) * self._dtype.itemsize)
        return found

    def _check_bytes(self, file_bytes: int) -> None:
        needed_bytes = self._byte_start + int(np.prod(self.shape, dtype=object)) * self._dtype.itemsize
        if file_bytes < needed_bytes:
            raise FormatError(
                f"{self._path} is no NumPy array of numbers, or cut: {file_bytes} bytes, its header says {needed_bytes}; "
                f"copy it again"
            )


def read_lengths(path: Path) -> np.ndarray:
    """Returns the tokens of each document, int64 [documents], that a .npy file holds; raises `ConfigError` for others."""
    array = _NpyFile(path)
    if len(array.shape) != 1 or ((lengths := array.read(0, array.shape[0])) < 0).any():
        raise ConfigError(f"{path} is {list(array.shape)}, or has numbers below 0; expected 1-D lengths of documents")
    return lengths.astype(np.int64)


def _raw_arrays(source: TokenInput) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (ids, bytes of the file that they took)."""
    dtype = np.dtype(RAW_DTYPES[source.dtype])
    rest = b""
    for data, read_bytes in _decompressed(source.path) if source.compressed else _plain(source.path, RAW_READ_BYTES):
        data = rest + data if rest else data
        whole = len(data) // dtype.itemsize
        rest = data[whole * dtype.itemsize :]
        yield np.frombuffer(data, dtype=dtype, count=whole), read_bytes
    if rest:
        raise ConfigError(
            f"{source.path} ends in {len(rest)} bytes that are no whole {source.dtype} of {dtype.itemsize} bytes; it was "
            f"cut, or give the right --dtype"
        )


def _plain(path: Path, read_bytes: int) -> Iterator[tuple[bytes, int]]:
    with path.open("rb") as file:
        while data := file.read(read_bytes):
            yield data, len(data)


def _decompressed(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yields the bytes of a zstd file of one or more frames. The library's own stream takes a cut frame for whole."""
    decompressor = zstandard.ZstdDecompressor()
    frame = None
    for data, read_bytes in _plain(path, COMPRESSED_READ_BYTES):
        while data:
            if frame is None:
                frame = decompressor.decompressobj()
            try:
                yield frame.decompress(data), read_bytes
            except zstandard.ZstdError as error:
                raise FormatError(f"{path} is no zstd file, or damaged ({error}); copy it again") from error
            read_bytes = 0  # counted once, also where several frames lie in it
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise FormatError(f"{path} ends within a zstd frame: it was cut short; copy it again")
