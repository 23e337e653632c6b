"""Which files token ids can be had from: their content decides, never their name alone; folders are walked.

Input: paths of files and folders, the type that the user gave for raw integers, the field of JSON lines.
Output: `TokenInput`s in order, and what was found in folders and left out, with why.
Errors: `ConfigError` and `FormatError` for what cannot be read as tokens, by its name and with the remedy: compressed,
packed or indexed data is never taken for ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tierstore.errors import ConfigError, FormatError
from tierstore.formats.content import HEAD_BYTES, Content, recognise, unfinished_download
from tierstore.formats.trace import check_token_ids

from .byte_streams import CODECS, count_bytes, first_bytes
from .folders import LEFT_OUT_KINDS, files_under, is_text, own_file, remedy_of
from .ids import LLMC_HEADER_BYTES, RAW_DTYPES, NoIdsError, Piece, check_llmc, npy_header, npy_pieces, raw_pieces
from .json_lines import SUFFIXES as LINES_SUFFIXES
from .json_lines import LineField, documents_of_lines, field_of_lines
from .megatron_pairs import index_beside, read_index
from .text import TextPart, parts_of_document, parts_of_file

RAW_SUFFIXES = {".i32": "int32", ".i64": "int64", ".u16": "uint16", ".u32": "uint32"}
COMPRESSED_SUFFIXES = {".zst": "zstd", ".zstd": "zstd", ".gz": "gzip", ".xz": "xz", ".bz2": "bzip2"}
WEB_SUFFIXES = {".html", ".htm", ".xhtml"}  # of pages that are meant to be text
LLMC_KINDS = {"llmc-tokens-u16", "llmc-tokens-u32"}


@dataclass(frozen=True)
class TokenInput:
    """One file. kind: "text", "json-lines", "npy", "raw", "llmc" or "megatron"; codec: what compressed it,
    "" for nothing.

    dtype: NumPy's name of the ids of the last three. field: of JSON lines. index: Megatron's .idx.
    """

    path: Path
    kind: str
    num_bytes: int
    codec: str = ""
    dtype: str = ""
    field: LineField | None = None
    index: Path | None = None

    @property
    def is_text(self) -> bool:
        """Whether it needs a tokenizer."""
        return self.kind == "text" or (self.field is not None and not self.field.is_ids)


class LeftOut(NamedTuple):
    """A file of a folder that is not traced, and why."""

    path: Path
    why: str


def find_inputs(
    paths: Sequence[Path], dtype: str | None, field: str | None = None, besides: Sequence[Path] = ()
) -> tuple[list[TokenInput], list[LeftOut]]:
    """Returns the files that paths name, folders walked in sorted order, and those of folders that are left out.

    dtype: one of RAW_DTYPES, of files whose content and name do not say it; field: of JSON lines; besides: files that
    have another part to play, such as the tokenizer. What is hidden in a folder is not looked at. What holds no tokens
    is left out there, and refused if it is named by itself; data that somebody packed is refused in both. Raises
    `ConfigError`, `FormatError`; `OSError` if a file cannot be read.
    """
    inputs: list[TokenInput] = []
    left_out: list[LeftOut] = []
    apart = {path.resolve() for path in besides}
    for path in paths:
        if not path.is_dir():
            inputs.append(_input_of(path, dtype, field))
            continue
        for file in files_under(path):
            if file.resolve() in apart:
                continue
            found = _input_in_folder(file, dtype, field)
            if isinstance(found, TokenInput):
                inputs.append(found)
            elif found is not None:
                left_out.append(found)
    return inputs, left_out


def _input_in_folder(file: Path, dtype: str | None, field: str | None) -> TokenInput | LeftOut | None:
    """Returns the input, why the file is not one, or None if it belongs to another one."""
    if file.stat().st_size == 0 and unfinished_download(file) is None:
        return LeftOut(file, "empty")
    if file.suffix == ".idx" and index_beside(file.with_suffix(".bin")) == file and file.with_suffix(".bin").is_file():
        return None
    try:
        found = _input_of(file, dtype, field)
    except NoIdsError as error:
        return LeftOut(file, error.why)
    return LeftOut(file, "text, while --dtype asks for ids") if dtype is not None and found.kind == "text" else found


def _input_of(path: Path, dtype: str | None, field: str | None) -> TokenInput:
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is not a regular file; write what comes out of it to a file first")
    if why := unfinished_download(path):
        raise ConfigError(f"{path}: {why}")
    size = path.stat().st_size
    if index := index_beside(path):
        found = read_index(index, path).dtype
        _check_dtype(path, dtype, found, f"its index {index.name}")
        return TokenInput(path, "megatron", size, dtype=found, index=index)
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    content, codec = recognise(head, size) if size else None, ""
    if content is not None and content.kind in CODECS:
        if _suffixes(path)[-1:] == [".npy"]:
            raise ConfigError(f"{path} is a compressed .npy file; decompress it first")
        codec = content.kind
        head = first_bytes(path, codec, HEAD_BYTES)
        content = _content_inside(path, codec, head)
    elif content is None and size and path.suffix in COMPRESSED_SUFFIXES:
        raise FormatError(f"{path} is no {COMPRESSED_SUFFIXES[path.suffix]} file, or damaged; copy it again")
    known = _input_of_content(path, size, codec, head, content, dtype, field)
    return known or _input_of_bytes(path, size, codec, head, dtype)


def _content_inside(path: Path, codec: str, head: bytes) -> Content | None:
    """What a compressed file holds. A table of offsets is one if its last is the end: then all of the file is read."""
    if len(head) < HEAD_BYTES:
        return recognise(head, len(head)) if head else None
    content = recognise(head, 1 << 62)
    num_offsets = int.from_bytes(head[:4], "little")
    if content is None and num_offsets < len(head) // 4 - 1:
        end = int.from_bytes(head[4 + 4 * num_offsets :][:4], "little")
        content = recognise(head, end) if end else None
        if content is not None and count_bytes(path, codec) != end:
            return None
    return content


def _input_of_content(
    path: Path, size: int, codec: str, head: bytes, content: Content | None, dtype: str | None, field: str | None
) -> TokenInput | None:
    """Returns the input that a file of known content is, None if its content says nothing; refuses all else by name."""
    is_lines = LINES_SUFFIXES & set(path.suffixes) and size > 0
    starts_as_json = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")
    if is_lines or (starts_as_json and (content is None or content.kind in ("json", "json-lines"))):
        found = field_of_lines(path, codec, field)
        if isinstance(found, LineField):
            return TokenInput(path, "json-lines", size, codec, field=found)
        if found is not None:
            raise NoIdsError(path, f"JSON lines, but {found}", "name the right field with --field")
        if content is None and is_lines:
            raise ConfigError(f"{path} is called JSON lines, and its first line is not JSON; get it again or rename it")
    if content is None or (content.kind == "html" and WEB_SUFFIXES & set(path.suffixes)):
        return None
    if content.kind == "npy" and not codec:
        with path.open("rb") as file:
            npy_header(file, path)  # refused before hours of work, not after
        return TokenInput(path, "npy", size)
    if content.kind in LLMC_KINDS and not codec:
        found_dtype = check_llmc(path, head, size)
        _check_dtype(path, dtype, found_dtype, "its header")
        return TokenInput(path, "llmc", size, dtype=found_dtype)
    name, remedy = content.name, remedy_of(content, path)
    if codec:
        name = f"{codec} data that holds {name}"
        remedy = "decompress it first" + ("" if content.kind in CODECS or not remedy else f", then {remedy}")
    if content.kind in LEFT_OUT_KINDS:
        raise NoIdsError(path, name, remedy)
    raise ConfigError(f"{path} is {name}; {remedy}")


def _input_of_bytes(path: Path, size: int, codec: str, head: bytes, dtype: str | None) -> TokenInput:
    """Plain text or raw integers: if the bytes do not decide, the name or --dtype does."""
    if _suffixes(path)[-1:] == [".npy"]:
        raise FormatError(f"{path} is no NumPy array, or cut; copy it again")
    if name := own_file(head):
        raise NoIdsError(path, f"{name} of tierstore", "give what it was made from")
    suffix = (_suffixes(path) or [""])[-1]
    raw, text = RAW_SUFFIXES.get(suffix, dtype), is_text(head)
    if text and (suffix in RAW_SUFFIXES or (raw is not None and suffix == ".bin")):
        raise ConfigError(f"{path} is text, not {raw} ids; name it .txt, and give --tokenizer tokenizer.json")
    if raw is not None and not text:
        return TokenInput(path, "raw", size, codec, np.dtype(RAW_DTYPES[raw]).str)
    if suffix == ".bin" and not text:
        raise ConfigError(f"{path} does not say which integers it holds; give --dtype, one of {', '.join(RAW_DTYPES)}")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise NoIdsError(path, "text in UTF-16", "convert it first: iconv -f UTF-16 -t UTF-8")
    if b"\0" in head:
        raise NoIdsError(path, "no text: it has zero bytes", "if it holds token ids, give --dtype")
    return TokenInput(path, "text", size, codec)


def _suffixes(path: Path) -> list[str]:
    """Suffixes of what a file holds, without that of its compression."""
    return path.with_suffix("").suffixes if path.suffix in COMPRESSED_SUFFIXES else path.suffixes


def _check_dtype(path: Path, dtype: str | None, found: str, by: str) -> None:
    if dtype is not None and np.dtype(RAW_DTYPES[dtype]) != np.dtype(found):
        raise ConfigError(f"{path} holds {np.dtype(found).name} by {by}, --dtype says {dtype}; leave --dtype out")


def text_parts(source: TokenInput) -> Iterator[TextPart]:
    """Yields the text of a `TokenInput` that needs a tokenizer."""
    if source.field is None:
        yield from parts_of_file(source.path, source.codec, source.num_bytes)
        return
    for text, input_bytes in documents_of_lines(source.path, source.codec, source.field):
        assert isinstance(text, str), "the field holds text"
        yield from parts_of_document(text, input_bytes)


def id_pieces(source: TokenInput, vocab_size: int | None, lengths: np.ndarray | None) -> Iterator[Piece]:
    """Yields the ids of a `TokenInput` that holds ids.

    lengths: int64 [documents], tokens of each document, if the file does not say it itself. vocab_size:
    ids are below it.
    """
    if lengths is not None and source.kind in ("json-lines", "megatron"):
        raise ConfigError(f"{source.path} says itself where its documents end; leave --doclens out")
    if source.kind == "npy":
        return npy_pieces(source.path, lengths, vocab_size)
    if source.kind == "json-lines":
        return _line_pieces(source, vocab_size)
    skip_bytes = LLMC_HEADER_BYTES if source.kind == "llmc" else 0
    if source.index is not None:
        lengths = read_index(source.index, source.path).lengths
    return raw_pieces(source.path, source.codec, source.dtype, lengths, vocab_size, skip_bytes)


def _line_pieces(source: TokenInput, vocab_size: int | None) -> Iterator[Piece]:
    assert source.field is not None, "of JSON lines"
    num_tokens = 0
    for ids, input_bytes in documents_of_lines(source.path, source.codec, source.field):
        assert isinstance(ids, np.ndarray), "the field holds ids"
        check_token_ids(ids, vocab_size, str(source.path), num_tokens)
        num_tokens += len(ids)
        yield Piece(ids, [len(ids)], input_bytes)
