"""A server's replies to one request of a client: rows go to the caller's buffers as they come, counts are summed.

Input: messages of lookup.proto. Output: rows in their buffers. Errors: `FormatError` for malformed messages, and for
rows that were not asked for, come twice, or are missing: a reply of another release must not pass for rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import add
from typing import TypeVar

from ..errors import FormatError
from ..tiers.engine import Request
from .messages import LookupReply, Part
from .wire import Buffer, Message, decode

DRAM, STATIC, NVME = range(3)  # of counts by order
COUNT_END = 1 << 48  # above what any request can ask for

M = TypeVar("M", bound=Message)


class Answer:
    """What one request is answered with. One thread at a time may use it."""

    def __init__(self, url: str, requests: Sequence[Request], unit_bytes: Sequence[int], orders: Sequence[int]) -> None:
        """unit_bytes: of a token, or of a row if ids are asked for; orders: how many each table has, 0 if ids are."""
        self.requests, self.num_bytes = requests, 0
        self.version = 0, 0  # of what instance, and its number there
        self.hits = [[[0] * num_orders for _ in (DRAM, STATIC, NVME)] for num_orders in orders]
        self._url, self._unit_bytes = url, unit_bytes
        self._outs = [out.reshape(-1).data for _, _, out in requests]
        self._filled = [0] * len(requests)

    def take(self, data: bytes) -> None:
        """Puts a reply's rows where they belong; raises `FormatError` if they belong nowhere."""
        reply = decoded(LookupReply, data, self._url)
        version = reply.instance, reply.version
        if self.num_bytes and version != self.version:
            raise self._wrong(f"version {reply.version} within an answer of version {self.version[1]}")
        self.version = version
        for part in reply.parts:
            if part.table >= len(self._outs):
                raise self._wrong(f"table {part.table} of {len(self._outs)}")
            self._take_part(part)

    def _take_part(self, part: Part) -> None:
        place, out = part.table, self._outs[part.table]
        start, end = self._filled[place], self._filled[place] + len(part.rows)
        if part.start * self._unit_bytes[place] != start or end > len(out):
            raise self._wrong(
                f"{len(part.rows)} bytes from {part.start} on of table {place}, after {start} of {len(out)}"
            )
        for total, counts in zip(self.hits[place], (part.dram_hits, part.static_hits, part.nvme_hits), strict=True):
            if len(counts) != len(total) or max(counts, default=0) >= COUNT_END:
                raise self._wrong(f"counts {counts} of {len(total)} orders")
            total[:] = map(add, total, counts)
        out[start:end] = part.rows
        self._filled[place] = end
        self.num_bytes += len(part.rows)

    def check_whole(self) -> None:
        """Raises `FormatError` if rows are missing."""
        missing = sum(map(len, self._outs)) - sum(self._filled)
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
