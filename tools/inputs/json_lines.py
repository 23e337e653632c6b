"""JSON lines as documents: a text or a list of token ids on every line, by itself or in a field of an object.

Input: a file's lines, decompressed, and the field's name, if the user gave one. Output: documents, str or int64
[tokens]. Errors: `ConfigError` naming file, line and field.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tierstore.errors import ConfigError

from .byte_streams import ChunkFile

SUFFIXES = {".jsonl", ".ndjson"}
LINE_BYTES_MAX = 1 << 28  # one document
PROBE_BYTES = 1 << 26  # the longest first line that is looked at
TEXT_FIELDS = ("text", "content")  # taken if nobody names a field, the first that there is
ID_FIELDS = ("input_ids", "token_ids", "tokens", "ids")
FIELDS_NAMED_MAX = 8


@dataclass(frozen=True)
class LineField:
    """What of each line is a document. name: None if the line itself is; is_ids: token ids, else text."""

    name: str | None
    is_ids: bool


def field_of_lines(path: Path, codec: str, wanted: str | None) -> LineField | str | None:
    """Looks at a file that begins like JSON; returns the field, or why its lines have none,
    or None if it is not JSON lines.

    wanted: the field's name; None: by default "text", or one of the usual names of lists of ids. A file of one line is
    JSON lines if its name says so or a field is wanted.
    """
    with ChunkFile(path, codec) as raw, io.BufferedReader(raw, 1 << 16) as file:
        lines = (line for line in iter(lambda: file.readline(PROBE_BYTES), b"") if line.strip())
        first, second = _line(lines), _line(lines)
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return None
    named = wanted is not None or SUFFIXES & set(path.suffixes)
    if not (second[:1] in (b"{", b"[", b'"') or (not second and named)):
        return None
    if isinstance(value, (str, list)):
        return (
            LineField(None, isinstance(value, list)) if _is_document(value) else "its lines are lists of other things"
        )
    if not isinstance(value, dict):
        return None
    names = [wanted] if wanted is not None else [*TEXT_FIELDS, *ID_FIELDS]
    found = next((name for name in names if _is_document(value.get(name))), None)
    if found is None:
        there = ", ".join(list(value)[:FIELDS_NAMED_MAX])
        what = (
            f"no text or token ids in a field {wanted}" if wanted is not None else "no field text, nor one of token ids"
        )
        return f"its first line has {what}; it has: {there}"
    return LineField(found, isinstance(value[found], list))


def _line(lines: Iterator[bytes]) -> bytes:
    return next(lines, b"").removeprefix(b"\xef\xbb\xbf").strip()


def _is_document(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(type(each) is int for each in value))


def documents_of_lines(path: Path, codec: str, field: LineField) -> Iterator[tuple[str | np.ndarray, int]]:
    """Yields (the document of each line that is not blank, bytes of the file that were read for it)."""
    with ChunkFile(path, codec) as raw, io.BufferedReader(raw, 1 << 16) as file:
        consumed = number = 0
        while line := file.readline(LINE_BYTES_MAX + 1):
            number += 1
            if len(line) > LINE_BYTES_MAX:
                raise ConfigError(
                    f"{path}: line {number} is longer than {LINE_BYTES_MAX} bytes; is each document a line?"
                )
            if line.strip():
                yield _document(line, field, f"{path}: line {number}"), raw.consumed - consumed
                consumed = raw.consumed


def _document(line: bytes, field: LineField, where: str) -> str | np.ndarray:
    try:
        value = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{where} is not JSON ({error}); the file was cut or is something else: get it again"
        ) from error
    what = "it"
    if field.name is not None:
        what = f"its field {field.name}"
        if not isinstance(value, dict) or field.name not in value:
            raise ConfigError(
                f"{where} has no field {field.name}, as the first line has; remove it, or name another field"
            )
        value = value[field.name]
    if field.is_ids and isinstance(value, list) and all(type(each) is int for each in value):
        try:
            return np.array(value, dtype=np.int64)
        except OverflowError as error:
            raise ConfigError(f"{where}: {what} has an id beyond 64 bits; no vocabulary has that") from error
    if not field.is_ids and isinstance(value, str):
        return value
    expected = "a list of integers" if field.is_ids else "a text"
    raise ConfigError(f"{where}: {what} is {str(value)!r:.60}, expected {expected}, as in the first line")
