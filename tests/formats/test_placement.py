"""A placement file is what FORMAT.md says, to a reader that shares no code; a head that lies is a named error."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.stores import Model, place_some

from tierstore import open as open_store
from tierstore.errors import FormatError
from tierstore.formats.catalog import CatalogImage, read_catalog
from tierstore.formats.placement import HEAD_BYTES_MAX
from tierstore.layout import UNIT_BYTES
from tierstore.offline.place import place_entries
from tierstore.offline.placement_file import Chosen

WORD = 2**64
TABLE = "layers.1"


def crc32c(data: bytes, seed: int = 0) -> int:
    """RFC 3720, a bit at a time over a table of bytes."""
    checksum = seed ^ 0xFFFFFFFF
    for byte in data:
        checksum = CRC_TABLE[(checksum ^ byte) & 0xFF] ^ checksum >> 8
    return checksum ^ 0xFFFFFFFF


def _crc_of_byte(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value


CRC_TABLE = [_crc_of_byte(value) for value in range(256)]


def hash_of(key: int) -> int:
    key = (key ^ key >> 33) * 0xFF51AFD7ED558CCD % WORD
    key = (key ^ key >> 33) * 0xC4CEB9FE1A85EC53 % WORD
    return key ^ key >> 33


class IndependentReader:
    """Reads a placement with `struct` alone, by FORMAT.md."""

    def __init__(self, data: bytes) -> None:
        magic, version, body_bytes = struct.unpack_from("<8sII", data)
        assert (magic, version) == (b"TIERPLAC", 1)
        head_bytes = -(-(20 + body_bytes) // 4096) * 4096
        assert head_bytes <= 65536
        (checksum,) = struct.unpack_from("<I", data, head_bytes - 4)
        assert crc32c(data[: head_bytes - 4]) == checksum
        assert not any(data[16 + body_bytes : head_bytes - 4])
        assert not any(data[head_bytes:65536])
        self.data = data
        self.head = json.loads(data[16 : 16 + body_bytes])
        assert self.head["num_bytes"] == len(data)
        assert len(data) % 4096 == 0

    def place_of(self, table: str, order_index: int, key: int) -> int | None:
        index = self.head["tables"][table]["indexes"][order_index]
        hashed, num_buckets = hash_of(key), index["num_buckets"]
        bucket = hashed * num_buckets >> 64
        for _ in range(num_buckets):
            at = index["byte_start"] + 64 * bucket
            keys = struct.unpack_from("<5q", self.data, at)
            places = struct.unpack_from("<5I", self.data, at + 40)
            (displaced,) = struct.unpack_from("<I", self.data, at + 60)
            if key in keys:
                return places[keys.index(key)]
            if not displaced >> hashed % 32 & 1:
                return None
            bucket = (bucket + 1) % num_buckets
        return None

    def record(self, table: str, place: int, seed: int) -> tuple[bytes, int, int]:
        """Returns (entry, key, order index) of a record, its checksum and padding checked."""
        shape = self.head["tables"][table]
        start = shape["byte_start"] + place * shape["record_bytes"]
        record = self.data[start : start + shape["record_bytes"]]
        key, order_index, checksum = struct.unpack_from("<qII", record, len(record) - 16)
        assert crc32c(record[:-4], seed) == checksum
        assert not any(record[shape["entry_bytes"] : -16])
        return record[: shape["entry_bytes"]], key, order_index


def published(store: Path) -> tuple[Path, CatalogImage]:
    image = read_catalog(store)
    assert image.epoch is not None
    return store / image.placements[image.epoch].file, image


def test_an_independent_reader_finds_every_placed_entry(own_store: Path, model: Model) -> None:
    chosen = place_some(own_store, 0.5)
    file, image = published(own_store)
    assert file == own_store / "placements" / "00000001.placement"
    reader = IndependentReader(file.read_bytes())
    assert reader.head["epoch"] == 1
    assert set(reader.head["tables"]) == set(chosen)
    covered = [(0, 65536)]
    for name, part in chosen.items():
        table, seed = reader.head["tables"][name], image.tables[name].seed
        assert (table["name"], table["static_fraction"], table["hbm_entries"]) == (name, 0.5, 0)
        assert (table["entry_bytes"], table["record_bytes"], table["num_entries"]) == (320, 336, len(part.keys))
        keys = np.full((len(part.keys), 3), -1)
        keys[np.arange(len(keys)), part.order_index] = part.keys
        rows = model.expected(name, keys).reshape(len(keys), 3, 8 * 40)
        for place, (order_index, key) in enumerate(zip(part.order_index.tolist(), part.keys.tolist(), strict=True)):
            assert reader.place_of(name, order_index, key) == place
            assert reader.record(name, place, seed) == (rows[place, order_index].tobytes(), key, order_index)
        pairs = set(zip(part.order_index.tolist(), part.keys.tolist(), strict=True))
        for order_index, key in ((order, key) for order in range(3) for key in (1, 2**62, *part.keys[:50].tolist())):
            assert (reader.place_of(name, order_index, key) is None) == ((order_index, key) not in pairs)
        for order_index, index in enumerate(table["indexes"]):
            count = int((part.order_index == order_index).sum())
            assert index["num_buckets"] == int(count / 3.5) + 1
            end = index["byte_start"] + 64 * index["num_buckets"]
            assert crc32c(reader.data[index["byte_start"] : end]) == index["checksum"]
            covered.append((index["byte_start"], end))
        covered.append((table["byte_start"], table["byte_start"] + 336 * len(part.keys)))
    assert covered == sorted(covered)
    for (_, end), (start, _) in zip(covered, [*covered[1:], (len(reader.data), 0)], strict=True):
        assert start == -(-end // 4096) * 4096
        assert not any(reader.data[end:start])


def test_full_buckets_send_keys_on_as_the_format_says(own_store: Path) -> None:
    """Keys of one bucket: five find room, the others are displaced, the last bucket's onto the first."""
    pool = np.random.default_rng(0).integers(0, 2**63, 30_000)
    num_buckets = int(100 / 3.5) + 1
    last = [key for key in pool.tolist() if hash_of(key) * num_buckets >> 64 == num_buckets - 1][:100]
    place_entries(own_store, {TABLE: Chosen(np.zeros(100, dtype=np.uint8), np.array(last))})
    reader = IndependentReader(published(own_store)[0].read_bytes())
    assert reader.head["tables"][TABLE]["indexes"][0]["num_buckets"] == num_buckets
    assert [reader.place_of(TABLE, 0, key) for key in last] == list(range(100))
    assert [index["num_buckets"] for index in reader.head["tables"][TABLE]["indexes"][1:]] == [0, 0]
    assert reader.place_of(TABLE, 1, last[0]) is None


