"""Our messages are protobuf's: what its own library writes we read, and the other way round;
what is damaged is refused."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import random
import subprocess
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.repository import REPOSITORY

from tierstore.remote import messages
from tierstore.remote.messages import Description, LookupReply, LookupRequest, Part, TableKeys, TableMessage
from tierstore.remote.rows_reply import PartShape, RowsReply
from tierstore.remote.wire import BYTES, TEXT, UINT, UINTS, Message, decode, encode, varint
from tierstore.spec import TableSpec

PROTO = REPOSITORY / "tierstore" / "remote" / "lookup.proto"
NAMES = {"TableMessage": "Table"}  # ours, where it is not the one of lookup.proto
KINDS = [
    kind
    for kind in vars(messages).values()
    if isinstance(kind, type) and issubclass(kind, Message) and kind is not Message
]


def filled(kind: type[Message], seed: int) -> Message:
    """A message with every field set, small and large."""
    rng = random.Random(seed)
    message = kind()
    for number, (name, of) in kind.FIELDS.items():
        uint_end = 2**32 if (kind, name) == (Part, "table") else 2**64
        if of == UINT:
            value: Any = rng.choice([1, 127, 128, 300, uint_end - 1])
        elif of == UINTS:
            value = [rng.choice([0, 1, 128, 2**63, 2**64 - 1]) for _ in range(rng.randint(1, 5))]
        elif of == BYTES:
            value = rng.randbytes(rng.choice([1, 127, 128, 70_000]))
        elif of == TEXT:
            value = rng.choice(["a", "layers.1", "é" * 100])
        else:
            value = (
                [filled(of, rng.random()) for _ in range(2)] if number in kind.REPEATED else filled(of, rng.random())
            )
        setattr(message, name, value)
    return message


def plain(message: Message) -> dict[str, Any]:
    """A message as builtin values, views as bytes."""

    def of(value: Any) -> Any:
        if isinstance(value, list):
            return [of(element) for element in value]
        if isinstance(value, Message):
            return plain(value)
        return bytes(value) if isinstance(value, memoryview | bytes) else value

    return {field.name: of(getattr(message, field.name)) for field in dataclasses.fields(message)}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("seed", range(3))
def test_what_is_encoded_is_decoded(kind: type[Message], seed: int) -> None:
    message = filled(kind, seed)
    assert plain(decode(kind, encode(message))) == plain(message)
    assert encode(kind()) == b""
    assert plain(decode(kind, b"")) == plain(kind())


def test_bytes_of_a_message_by_hand() -> None:
    """Written out by the rules that are in the head of `wire`."""
    assert varint(300) == b"\xac\x02"
    request = LookupRequest(b"\x01\x02", [TableKeys("ab", 300, b"k")])
    assert encode(request) == b"\x0a\x02\x01\x02" + b"\x12\x0a" + b"\x0a\x02ab" + b"\x10\xac\x02" + b"\x1a\x01k"
    assert encode(Part(0, 0, b"", [0, 1], [], [2**64 - 1])) == b"\x22\x02\x00\x01" + b"\x32\x0a" + b"\xff" * 9 + b"\x01"


def test_what_others_may_write_otherwise_is_read_too() -> None:
    """Unpacked numbers, unknown fields of every wire type, fields in another order, and a field twice."""
    data = b"\x20\x05" + b"\x20\x06" + b"\x22\x01\x07"  # field 4 unpacked twice, then packed
    unknown = b"\x78\x01" + b"\x79" + bytes(8) + b"\x7a\x02xy" + b"\x7d" + bytes(4)  # field 15
    part = decode(Part, unknown + data + b"\x10\x01" + unknown + b"\x08\x03" + b"\x08\x04")
    assert (part.dram_hits, part.start, part.table) == ([5, 6, 7], 1, 4)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x80", "does not end"),
        (b"\xff" * 10 + b"\x01", "does not end"),
        (b"\x0a", "varint"),
        (b"\x0a\x05ab", "field 1 has 5 bytes, 2 are left"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "field 1 has 18446744073709551615 bytes"),
        (b"\x08\x01", "field 1 .* has wire type 0"),
        (b"\x12\x04\x0a\x02ab\x12", "varint"),
        (b"\x12\x03\x0a\x02a", "2 bytes, 1 are left"),
        (b"\x0b", "field 1 has wire type 3"),
        (b"\x0c", "field 1 has wire type 4"),
        (b"\x02\x00", "field 0"),
        (b"\x79\x00", "8 bytes, 1 are left"),
        (b"\x12\x04\x0a\x02\xff\xfe", "utf-8"),
        (b"\x78\x01" * 5000, "more than 4096 fields"),
    ],
)
def test_damaged_messages_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decode(LookupRequest, data)


def test_numbers_without_end_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 65536 numbers"):
        decode(Part, b"\x22" + varint(70_000) + bytes(70_000))
    for value in (-1, 2**64):
        with pytest.raises(ValueError, match="does not fit"):
            varint(value)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=60), kind=st.sampled_from(KINDS))
def test_any_bytes_are_a_message_or_a_value_error(data: bytes, kind: type[Message]) -> None:
    try:
        message = decode(kind, data)
    except ValueError:
        return
    assert plain(decode(kind, encode(message))) == plain(message)


def test_rows_are_copied_once_and_not_before_the_end() -> None:
    rows = bytearray(b"before")
    reply = LookupReply(1, [Part(0, 0, memoryview(rows))])
    rows[:] = b"behind"
    assert bytes(decode(LookupReply, encode(reply)).parts[0].rows) == b"behind"
    data = encode(reply)
    assert decode(LookupReply, data).parts[0].rows.obj is data


def test_a_spec_survives_its_message() -> None:
    spec = TableSpec(
        "layers.1", 2000, 264, (2, 3), 2, (500, 501, 499, 400), (0, 500, 1001, 1500), "raw", 256, "ab" * 32
    )
    assert decode(TableMessage, encode(messages.table_message(spec))).as_spec() == spec
    assert messages.identity_of([spec]) != messages.identity_of([dataclasses.replace(spec, fingerprint="cd" * 32)])


@pytest.fixture(scope="module")
def protobuf(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """What protobuf's own compiler makes of lookup.proto."""
    if importlib.util.find_spec("grpc_tools") is None or importlib.util.find_spec("google.protobuf") is None:
        pytest.skip("grpcio-tools is not installed; pip install grpcio-tools")
    folder = tmp_path_factory.mktemp("protobuf")
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO.parent}", f"--python_out={folder}", PROTO.name]
    subprocess.run(command, check=True, timeout=60)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("lookup_pb2")
    finally:
        sys.path.remove(str(folder))


