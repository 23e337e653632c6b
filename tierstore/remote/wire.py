"""The protobuf wire format, as far as the messages of lookup.proto need it: varints, and fields of known length.

Input: messages; bytes. Output: bytes; messages, whose bytes fields are views of what was decoded. Errors: `ValueError`
for what is cut short, nested without end, or of a wire type that the field does not have. Unknown fields are skipped,
as protobuf does.

Why not protobuf's library: it copies rows more often, and a process can load only one version of it, which would have
to suit an inference engine too. Measured with upb on two busy cores: a reply with 1 MiB of rows is encoded in 0.05 to
0.2 ms here and in 10 to 19 ms there, which is mostly memory that each message takes and gives back. One-token messages
take 5 to 20 us here and 3 to 17 us there, beside a call's round trip of about a millisecond.

A message is a sequence of fields, each a varint `number << 3 | wire type` and a value. Wire type 0: a varint. Wire type
2: a length in bytes, a varint, and so many bytes: bytes, UTF-8 text, a message, or packed varints. Wire types 1 and 5:
8 and 4 bytes, which only unknown fields have. A varint has 7 bits in each byte, lowest first; the top bit means that
more follow: 300 is AC 02.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

UINT, UINTS, BYTES, TEXT = "uint", "uints", "bytes", "text"
VARINT, FIXED64, SIZED, FIXED32 = 0, 1, 2, 5  # wire types
VARINT_BYTES_MAX = 10
FIELDS_MAX = 4096  # of one message, so that many tiny ones cannot take a hundred times their bytes in memory
NUMBERS_MAX = 1 << 16  # of one packed field
UINT_END = 1 << 64
NUMBER_MAX = (1 << 29) - 1  # of a field
ONE_BYTE = [bytes((value,)) for value in range(0x80)]  # nearly all varints are one of these

Buffer = bytes | bytearray | memoryview
M = TypeVar("M", bound="Message")


class Message:
    """A dataclass whose fields the functions below make, such as `text_field`, and that `numbered` finishes."""

    FIELDS: ClassVar[
        Mapping[int, tuple[str, Any]]
    ]  # number -> (attribute, one of the kinds above or a `Message` class)
    REPEATED: ClassVar[frozenset[int]]  # numbers whose attribute is a list of messages
    WRITTEN: ClassVar[Sequence[tuple[str, Any, bool, bytes]]]  # attribute, kind, whether repeated, tag: to encode


def numbered(kind: type[M]) -> type[M]:
    """Gives a dataclass of fields that have numbers its `FIELDS`, `REPEATED` and `WRITTEN`."""
    numbers = {field.metadata["number"]: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    kind.FIELDS = {number: (field.name, field.metadata["kind"]) for number, field in numbers.items()}
    kind.REPEATED = frozenset(number for number, field in numbers.items() if field.metadata["repeated"])
    kind.WRITTEN = [
        (name, of, number in kind.REPEATED, varint(number << 3 | (VARINT if of is UINT else SIZED)))
        for number, (name, of) in kind.FIELDS.items()
    ]
    return kind


def text_field(number: int) -> Any:
    """Returns a field of text, "" by default."""
    return dataclasses.field(default="", metadata=_numbered(number, TEXT))


def uint_field(number: int) -> Any:
    """Returns a field of one number, 0 by default."""
    return dataclasses.field(default=0, metadata=_numbered(number, UINT))


def uints_field(number: int) -> Any:
    """Returns a field of a list of numbers."""
    return dataclasses.field(default_factory=list, metadata=_numbered(number, UINTS))


def bytes_field(number: int) -> Any:
    """Returns a field of bytes, any contiguous buffer; after `decode` a view of what was decoded."""
    return dataclasses.field(default=b"", metadata=_numbered(number, BYTES))


def message_field(number: int, kind: type[Message]) -> Any:
    """Returns a field of one message, None by default."""
    return dataclasses.field(default=None, metadata=_numbered(number, kind))


def messages_field(number: int, kind: type[Message]) -> Any:
    """Returns a field of a list of messages."""
    return dataclasses.field(default_factory=list, metadata=_numbered(number, kind, repeated=True))


def _numbered(number: int, kind: Any, *, repeated: bool = False) -> dict[str, Any]:
    return {"number": number, "kind": kind, "repeated": repeated}


def tag_of(kind: type[Message], name: str) -> bytes:
    """Returns what stands before a field of this attribute: its number and wire type."""
    return next(tag for attribute, _, _, tag in kind.WRITTEN if attribute == name)


def encode(message: Message) -> bytes:
    """Returns a message as bytes. Its bytes fields may be any contiguous buffers; each is copied once."""
    pieces: list[Buffer] = []
    _encode_into(pieces, message)
    return b"".join(pieces)


def _encode_into(pieces: list[Buffer], message: Message) -> int:
    """Appends a message's pieces; returns how many bytes they are."""
    num_bytes = 0
    for name, kind, is_repeated, tag in message.WRITTEN:
        value = getattr(message, name)
        if kind is BYTES and type(value) is not bytes:
            value = memoryview(value)
            value = value.cast("B") if value.nbytes else b""
        if not value:  # protobuf leaves out zeros and what is empty
            continue
        if kind is UINT:
            head = tag + varint(value)
            pieces.append(head)
            num_bytes += len(head)
            continue
        for sized in value if is_repeated else (value,):
            head_index = len(pieces)
            pieces.append(b"")
            size = _sized_into(pieces, kind, sized)
            head = pieces[head_index] = tag + varint(size)
            num_bytes += len(head) + size
    return num_bytes


