"""Members of a tar archive as documents, as webdataset packs them: a text, or a field of a JSON object, each.

Input: an archive, perhaps compressed, and the field. Output: documents: str, or int64 [tokens], in the archive's order.
Errors: `FormatError` for archives that are cut or damaged; `ConfigError` naming the member for what is not a document.

A member's extension says what it is, as in webdataset: .txt and .text are text, .json an object, .npy an array of ids.
All others lie beside a document and are passed over. Headers are read here, one after the other, and nothing is
unpacked: names in an archive lead nowhere.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from tierstore.errors import ConfigError, FormatError

from .byte_streams import ChunkFile
from .fields import IDS, TEXT, Field, MemberField, NoField
from .ids import NPY_ERRORS
from .json_lines import document_of_json, field_of_json
from .token_input import Document

BLOCK_BYTES = 512
MEMBER_BYTES_MAX = 1 << 28  # of a document
HEADER_BYTES_MAX = 1 << 16  # of a long name, or of a member's extended header
PROBE_MEMBERS = 1000  # that are looked at for a document
SKIP_BYTES = 1 << 20
TEXT_EXTENSIONS = ("txt", "text")
NAMED_MAX = 8
_REGULAR, _EXTENDED, _LONG_NAME, _SPARSE = b"0\x007", b"x", b"L", b"S"
_WITHOUT_DATA = b"123456"  # links, devices, folders


class _Member(NamedTuple):
    """name: whole; extension: behind the first dot of its last part, in small letters, as webdataset has it."""

    name: str
    extension: str
    data: bytes | None  # None: passed over


def field_of_members(path: Path, codec: str, wanted: str | None) -> MemberField | NoField:
    """Looks at the first members; returns which of them are documents, or why none is.

    wanted: an extension, or a field of JSON objects. None: text if there is any, else the usual fields, else arrays.
    """
    seen: dict[str, MemberField | NoField | None] = {}
    for number, (member, _) in enumerate(_members(path, codec, ("json",), first=True)):
        if member.extension not in seen:
            seen[member.extension] = _field_of_member(member, wanted)
        if number == PROBE_MEMBERS:
            break
    found = {extension: field for extension, field in seen.items() if isinstance(field, MemberField)}
    if wanted is not None and wanted in found:
        return found[wanted]
    for extension in (*TEXT_EXTENSIONS, "json", "npy"):
        if extension in found and (wanted is None or extension == "json"):
            return found[extension]
    why = next((field.why for field in seen.values() if isinstance(field, NoField)), None)
    return NoField(why or f"its members are of these kinds: {', '.join(list(seen)[:NAMED_MAX]) or 'none'}")


def _field_of_member(member: _Member, wanted: str | None) -> MemberField | NoField | None:
    last = member.extension.rpartition(".")[2]
    if last in TEXT_EXTENSIONS:
        return MemberField(None, TEXT, member.extension)
    if last == "npy":
        return MemberField(None, IDS, member.extension)
    if last == "json" and member.data is not None:
        try:
            value = json.loads(member.data)
        except (ValueError, RecursionError):
            return NoField(f"its member {member.name} is not JSON")
        inner = field_of_json(value, None if wanted == member.extension else wanted, f"its member {member.name}")
        return MemberField(inner.name, inner.sort, member.extension) if isinstance(inner, Field) else inner
    return None


def documents_of_members(path: Path, codec: str, field: Field) -> Iterator[Document]:
    """Yields the document of each member that has the field's extension."""
    assert isinstance(field, MemberField)
    consumed = 0
    for member, taken in _members(path, codec, (field.extension,)):
        if member.data is None:
            continue
        where = f"{path}: member {member.name}"
        document: str | np.ndarray
        if field.extension.rpartition(".")[2] == "json":
            document = document_of_json(member.data, field, where)
        elif field.sort == TEXT:
            document = member.data.decode(errors="replace").removeprefix("\ufeff")
        else:
            document = _array(member.data, where)
        yield Document(document, taken - consumed, where)
        consumed = taken


def _array(data: bytes, where: str) -> np.ndarray:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (*NPY_ERRORS, OSError) as error:
        raise ConfigError(f"{where} is no NumPy array of numbers, or cut ({error}); take it out") from error
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
        raise ConfigError(f"{where} is {getattr(array, 'dtype', 'an archive')}, expected integers, 1-D; take it out")
    return array