def theirs(protobuf: ModuleType, kind: type[Message]) -> Any:
    return getattr(protobuf, NAMES.get(kind.__name__, kind.__name__))


def test_the_messages_are_those_of_lookup_proto(protobuf: ModuleType) -> None:
    described = {message.name: message for message in protobuf.DESCRIPTOR.message_types_by_name.values()}
    assert {NAMES.get(kind.__name__, kind.__name__) for kind in KINDS} == set(described)
    for kind in KINDS:
        descriptor = described[NAMES.get(kind.__name__, kind.__name__)]
        assert {f.number: f.name for f in descriptor.fields} == {n: name for n, (name, _) in kind.FIELDS.items()}
    service = protobuf.DESCRIPTOR.services_by_name["Lookups"]
    assert service.full_name == messages.SERVICE


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("seed", range(5))
def test_protobuf_reads_what_we_write_and_writes_what_we_read(
    protobuf: ModuleType, kind: type[Message], seed: int
) -> None:
    message = filled(kind, seed)
    data = encode(message)
    read = theirs(protobuf, kind).FromString(data)
    assert read.SerializeToString(deterministic=True) == data
    assert plain(decode(kind, read.SerializeToString())) == plain(message)


def test_protobuf_reads_a_reply_that_rows_were_looked_up_into(protobuf: ModuleType) -> None:
    reply = RowsReply(3, 4, [PartShape(0, 0, 20_000, 3, 2), PartShape(1, 5, 2, 8, 1)])
    for rows in reply.rows:
        rows[:] = np.arange(len(rows)) % 251
    reply.count(0, [[20_000, 1], [0, 127], [128, 0]])
    reply.count(1, [[0], [0], [2]])
    read = theirs(protobuf, LookupReply).FromString(reply.message)
    assert (read.version, read.instance) == (3, 4)
    found = [[list(part.dram_hits), list(part.static_hits), list(part.nvme_hits)] for part in read.parts]
    assert found == [[[20_000, 1], [0, 127], [128, 0]], [[0], [0], [2]]]
    assert [part.rows for part in read.parts] == [rows.tobytes() for rows in reply.rows]


def test_damaged_bytes_that_we_read_protobuf_reads_as_the_same(protobuf: ModuleType) -> None:
    num_read = 0
    for seed in range(3000):
        rng = random.Random(seed)
        kind = rng.choice([LookupRequest, Description, LookupReply, TableKeys])
        data = bytearray(encode(filled(kind, seed))[:300])
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            ours = decode(kind, bytes(data))
        except ValueError:
            continue
        num_read += 1
        read = theirs(protobuf, kind).FromString(bytes(data))
        assert plain(decode(kind, read.SerializeToString())) == plain(ours), seed
    assert num_read > 500
