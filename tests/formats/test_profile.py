"""A profile gives back what was written, block by block; damage and contradictions are named errors,
never wrong counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tierstore.errors import FormatError, TierStoreError
from tierstore.formats import profile as profile_format
from tierstore.formats.columns import ColumnReader, ColumnWriter
from tierstore.formats.profile import HELD_OUT, ITEMS, KEYS, KIND, NGRAMS, ProfileHeader, ProfileReader, ProfileWriter

NGRAM_HEADER = ProfileHeader(NGRAMS, (("layers.1", "ab", (2, 3)), ("layers.4", "cd", (2, 3))), 17, 0.25, 1.0)
KEY_HEADER = ProfileHeader(KEYS, (("layers.1", "ab", (2, 3)), ("plain", "cd", (1,))), 0, 0.5, 0.125)
COUNTS = {"tokens": 100, "documents": 9, "held_out_tokens": 5, "held_out_documents": 2}
FOOTER = {"counts": COUNTS, "analysis": {"hit_rate": [0.5, None]}}


def some_items(seed: int, count: int, header: ProfileHeader = NGRAM_HEADER) -> tuple[np.ndarray, np.ndarray]:
    """Sorted, distinct items that the header allows, and their sums, written with Python's own integers."""
    rng = np.random.default_rng(seed)
    if header.kind == NGRAMS:
        values = {int(value) << 1 for value in rng.integers(0, 2**50, count)} | {0, 2**51 - 1}
    else:
        values = {(mark << 64) + int(rng.integers(0, 2**63)) for mark in rng.choice([0, 1, 1 << 32], count).tolist()}
    items = np.array([divmod(value, 2**64) for value in sorted(values)], dtype=np.uint64)
    return items, rng.integers(0, 2**40, (len(items), 2))


def held_out_blocks(header: ProfileHeader) -> list[dict[str, np.ndarray]]:
    """Documents of 3 and 2 accesses, the first over two blocks."""
    whole = {
        NGRAMS: {"token_ids": np.array([5, 6, 7, 8, 9], dtype=np.int32)},
        KEYS: {
            "table": np.array([0, 0, 1, 1, 0], dtype=np.uint16),
            "order_index": np.array([0, 1, 0, 0, 1], dtype=np.uint8),
            "keys": np.array([0, 2**63 - 1, 3, 3, 4]),
            "batch": np.array([0, 0, 1, 0, 7]),
        },
    }[header.kind]
    return [
        {name: values[:2] for name, values in whole.items()} | {"document_ends": np.array([], dtype=np.int64)},
        {name: values[2:] for name, values in whole.items()} | {"document_ends": np.array([3, 5])},
    ]


def write(path: Path, header: ProfileHeader = NGRAM_HEADER, count: int = 100) -> Path:
    with ProfileWriter(path, header) as writer:
        for columns in held_out_blocks(header):
            writer.write_held_out(columns)
        writer.write_items(*some_items(0, count, header))
        writer.finish(FOOTER)
    return path


def craft(
    path: Path,
    header: dict[str, Any] | None = None,
    items: list[dict[str, Any]] | None = None,
    held_out: list[dict[str, Any]] | None = None,
    footer: dict[str, Any] | None = None,
) -> Path:
    """Writes a profile that says what it is told to, with good checksums."""
    with ColumnWriter(path, KIND, header or asdict(NGRAM_HEADER)) as writer:
        for section, blocks in (
            (HELD_OUT, held_out_blocks(NGRAM_HEADER) if held_out is None else held_out),
            (ITEMS, items or []),
        ):
            for block in blocks:
                writer.write_block(section, block)
        writer.finish(FOOTER if footer is None else footer)
    return path


def items_block(high: list[int], low: list[int], counted: list[int], held_out: list[int]) -> dict[str, np.ndarray]:
    columns = {"high": (high, "u8"), "low": (low, "u8"), "counted": (counted, "i8"), "held_out": (held_out, "i8")}
    return {name: np.array(values, dtype=dtype) for name, (values, dtype) in columns.items()}


def read_all(path: Path) -> int:
    """Reads every block of a profile; returns how many there were."""
    with ProfileReader(path) as profile:
        return len(list(profile.items())) + len(list(profile.held_out()))