def _members(
    path: Path, codec: str, extensions: tuple[str, ...], *, first: bool = False
) -> Iterator[tuple[_Member, int]]:
    """Yields (a regular member, with its data if it has one of `extensions`; bytes of the file read so far).

    first: only the first of each extension has its data.
    """
    left = set(extensions)
    with ChunkFile(path, codec) as raw, io.BufferedReader(raw, SKIP_BYTES) as file:
        archive = _Archive(path, file)
        while (header := archive.next_member()) is not None:
            name, size = header
            extension = name.rpartition("/")[2].partition(".")[2].lower()
            data = archive.read(size, name) if extension in left else None
            if data is None:
                archive.skip(size)
            if first and data is not None:
                left.discard(extension)
            yield _Member(name, extension, data), raw.consumed


class _Archive:
    """The headers of an archive, one after the other."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path, self._file = path, file
        self._at = 0

    def next_member(self) -> tuple[str, int] | None:
        """Returns (name, bytes) of the next regular member, or None at the end; its data comes next."""
        name, size = "", -1
        while True:
            block = self._exactly(BLOCK_BYTES, "its members, without the mark of the end")
            if not block.strip(b"\0"):
                return None
            kind, stated = block[156:157], self._check(block)
            if kind == _EXTENDED:
                fields = _extended(self.read(stated, "an extended header", HEADER_BYTES_MAX))
                name, size = fields.get("path", name), int(fields.get("size", size))
                if any(key.startswith("GNU.sparse") for key in fields):
                    raise ConfigError(f"{self._path} has sparse members; pack it again without --sparse")
            elif kind == _LONG_NAME:
                name = self.read(stated, "a long name", HEADER_BYTES_MAX).rstrip(b"\0").decode(errors="replace")
            elif kind in _REGULAR:
                prefix = block[345:500] if block[257:263] == b"ustar\0" else b""
                parts = [part.partition(b"\0")[0].decode(errors="replace") for part in (prefix, block[:100])]
                return name or "/".join(part for part in parts if part), stated if size < 0 else size
            elif kind == _SPARSE:
                raise ConfigError(f"{self._path} has sparse members; pack it again without --sparse")
            else:
                self.skip(0 if kind in _WITHOUT_DATA else stated)
                name, size = ("", -1) if kind in _WITHOUT_DATA else (name, size)

    def _check(self, block: bytes) -> int:
        """Returns the size that a header states; raises `FormatError` if its checksum is another."""
        total = sum(block) - sum(block[148:156]) + 8 * 32
        try:
            is_good = int(block[148:156].strip(b"\0 ") or b"0", 8) == total
            field = block[124:136]
            size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.strip(b"\0 ") or b"0", 8)
            is_good &= size >= 0
        except ValueError:
            is_good, size = False, 0
        if not is_good:
            raise FormatError(f"{self._path}: the header at byte {self._at - BLOCK_BYTES} is damaged; copy it again")
        return size

    def read(self, size: int, what: str, most: int = MEMBER_BYTES_MAX) -> bytes:
        """Returns the data of a member."""
        if size > most:
            raise ConfigError(f"{self._path}: {what} has {size} bytes, at most {most} are read; take it out")
        data = self._exactly(size, what)
        self._exactly(-size % BLOCK_BYTES, what)
        return data

    def skip(self, size: int) -> None:
        """Passes over the data of a member."""
        left = size + -size % BLOCK_BYTES
        while left:
            left -= len(self._exactly(min(left, SKIP_BYTES), "a member"))

    def _exactly(self, count: int, what: str) -> bytes:
        data = self._file.read(count)
        self._at += len(data)
        if len(data) != count:
            raise FormatError(f"{self._path} ends within {what}, at byte {self._at}: it was cut; copy it again")
        return data


def _extended(data: bytes) -> dict[str, str]:
    """The fields of an extended header (POSIX.1-2001): "LENGTH KEY=VALUE\\n" each; damaged ones are left out."""
    fields = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data):
            break
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        fields[key.decode(errors="replace")] = value.decode(errors="replace")
        data = data[int(length) :]
    if not fields.get("size", "0").isdigit():
        fields.pop("size")
    return fields