def with_head(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes what a placement's head says and seals it again."""
    data = file.read_bytes()
    (body_bytes,) = struct.unpack_from("<I", data, 12)
    told = json.loads(data[16 : 16 + body_bytes])
    changed = change(told)
    body = changed if isinstance(changed, bytes) else json.dumps(told if changed is None else changed).encode()
    size = -(-(20 + len(body)) // UNIT_BYTES) * UNIT_BYTES
    head = (data[:12] + struct.pack("<I", len(body)) + body).ljust(size - 4, b"\0")
    file.write_bytes((head + struct.pack("<I", crc32c(head))).ljust(HEAD_BYTES_MAX, b"\0") + data[HEAD_BYTES_MAX:])


def setting(place: str, value: object) -> Callable[[dict[str, Any]], None]:
    """A change of the number at a place such as "indexes.0.num_buckets" of the table."""

    def change(told: dict[str, Any]) -> None:
        part: Any = told["tables"][TABLE]
        *path, last = place.split(".")
        for step in path:
            part = part[int(step)] if isinstance(part, list) else part[step]
        part[last] = value

    return change


NUMBERS = [
    "record_bytes",
    "byte_start",
    "num_entries",
    "hbm_entries",
    "indexes.0.byte_start",
    "indexes.1.num_buckets",
    "indexes.2.checksum",
]
LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    **{f"{place} {value!r}": setting(place, value) for place in NUMBERS for value in (-1, 0.5, "8", None, [], 2**70)},
    **{f"{place} as a float": setting(place, 4096.0) for place in NUMBERS},
    "more HBM than entries": setting("hbm_entries", 10**6),
    "a part off its unit": setting("byte_start", HEAD_BYTES_MAX + 8),
    "static_fraction above 1": setting("static_fraction", 1.5),
    "static_fraction as text": setting("static_fraction", "0.5"),
    "static_fraction as nothing": setting("static_fraction", None),
    "too few orders": setting("indexes", []),
    "another name": setting("name", "layers.14"),
    "other entries": setting("entry_bytes", 328),
    "a field more": setting("more", 1),
    "an unknown table": lambda told: told["tables"].update(other=told["tables"][TABLE]),
    "tables in a list": lambda told: told.update(tables=[]),
    "a number for a table": lambda told: told["tables"].update({TABLE: 7}),
    "another epoch": lambda told: told.update(epoch=2),
    "another length": lambda told: told.update(num_bytes=told["num_bytes"] + UNIT_BYTES),
    "a list": lambda told: [told],
    "a number": lambda _: 7,
    "no JSON": lambda _: b"{",
    "no text": lambda _: b"\xff\xfe",
    "JSON without end": lambda _: b"[" * 50_000,
}


@pytest.mark.long
@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_head_that_lies_under_a_good_checksum_is_named(own_store: Path, lie: Callable[..., object]) -> None:
    place_entries(own_store, {TABLE: Chosen(np.array([0, 1, 2], dtype=np.uint8), np.array([5, 6, 7]))})
    file, _ = published(own_store)
    with_head(file, lambda _: None)
    open_store(own_store, dram="400KiB").close()
    with_head(file, lie)
    with pytest.raises(FormatError, match=r"00000001\.placement: .*plan again"):
        open_store(own_store, dram="400KiB")
    open_store(own_store, dram="400KiB", placement="none").close()