@pytest.mark.parametrize("header", [NGRAM_HEADER, KEY_HEADER], ids=[NGRAMS, KEYS])
def test_all_that_was_written_comes_back(tmp_path: Path, header: ProfileHeader) -> None:
    items, sums = some_items(0, 100, header)
    with ProfileReader(write(tmp_path / "p", header)) as profile:
        assert profile.header == header
        assert profile.counts == COUNTS
        assert profile.footer == FOOTER
        assert profile.num_items == len(items)
        ((found_items, found_sums),) = profile.items()
        np.testing.assert_array_equal(found_items, items)
        np.testing.assert_array_equal(found_sums, sums)
        assert (found_items.dtype, found_sums.dtype) == (np.uint64, np.int64)
        for found, expected in zip(profile.held_out(), held_out_blocks(header), strict=True):
            assert {name: (values.dtype, values.tolist()) for name, values in found.items()} == {
                name: (values.dtype, values.tolist()) for name, values in expected.items()
            }


def test_a_profile_of_nothing_is_one(tmp_path: Path) -> None:
    with ProfileWriter(tmp_path / "p", NGRAM_HEADER) as writer:
        writer.finish({"counts": dict.fromkeys(COUNTS, 0)})
    with ProfileReader(tmp_path / "p") as profile:
        assert (list(profile.items()), list(profile.held_out()), profile.num_items) == ([], [], 0)


@pytest.mark.parametrize("sizes", [[100], [1] * 100, [0, 6, 7, 0, 1, 13, 73], [7] * 14 + [2], [14, 86]], ids=str)
def test_items_are_cut_into_the_same_blocks_however_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    monkeypatch.setattr(profile_format, "BLOCK_ITEMS", 7)
    items, sums = some_items(1, 98)
    assert len(items) == sum(sizes) == 100
    for name, parts in (("p", sizes), ("whole", [100])):
        with ProfileWriter(tmp_path / name, NGRAM_HEADER) as writer:
            start = 0
            for size in parts:
                writer.write_items(items[start : start + size], sums[start : start + size])
                start += size
            writer.finish({"counts": dict.fromkeys(COUNTS, 0)})
    assert (tmp_path / "p").read_bytes() == (tmp_path / "whole").read_bytes()
    with ProfileReader(tmp_path / "p") as profile:
        blocks = list(profile.items())
    assert [len(found) for found, _ in blocks] == [7] * 14 + [2]
    np.testing.assert_array_equal(np.concatenate([found for found, _ in blocks]), items)
    np.testing.assert_array_equal(np.concatenate([found for _, found in blocks]), sums)


def test_unfinished_a_profile_leaves_nothing_and_an_older_one_as_it_was(tmp_path: Path) -> None:
    before = write(tmp_path / "p").read_bytes()
    with ProfileWriter(tmp_path / "p", KEY_HEADER) as writer:
        writer.write_items(*some_items(0, 10, KEY_HEADER))
        assert len(list(tmp_path.iterdir())) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["p"]
    assert (tmp_path / "p").read_bytes() == before


def test_every_length_that_a_profile_can_be_cut_to_is_named(tmp_path: Path) -> None:
    content = write(tmp_path / "p").read_bytes()
    for length in [*range(0, len(content), 13), len(content) - 1]:
        (tmp_path / "p").write_bytes(content[:length])
        with pytest.raises(FormatError, match="/p"):
            read_all(tmp_path / "p")


def test_every_flipped_byte_is_named(tmp_path: Path) -> None:
    content = write(tmp_path / "p", count=5).read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        (tmp_path / "p").write_bytes(damaged)
        with pytest.raises(FormatError, match="/p"):
            read_all(tmp_path / "p")


def test_foreign_newer_and_other_files_of_columns_are_named(tmp_path: Path) -> None:
    content = write(tmp_path / "p").read_bytes()
    (tmp_path / "foreign").write_bytes(b"#!/bin/sh\n" * 100)
    (tmp_path / "newer").write_bytes(content[:8] + b"\x02\0\0\0" + content[12:])
    with ColumnWriter(tmp_path / "trace", "trace", {}) as writer:
        writer.finish({})
    for name, message in (
        ("foreign", "is not a profile"),
        ("newer", r"version 2, this tierstore reads 1; .*upgrade"),
        ("trace", "is a trace, expected a profile"),
    ):
        with pytest.raises(FormatError, match=message):
            ProfileReader(tmp_path / name)
    with pytest.raises(TierStoreError, match="No such file or directory"):
        ProfileReader(tmp_path / "gone")


