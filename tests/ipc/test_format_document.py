"""FORMAT.md draws what processes share: its byte tables and fields are those of the code, read by the tables alone."""

from __future__ import annotations

import re
import struct

import msgspec
import numpy as np
import pytest
from support.repository import REPOSITORY

from tierstore import kernels
from tierstore.decisions.shared_budget import SharedShare
from tierstore.ipc import messages, protocol

CELL = re.compile(r"([\d,]+) \.\. ([\d,]+)")
KEY, ORDER_INDEX = 0x1234_5678_9ABC, 2


def section(heading: str) -> str:
    """The text of FORMAT.md from a heading to the next."""
    text = (REPOSITORY / "FORMAT.md").read_text(encoding="utf-8")
    return re.split(r"^#+ ", text.partition(f"\n{heading}\n")[2], maxsplit=1, flags=re.M)[0]


def byte_table(heading: str, number: int = 0) -> dict[str, tuple[int, int]]:
    """A byte table of a section: what (the words before a comma or colon), and its first byte and the one behind it."""
    tables = re.findall(r"(?:^\|.*\n)+", section(heading), re.M)
    tables = [table for table in tables if CELL.search(table)]
    rows = {}
    for line in tables[number].splitlines()[2:]:
        _, place, what, *_ = (cell.strip() for cell in line.split("|"))
        if found := CELL.fullmatch(place):
            start, end = (int(each.replace(",", "")) for each in found.groups())
            rows[re.split(r"[:;]|, (?!odd|even)", what)[0]] = (start, end)
    return rows


def u64(block: np.ndarray, place: tuple[int, int]) -> int:
    return int(block[place[0] : place[0] + 8].view("<u8")[0])


def block_of(num_bytes: int) -> np.ndarray:
    """Zeros at a multiple of 64 bytes."""
    memory = np.zeros(num_bytes + 64, dtype=np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + num_bytes]


@pytest.mark.parametrize(
    ("heading", "number", "num_bytes"),
    [
        ("### The control block", 0, 64),
        ("### The static block", 0, kernels.INDEX_HEAD.itemsize),
        ("### The recency block", 0, kernels.CACHE_SET_BYTES),
        ("### The recency block", 1, kernels.CACHE_HISTORY_BYTES),
        ("### A client's block", 0, kernels.CLIENT_BLOCK_BYTES),
        ("### A client's block", 1, kernels.REPORT.itemsize),
        ("## The daemon's socket", 0, protocol.PACKET_BYTES_MAX - protocol.PART_BYTES_MAX),
    ],
)
def test_a_byte_table_has_no_gap_and_the_length_of_the_code(heading: str, number: int, num_bytes: int) -> None:
    places = list(byte_table(heading, number).values())
    assert [start for start, _ in places] == [0, *(end for _, end in places[:-1])]
    assert places[-1][1] == num_bytes


def test_a_published_epoch_is_where_the_table_says() -> None:
    control, at = block_of(kernels.CONTROL_BYTES), byte_table("### The control block")
    kernels.publish_epoch(control, 3, 5)
    kernels.reclaim_epochs_before(control, 3, 4)
    line = control[64 * (3 % 2) :]
    assert u64(line, at["current"]) == 3 << 48 | 5
    assert u64(line, at["oldest"]) == 4
    assert f"{kernels.CONTROL_BYTES:,}" in section("## Shared memory of a daemon")


