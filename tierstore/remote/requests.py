"""What a client asks a server: lookups cut into requests that the server's limits allow, each ready to be sent.

Input: keys or row ids, and the buffers for their rows. Output: *attempts*: one request each, and where its answer goes;
each may be made again. Errors: `FormatError` if an answer is not what was asked for, and what the connection raises.

Shapes: N tokens, O orders, H rows per key.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import FormatError
from ..spec import TableSpec
from ..store.arguments import table_ids
from ..tiers.engine import Request
from . import messages
from .channel import Connection
from .lookup_request import write_request
from .messages import Description, TableKeys
from .places import Apart, Place, place_of
from .replies import Answer, LastVersion, decoded
from .wire import encode

UNARY_BYTES_MAX = 256 << 10  # of rows; beyond, they are streamed
HEAD_BYTES = 4096  # of a message, at most, beside its keys or rows
ID_BYTES = 8  # of a key or a row id

Call = Callable[[str, bytes, float], bytes]  # a method's one answer to a request, by some time


@dataclass(frozen=True)
class Attempt:
    """One request. method: of the service; answer: makes what takes the answer; is_small: that is one message."""

    method: str
    request: bytes
    answer: Callable[[], Answer]
    is_small: bool

    def ask(self, connection: Connection, until: float) -> Answer:
        """Returns the whole answer, which must be there by `until` (of `time.monotonic`). Blocks on the network."""
        answer = self.answer()
        if self.is_small:
            answer.take(connection.unary(self.method, self.request, until))
        else:
            connection.stream(self.method, self.request, until, answer.take)
        answer.check_whole()
        return answer


class Requests:
    """Makes requests of one server. Any thread may call."""

    def __init__(self, url: str, specs: Sequence[TableSpec], description: Description) -> None:
        """specs: the engine's; on the wire, row ids and the keys of plain tables are the table's own.

        url: of the server; description: its own, which states its limits.
        """
        self._url, self._specs, self._last = url, specs, LastVersion()
        self.identity = bytes(description.identity)
        self.tokens_max = max(1, description.tokens_max)
        self._unary_bytes_max = min(UNARY_BYTES_MAX, description.message_bytes_max - HEAD_BYTES)
        self._ids_max = max(1, (description.message_bytes_max - HEAD_BYTES) // ID_BYTES)

    def lookup(self, requests: Sequence[Request], *, compact: Container[int] = ()) -> list[Attempt]:
        """Returns what asks for a lookup in one or more tables. The tokens of each out may lie apart.

        compact: tables of which the answer leaves the rows of sentinels out, and their places alone.
        """
        return [self._attempt_lookup(piece, compact) for piece in self._pieces(requests)]

    def rows(self, index: int, row_ids: np.ndarray, out: np.ndarray, where: np.ndarray | None = None) -> list[Attempt]:
        """Returns what asks for rows by their ids, int64 [R], into out, uint8 [R, row_bytes].

        where: of each id, int64 [R], the index of its row in out, which may be of any length; None: in order.
        """
        step = min(self._ids_max, self.tokens_max * self._specs[index].num_heads)
        attempts = []
        for start in range(0, len(row_ids), step):
            part = slice(start, start + step)
            place = Place(out[part], out.shape[1]) if where is None else Apart(out, (where[part],))
            attempts.append(self._attempt_rows(self._specs[index], row_ids[part], out, place))
        return attempts

    def locate(self, call: Call, index: int, keys: np.ndarray, sources: np.ndarray, until: float) -> None:
        """Asks what would answer keys, int64 [N, O], and writes it to sources, uint8 [N, O]."""
        for start, end in self._token_ranges(index, len(keys)):
            request = encode(messages.LocateRequest(self.identity, self._table_keys(index, keys[start:end])))
            data = call("Locate", request, until)
            found = decoded(messages.LocateReply, data, self._url).sources
            if len(found) != keys[start:end].size:
                raise FormatError(
                    f"{self._url} answered {len(found)} sources of {keys[start:end].size} keys; client and server "
                    "differ: update both"
                )
            sources[start:end] = np.frombuffer(found, dtype=np.uint8).reshape(-1, keys.shape[1])

    def _attempt_lookup(self, piece: Sequence[Request], compact: Container[int]) -> Attempt:
        tables = [self._table_keys(index, keys, compact=index in compact) for index, keys, _ in piece]
        specs = [self._specs[index] for index, _, _ in piece]

        def answer() -> Answer:
            places = [
                place_of(request, spec.num_heads * spec.row_bytes, compact=request[0] in compact)
                for request, spec in zip(piece, specs, strict=True)
            ]
            shapes = [(len(spec.orders), spec.rows_per_key) for spec in specs]
            return Answer(self._url, piece, places, shapes, self._last if is_small else None)

        is_small = sum([out.nbytes for _, _, out in piece]) <= self._unary_bytes_max
        request = write_request(self.identity, tables)
        return Attempt("Lookup" if is_small else "LookupStream", request, answer, is_small)

    def _attempt_rows(self, spec: TableSpec, row_ids: np.ndarray, out: np.ndarray, place: Place) -> Attempt:
        request = encode(messages.RowsRequest(self.identity, spec.name, _packed(_on_wire(spec, row_ids))))

        def answer() -> Answer:
            return Answer(self._url, [(0, row_ids, out)], [place], [(0, 0)])

        return Attempt("Rows", request, answer, is_small=False)

    def _pieces(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """Yields a lookup in parts that the server's limits allow, each of one or more tables."""
        if len(requests) == 1 and 0 < len(requests[0][1]) <= self._tokens_at_once(requests[0][0]):
            yield [requests[0]]  # as nearly all are
            return
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
        step = self._tokens_at_once(index)
        for start in range(0, num_tokens, step):
            yield start, min(start + step, num_tokens)

    def _tokens_at_once(self, index: int) -> int:
        return max(1, min(self.tokens_max, self._ids_max // len(self._specs[index].orders)))

    def _table_keys(self, index: int, keys: np.ndarray, *, compact: bool = False) -> TableKeys:
        spec = self._specs[index]
        return TableKeys(spec.name, len(keys), _packed(_on_wire(spec, keys) if spec.is_plain else keys), int(compact))


def _on_wire(spec: TableSpec, row_ids: np.ndarray) -> np.ndarray:
    """Returns an engine's row ids as the table's own."""
    return table_ids(spec.public or spec, row_ids)


def _packed(ids: np.ndarray) -> memoryview:
    """Returns int64s as little-endian bytes, without a copy if they lie so."""
    return np.ascontiguousarray(ids, dtype="<i8").reshape(-1).view(np.uint8).data