TABLES = asdict(NGRAM_HEADER)["tables"]
BAD_HEADERS = [
    {"kind": "tokens"},
    {"tables": []},
    {"tables": 7},
    {"tables": [["layers.1", "ab"]]},
    {"tables": [["layers.1", "ab", []]]},
    {"tables": [["layers.1", "ab", ["two"]]]},
    {"tables": [["layers.1", "ab", [3, 2]]]},
    {"tables": [["layers.1", "ab", [3, 2]]]},
    {"tables": [["layers.1", "ab", [0, 2]]]},
    {"tables": [["layers.1", "ab", [2, 9]]]},
    {"tables": [*TABLES, ["layers.9", "ef", [2]]]},
    {"tables": [*TABLES, TABLES[0]]},
    {"bits": 0},
    {"bits": -1},
    {"bits": 43},
    {"bits": None},
    {"bits": 1e300 * 10},
    {"held_out": -0.1},
    {"held_out": 1.1},
    {"held_out": "much"},
    {"sample_rate": 0},
    {"sample_rate": 1.5},
]


@pytest.mark.parametrize("change", BAD_HEADERS, ids=str)
def test_a_header_that_contradicts_itself_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=r"/p: .*profile again"):
        ProfileReader(craft(tmp_path / "p", header=asdict(NGRAM_HEADER) | change))


def test_a_number_beyond_all_floats_in_the_header_is_named() -> None:
    """JSON's 1e999 is read as infinity, which no int can be: it was an OverflowError once."""
    with pytest.raises(FormatError, match="header is damaged"):
        ProfileHeader.from_dict(asdict(NGRAM_HEADER) | {"bits": float("inf")}, "p")


@pytest.mark.parametrize("name", list(asdict(NGRAM_HEADER)))
def test_a_header_that_lacks_a_field_is_named(tmp_path: Path, name: str) -> None:
    header = asdict(NGRAM_HEADER)
    del header[name]
    with pytest.raises(FormatError, match=rf"header is damaged .*{name}"):
        ProfileReader(craft(tmp_path / "p", header=header))


BAD_COUNTS = [
    None,
    {},
    [1, 2],
    *({name: count for name, count in COUNTS.items() if name != left} for left in COUNTS),
    *(COUNTS | {name: bad} for name in COUNTS for bad in (-1, 1.5, True, "1", None)),
    COUNTS | {"held_out_tokens": 101},
    COUNTS | {"held_out_documents": 10},
]


@pytest.mark.parametrize("counts", BAD_COUNTS, ids=str)
def test_counts_that_are_missing_or_contradict_each_other_are_named(tmp_path: Path, counts: object) -> None:
    with pytest.raises(FormatError, match=r"/p: the profile's counts .* damaged"):
        ProfileReader(craft(tmp_path / "p", footer={"counts": counts}))


BAD_ITEMS = {
    "descending low words": [items_block([0, 0], [5, 4], [1, 1], [0, 0])],
    "descending high words": [items_block([1, 0], [5, 6], [1, 1], [0, 0])],
    "an item twice": [items_block([0, 0], [5, 5], [1, 1], [0, 0])],
    "an item twice over blocks": [items_block([0], [5], [1], [0]), items_block([0], [5], [1], [0])],
    "blocks out of order": [items_block([0], [5], [1], [0]), items_block([0], [4], [1], [0])],
    "an empty block": [items_block([0], [5], [1], [0]), items_block([], [], [], [])],
    "nothing but an empty block": [items_block([], [], [], [])],
    "too few low words": [items_block([0, 0], [5], [1, 1], [0, 0])],
    "too few counts": [items_block([0, 0], [5, 6], [1], [0, 0])],
    "too many counts": [items_block([0, 0], [5, 6], [1, 1], [0, 0, 0])],
    "a negative count": [items_block([0], [5], [-1], [0])],
    "a negative held-out count": [items_block([0], [5], [1], [-1])],
    "more bits than there are": [items_block([0], [2**51], [1], [0])],
    "more bits than a word": [items_block([1], [0], [1], [0])],
}


