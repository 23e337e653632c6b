"""Files of token ids as pieces: raw integers, NumPy arrays, token files of llm.c and modded-nanogpt, Megatron's pairs.

Input: a `TokenInput` of ids. Output: `Piece`s in order, in bounded memory. Files are read, never mapped.
Errors: `ValueError` naming file and place for ids outside the vocabulary, `ConfigError` for lengths that do not add up
and files that were cut, `FormatError` for files that contradict their own header.
"""

from __future__ import annotations

import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from tierstore.errors import ConfigError, FormatError
from tierstore.formats.trace import check_token_ids

from .byte_streams import read_chunks

RAW_DTYPES = {"int32": "<i4", "int64": "<i8", "uint16": "<u2", "uint32": "<u4"}
PIECE_TOKENS = 1 << 20
# What NumPy raises for a damaged head, which it reads as Python's source.
NPY_ERRORS = (ValueError, EOFError, SyntaxError, TypeError, KeyError, RecursionError, tokenize.TokenError)
LLMC_HEADER_BYTES = 1024
LLMC_DTYPES = {20240520: "<u2", 20240801: "<u4"}  # of token files, by their first number


class Piece(NamedTuple):
    """Token ids, [T] of any integer type; places in them, 0 to T, at which documents end;
    bytes of input that they took."""

    token_ids: np.ndarray
    document_ends: np.ndarray | list[int]
    input_bytes: int


class NoIdsError(ConfigError):
    """The file is well, and holds no tokens: named by itself it is refused, in a folder it is left out."""

    def __init__(self, path: Path, why: str, remedy: str) -> None:
        super().__init__(f"{path} is {why}; {remedy}")
        self.why = why


def raw_pieces(
    path: Path, codec: str, dtype: str, lengths: np.ndarray | None, vocab_size: int | None, skip_bytes: int = 0
) -> Iterator[Piece]:
    """Yields the ids of raw integers. They are one document, or those of `lengths`, int64 [documents].

    skip_bytes: of a header, at most as long as the first piece.
    """
    return _with_lengths(path, _raw_arrays(path, codec, dtype, skip_bytes), lengths, vocab_size)


def npy_pieces(path: Path, lengths: np.ndarray | None, vocab_size: int | None) -> Iterator[Piece]:
    """Yields the ids of a .npy file: of a 2-D array a document a row, of a 1-D one as `raw_pieces` does."""
    with path.open("rb") as file:
        shape, fortran_order, dtype = npy_header(file, path)
        if len(shape) == 2:
            if lengths is not None:
                raise ConfigError(f"{path} is 2-D, one document a row; leave --doclens out")
            yield from _rows(path, file, shape, fortran_order, dtype, vocab_size)
        else:
            yield from _with_lengths(path, _values(path, file, shape[0], dtype), lengths, vocab_size)


def check_llmc(path: Path, head: bytes, size: int) -> str:
    """Returns NumPy's name of the ids of a token file of llm.c by its header; raises `FormatError`, `ConfigError`."""
    magic, version, num_tokens = np.frombuffer(head, dtype="<i4", count=3).tolist()
    dtype = LLMC_DTYPES.get(magic)
    if dtype is None:
        raise ConfigError(
            f"{path} is a file of llm.c's for evaluations (number {magic}), not a stream of token ids; "
            f"give its token files"
        )
    expected = LLMC_HEADER_BYTES + num_tokens * np.dtype(dtype).itemsize
    if size != expected:
        raise FormatError(
            f"{path}: its header (llm.c's, version {version}) says {num_tokens} tokens, which is {expected} bytes; it "
            f"has {size}: it was cut, copy it again"
        )
    return dtype


def read_lengths(path: Path) -> np.ndarray:
    """Returns the tokens of each document, int64 [documents], that a .npy file holds;
    raises `ConfigError` for others."""
    with path.open("rb") as file:
        shape, _, dtype = npy_header(file, path)
        if len(shape) == 1:
            parts = [values.astype(np.int64) for values, _ in _values(path, file, shape[0], dtype)]
            lengths = np.concatenate([np.empty(0, dtype=np.int64), *parts])
            if (lengths >= 0).all():
                return lengths
    raise ConfigError(f"{path} is {list(shape)}, or has numbers below 0; expected 1-D lengths of documents")


