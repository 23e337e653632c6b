"""What a client asks a server: lookups cut into requests that the server's limits allow, each ready to be sent.

Input: keys or row ids, and the buffers for their rows. Output: *attempts*, functions that send one request, by some
time (of `time.monotonic`), and return its `Answer`; each may be called again. Errors: `FormatError` if an answer is not
what was asked for, and what the connection raises.

Shapes: N tokens, O orders, H rows per key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from ..errors import FormatError
from ..spec import TableSpec
from ..store.arguments import table_ids
from ..tiers.engine import Request
from . import messages
from .channel import Connection
from .messages import Description, TableKeys
from .replies import Answer, decoded
from .wire import encode

UNARY_BYTES_MAX = 256 << 10  # of rows; beyond, they are streamed
HEAD_BYTES = 4096  # of a message, at most, beside its keys or rows
ID_BYTES = 8  # of a key or a row id

Attempt = Callable[[float], Answer]


class Requests:
    """Makes requests of one server. Any thread may call."""

    def __init__(self, connection: Connection, specs: Sequence[TableSpec], description: Description) -> None:
        """specs: the engine's; on the wire, row ids and the keys of plain tables are the table's own.

        description: of the server, which states its limits.
        """
        self._connection, self._specs = connection, specs
        self.identity = bytes(description.identity)
        self.tokens_max = max(1, description.tokens_max)
        self._unary_bytes_max = min(UNARY_BYTES_MAX, description.message_bytes_max - HEAD_BYTES)
        self._ids_max = max(1, (description.message_bytes_max - HEAD_BYTES) // ID_BYTES)

    def lookup(self, requests: Sequence[Request]) -> list[Attempt]:
        """Returns what asks for a lookup in one or more tables."""
        return [self._attempt_lookup(piece) for piece in self._pieces(requests)]

    def rows(self, index: int, row_ids: np.ndarray, out: np.ndarray) -> list[Attempt]:
        """Returns what asks for rows by their ids, int64 [R], into out, uint8 [R, row_bytes]."""
        step = min(self._ids_max, self.tokens_max * self._specs[index].num_heads)
        return [
            self._attempt_rows(self._specs[index], row_ids[start : start + step], out[start : start + step])
            for start in range(0, len(row_ids), step)
        ]

    def locate(self, index: int, keys: np.ndarray, sources: np.ndarray, until: float) -> None:
        """Asks what would answer keys, int64 [N, O], and writes it to sources, uint8 [N, O]."""
        connection = self._connection
        for start, end in self._token_ranges(index, len(keys)):
            request = encode(messages.LocateRequest(self.identity, self._table_keys(index, keys[start:end])))
            data = connection.tried(partial(connection.unary, "Locate", request, until), until)
            found = decoded(messages.LocateReply, data, connection.url).sources
            if len(found) != keys[start:end].size:
                raise FormatError(
                    f"{connection.url} answered {len(found)} sources of {keys[start:end].size} keys; client and server "
                    "differ: update both"
                )
            sources[start:end] = np.frombuffer(found, dtype=np.uint8).reshape(-1, keys.shape[1])

    def _attempt_lookup(self, piece: Sequence[Request]) -> Attempt:
        request = encode(
            messages.LookupRequest(self.identity, [self._table_keys(index, keys) for index, keys, _ in piece])
        )
        specs = [self._specs[index] for index, _, _ in piece]
        token_bytes = [spec.num_heads * spec.row_bytes for spec in specs]
        orders = [len(spec.orders) for spec in specs]
        is_small = sum(out.nbytes for _, _, out in piece) <= self._unary_bytes_max

        def ask(until: float) -> Answer:
            answer = Answer(self._connection.url, piece, token_bytes, orders)
            if is_small:
                answer.take(self._connection.unary("Lookup", request, until))
            else:
                self._connection.stream("LookupStream", request, until, answer.take)
            answer.check_whole()
            return answer

        return ask

    def _attempt_rows(self, spec: TableSpec, row_ids: np.ndarray, out: np.ndarray) -> Attempt:
        request = encode(messages.RowsRequest(self.identity, spec.name, _packed(_on_wire(spec, row_ids))))

        def ask(until: float) -> Answer:
            answer = Answer(self._connection.url, [(0, row_ids, out)], [spec.row_bytes], [0])
            self._connection.stream("Rows", request, until, answer.take)
            answer.check_whole()
            return answer

        return ask

    def _pieces(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """Yields a lookup in parts that the server's limits allow, each of one or more tables."""
        piece: list[Request] = []
        num_tokens = num_ids = 0
        for index, keys, out in requests:
            for start, end in self._token_ranges(index, len(keys)):
                part = keys[start:end]
                if piece and (num_tokens + len(part) > self.tokens_max or num_ids + part.size > self._ids_max):
                    yield piece
                    piece, num_tokens, num_ids = [], 0, 0
                piece.append((index, part, out[start:end]))
                num_tokens += len(part)
                num_ids += part.size
        if piece:
            yield piece

    def _token_ranges(self, index: int, num_tokens: int) -> Iterator[tuple[int, int]]:
        step = max(1, min(self.tokens_max, self._ids_max // len(self._specs[index].orders)))
        for start in range(0, num_tokens, step):
            yield start, min(start + step, num_tokens)

    def _table_keys(self, index: int, keys: np.ndarray) -> TableKeys:
        spec = self._specs[index]
        return TableKeys(spec.name, len(keys), _packed(_on_wire(spec, keys) if spec.is_plain else keys))


def _on_wire(spec: TableSpec, row_ids: np.ndarray) -> np.ndarray:
    """Returns an engine's row ids as the table's own."""
    return table_ids(spec.public or spec, row_ids)


def _packed(ids: np.ndarray) -> memoryview:
    """Returns int64s as little-endian bytes, without a copy if they lie so."""
    return np.ascontiguousarray(ids, dtype="<i8").reshape(-1).view(np.uint8).data