@pytest.mark.parametrize("blocks", BAD_ITEMS.values(), ids=BAD_ITEMS.keys())
def test_items_that_no_profile_can_have_are_named(tmp_path: Path, blocks: list[dict[str, Any]]) -> None:
    with (
        ProfileReader(craft(tmp_path / "p", items=blocks)) as profile,
        pytest.raises(FormatError, match=r"/p: .*again"),
    ):
        list(profile.items())


@pytest.mark.parametrize(("mark", "key"), [(2, 0), (1 << 32 | 1, 0), (2 << 32, 0), (0, 2**63)])
def test_keys_of_no_table_or_order_are_named(tmp_path: Path, mark: int, key: int) -> None:
    blocks = [items_block([mark], [key], [1], [0])]
    path = craft(tmp_path / "p", header=asdict(KEY_HEADER), items=blocks, held_out=[])
    with ProfileReader(path) as profile, pytest.raises(FormatError, match="items that its tables cannot have"):
        list(profile.items())


def ids_block(count: int, ends: list[int]) -> dict[str, np.ndarray]:
    return {"token_ids": np.zeros(count, dtype=np.int32), "document_ends": np.array(ends, dtype=np.int64)}


BAD_DOCUMENTS = {
    "an end before its block": [ids_block(3, [3]), ids_block(2, [2, 5])],
    "descending ends": [ids_block(5, [5, 3])],
    "an end behind its block": [ids_block(3, [3, 5]), ids_block(2, [])],
    "a negative end": [ids_block(5, [-1, 5])],
    "a document without end": [ids_block(5, [2, 4])],
    "too few documents": [ids_block(5, [5])],
    "too many documents": [ids_block(5, [1, 2, 5])],
    "none": [],
}


@pytest.mark.parametrize("blocks", BAD_DOCUMENTS.values(), ids=BAD_DOCUMENTS.keys())
def test_held_out_documents_that_do_not_add_up_are_named(tmp_path: Path, blocks: list[dict[str, Any]]) -> None:
    with (
        ProfileReader(craft(tmp_path / "p", held_out=blocks)) as profile,
        pytest.raises(FormatError, match="held-out doc"),
    ):
        list(profile.held_out())


def test_columns_of_held_out_keys_that_differ_in_length_are_named(tmp_path: Path) -> None:
    blocks = held_out_blocks(KEY_HEADER)
    blocks[0]["batch"] = blocks[0]["batch"][:1]
    path = craft(tmp_path / "p", header=asdict(KEY_HEADER), held_out=blocks)
    with ProfileReader(path) as profile, pytest.raises(FormatError, match="held-out documents"):
        list(profile.held_out())


@pytest.mark.parametrize("section", [ITEMS, HELD_OUT])
@pytest.mark.parametrize("change", ["missing", "other type", "more"])
def test_columns_that_a_section_does_not_have_are_named(tmp_path: Path, section: str, change: str) -> None:
    block: Callable[[], dict[str, np.ndarray]] = {
        ITEMS: lambda: items_block([0], [5], [1], [0]),
        HELD_OUT: lambda: ids_block(5, [3, 5]),
    }[section]
    columns = block()
    name = next(iter(columns))
    if change == "missing":
        del columns[name]
    elif change == "other type":
        columns[name] = columns[name].astype(np.int16)
    else:
        columns["more"] = columns[name]
    sections = {ITEMS: [], HELD_OUT: held_out_blocks(NGRAM_HEADER)} | {section: [columns]}
    with pytest.raises(FormatError, match=f"a block of {section} has columns"):
        ProfileReader(craft(tmp_path / "p", items=sections[ITEMS], held_out=sections[HELD_OUT]))


def test_the_shift_of_an_order_leaves_as_many_ids() -> None:
    header = replace(NGRAM_HEADER, tables=(("t", "", (2, 3, 5)),), bits=20)
    assert [header.shift(order) for order in header.orders] == [60, 40, 0]
    value = sum(token << 20 * (4 - place) for place, token in enumerate([9, 8, 7, 6, 5]))
    assert value >> header.shift(2) == 9 << 20 | 8


def test_the_file_closes_where_opening_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    real = ColumnReader.close
    monkeypatch.setattr(ColumnReader, "close", lambda reader: (closed.append(reader), real(reader)))
    for broken in ({"footer": {}}, {"header": {"kind": NGRAMS}}):
        with pytest.raises(FormatError):
            ProfileReader(craft(tmp_path / "p", **broken))
    assert len(closed) == 2
