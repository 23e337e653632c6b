"""A `LookupRequest` of few tables, written and read without a walk over its fields: all but the keys is remembered.

Input: what is asked for, or a request's bytes. Output: the same bytes as `wire.encode` gives; the same message as
`wire.decode` gives. Errors: those of `wire`. A request whose bytes are not known yet is decoded, field by field.

    identity | TABLES size, table, num_tokens, KEYS size | keys ... | compact | TABLES size ...

Why: lookups come in few shapes, and for one token the fields took most of the time that encoding and decoding took.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from .messages import LookupRequest, TableKeys
from .wire import Buffer, decode, encode, tag_of, varint

SHAPES_MAX = 256  # that are remembered, by the writer and by each reader,
HEAD_BYTES_MAX = 1024  # each with so many bytes before its keys at most: a client may send longer names

_TABLES, _KEYS, _COMPACT = tag_of(LookupRequest, "tables"), tag_of(TableKeys, "keys"), tag_of(TableKeys, "compact")


def write_request(identity: bytes, tables: Sequence[TableKeys]) -> bytes:
    """Returns a `LookupRequest` as bytes; the keys are copied once."""
    pieces: list[Buffer] = [_identity(identity)]
    for each in tables:
        head, tail = _around_keys(each.table, each.num_tokens, len(each.keys), each.compact)
        pieces += (head, each.keys, tail)
    return b"".join(pieces)


class RequestReader:
    """Reads requests. Any thread may call."""

    def __init__(self) -> None:
        # By a request's bytes. Threads write it at the same time: an entry that is lost is only learned again.
        self._known: dict[int, _Known] = {}

    def read(self, data: bytes) -> LookupRequest:
        """Returns the message that bytes are; raises `ValueError` if they are not one."""
        known = self._known.get(len(data))
        if known is not None and data.startswith(known.head) and data.endswith(known.tail):
            keys = memoryview(data)[len(known.head) : len(data) - len(known.tail)]
            return LookupRequest(known.identity, [TableKeys(known.table, known.num_tokens, keys, known.compact)])
        request = decode(LookupRequest, data)
        if len(request.tables) == 1:
            self._learn(data, bytes(request.identity), request.tables[0])
        return request

    def _learn(self, data: bytes, identity: bytes, table: TableKeys) -> None:
        """Remembers a request of one table, if its bytes are those that `write_request` would give."""
        if len(identity) + len(table.table) > HEAD_BYTES_MAX // 2:
            return
        head, tail = _laid_around_keys(table.table, table.num_tokens, len(table.keys), table.compact)
        head = _identity(identity) + head
        if len(head) + len(table.keys) + len(tail) != len(data) or len(head) > HEAD_BYTES_MAX:
            return
        if data.startswith(head) and data.endswith(tail):
            if len(self._known) >= SHAPES_MAX:
                self._known = {}
            self._known[len(data)] = _Known(head, tail, identity, table.table, table.num_tokens, table.compact)


class _Known(NamedTuple):
    """Requests of one size: the bytes before and behind their keys, and what these say."""

    head: bytes
    tail: bytes
    identity: bytes
    table: str
    num_tokens: int
    compact: int


def _laid_around_keys(table: str, num_tokens: int, num_bytes: int, compact: int) -> tuple[bytes, bytes]:
    """Returns what stands before, and behind, `num_bytes` bytes of keys of one table."""
    head = encode(TableKeys(table, num_tokens)) + (_KEYS + varint(num_bytes) if num_bytes else b"")
    tail = _COMPACT + varint(compact) if compact else b""
    return _TABLES + varint(len(head) + num_bytes + len(tail)) + head, tail


_around_keys = functools.lru_cache(SHAPES_MAX)(_laid_around_keys)


@functools.lru_cache(SHAPES_MAX)
def _identity(identity: bytes) -> bytes:
    return encode(LookupRequest(identity))
