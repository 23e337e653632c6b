"""A request whose shape is remembered has the bytes of `encode`, and reads as `decode` reads it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from tierstore.remote.lookup_request import SHAPES_MAX, RequestReader, write_request
from tierstore.remote.messages import LookupRequest, TableKeys
from tierstore.remote.wire import decode, encode

IDENTITY = bytes(range(32))
TABLES = [
    [],
    [TableKeys("layers.1", 1, bytes(range(24)))],
    [TableKeys("layers.1", 1, bytes(range(24)), 1)],
    [TableKeys("", 0, b"")],
    [TableKeys("ä" * 300, 300, bytes(2400)), TableKeys("b", 1, b"12345678", 1)],
]


def same(found: LookupRequest, expected: LookupRequest) -> bool:
    """Whether two requests say the same, whatever buffers their bytes are in."""
    return encode(found) == encode(expected) and bytes(found.identity) == bytes(expected.identity)


def read_or_refused(read: Callable[[bytes], LookupRequest], data: bytes) -> tuple[bytes, str]:
    """What a reader makes of bytes, encoded again, or what it says of them."""
    try:
        return encode(read(data)), ""
    except ValueError as error:
        return b"", str(error)


@pytest.mark.parametrize("tables", TABLES, ids=range(len(TABLES)))
@pytest.mark.parametrize("identity", [b"", IDENTITY])
def test_a_request_is_written_as_encode_writes_it_and_read_again(identity: bytes, tables: list[TableKeys]) -> None:
    data, reader = write_request(identity, tables), RequestReader()
    assert data == encode(LookupRequest(identity, tables))
    for _ in range(3):  # the first is decoded, the others may be known
        assert same(reader.read(data), LookupRequest(identity, tables))


def test_a_known_shape_gives_each_request_its_own_keys() -> None:
    reader = RequestReader()
    for byte in b"abc":
        request = LookupRequest(IDENTITY, [TableKeys("t", 1, bytes([byte] * 8))])
        assert bytes(reader.read(encode(request)).tables[0].keys) == bytes([byte] * 8)


@pytest.mark.parametrize("at", range(len(write_request(IDENTITY, TABLES[1]))))
def test_after_a_known_request_any_damaged_one_is_read_as_decode_reads_it(at: int) -> None:
    good, reader = write_request(IDENTITY, TABLES[1]), RequestReader()
    for _ in range(2):
        reader.read(good)
    for bit in range(8):
        data = bytearray(good)
        data[at] ^= 1 << bit
        expected = read_or_refused(partial(decode, LookupRequest), bytes(data))
        found = read_or_refused(reader.read, bytes(data))
        assert found == expected
        assert same(reader.read(good), LookupRequest(IDENTITY, TABLES[1]))


def test_requests_in_another_order_of_fields_are_decoded_each_time() -> None:
    tables = encode(LookupRequest(tables=TABLES[1]))
    data, reader = tables + encode(LookupRequest(IDENTITY)), RequestReader()
    for _ in range(2):
        assert same(reader.read(data), LookupRequest(IDENTITY, TABLES[1]))
    assert not reader._known


def test_what_is_remembered_of_hostile_clients_is_bounded() -> None:
    reader = RequestReader()
    for length in range(2 * SHAPES_MAX):
        reader.read(write_request(IDENTITY, [TableKeys("t" * 100, 1, bytes(length))]))
        assert len(reader._known) <= SHAPES_MAX
    before = len(reader._known)
    reader.read(write_request(IDENTITY, [TableKeys("t" * 5000, 1, bytes(8))]))
    reader.read(write_request(bytes(5000), [TableKeys("t", 1, bytes(8))]))
    assert len(reader._known) == before
