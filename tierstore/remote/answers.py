"""The answers to calls of lookup.proto, from a store: descriptions, rows, where keys are, counts.

Input: decoded requests, and the call's deadline. Output: encoded replies, whose rows were looked up into them; streams
in parts of CHUNK_BYTES, so that a call takes memory for CHUNKS_MAX of them at most, however many rows it asks for.
Errors: `Refusal` beyond the limits, `FingerprintMismatchError` for other tables, `ValueError` for arrays whose bytes
are not those of their shape. Knows nothing of gRPC.

Shapes: N tokens, O orders, H rows per key.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..errors import ConfigError, FingerprintMismatchError, StoreNotReadyError, TierStoreError
from ..spec import TableSpec
from ..store.store import Store
from ..store.table import Table
from . import messages
from .limits import Deadline, InFlight, Refusal
from .messages import TableKeys
from .rows_reply import PartShape, RowsReply, hits_of
from .wire import Buffer, encode

CHUNK_BYTES = 1 << 20  # of rows in one message of a stream
CHUNKS_MAX = 4  # of one stream: looked up, made compact, sent before, and on its way through grpc
DESCRIBE_TRIES = 4  # of a description, if the store changes meanwhile
PLACED_KEYS_MAX = 16384  # of one answer
PLACED_BYTES = 4 << 20  # that reading them takes, twice
HEAD_BYTES = 4096  # of a message, at most, beside its keys or rows
ID_BYTES = 8  # of a key or a row id

T = TypeVar("T")


class Served(NamedTuple):
    """A store, the number of its version, what identifies its tables, and a number of its own: see lookup.proto."""

    store: Store
    version: int
    identity: bytes
    instance: int

    def reply(self, parts: Sequence[PartShape]) -> RowsReply:
        """Returns a reply of this version, to be filled."""
        return RowsReply(self.version, self.instance, parts)


class Wanted(NamedTuple):
    """Keys of a table, int64 [N, O]. compact: without the rows of sentinels."""

    table: Table
    keys: np.ndarray
    compact: bool


class AnswerLimits(NamedTuple):
    """Bytes and tokens of one request, and lookups at a time."""

    message_bytes_max: int
    tokens_max: int
    workers: int


class StoreChangedError(TierStoreError):
    """Another store took the place of the one that a call began with."""


class Answers:
    """Answers requests from the store that is served at the time. Any thread may call."""

    def __init__(
        self,
        store: Callable[[], Store],
        limits: AnswerLimits,
        in_flight: InFlight,
        record: Callable[[], dict[str, Any]],
    ) -> None:
        """store: returns the one to answer from now. record: the server's own counts.
        Raises `ConfigError` for unfit limits."""
        self._store = store
        self._limits, self._in_flight, self._record = limits, in_flight, record
        self._workers = threading.BoundedSemaphore(limits.workers)
        self._served: Served | None = None
        for spec in _specs(store()):
            if spec.num_heads * spec.row_bytes + HEAD_BYTES > limits.message_bytes_max:
                raise ConfigError(
                    f"message_bytes_max: a token's rows of table {spec.name} take {spec.num_heads * spec.row_bytes} "
                    f"bytes, a message holds {limits.message_bytes_max - HEAD_BYTES}; allow more"
                )
        if limits.tokens_max < 1:
            raise ConfigError(f"tokens_max is {limits.tokens_max}, expected at least 1")

    def describe(self, call: Deadline, request: messages.DescribeRequest) -> bytes:  # noqa: ARG002
        """Describes what is served, and within which limits."""
        for _ in range(DESCRIBE_TRIES):
            served = self._now_served()
            data = self._description(served)
            if served.store.version == served.version:  # else whose digests these are is not known
                return data
        raise StoreChangedError(f"{served.store.name} was swapped while it was described; ask again")

    def _description(self, served: Served) -> bytes:
        description = messages.Description(
            name=served.store.name,
            version=served.version,
            identity=served.identity,
            tables=[messages.table_message(spec) for spec in _specs(served.store)],
            attachments=[messages.Attachment(name, value) for name, value in served.store.attachments.items()],
            tokens_max=self._limits.tokens_max,
            message_bytes_max=self._limits.message_bytes_max,
            build=served.store.build,
            instance=served.instance,
            common_build=served.store.common_build,
        )
        return encode(description)

    def lookup(self, call: Deadline, request: messages.LookupRequest) -> bytes:
        """Looks all keys of a request up, and answers in one message."""
        served = self._now_served(request.identity)
        wanted = self._wanted(served, request.tables)
        num_bytes = sum(len(each.keys) * _token_bytes(each.table) for each in wanted)
        if num_bytes + HEAD_BYTES > self._limits.message_bytes_max:
            most = self._limits.message_bytes_max - HEAD_BYTES
            raise Refusal(f"the rows take {num_bytes} bytes, one message holds {most}; call LookupStream", retry=False)
        with self._in_flight.holding(2 * num_bytes, call.peer):
            reply = served.reply([_shape(place, 0, each) for place, each in enumerate(wanted)])
            for part, each in enumerate(wanted):
                self._look_up(call, served, each, reply, part)
            return reply.message

    def lookup_stream(self, call: Deadline, request: messages.LookupRequest) -> Iterator[bytes]:
        """Looks the keys of a request up, part by part."""
        served = self._now_served(request.identity)
        wanted = self._wanted(served, request.tables)
        most = min(CHUNK_BYTES, self._limits.message_bytes_max - HEAD_BYTES)
        chunk_bytes = max([most, *(_token_bytes(each.table) for each in wanted)])
        with self._in_flight.holding(CHUNKS_MAX * chunk_bytes, call.peer):
            for place, each in enumerate(wanted):
                step, at = chunk_bytes // _token_bytes(each.table), 0
                for start in range(0, len(each.keys), step):
                    part = each._replace(keys=each.keys[start : start + step])
                    shape = _shape(place, at, part)
                    reply = served.reply([shape])
                    self._look_up(call, served, part, reply, 0)
                    yield reply.message
                    at += shape.num_units

    def rows(self, call: Deadline, request: messages.RowsRequest) -> Iterator[bytes]:
        """Reads rows by their ids, part by part."""
        served = self._now_served(request.identity)
        table = served.store[request.table]
        num_ids = len(request.row_ids) // ID_BYTES
        row_ids = _array(request.row_ids, num_ids, 1, f"row ids of table {table.spec.name}")[:, 0]
        self._check_tokens(-(-len(row_ids) // table.spec.local.num_heads))
        row_bytes = table.spec.row_bytes
        step = max(1, CHUNK_BYTES // row_bytes)
        with self._in_flight.holding(CHUNKS_MAX * step * row_bytes, call.peer):
            for start in range(0, len(row_ids), step):
                ids = row_ids[start : start + step]
                reply = served.reply([PartShape(0, start, len(ids), row_bytes, 0)])
                out = reply.rows[0].reshape(len(ids), row_bytes)
                self._in_turn(call, served, partial(table.rows, ids, out))
                yield reply.message

    def locate(self, call: Deadline, request: messages.LocateRequest) -> bytes:
        """Answers what would answer each key."""
        served = self._now_served(request.identity)
        ((table, keys, _),) = self._wanted(served, [request.keys or TableKeys()])
        sources = self._in_turn(call, served, partial(table.locate, keys))
        return encode(messages.LocateReply(sources.data))

    def placed(self, call: Deadline, request: messages.PlacedRequest) -> bytes:
        """Answers which entries the placement has."""
        served = self._now_served(request.identity)
        count = min(request.count, PLACED_KEYS_MAX)
        with self._in_flight.holding(2 * PLACED_BYTES + count * (ID_BYTES + 1), call.peer):
            found = self._in_turn(call, served, partial(served.store.placed_keys, request.table, request.start, count))
        return encode(messages.PlacedReply(found[0].data, found[1].astype("<i8").data))

    def stats(self, call: Deadline, request: messages.StatsRequest) -> bytes:  # noqa: ARG002
        """Returns the store's counts, and the server's own."""
        stats = self._now_served().store.stats() | {"remote": self._record()}
        return encode(messages.StatsReply(json.dumps(stats)))

    def _now_served(self, identity: Buffer | None = None) -> Served:
        """Returns the store to answer from; raises `FingerprintMismatchError` if a client means other tables."""
        store, served = self._store(), self._served
        if served is None or served.store is not store:
            tables = messages.identity_of(_specs(store))
            served = self._served = Served(store, 0, tables, secrets.randbits(32))
        if identity is not None and bytes(identity) != served.identity:
            raise FingerprintMismatchError(
                f"the client means tables of identity {bytes(identity).hex()[:16] or 'none'}, {store.name} has "
                f"{served.identity.hex()[:16]}: other tables are served now; connect again, "
                "and check which store is served"
            )
        version = store.version
        if version < 0:
            raise StoreChangedError(f"{store.name} is being swapped; ask again")
        return served._replace(version=version)

    def _wanted(self, served: Served, tables: Sequence[TableKeys]) -> list[Wanted]:
        """Returns what a request asks for, checked."""
        wanted = []
        for of_table in tables:
            table = served.store[of_table.table]
            num_orders = len(table.spec.orders)
            keys = _array(of_table.keys, of_table.num_tokens, num_orders, f"keys of table {of_table.table}")
            wanted.append(Wanted(table, keys, bool(of_table.compact)))
        self._check_tokens(sum(len(each.keys) for each in wanted))
        return wanted

    def _check_tokens(self, num_tokens: int) -> None:
        if num_tokens > self._limits.tokens_max:
            raise Refusal(
                f"{num_tokens} tokens in one request, at most {self._limits.tokens_max} may be; ask in several",
                retry=False,
            )

    def _look_up(self, call: Deadline, served: Served, wanted: Wanted, reply: RowsReply, part: int) -> None:
        """Looks keys [N, O] up into a part of a reply."""
        (table, keys, compact), spec = wanted, wanted.table.spec
        shape = len(keys), spec.num_heads, spec.row_bytes
        out = np.empty(shape, dtype=np.uint8) if compact else reply.rows[part].reshape(shape)
        sources = np.empty(keys.shape, dtype=np.uint8)
        self._in_turn(call, served, partial(table.lookup, keys, out, sources))
        if compact:
            entries, to = out.reshape(keys.size, -1), reply.rows[part].reshape(-1, spec.entry_bytes)
            np.take(entries, np.flatnonzero(keys >= 0), axis=0, out=to, mode="clip")  # which does not copy to's twice
        reply.count(part, hits_of(sources))

    def _in_turn(self, call: Deadline, served: Served, act: Callable[[], T]) -> T:
        """Returns what act does, in one of the workers' turns; raises `TimeoutError` if the call's time is up before it
        comes."""
        seconds = call.expires_at - time.monotonic()
        if call.is_over() or not self._workers.acquire(timeout=max(0.0, seconds)):
            raise TimeoutError("the call's time was up before its turn came; allow more time, or ask less often")
        try:
            done = act()
            if served.store.version != served.version:  # whose rows these are is not known
                raise StoreChangedError(f"{served.store.name} was swapped while it answered; ask again")
            return done
        except StoreNotReadyError as error:
            if self._store() is served.store:
                raise
            raise StoreChangedError(
                f"{served.store.name} was changed for another while it answered; ask again"
            ) from error
        finally:
            self._workers.release()


def _specs(store: Store) -> list[TableSpec]:
    return [table.spec for table in store.tables.values()]


def _shape(place: int, start: int, wanted: Wanted) -> PartShape:
    """Returns the part of a reply to keys [N, O] of a table, whose rows begin at a unit of the request: a token, or of
    compact ones a key."""
    table, keys, compact = wanted
    if compact:
        return PartShape(place, start, int((keys >= 0).sum()), table.spec.entry_bytes, keys.shape[1])
    return PartShape(place, start, len(keys), _token_bytes(table), keys.shape[1])


def _token_bytes(table: Table) -> int:
    return table.spec.num_heads * table.spec.row_bytes


def _array(data: Buffer, num_tokens: int, width: int, what: str) -> np.ndarray:
    """Returns packed little-endian int64 as an array [num_tokens, width] of our own;
    raises `ValueError` for other sizes."""
    if len(data) != num_tokens * width * ID_BYTES:
        raise ValueError(
            f"{what}: {len(data)} bytes, but [{num_tokens}, {width}] int64 take {num_tokens * width * ID_BYTES}; "
            "send all of them"
        )
    return np.frombuffer(data, dtype="<i8").astype(np.int64).reshape(num_tokens, width)
