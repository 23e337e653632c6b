"""Which files token ids can be had from: their content decides, never their name alone; folders are walked.

Input: paths of files and folders, the type that the user gave for raw integers, the field of JSON lines.
Output: `TokenInput`s in order, and what was found in folders and left out, with why.
Errors: `ConfigError` and `FormatError` for what cannot be read as tokens, by its name and with the remedy: compressed,
packed or indexed data is never taken for ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tierstore.errors import ConfigError, FormatError
from tierstore.formats.content import HEAD_BYTES, Content, recognise, unfinished_download

from .byte_streams import CODECS, count_bytes, first_bytes
from .columns import KINDS as COLUMN_KINDS
from .columns import ColumnReader
from .fields import Field, NoField
from .folders import (
    LEFT_OUT_KINDS,
    DataSet,
    entries_under,
    is_about_repository,
    is_text,
    own_file,
    remedy_of,
)
from .ids import RAW_DTYPES, NoIdsError, check_llmc, npy_header
from .json_lines import SUFFIXES as LINES_SUFFIXES
from .json_lines import field_of_lines
from .megatron_pairs import index_beside, read_index
from .sample_sets import inputs_of
from .spool import Spool
from .tar_members import field_of_members
from .token_input import LeftOut, TokenInput

RAW_SUFFIXES = {".i32": "int32", ".i64": "int64", ".u16": "uint16", ".u32": "uint32"}
COMPRESSED_SUFFIXES = {".zst": "zstd", ".zstd": "zstd", ".gz": "gzip", ".xz": "xz", ".bz2": "bzip2"}
WEB_SUFFIXES = {".html", ".htm", ".xhtml"}  # of pages that are meant to be text
LLMC_KINDS = {"llmc-tokens-u16", "llmc-tokens-u32"}
SUMMARIES = {"_metadata", "_common_metadata"}  # Parquet without rows of its own, as Dask and Spark write it
SEEKING_KINDS = COLUMN_KINDS | LLMC_KINDS | {"npy"}  # whose length or end their readers look at first


class Finder:
    """Finds the inputs that paths name."""

    def __init__(self, columns: ColumnReader, spool: Spool, dtype: str | None = None, field: str | None = None) -> None:
        """columns: looks into Parquet and Arrow files. spool: takes copies of pipes, and of files that readers seek in.

        dtype: one of RAW_DTYPES, of files that do not say it themselves. field: of lines, columns, samples, members.
        """
        self._columns, self._spool, self._dtype, self._field = columns, spool, dtype, field

    def find(self, paths: Sequence[Path], besides: Sequence[Path] = ()) -> tuple[list[TokenInput], list[LeftOut]]:
        """Returns the files that paths name, folders walked in sorted order, and those of folders that are left out.

        besides: files that have another part to play, such as the tokenizer. What is hidden in a folder is not looked
        at. What holds no tokens is left out there, and refused if it is named by itself; data that somebody packed is
        refused in both. Raises `ConfigError`, `FormatError`; `OSError` if a file cannot be read.
        """
        inputs: list[TokenInput] = []
        left_out: list[LeftOut] = []
        apart = {path.resolve() for path in besides}
        for path in paths:
            if self._spool.is_pipe(path):
                inputs.append(self.input_of(self._spool.copy_of_pipe(path)))
                continue
            if not path.is_dir():
                inputs.append(self.input_of(path))
                continue
            found: list[TokenInput] = []
            for entry in entries_under(path):
                if isinstance(entry, DataSet):
                    found += inputs_of(entry, self._columns, self._field, self._dtype)
                elif entry.resolve() not in apart:
                    each = self._input_in_folder(entry)
                    found += [each] if isinstance(each, TokenInput) else []
                    left_out += [each] if isinstance(each, LeftOut) else []
            about = [each for each in found if each.kind == "text" and is_about_repository(each.path)]
            if len(about) < len(found):
                found = [each for each in found if each not in about]
                left_out += [LeftOut(each.path, "about the repository") for each in about]
            inputs += found
        return inputs, left_out

    def _input_in_folder(self, file: Path) -> TokenInput | LeftOut | None:
        """Returns the input, why the file is not one, or None if it belongs to another one."""
        if file.stat().st_size == 0 and unfinished_download(file) is None:
            return LeftOut(file, "empty")
        if file.name in SUMMARIES:
            return LeftOut(file, "a summary of Parquet files beside it")
        binary = file.with_suffix(".bin")
        if file.suffix == ".idx" and index_beside(binary) == file and binary.is_file():
            return None
        try:
            found = self.input_of(file)
        except NoIdsError as error:
            return LeftOut(file, error.why)
        if self._dtype is not None and found.kind == "text":
            return LeftOut(file, "text, while --dtype asks for ids")
        return found

    def input_of(self, path: Path) -> TokenInput:
        """Returns the input that a file is; raises as `find` does."""
        dtype = self._dtype
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is not a regular file; give - and let it be read: tierstore trace - < {path}")
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
            codec = content.kind
            head = first_bytes(path, codec, HEAD_BYTES)
            content = _content_inside(path, codec, head)
        elif content is None and size and path.suffix in COMPRESSED_SUFFIXES:
            raise FormatError(f"{path} is no {COMPRESSED_SUFFIXES[path.suffix]} file, or damaged; copy it again")
        known = self._of_content(path, size, codec, head, content)
        return known or _input_of_bytes(path, size, codec, head, dtype)

    def _of_content(self, path: Path, size: int, codec: str, head: bytes, content: Content | None) -> TokenInput | None:
        """Returns the input that a file of known content is, None if its content says nothing; raises for all else."""
        if (lines := self._of_lines(path, size, codec, head, content)) is not None:
            return lines
        if content is None or (content.kind == "html" and WEB_SUFFIXES & set(path.suffixes)):
            return None
        if codec and content.kind in SEEKING_KINDS:
            with self._spool.unfolded(path, codec, hold=True) as copy:
                return replace(self.input_of(copy), path=path, unfolds=codec)
        if content.kind == "npy":
            with path.open("rb") as file:
                npy_header(file, path)  # refused before hours of work, not after
            return TokenInput(path, "npy", size)
        if content.kind in LLMC_KINDS:
            found_dtype = check_llmc(path, head, size)
            _check_dtype(path, self._dtype, found_dtype, "its header")
            return TokenInput(path, "llmc", size, dtype=found_dtype)
        if content.kind in COLUMN_KINDS:
            return self._of_columns(path, size, content)
        if content.kind == "tar":
            members = field_of_members(path, codec, self._field)
            if isinstance(members, NoField):
                raise NoIdsError(path, f"{content.name} without text or token ids: {members.why}", "give others")
            return TokenInput(path, "tar", size, codec, field=members)
        name, remedy = content.name, remedy_of(content, path)
        if codec:
            name = f"{codec} data that holds {name}"
            remedy = "decompress it first" + ("" if content.kind in CODECS or not remedy else f", then {remedy}")
        if content.kind in LEFT_OUT_KINDS:
            raise NoIdsError(path, name, remedy)
        raise ConfigError(f"{path} is {name}; {remedy}")

    def _of_lines(self, path: Path, size: int, codec: str, head: bytes, content: Content | None) -> TokenInput | None:
        """Returns the input if the file is JSON lines; None if it is not."""
        is_lines = LINES_SUFFIXES & set(path.suffixes) and size > 0
        starts_as_json = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")
        if not is_lines and not (starts_as_json and (content is None or content.kind in ("json", "json-lines"))):
            return None
        found = field_of_lines(path, codec, self._field)
        if isinstance(found, Field):
            return TokenInput(path, "json-lines", size, codec, field=found)
        if found is not None:
            raise NoIdsError(path, f"JSON lines, but {found.why}", "name the right field with --field")
        if content is None and is_lines:
            raise ConfigError(f"{path} is called JSON lines, and its first line is not JSON; get it again or rename it")
        return None

    def _of_columns(self, path: Path, size: int, content: Content) -> TokenInput:
        found = self._columns.field_of(path, content.kind, self._field)
        if isinstance(found, Field):
            return TokenInput(path, content.kind, size, field=found)
        remedy = "name the right column with --field"
        if self._field is not None:  # what the user asked for is missing, and not only beside the data
            raise ConfigError(f"{path} is {content.name}, but {found.why}; {remedy}")
        raise NoIdsError(path, f"{content.name}, but {found.why}", remedy)


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
