"""JSON lines as documents: a text, a list of token ids or a chat on every line, by itself or in a field of an object.

Input: a file's lines, decompressed, and the field's name, if the user gave one. Output: documents: str, int64 [tokens],
or the messages of a chat in JSON. Errors: `ConfigError` naming file, line and field.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tierstore.errors import ConfigError

from .byte_streams import ChunkFile
from .fields import CHAT, IDS, TEXT, Field, NoField, choose_field
from .token_input import Document

SUFFIXES = {".jsonl", ".ndjson"}
LINE_BYTES_MAX = 1 << 28  # one document
PROBE_BYTES = 1 << 26  # the longest first line that is looked at
_EXPECTED = {TEXT: "a text", IDS: "a list of integers", CHAT: "a list of messages"}


def field_of_lines(path: Path, codec: str, wanted: str | None) -> Field | NoField | None:
    """Looks at a file that begins like JSON; returns the field, or why its lines have none,
    or None if it is not JSON lines.

    wanted: the field's name; None: the usual ones. A file of one line is JSON lines if its name says so or a field is
    wanted.
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
    return field_of_json(value, wanted, "its first line")


def field_of_json(value: Any, wanted: str | None, of: str) -> Field | NoField | None:
    """Returns the field of a parsed value, why it has none, or None for a bare number or null. of: what it is."""
    if isinstance(value, (str, list)):
        sort = _sort(value)
        return NoField(f"{of} is a list of other things") if sort is None else Field(None, sort)
    if not isinstance(value, dict):
        return None
    return choose_field({name: _sort(each) for name, each in value.items()}, wanted, of)


def _line(lines: Iterator[bytes]) -> bytes:
    return next(lines, b"").removeprefix(b"\xef\xbb\xbf").strip()


def _sort(value: Any) -> str | None:
    """What a value is: a text, ids, a chat, or None for anything else."""
    if isinstance(value, str):
        return TEXT
    if not isinstance(value, list):
        return None
    if value and all(isinstance(each, dict) and "role" in each for each in value):
        return CHAT
    return IDS if all(type(each) is int for each in value) else None


def documents_of_lines(path: Path, codec: str, field: Field) -> Iterator[Document]:
    """Yields the document of each line that is not blank."""
    with ChunkFile(path, codec) as raw, io.BufferedReader(raw, 1 << 16) as file:
        consumed = number = 0
        while line := file.readline(LINE_BYTES_MAX + 1):
            number += 1
            if len(line) > LINE_BYTES_MAX:
                raise ConfigError(
                    f"{path}: line {number} is longer than {LINE_BYTES_MAX} bytes; is each document a line?"
                )
            if line.strip():
                where = f"{path}: line {number}"
                yield Document(document_of_json(line, field, where), raw.consumed - consumed, where)
                consumed = raw.consumed


def document_of_json(line: bytes, field: Field, where: str) -> str | np.ndarray:
    """Returns the document that JSON holds; raises `ConfigError` that begins with `where`."""
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
    sort = _sort(value)
    if field.is_ids and sort == IDS:
        try:
            return np.array(value, dtype=np.int64)
        except OverflowError as error:
            raise ConfigError(f"{where}: {what} has an id beyond 64 bits; no vocabulary has that") from error
    if field.sort == TEXT and sort == TEXT:
        assert isinstance(value, str)
        return _whole_characters(value)
    if field.sort == CHAT and sort == CHAT:
        return json.dumps(value)
    raise ConfigError(f"{where}: {what} is {str(value)!r:.60}, expected {_EXPECTED[field.sort]}, as in the first line")


def _whole_characters(text: str) -> str:
    """Returns a text with U+FFFD for halves of characters, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