def _sized_into(pieces: list[Buffer], kind: Any, value: Any) -> int:
    if kind is TEXT:
        value = value.encode()
    elif kind is UINTS:
        value = b"".join(map(varint, value))
    elif kind is not BYTES:
        return _encode_into(pieces, value)
    pieces.append(value)
    return len(value)


def varint(value: int) -> bytes:
    """Returns an int of 0 to 2^64 - 1 as a varint."""
    if 0 <= value < 0x80:
        return ONE_BYTE[value]
    if not 0 <= value < UINT_END:
        raise ValueError(f"{value} does not fit a varint of 64 bits")
    groups = bytearray()
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def decode(kind: type[M], data: Buffer) -> M:
    """Returns the message of a kind that bytes are; raises `ValueError` if they are not one.
    Of a field given twice, the last."""
    message, view, at, num_fields = kind(), memoryview(data), 0, 0
    end, fields = len(view), kind.FIELDS
    while at < end:
        num_fields += 1
        if num_fields > FIELDS_MAX:
            raise ValueError(
                f"{kind.__name__}: more than {FIELDS_MAX} fields; send what is asked for in several requests"
            )
        # Varints of one byte, which nearly all are, are read here: a call for each would take longer than all the rest.
        tag, at = (view[at], at + 1) if view[at] < 0x80 else _read_varint(view, at)
        wire_type = tag & 7
        field = fields.get(tag >> 3)
        if wire_type == SIZED and field is not None:
            size, at = (view[at], at + 1) if at < end and view[at] < 0x80 else _read_varint(view, at)
            start, at = at, at + size
            if at > end:
                raise _cut_short(kind, tag >> 3, size, end - start)
            value: Any = view[start:at]
        elif wire_type == VARINT and field is not None:
            value, at = (view[at], at + 1) if at < end and view[at] < 0x80 else _read_varint(view, at)
        else:
            at = _end_of_other(view, at, tag, kind)
            if field is not None:
                raise _wrong_type(kind, tag >> 3, field[0], wire_type)
            continue
        _store(message, tag, field, value)
    return message


def _store(message: Message, tag: int, field: tuple[str, Any], value: Any) -> None:
    """Gives a message the value of one field: a number, or a view of bytes."""
    name, kind = field
    if (tag & 7) == VARINT:
        if kind is UINT:
            setattr(message, name, value)
        elif kind is UINTS:  # unpacked: protobuf's parsers take both
            getattr(message, name).append(value)
        else:
            raise _wrong_type(type(message), tag >> 3, name, VARINT)
    elif kind is BYTES:
        setattr(message, name, value)
    elif kind is UINTS:
        getattr(message, name).extend(_varints(value))
    elif kind is TEXT:
        setattr(message, name, str(value, "utf-8"))  # a `UnicodeDecodeError` is a `ValueError`
    elif kind is UINT:
        raise _wrong_type(type(message), tag >> 3, name, SIZED)
    elif tag >> 3 in message.REPEATED:
        getattr(message, name).append(decode(kind, value))
    else:
        setattr(message, name, decode(kind, value))


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    """Returns the varint that begins at a byte, and the number of the byte behind it."""
    value = 0
    for shift, byte in enumerate(view[at : at + VARINT_BYTES_MAX]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value % UINT_END, at + shift + 1
    raise ValueError(f"a varint at byte {at} of {len(view)} does not end; the message is damaged")


def _end_of_other(view: memoryview, at: int, tag: int, kind: type) -> int:
    """Returns where the value ends of a field that nobody knows, or that has a wire type of no field of ours."""
    number, wire_type = tag >> 3, tag & 7
    if not 0 < number <= NUMBER_MAX or wire_type not in (VARINT, FIXED64, SIZED, FIXED32):
        raise ValueError(f"{kind.__name__}: field {number} has wire type {wire_type}; the message is damaged")
    if wire_type == VARINT:
        return _read_varint(view, at)[1]
    size, at = _read_varint(view, at) if wire_type == SIZED else (8 if wire_type == FIXED64 else 4, at)
    if size > len(view) - at:
        raise _cut_short(kind, number, size, len(view) - at)
    return at + size


def _cut_short(kind: type, number: int, size: int, left: int) -> ValueError:
    return ValueError(f"{kind.__name__}: field {number} has {size} bytes, {left} are left; it was cut short")


def _wrong_type(kind: type, number: int, name: str, wire_type: int) -> ValueError:
    what = f"{kind.__name__}: field {number} ({name})"
    return ValueError(f"{what} has wire type {wire_type}; the message is damaged, or of another version")


def _varints(view: memoryview) -> Iterable[int]:
    """Returns the numbers of a packed field."""
    data = bytes(view[: NUMBERS_MAX + 1])
    if len(data) <= NUMBERS_MAX and data.isascii():  # a byte each
        return data
    values: list[int] = []
    at = 0
    while at < len(view):
        if len(values) == NUMBERS_MAX:
            raise ValueError(f"a field of more than {NUMBERS_MAX} numbers; no message has so many")
        value, at = _read_varint(view, at)
        values.append(value)
    return values
