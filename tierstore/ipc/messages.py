"""The messages of the daemon's socket: what a daemon, its clients and administrators send each other, as JSON.

Input: the bytes of a whole message; structs. Output: a struct of the type that is expected; bytes. Errors:
`DaemonError` names what is wrong with bytes that are not that message: not JSON, a missing field, a field of another
type. Clients and administrators are not trusted, so the daemon refuses fields that it does not know, too. What the
daemon sends may have fields that an older client does not know.

    client -> daemon    Hello, then FromClient, any number
    admin  -> daemon    Hello, then a Request at a time
    daemon -> client    Welcome and Layout in one object, then FromDaemon, any number
    daemon -> admin     Welcome, then the answer to each request

Instead of any message of its own, the daemon may send a Failure or a Goodbye. A message is nested as deep as its type.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from ..decisions.shared_budget import SharedShare
from ..errors import DaemonError

RELEASE_CHARS_MAX = 64

Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
OrderCounts = tuple[Count, ...]
T = TypeVar("T")


class Hello(Struct, frozen=True):
    """The first message of a connection.

    hello: the protocol's version. on_gpu: a GPU would read the static set in place.
    """

    hello: int
    role: str
    pid: int
    release: Annotated[str, Meta(max_length=RELEASE_CHARS_MAX)]
    on_gpu: bool = False


class Welcome(Struct, frozen=True):
    """The answer to a hello."""

    hello: int
    release: str
    pid: int


class Layout(Struct, frozen=True):
    """What a client needs to map a version of the store. Descriptors of the blocks come with it, in the order of
    `sizes`.

    is_exported: the static block's descriptor is its writable export, which drivers need that lock memory for a GPU.
    sizes: bytes of the blocks control, static, recency, client and, if tables are resident, resident. bad_pages: of
    resident tables, and why. published: the published version of the store's rows that is served; 0: the base. folded:
    the version into which all before it were folded when the daemon opened the store: its index of rows is of those
    files.
    """

    is_exported: bool = msgspec.field(name="lent")  # the key that clients of every release read
    store: str
    identity: str
    version: Count
    tag: Count
    placement: int | None
    sizes: Annotated[tuple[Count, ...], Meta(min_length=4, max_length=5)]
    tables: dict[str, SharedShare]
    bad_pages: dict[str, dict[int, str]]
    budget_bytes: Count
    dram_bytes: Count
    published: Count = 0
    folded: Count = 0

    def __post_init__(self) -> None:
        for name, share in self.tables.items():
            _, *numbers = _flat(astuple(share))
            if min(numbers) < 0:
                raise ValueError(f"the share of table {name} has numbers below 0: {share}")


class Failure(Struct, frozen=True):
    """An error of the daemon. error: the class of `tierstore.errors`."""

    error: str
    message: str


class Goodbye(Struct, frozen=True):
    """The daemon ends the connection. bye: why."""

    bye: str


class Move(Struct, frozen=True):
    """The client is to map another version, and then to say that it left the one before."""

    move: Layout


class FromDaemon(Struct, frozen=True):
    """What an attached client may receive: `Move`, `Failure` or `Goodbye`. Other messages have none of the fields."""

    move: Layout | None = None
    error: str | None = None
    message: str = ""
    bye: str | None = None


class LatencyCounts(Struct, frozen=True, forbid_unknown_fields=True):
    """A histogram of the lookups that were timed."""

    counts: tuple[Count, ...]
    sum_ns: Count


class EngineCounters(Struct, frozen=True, forbid_unknown_fields=True):
    """What a client's engine counted. tables: of each, keys by order found in DRAM, in the static set, and on NVMe."""

    batches: Count
    zero_miss_batches: Count
    sentinels: Count
    rows: Count
    rows_missed: Count
    pages_read: Count
    entries_read: Count
    bytes_read: Count
    row_bytes_read: Count
    latency: LatencyCounts
    tables: tuple[tuple[OrderCounts, OrderCounts, OrderCounts], ...]


class FromClient(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A report of an attached client: its counters, or the version that it has left."""

    counters: EngineCounters | None = None
    left: int | None = None

    def __post_init__(self) -> None:
        if (self.counters is None) == (self.left is None):
            raise ValueError("expected one of counters and left")


class StatRequest(Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag="stat"):
    """Asks for the stat record."""


class ReplanRequest(Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag="replan"):
    """Asks for a re-plan now."""


class ReloadRequest(Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag="reload"):
    """Asks the daemon to read certificates and the placement again."""


class SwapRequest(Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag="swap"):
    """Asks the daemon to serve another store."""

    store: str


class RollbackRequest(Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag="rollback"):
    """Asks the daemon to serve the store before again."""


Request = StatRequest | ReplanRequest | ReloadRequest | SwapRequest | RollbackRequest


class Done(Struct, frozen=True, kw_only=True):
    """The answer to a reload."""

    ok: bool = True


class ReplanResult(Struct, frozen=True, kw_only=True):
    """What a re-plan did: entries that became static and that made way. at: Unix time of its end."""

    at: float
    entered: int
    left: int
    seconds: float
    steps: int


class ReplanAnswer(ReplanResult, frozen=True, kw_only=True):
    """The answer to a re-plan."""

    ok: bool = True


class SwapAnswer(Struct, frozen=True, kw_only=True):
    """What a swap did.

    warmed: entries that were static when clients moved; filled: entries that became so afterwards.
    """

    version: int
    store: str
    warmed: int
    filled: int
    seconds: float
    ok: bool = True


def to_json(message: Any) -> bytes:
    """Returns a message as JSON.

    Raises:
        DaemonError: a text of it, such as a path, is not UTF-8.
        TypeError: it is not a message, which is the caller's mistake.
    """
    try:
        return msgspec.json.encode(message)
    except UnicodeEncodeError as error:
        text = error.object[error.start : error.end]
        raise DaemonError(f"a message holds {text!r}, which is not UTF-8: rename it") from error


def from_json(data: bytes, kind: type[T]) -> T:
    """Returns the message of a kind that bytes of JSON say. Raises `DaemonError` if they are not such a message."""
    message: T = _decoded(data, kind)
    return message


def request_from_json(data: bytes) -> Request:
    """Returns the request that bytes of JSON say. Raises `DaemonError` if they are not a request."""
    request: Request = _decoded(data, Request)
    return request


def _decoded(data: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise DaemonError(
            f"a message of {len(data):,} bytes is not what was expected: {error}; is the sender of another release?"
        ) from error


def _flat(values: Any) -> list[int]:
    return [number for value in values for number in (value if isinstance(value, tuple) else (value,))]
