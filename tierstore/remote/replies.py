"""A server's replies to one request of a client: rows go to the caller's buffers as they come, counts are summed.

Input: messages of lookup.proto. Output: rows in their buffers. Errors: `FormatError` for malformed messages, and for
rows that were not asked for, come twice, or are missing: a reply of another release must not pass for rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import add
from typing import Protocol, TypeVar

from ..errors import FormatError
from ..tiers.engine import Request
from .messages import LookupReply, Part
from .places import Place
from .rows_reply import PartShape, read_as_laid_out
from .wire import Buffer, Message, decode

DRAM, STATIC, NVME = range(3)  # of counts by order
COUNT_END = 1 << 48  # above what any request can ask for

M = TypeVar("M", bound=Message)


class Counted(Protocol):
    """What `ClientCounts` takes of answers to lookups by keys.

    hits: of each request: counts of DRAM, STATIC and NVME, by order. num_nvme_rows: rows that a server's disk answered.
    """

    requests: Sequence[Request]
    hits: list[list[list[int]]]
    num_bytes: int

    @property
    def num_nvme_rows(self) -> int: ...


class LastVersion:
    """Which version answered last: the next reply is expected to be of it. Threads write it at the same time: a wrong
    guess costs a walk over the reply's fields."""

    def __init__(self) -> None:
        self.version = 0, 0  # instance, and its number there


class Answer:
    """What one request is answered with. One thread at a time may use it."""

    def __init__(
        self,
        url: str,
        requests: Sequence[Request],
        places: Sequence[Place],
        shapes: Sequence[tuple[int, int]],
        last: LastVersion | None = None,
    ) -> None:
        """places: of each request's rows. shapes: how many orders a table has, and rows per key; (0, 0) by row ids.

        last: of the server, for answers that come in one message.
        """
        self.requests: Sequence[Request] = requests
        self.num_bytes = 0
        self.version = 0, 0  # of what instance, and its number there
        self.hits = [[[0] * num_orders for _ in (DRAM, STATIC, NVME)] for num_orders, _ in shapes]
        self._url, self._places, self._last = url, places, last
        self._rows_per_key = [rows_per_key for _, rows_per_key in shapes]
        self._filled = [0] * len(requests)

    @property
    def is_by_key(self) -> bool:
        """Whether keys were asked for, and not row ids."""
        return any(self._rows_per_key)

    @property
    def num_nvme_rows(self) -> int:
        """See `Counted`."""
        return sum(sum(hits[NVME]) * num_rows for hits, num_rows in zip(self.hits, self._rows_per_key, strict=True))

    def take(self, data: bytes) -> None:
        """Puts a reply's rows where they belong; raises `FormatError` if they belong nowhere."""
        if self._last is not None and not self.num_bytes and self._took_expected(data, *self._last.version):
            return
        reply = decoded(LookupReply, data, self._url)
        version = reply.instance, reply.version
        if self.num_bytes and version != self.version:
            raise self._wrong(f"version {reply.version} within an answer of version {self.version[1]}")
        self.version = version
        if self._last is not None:
            self._last.version = version
        for part in reply.parts:
            if part.table >= len(self._places):
                raise self._wrong(f"table {part.table} of {len(self._places)}")
            self._take_part(part)

    def _took_expected(self, data: bytes, instance: int, number: int) -> bool:
        """Takes a reply that is the whole answer, byte for byte in the form in which servers write it;
        returns whether it was one."""
        shapes = [
            PartShape(table, 0, place.num_bytes // place.unit_bytes, place.unit_bytes, len(hits[DRAM]))
            for table, (place, hits) in enumerate(zip(self._places, self.hits, strict=True))
        ]
        parts = read_as_laid_out(data, number, instance, tuple(shapes))
        if parts is None:
            return False
        self.version = instance, number
        for table, (rows, counts) in enumerate(parts):
            self.hits[table] = [list(each) for each in counts]
            self._places[table].put(0, rows)
            self._filled[table] = len(rows)
            self.num_bytes += len(rows)
        return True

    def _take_part(self, part: Part) -> None:
        place, start = self._places[part.table], self._filled[part.table]
        end = start + len(part.rows)
        if part.start * place.unit_bytes != start or end > place.num_bytes or end % place.unit_bytes:
            raise self._wrong(
                f"{len(part.rows)} bytes from {part.start} on of table {part.table}, after {start} of {place.num_bytes}"
            )
        for total, counts in zip(
            self.hits[part.table], (part.dram_hits, part.static_hits, part.nvme_hits), strict=True
        ):
            if len(counts) != len(total) or max(counts, default=0) >= COUNT_END:
                raise self._wrong(f"counts {counts} of {len(total)} orders")
            total[:] = map(add, total, counts)
        place.put(start, part.rows)
        self._filled[part.table] = end
        self.num_bytes += len(part.rows)

    def check_whole(self) -> None:
        """Raises `FormatError` if rows are missing."""
        missing = sum(place.num_bytes for place in self._places) - sum(self._filled)
        if missing:
            raise self._wrong(f"the rows are {missing} bytes short")

    def _wrong(self, what: str) -> FormatError:
        return FormatError(f"{self._url} answered what was not asked: {what}; client and server differ: update both")


def decoded(kind: type[M], data: Buffer, url: str) -> M:
    """Returns a server's message; raises `FormatError` if it is malformed."""
    try:
        return decode(kind, data)
    except ValueError as error:
        raise FormatError(f"{url} answered what is no {kind.__name__} ({error}); is that a tierstore?") from error
