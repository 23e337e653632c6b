"""The messages of lookup.proto, field by field, and what a table is as one of them.

Flows in and out: nothing; `wire` turns them into bytes and back. A test holds them against what protobuf's own compiler
makes of lookup.proto.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..spec import TableSpec
from .wire import BYTES, TEXT, UINT, UINTS, Buffer, Message

SERVICE = "tierstore.v1.Lookups"
# Names of headers and trailers; see lookup.proto.
TOKEN_HEADER, ERROR_TRAILER, RETRY_TRAILER = "authorization", "tierstore-error", "tierstore-retry"


@dataclass
class DescribeRequest(Message):
    """See lookup.proto."""

    FIELDS: ClassVar = {}


@dataclass
class TableMessage(Message):
    """`Table` of lookup.proto."""

    name: str = ""
    num_rows: int = 0
    row_bytes: int = 0
    orders: list[int] = field(default_factory=list)
    rows_per_key: int = 0
    moduli: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    codec: str = ""
    dim: int = 0
    fingerprint: str = ""

    FIELDS: ClassVar = {
        1: ("name", TEXT),
        2: ("num_rows", UINT),
        3: ("row_bytes", UINT),
        4: ("orders", UINTS),
        5: ("rows_per_key", UINT),
        6: ("moduli", UINTS),
        7: ("offsets", UINTS),
        8: ("codec", TEXT),
        9: ("dim", UINT),
        10: ("fingerprint", TEXT),
    }

    def as_spec(self) -> TableSpec:
        """Returns the table's spec; raises `FormatError` where its numbers contradict each other."""
        return TableSpec.from_record({name: getattr(self, name) for name, _ in self.FIELDS.values()})


@dataclass
class Attachment(Message):
    """See lookup.proto."""

    name: str = ""
    value: Buffer = b""

    FIELDS: ClassVar = {1: ("name", TEXT), 2: ("value", BYTES)}


@dataclass
class Description(Message):
    """See lookup.proto."""

    name: str = ""
    version: int = 0
    identity: Buffer = b""
    tables: list[TableMessage] = field(default_factory=list)
    attachments: list[Attachment] = field(default_factory=list)
    tokens_max: int = 0
    message_bytes_max: int = 0
    build: str = ""
    instance: int = 0

    FIELDS: ClassVar = {
        1: ("name", TEXT),
        2: ("version", UINT),
        3: ("identity", BYTES),
        4: ("tables", TableMessage),
        5: ("attachments", Attachment),
        6: ("tokens_max", UINT),
        7: ("message_bytes_max", UINT),
        8: ("build", TEXT),
        9: ("instance", UINT),
    }
    REPEATED = frozenset({4, 5})


@dataclass
class TableKeys(Message):
    """See lookup.proto."""

    table: str = ""
    num_tokens: int = 0
    keys: Buffer = b""

    FIELDS: ClassVar = {1: ("table", TEXT), 2: ("num_tokens", UINT), 3: ("keys", BYTES)}


@dataclass
class LookupRequest(Message):
    """See lookup.proto."""

    identity: Buffer = b""
    tables: list[TableKeys] = field(default_factory=list)

    FIELDS: ClassVar = {1: ("identity", BYTES), 2: ("tables", TableKeys)}
    REPEATED = frozenset({2})


@dataclass
class Part(Message):
    """See lookup.proto."""

    table: int = 0
    start: int = 0
    rows: Buffer = b""
    dram_hits: list[int] = field(default_factory=list)
    static_hits: list[int] = field(default_factory=list)
    nvme_hits: list[int] = field(default_factory=list)

    FIELDS: ClassVar = {
        1: ("table", UINT),
        2: ("start", UINT),
        3: ("rows", BYTES),
        4: ("dram_hits", UINTS),
        5: ("static_hits", UINTS),
        6: ("nvme_hits", UINTS),
    }


@dataclass
class LookupReply(Message):
    """See lookup.proto."""

    version: int = 0
    parts: list[Part] = field(default_factory=list)
    instance: int = 0

    FIELDS: ClassVar = {1: ("version", UINT), 2: ("parts", Part), 3: ("instance", UINT)}
    REPEATED = frozenset({2})


@dataclass
class RowsRequest(Message):
    """See lookup.proto."""

    identity: Buffer = b""
    table: str = ""
    row_ids: Buffer = b""

    FIELDS: ClassVar = {1: ("identity", BYTES), 2: ("table", TEXT), 3: ("row_ids", BYTES)}


@dataclass
class LocateRequest(Message):
    """See lookup.proto."""

    identity: Buffer = b""
    keys: TableKeys | None = None

    FIELDS: ClassVar = {1: ("identity", BYTES), 2: ("keys", TableKeys)}


@dataclass
class LocateReply(Message):
    """See lookup.proto."""

    sources: Buffer = b""

    FIELDS: ClassVar = {1: ("sources", BYTES)}


@dataclass
class StatsRequest(Message):
    """See lookup.proto."""

    FIELDS: ClassVar = {}


@dataclass
class StatsReply(Message):
    """See lookup.proto."""

    json: str = ""

    FIELDS: ClassVar = {1: ("json", TEXT)}


def table_message(spec: TableSpec) -> TableMessage:
    """Returns a table's spec as a message."""
    record: dict[str, Any] = spec.as_record()
    return TableMessage(**record)


def identity_of(specs: Sequence[TableSpec]) -> bytes:
    """Returns the SHA-256 of what tables are, order included:
    by which client and server know that they mean the same ones."""
    records = json.dumps([spec.as_record() for spec in specs], sort_keys=True)
    return hashlib.sha256(records.encode()).digest()