def npy_header(file: IO[bytes], path: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Reads the head of a .npy file of integers, 1-D or 2-D; returns (shape, whether in Fortran's order, dtype)."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(file)
    except NPY_ERRORS as error:
        raise FormatError(f"{path} is no NumPy array of numbers, or cut ({error}); copy it again") from error
    if any(type(dimension) is not int or dimension < 0 for dimension in shape):
        raise FormatError(f"{path} has the shape {shape}: its head is damaged; copy it again")
    if len(shape) not in (1, 2) or dtype.kind not in "iu":
        raise NoIdsError(
            path, f"{dtype} {list(shape)}, expected integers, 1-D, or 2-D with a document a row", "save ids so"
        )
    num_bytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
    left = path.stat().st_size - file.tell()
    if left < num_bytes:
        raise FormatError(f"{path} has {left} bytes of values, its head says {num_bytes}: it was cut; copy it again")
    return shape, fortran_order, dtype


def _values(path: Path, file: IO[bytes], count: int, dtype: np.dtype[Any]) -> Iterator[tuple[np.ndarray, int]]:
    for start in range(0, count, PIECE_TOKENS):
        values = np.frombuffer(file.read(min(PIECE_TOKENS, count - start) * dtype.itemsize), dtype=dtype)
        if len(values) < min(PIECE_TOKENS, count - start):
            raise FormatError(f"{path} was cut while it was read; copy it again")
        yield values, values.nbytes


def _rows(
    path: Path,
    file: IO[bytes],
    shape: tuple[int, ...],
    fortran_order: bool,
    dtype: np.dtype[Any],
    vocab_size: int | None,
) -> Iterator[Piece]:
    num_rows, width = shape
    if fortran_order:  # column by column on disk: all of it has to be there for the first row
        columns = [values for values, _ in _values(path, file, num_rows * width, dtype)]
        whole = np.concatenate([np.empty(0, dtype=dtype), *columns]).reshape(width, num_rows).T
    step = max(1, PIECE_TOKENS // max(1, width))
    for start in range(0, num_rows, step):
        count = min(step, num_rows - start)
        if fortran_order:
            ids = np.ascontiguousarray(whole[start : start + count]).reshape(-1)
        else:
            parts = [values for values, _ in _values(path, file, count * width, dtype)]
            ids = np.concatenate([np.empty(0, dtype=dtype), *parts])
        check_token_ids(ids, vocab_size, str(path), start * width)
        yield Piece(ids, np.arange(1, count + 1) * width, ids.nbytes)


def _raw_arrays(path: Path, codec: str, dtype_name: str, skip_bytes: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (ids, bytes of the file that they took)."""
    dtype = np.dtype(dtype_name)
    rest = b""
    for chunk, read_bytes in read_chunks(path, codec):
        data = (rest + chunk if rest else chunk)[skip_bytes:]
        skip_bytes = 0
        whole = len(data) // dtype.itemsize
        rest = data[whole * dtype.itemsize :]
        yield np.frombuffer(data, dtype=dtype, count=whole), read_bytes
    if rest:
        raise ConfigError(
            f"{path} ends in {len(rest)} bytes that are no whole {dtype.name} of {dtype.itemsize} bytes; it was cut, "
            f"or give the right --dtype"
        )


def _with_lengths(
    path: Path,
    arrays: Iterator[tuple[np.ndarray, int]],
    lengths: np.ndarray | None,
    vocab_size: int | None,
) -> Iterator[Piece]:
    ends = None if lengths is None else np.cumsum(lengths, dtype=np.int64)
    token_start = 0
    for token_ids, input_bytes in arrays:
        check_token_ids(token_ids, vocab_size, str(path), token_start)
        token_end = token_start + len(token_ids)
        here: np.ndarray | list[int] = []
        if ends is not None:
            first, last = np.searchsorted(ends, [token_start, token_end], side="right")
            here = ends[first:last] - token_start
        yield Piece(token_ids, here, input_bytes)
        token_start = token_end
    if ends is not None and (int(ends[-1]) if len(ends) else 0) != token_start:
        raise ConfigError(
            f"{path} has {token_start} tokens, its document lengths add up to {ends[-1] if len(ends) else 0}; "
            f"give the lengths that belong to it"
        )
    yield Piece(np.empty(0, dtype=np.int32), [0], 0)