def test_reports_are_where_the_table_says() -> None:
    block, at = block_of(kernels.CLIENT_BLOCK_BYTES), byte_table("### A client's block")
    report = byte_table("### A client's block", 1)
    kernels.init_client_block(block)
    reports = np.array([(KEY + place, 7, ORDER_INDEX, 5 | 3 << 3) for place in range(3)], dtype=kernels.REPORT)
    kernels.ReportWriter(block).add(reports)
    assert u64(block, at["written"]) == 3
    assert u64(block, at["magic"]) == 0x0001746C635F7374
    ring = next(place for what, place in at.items() if what.startswith("ring"))
    assert (ring[1] - ring[0]) // kernels.REPORT.itemsize == kernels.NUM_RING_REPORTS
    for place in range(3):
        record = block[ring[0] + 16 * place :][:16].tobytes()
        assert struct.unpack("<qHBB", record[:12]) == (KEY + place, 7, ORDER_INDEX, 5 | 3 << 3)
        seal = report["seal"]
        assert struct.unpack("<I", record[slice(*seal)])[0] == 1 ^ _finalizer(KEY + place) & 0xFFFFFFFF
    counters = {what: u64(block, place) for what, place in at.items() if what.startswith(("active", "pinned"))}
    assert len(counters) == 4
    assert set(counters.values()) == {0}


def test_a_pin_is_counted_where_the_table_says() -> None:
    control, block = block_of(kernels.CONTROL_BYTES), block_of(kernels.CLIENT_BLOCK_BYTES)
    kernels.init_client_block(block)
    kernels.publish_epoch(control, 1, 3)
    pin = kernels.EpochPin(control, 1, block)
    pin.pin()
    at = byte_table("### A client's block")
    assert (u64(block, at["pinned, even"]), u64(block, at["pinned, odd"])) == (0, 1)
    pin.unpin(3)


def test_an_empty_cache_is_what_the_table_says() -> None:
    num_sets, entry_bytes = 3, 20
    memory = block_of(num_sets * (128 + 128 + 8 * 24))
    memory[:] = 0xA5
    kernels.EntryCache(memory, num_sets=num_sets, entry_bytes=entry_bytes, is_new=True)
    at = byte_table("### The recency block")
    keys = memory[: 128 * num_sets].reshape(num_sets, 128)[:, slice(*at["8 keys"])].copy().view("<i8")
    assert keys.shape == (num_sets, kernels.CACHE_WAYS)
    assert (keys == -1).all()
    assert u64(memory, at["version"]) == 0


def test_sources_of_reports_are_those_of_lookups() -> None:
    numbered = ", ".join(f"{number} {name}" for number, name in enumerate(kernels.SOURCES) if number)
    assert f"source ({numbered})" in section("### A client's block")


def test_the_limits_of_the_socket_are_named() -> None:
    text = section("## The daemon's socket")
    for number in (protocol.PACKET_BYTES_MAX, protocol.MESSAGE_BYTES_MAX, protocol.CLIENT_MESSAGE_BYTES_MAX):
        assert f"{number:,}" in text
    assert f"| {protocol.FDS_MAX};" in text
    assert f"version is {protocol.PROTOCOL_VERSION}." in text
    packet = protocol.packets_of(b"{}", 100)[0]
    assert packet == b"tsd\n" + bytes([0, 0, 0, 0]) + struct.pack("<I", 2) + b"{}"


def test_every_message_and_each_of_its_fields_is_there() -> None:
    rows = re.findall(r"^\| (`[A-Z].*?) \| (.*) \|$", section("## The daemon's socket"), re.M)
    fields = {name: text for names, text in rows for name in re.findall(r"`(\w+)`", names)}
    for name, kind in vars(messages).items():
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind is not msgspec.Struct:
            wanted = set(kind.__struct_encode_fields__)
            if "`ReplanResult`" in fields[name]:
                wanted -= set(messages.ReplanResult.__struct_encode_fields__)
            assert wanted <= set(re.findall(r"`(\w+)`", fields[name])), name
    assert set(re.findall(r"`(\w+)`", fields["SharedShare"])) == set(SharedShare.__dataclass_fields__)


def _finalizer(value: int) -> int:
    """MurmurHash3's, on 64 bits."""
    mask = (1 << 64) - 1
    value = (value ^ value >> 33) * 0xFF51AFD7ED558CCD & mask
    value = (value ^ value >> 33) * 0xC4CEB9FE1A85EC53 & mask
    return value ^ value >> 33
