"""The messages of lookup.proto as dataclasses: each field once, with its number. lookup.proto says what each field
means.

Input: a table's spec. Output: messages, which `wire` turns into bytes and back. Errors: `FormatError` for a table whose
numbers contradict each other. A test compares them with what protobuf's own compiler makes of lookup.proto.
"""

# ruff: noqa: RUF009 - the functions that make fields are called once for each field, as `dataclasses.field` is

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..spec import TableSpec
from .wire import (
    Buffer,
    Message,
    bytes_field,
    message_field,
    messages_field,
    numbered,
    text_field,
    uint_field,
    uints_field,
)

SERVICE = "tierstore.v1.Lookups"
# Names of headers and trailers; see lookup.proto.
TOKEN_HEADER, ERROR_TRAILER, RETRY_TRAILER = "authorization", "tierstore-error", "tierstore-retry"


@numbered
@dataclass
class DescribeRequest(Message):
    """Asks what the server serves."""


@numbered
@dataclass
class TableMessage(Message):
    """One table, `Table` of lookup.proto: what `TableSpec.to_dict` gives."""

    name: str = text_field(1)
    num_rows: int = uint_field(2)
    row_bytes: int = uint_field(3)
    orders: list[int] = uints_field(4)
    rows_per_key: int = uint_field(5)
    moduli: list[int] = uints_field(6)
    offsets: list[int] = uints_field(7)
    codec: str = text_field(8)
    dim: int = uint_field(9)
    fingerprint: str = text_field(10)
    row_start: int = uint_field(11)
    row_end: int = uint_field(12)

    def as_spec(self) -> TableSpec:
        """Returns the table's spec; raises `FormatError` if its numbers contradict each other."""
        return TableSpec.from_dict({name: getattr(self, name) for name, _ in self.FIELDS.values()})


@numbered
@dataclass
class Attachment(Message):
    """A record of the catalog that the model's side wrote when the store was built."""

    name: str = text_field(1)
    value: Buffer = bytes_field(2)


@numbered
@dataclass
class Description(Message):
    """What is served, and within which limits."""

    name: str = text_field(1)
    version: int = uint_field(2)
    identity: Buffer = bytes_field(3)
    tables: list[TableMessage] = messages_field(4, TableMessage)
    attachments: list[Attachment] = messages_field(5, Attachment)
    tokens_max: int = uint_field(6)
    message_bytes_max: int = uint_field(7)
    build: str = text_field(8)
    instance: int = uint_field(9)
    common_build: str = text_field(10)


@numbered
@dataclass
class TableKeys(Message):
    """Keys of one table, packed int64 [num_tokens, orders]; compact: 1 to leave the rows of sentinels out."""

    table: str = text_field(1)
    num_tokens: int = uint_field(2)
    keys: Buffer = bytes_field(3)
    compact: int = uint_field(4)


@numbered
@dataclass
class LookupRequest(Message):
    """Asks for the rows of keys, in one or more tables."""

    identity: Buffer = bytes_field(1)
    tables: list[TableKeys] = messages_field(2, TableKeys)


@numbered
@dataclass
class Part(Message):
    """Rows of one table of a request, from token `start` on, and which tier answered their keys, by order."""

    table: int = uint_field(1)
    start: int = uint_field(2)
    rows: Buffer = bytes_field(3)
    dram_hits: list[int] = uints_field(4)
    static_hits: list[int] = uints_field(5)
    nvme_hits: list[int] = uints_field(6)


@numbered
@dataclass
class LookupReply(Message):
    """Rows, and the version of the store that they are of."""

    version: int = uint_field(1)
    parts: list[Part] = messages_field(2, Part)
    instance: int = uint_field(3)


@numbered
@dataclass
class RowsRequest(Message):
    """Asks for rows of one table by their ids, packed int64."""

    identity: Buffer = bytes_field(1)
    table: str = text_field(2)
    row_ids: Buffer = bytes_field(3)


@numbered
@dataclass
class LocateRequest(Message):
    """Asks what would answer each key."""

    identity: Buffer = bytes_field(1)
    keys: TableKeys | None = message_field(2, TableKeys)


@numbered
@dataclass
class LocateReply(Message):
    """One byte a key: its index in `kernels.SOURCES`."""

    sources: Buffer = bytes_field(1)


@numbered
@dataclass
class PlacedRequest(Message):
    """Asks which entries of one table are placed: `count` from the `start` hottest on."""

    identity: Buffer = bytes_field(1)
    table: str = text_field(2)
    start: int = uint_field(3)
    count: int = uint_field(4)


@numbered
@dataclass
class PlacedReply(Message):
    """Keys, packed int64, hottest first, and of each the index of its order, one byte; fewer at the end."""

    order_index: Buffer = bytes_field(1)
    keys: Buffer = bytes_field(2)


@numbered
@dataclass
class StatsRequest(Message):
    """Asks for the store's counters, and the server's."""


@numbered
@dataclass
class StatsReply(Message):
    """The counters, as JSON."""

    json: str = text_field(1)


def table_message(spec: TableSpec) -> TableMessage:
    """Returns a table's spec as a message."""
    record: dict[str, Any] = spec.to_dict()
    return TableMessage(**record)


def identity_of(specs: Sequence[TableSpec]) -> bytes:
    """Returns the SHA-256 of what tables are, their order included; client and server compare it."""
    records = json.dumps([spec.to_dict() for spec in specs], sort_keys=True)
    return hashlib.sha256(records.encode()).digest()
