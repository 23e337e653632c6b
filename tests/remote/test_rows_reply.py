"""A reply that its rows are looked up into is the message that `encode` makes of the same rows, and protobuf's."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import pytest

from tierstore import kernels
from tierstore.remote.messages import LookupReply, Part
from tierstore.remote.rows_reply import PartShape, RowsReply, hits_of, read_as_laid_out
from tierstore.remote.wire import decode, encode


def filled(version: int, instance: int, shapes: list[PartShape], seed: int = 0) -> tuple[bytes, LookupReply]:
    """A reply put together in place, and the message that it must be."""
    rng = np.random.default_rng(seed)
    reply = RowsReply(version, instance, shapes)
    parts = []
    for number, shape in enumerate(shapes):
        rows = rng.integers(0, 256, shape.num_units * shape.unit_bytes, dtype=np.uint8)
        hits = rng.integers(0, shape.num_units + 1, (3, shape.num_orders)).tolist()
        hits[0][:1] = [shape.num_units] * min(1, shape.num_orders)
        reply.rows[number][:] = rows
        if shape.num_orders:
            reply.count(number, hits)
        parts.append(Part(shape.table, shape.start, rows.tobytes(), *hits))
    return reply.message, LookupReply(version, parts, instance)


SHAPES = [
    [PartShape(0, 0, 1, 6336, 3)],
    [PartShape(0, 0, 127, 40, 3), PartShape(1, 0, 5, 4, 1)],
    [PartShape(3, 2**40, 7, 300, 2)],
    [PartShape(0, 0, 0, 300, 2)],
    [PartShape(0, 9, 6, 264, 0)],
    [PartShape(0, 0, 0, 264, 0)],
    [],
]


@pytest.mark.parametrize("shapes", SHAPES, ids=range(len(SHAPES)))
@pytest.mark.parametrize(("version", "instance"), [(0, 0), (1, 2**32 - 1), (300, 1)])
def test_a_reply_of_few_tokens_is_byte_for_byte_what_encode_makes(
    shapes: list[PartShape], version: int, instance: int
) -> None:
    message, expected = filled(version, instance, shapes)
    assert message == encode(expected)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 500])
def test_keys_are_counted_by_the_tier_that_answered_them(num_tokens: int) -> None:
    rng = np.random.default_rng(num_tokens)
    tiers = [("resident", "static", "recency"), ("static",), ("record", "pages")]
    for _ in range(20):
        sources = rng.integers(0, len(kernels.SOURCES), (num_tokens, 3), dtype=np.uint8)
        numbers = [[kernels.SOURCES.index(source) for source in tier] for tier in tiers]
        expected = [np.isin(sources, tier).sum(axis=0).tolist() for tier in numbers]
        assert [list(counts) for counts in hits_of(sources)] == expected


KNOWN = [PartShape(0, 0, 1, 6, 3), PartShape(1, 0, 3, 4, 1)]


def test_a_reply_of_the_expected_shape_and_version_is_read_without_a_walk_over_its_fields() -> None:
    message, expected = filled(5, 2**31, KNOWN)
    found = read_as_laid_out(message, 5, 2**31, tuple(KNOWN))
    assert found is not None
    for (rows, counts), part in zip(found, expected.parts, strict=True):
        assert bytes(rows) == part.rows
        assert [list(each) for each in counts] == [part.dram_hits, part.static_hits, part.nvme_hits]
    for version, instance in ((6, 2**31), (5, 1), (0, 0)):
        assert read_as_laid_out(message, version, instance, tuple(KNOWN)) is None
    assert read_as_laid_out(message, 5, 2**31, tuple(KNOWN[:1])) is None
    assert read_as_laid_out(message + b"\0", 5, 2**31, tuple(KNOWN)) is None


def test_a_damaged_reply_is_read_as_decode_reads_it_or_left_to_decode() -> None:
    message, _ = filled(5, 9, KNOWN)
    for at in range(len(message)):
        data = bytearray(message)
        data[at] ^= 0x81
        found = read_as_laid_out(bytes(data), 5, 9, tuple(KNOWN))
        if found is not None:  # the bytes of a row: nothing else may differ
            reply = decode(LookupReply, bytes(data))
            assert (reply.version, reply.instance) == (5, 9)
            assert [bytes(rows) for rows, _ in found] == [bytes(part.rows) for part in reply.parts]
            counts = [[part.dram_hits, part.static_hits, part.nvme_hits] for part in reply.parts]
            assert [[list(each) for each in of_part] for _, of_part in found] == [
                [list(each) for each in of_part] for of_part in counts
            ]


@pytest.mark.parametrize("num_tokens", [128, 16_383, 16_384, 2_097_152])
def test_counts_of_many_tokens_are_read_as_they_were_written(num_tokens: int) -> None:
    shapes = [PartShape(1, 70_000, num_tokens, 2, 3), PartShape(0, 0, num_tokens, 1, 1)]
    message, expected = filled(5, 6, shapes, seed=num_tokens)
    reply = decode(LookupReply, message)
    assert (reply.version, reply.instance) == (5, 6)
    for part, wanted in zip(reply.parts, expected.parts, strict=True):
        assert (part.table, part.start, bytes(part.rows)) == (wanted.table, wanted.start, wanted.rows)
        assert part.dram_hits == wanted.dram_hits
        assert part.static_hits == wanted.static_hits
        assert part.nvme_hits == wanted.nvme_hits


def test_rows_lie_in_the_message_and_keep_it_alive() -> None:
    reply = RowsReply(1, 2, [PartShape(0, 0, 4, 1000, 1)])
    rows, message = reply.rows[0], reply.message
    rows[:] = 7
    reply.count(0, [[4], [0], [0]])
    assert bytes(decode(LookupReply, message).parts[0].rows) == bytes([7]) * 4000
    del reply, message
    gc.collect()
    rows[:] = 8
    assert rows.sum() == 8 * 4000


def test_replies_of_thousands_of_parts_leave_nothing_behind() -> None:
    """A client may ask for 4,096 tables in one request, in as many shapes as it likes."""
    RowsReply(1, 2, [])
    tracemalloc.start()
    try:
        for num_tokens in range(3):
            RowsReply(1, 2, [PartShape(table, 0, num_tokens, 4, 2) for table in range(4096)])
        gc.collect()
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 1 << 20


def test_fresh_bytes_are_what_their_array_was_given() -> None:
    data, memory = kernels.fresh_bytes(1000)
    assert type(data) is bytes
    assert (len(data), memory.shape, memory.dtype) == (1000, (1000,), np.uint8)
    memory[:] = np.arange(1000) % 251
    assert data == bytes(i % 251 for i in range(1000))
    assert np.shares_memory(memory, np.frombuffer(data, dtype=np.uint8))
    assert kernels.fresh_bytes(0)[0] == b""
    with pytest.raises(ValueError, match="below 0"):
        kernels.fresh_bytes(-1)
    with pytest.raises(MemoryError):
        kernels.fresh_bytes(2**62)
