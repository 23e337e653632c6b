"""A `LookupReply` whose bytes are laid out before its rows are there: these are looked up into the message itself.

A reply that is laid out so is read in the same way, without a walk over its fields.

Input: the version that answers, and how many rows each part will have; then the rows, written into `rows` by whoever
looks them up, and counts. Output: the message. It equals that of `wire.encode`, but that all counts of a part are
varints of one length, which protobuf's parsers take: their bytes must be known before the counts are.

    version | PARTS size, table, start, ROWS size | rows ... | HITS size | counts | ... | instance

Why: to encode rows that lie elsewhere copies them once more, which took a fifth of a large reply's time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .. import kernels
from .messages import LookupReply, Part
from .wire import tag_of, varint

LAYOUTS_MAX = 256  # that are remembered: requests are of few shapes,
REMEMBERED_PARTS_MAX = 64  # of few parts each: those of thousands would stay for good, and nobody counts their bytes
HITS_MAX, HITS_KEYS_MAX = 256, 8  # counts that are remembered, of so few keys that their tiers come again

# The tier of each number in `kernels.SOURCES`, as a byte.
_DRAM, _STATIC, _NVME = b"dsn"
_TIER_OF = {"resident": _DRAM, "recency": _DRAM, "static": _STATIC, "record": _NVME, "pages": _NVME}
_TIERS = bytes(_TIER_OF.get(source, 0) for source in kernels.SOURCES).ljust(256, b"\0")

_VERSION, _PARTS, _INSTANCE = (tag_of(LookupReply, name) for name in ("version", "parts", "instance"))
_TABLE, _START, _ROWS = (tag_of(Part, name) for name in ("table", "start", "rows"))
_HITS = [tag_of(Part, name) for name in ("dram_hits", "static_hits", "nvme_hits")]


class PartShape(NamedTuple):
    """A part to come: `num_units` tokens of a table (or rows, by their ids), each of `unit_bytes`, from `start` on.

    table: its place in the request. num_orders: of its counts; 0: it has none.
    """

    table: int
    start: int
    num_units: int
    unit_bytes: int
    num_orders: int


class _Place(NamedTuple):
    """Where a part lies in the message. count_bytes: of one count. sizes: the varint before each tier's counts."""

    rows_start: int
    rows_end: int
    count_bytes: int
    sizes: bytes


class RowsReply:
    """A reply under way, used by one thread. It is whole once all rows, and all counts, were written.

    Attributes:
        message: The reply's bytes.
        rows: Of each part, uint8 [num_units * unit_bytes], its place in the message.
    """

    def __init__(self, version: int, instance: int, parts: Sequence[PartShape]) -> None:
        lay_out = _remembered if len(parts) <= REMEMBERED_PARTS_MAX else _laid_out
        fixed, self._places, num_bytes = lay_out(version, instance, tuple(parts))
        self.message, whole = kernels.fresh_bytes(num_bytes)
        self._view = whole.data
        for start, data in fixed:
            self._view[start : start + len(data)] = data
        self.rows: list[np.ndarray] = [whole[place.rows_start : place.rows_end] for place in self._places]

    def count(self, part: int, hits: Sequence[Sequence[int]]) -> None:
        """Writes a part's counts: [dram, static, nvme], each by order, none above its tokens."""
        _, at, count_bytes, sizes = self._places[part]
        pieces = [tag + sizes + _of_length(counts, count_bytes) for tag, counts in zip(_HITS, hits, strict=True)]
        data = b"".join(pieces)
        self._view[at : at + len(data)] = data


def hits_of(sources: np.ndarray) -> Sequence[Sequence[int]]:
    """Returns how many keys dram answered, its static set, and nvme, by order. sources: uint8 [N, O], numbers in
    `kernels.SOURCES`."""
    count = _hits_remembered if sources.size <= HITS_KEYS_MAX else _hits_of
    return count(sources.tobytes().translate(_TIERS), sources.shape[1])


def _hits_of(tiers: bytes, num_orders: int) -> Sequence[Sequence[int]]:
    by_order = [tiers[order::num_orders] for order in range(num_orders)]
    static = [column.count(_STATIC) for column in by_order]
    dram = [column.count(_DRAM) + in_set for column, in_set in zip(by_order, static, strict=True)]
    return dram, static, [column.count(_NVME) for column in by_order]


_hits_remembered = functools.lru_cache(HITS_MAX)(_hits_of)


def _laid_out(
    version: int, instance: int, parts: tuple[PartShape, ...]
) -> tuple[list[tuple[int, bytes]], list[_Place], int]:
    """Returns what is known of a message before its rows are, and from which byte on; its parts' places; its bytes."""
    head = _VERSION + varint(version) if version else b""
    fixed, at = [(0, head)], len(head)
    places: list[_Place] = []
    for table, start, num_units, unit_bytes, num_orders in parts:
        rows_bytes, count_bytes = num_units * unit_bytes, len(varint(num_units))
        sizes = varint(num_orders * count_bytes)
        tail_bytes = len(_HITS) * (1 + len(sizes) + num_orders * count_bytes) if num_orders else 0
        head = _TABLE + varint(table) if table else b""
        if start:
            head += _START + varint(start)
        if rows_bytes:
            head += _ROWS + varint(rows_bytes)
        head = _PARTS + varint(len(head) + rows_bytes + tail_bytes) + head
        fixed.append((at, head))
        at += len(head)
        places.append(_Place(at, at + rows_bytes, count_bytes, sizes))
        at += rows_bytes + tail_bytes
    end = _INSTANCE + varint(instance) if instance else b""
    fixed.append((at, end))
    return fixed, places, at + len(end)


_remembered = functools.lru_cache(LAYOUTS_MAX)(_laid_out)


def read_as_laid_out(
    data: bytes, version: int, instance: int, parts: tuple[PartShape, ...]
) -> list[tuple[memoryview, list[bytes]]] | None:
    """Returns each part's rows and [dram, static, nvme] counts by order, of a reply that is laid out as a `RowsReply`
    of these parts; None for any other reply, which `wire.decode` reads, and for parts of 128 units or more.
    """
    if not parts or len(parts) > REMEMBERED_PARTS_MAX:
        return None
    fixed, places, num_bytes = _remembered(version, instance, parts)
    if len(data) != num_bytes:
        return None
    for start, piece in fixed:
        if not data.startswith(piece, start):
            return None
    view, found = memoryview(data), []
    for (rows_start, rows_end, count_bytes, sizes), shape in zip(places, parts, strict=True):
        if count_bytes != 1 or not shape.num_orders:
            return None
        counts, at = [], rows_end
        for tag in _HITS:
            at += len(tag) + len(sizes)
            counts.append(data[at : at + shape.num_orders])
            if not data.startswith(tag + sizes, at - len(tag) - len(sizes)) or not counts[-1].isascii():
                return None
            at += shape.num_orders
        found.append((view[rows_start:rows_end], counts))
    return found


def _of_length(values: Sequence[int], count_bytes: int) -> bytes:
    """Returns varints of `count_bytes` each, also those that a shorter one would hold."""
    if count_bytes == 1:
        return bytes(values)
    last = count_bytes - 1
    return bytes(
        value >> 7 * group & 0x7F | (0x80 if group < last else 0) for value in values for group in range(count_bytes)
    )
