"""A file of columns gives back what was written, and every way to damage, cut or fake it is a named error."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from support.held import open_files

from tierstore import kernels
from tierstore.errors import BudgetError, ConfigError, FormatError
from tierstore.formats import column_layout, columns
from tierstore.formats.columns import ColumnReader, ColumnWriter

INTEGERS = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"]


def write(path: Path, *blocks: dict[str, np.ndarray], header: dict | None = None, kind: str = "trace") -> Path:
    with ColumnWriter(path, kind, header or {"made": "here"}) as writer:
        for block in blocks:
            writer.write_block("items", block)
        writer.finish({"blocks": len(blocks)})
    return path


def read(path: Path, kind: str = "trace") -> tuple[dict, dict, list[tuple[str, dict[str, list[int]]]]]:
    """All that a file says, as plain Python values."""
    with ColumnReader.open(path, kind) as reader:
        blocks = [
            (section, {name: values.tolist() for name, values in block.items()})
            for section in reader.sections()
            for block in reader.blocks(section)
        ]
        return reader.header, reader.footer, blocks


def craft(path: Path, directory: object, data: bytes = b"", kind: bytes = b"trace", header: bytes = b"{}") -> Path:
    """Writes a file whose checksums are right, whatever it says. Shares no code with the writer."""
    body = directory if isinstance(directory, bytes) else json.dumps(directory).encode()
    total = 44 + len(header) + len(data) + len(body) + 24
    head = b"TIERCOLS" + struct.pack("<IIQ", 1, len(header), total) + kind.ljust(16, b"\0")
    tail = struct.pack("<QI", len(body), kernels.crc32c(body))
    tail += struct.pack("<I", kernels.crc32c(tail)) + b"COLS.END"
    path.write_bytes(head + struct.pack("<I", kernels.crc32c(head + header)) + header + data + body + tail)
    return path


def record(data: bytes, num_values: int, dtype: str = "i4", filter_: str = "plain") -> list:
    return ["a", dtype, filter_, num_values, len(data), kernels.crc32c(data)]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_integer_type_comes_back_exactly(tmp_path: Path, dtype: str, seed: int) -> None:
    rng, limits = np.random.default_rng(seed), np.iinfo(dtype)
    whole_range = rng.integers(limits.min, limits.max, 1000, dtype=dtype, endpoint=True)
    columns = {
        "random": whole_range,
        "sorted": np.sort(whole_range),
        "ends": np.array([limits.max, limits.min, 0, limits.max], dtype=dtype),
        "empty": whole_range[:0],
        "one": whole_range[:1],
        "strided": whole_range[::-3],
        "big_endian": whole_range.astype(np.dtype(dtype).newbyteorder(">")),
    }
    path = write(tmp_path / "c", columns)
    with ColumnReader.open(path, "trace") as reader:
        (block,) = reader.blocks("items")
        for name, values in columns.items():
            assert block[name].dtype == np.dtype(dtype)
            np.testing.assert_array_equal(block[name], values)
            assert reader.num_values("items", name) == len(values)
            with pytest.raises(ValueError, match="read-only"):
                block[name][:] = 0


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40),
    st.sampled_from(column_layout.FILTERS),
)
def test_every_filter_loses_nothing(values: list[int], filter_: str) -> None:
    from tierstore.formats.columns import _filtered, _unfiltered

    array = np.array(values, dtype="<i8")
    assert _unfiltered(bytes(_filtered(array, filter_)), array.dtype, filter_).tolist() == values


def test_ascending_numbers_take_a_fraction_of_their_bytes(tmp_path: Path) -> None:
    ascending = np.cumsum(np.random.default_rng(0).integers(0, 1000, 200_000)).astype(np.uint64)
    assert write(tmp_path / "c", {"a": ascending}).stat().st_size < ascending.nbytes / 5


def test_blocks_come_back_in_order_by_section(tmp_path: Path) -> None:
    with ColumnWriter(tmp_path / "c", "profile", {"bits": 17}) as writer:
        for number in range(6):
            writer.write_block(("odd", "even")[number % 2], {"a": np.array([number]), "b": np.arange(number)})
        writer.finish({"sum": 15, "nested": {"list": [1.5, None, "text"]}})
    with ColumnReader.open(tmp_path / "c", "profile") as reader:
        assert reader.sections() == ["odd", "even"]
        assert [block["a"].tolist() for block in reader.blocks("even")] == [[1], [3], [5]]
        assert [block["a"].tolist() for block in reader.blocks("odd")] == [[0], [2], [4]]
        assert (reader.num_values("even", "b"), reader.num_values("odd", "b")) == (9, 6)
        assert (reader.num_values("none", "b"), list(reader.blocks("none"))) == (0, [])
        assert reader.header == {"bits": 17}
        assert reader.footer == {"sum": 15, "nested": {"list": [1.5, None, "text"]}}


def test_a_file_without_blocks_is_a_file(tmp_path: Path) -> None:
    assert read(write(tmp_path / "c")) == ({"made": "here"}, {"blocks": 0}, [])


def test_the_same_columns_give_the_same_bytes(tmp_path: Path) -> None:
    columns = {"a": np.random.default_rng(3).integers(0, 50, 40_000, dtype=np.int32)}
    assert write(tmp_path / "c", columns).read_bytes() == write(tmp_path / "d", columns).read_bytes()


def test_an_unfinished_file_never_bears_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "c", {"a": np.arange(3)})
    before = path.read_bytes()
    with ColumnWriter(path, "trace", {}) as writer:
        writer.write_block("items", {"a": np.arange(5)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_disk_begins_with_what_is_written_and_nothing_is_given_to_it_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, advise = [], os.posix_fadvise

    def noted(fd: int, start: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        assert start + length <= os.fstat(fd).st_size
        begun.append((start, length))
        advise(fd, start, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", noted)
    monkeypatch.setattr(columns, "WRITEBACK_BYTES", 1000)
    values = np.random.default_rng(0).integers(0, 2**63, 200)
    with ColumnWriter(tmp_path / "a", "test", {}) as writer:
        for _ in range(10):
            writer.write_block("part", {"value": values})
        writer.finish({})
    assert len(begun) >= 8
    assert all(length >= 1000 for _, length in begun)
    assert [start for start, _ in begun] == [0, *np.cumsum([length for _, length in begun])[:-1]]


def test_a_half_written_file_of_a_killed_writer_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "c.new").write_bytes(b"half a file")
    write(tmp_path / "c", {"a": np.arange(3)})
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


def test_two_writers_of_one_file_never_mix(tmp_path: Path) -> None:
    with ColumnWriter(tmp_path / "c", "trace", {"who": 1}) as first, ColumnWriter(tmp_path / "c", "trace", {}) as last:
        with pytest.raises(ConfigError, match="another writer"):
            first.finish({})
        first.abandon()
        last.finish({})
    assert read(tmp_path / "c")[0] == {}


def test_writing_into_a_folder_or_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ConfigError, match="not a regular file"):
            ColumnWriter(path, "trace", {})
    with pytest.raises(ConfigError, match=f"there is no folder {tmp_path}/none; make it"):
        ColumnWriter(tmp_path / "none" / "c", "trace", {})


def test_columns_that_are_no_integers_or_too_many_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ColumnWriter(tmp_path / "c", "trace", {}) as writer:
        for values in (np.zeros(3), np.zeros(3, dtype=bool), np.zeros((2, 2), dtype=np.int32)):
            with pytest.raises(TypeError, match="expected 1-D integers"):
                writer.write_block("items", {"a": values})
        with pytest.raises(ValueError, match="65 columns"):
            writer.write_block("items", {f"c{i}": np.zeros(1, dtype=np.int8) for i in range(65)})
        monkeypatch.setattr("tierstore.formats.columns.BLOCK_BYTES_MAX", 100)
        with pytest.raises(ValueError, match="104 bytes"):
            writer.write_block("items", {"a": np.zeros(13, dtype=np.int64)})
        with pytest.raises(ValueError, match="JSON"):
            writer.finish({"share": float("nan")})


def small_file(folder: Path) -> Path:
    columns = {"ids": np.arange(40, dtype=np.int32) * 7, "ends": np.array([3, 9, 40]), "none": np.zeros(0, np.uint8)}
    return write(folder / "c", columns, columns, header={"trace": "tokens", "vocab_size": 300})


@pytest.mark.parametrize("bits", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_any_flipped_bit_is_an_error_or_changes_nothing(tmp_path: Path, bits: int) -> None:
    """bits: how many of each byte's are flipped, in turn; one of them is another one in each byte."""
    path = small_file(tmp_path)
    healthy, said = path.read_bytes(), read(path)
    for place in range(len(healthy)):
        for bit in range(place, place + bits):
            damaged = bytearray(healthy)
            damaged[place] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with contextlib.suppress(FormatError):
                assert read(path) == said


@pytest.mark.parametrize("fill", [0x00, 0xFF])
def test_any_overwritten_byte_is_an_error_or_changes_nothing(tmp_path: Path, fill: int) -> None:
    path = small_file(tmp_path)
    healthy, said = path.read_bytes(), read(path)
    for place in range(len(healthy)):
        path.write_bytes(healthy[:place] + bytes([fill]) + healthy[place + 1 :])
        with contextlib.suppress(FormatError):
            assert read(path) == said


def test_any_truncation_or_tail_is_an_error_that_says_both_lengths(tmp_path: Path) -> None:
    path = small_file(tmp_path)
    healthy = path.read_bytes()
    for length in [*range(len(healthy)), len(healthy) + 1]:
        path.write_bytes((healthy + b"\0")[:length])
        with pytest.raises(FormatError) as raised:
            ColumnReader.open(path, "trace")
        if length >= 68:
            assert f"{length} bytes on disk, its head says {len(healthy)}" in str(raised.value)
        elif length:
            assert f"{length} bytes on disk, expected 68 or more" in str(raised.value)


def test_a_file_cut_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    path = small_file(tmp_path)
    with ColumnReader.open(path, "trace") as reader:
        os.truncate(path, 120)
        with pytest.raises(FormatError, match="early"):
            list(reader.blocks("items"))


def test_a_file_of_another_kind_or_version_or_a_foreign_one_is_refused_by_name(tmp_path: Path) -> None:
    path = small_file(tmp_path)
    with pytest.raises(
        FormatError, match="is a trace, expected a profile; give a profile, which `tierstore profile` makes"
    ):
        ColumnReader.open(path, "profile")
    damaged = bytearray(path.read_bytes())
    damaged[8] = 2
    path.write_bytes(damaged)
    with pytest.raises(FormatError, match="version 2, this tierstore reads 1"):
        ColumnReader.open(path, "trace")
    path.write_bytes(b"PK\3\4" * 100)
    with pytest.raises(
        FormatError, match=r"is not a trace: it starts with .*; give a trace, which `tierstore trace` makes"
    ):
        ColumnReader.open(path, "trace")
    with pytest.raises(ConfigError, match="No such file or directory"):
        ColumnReader.open(tmp_path / "none", "trace")


def test_a_pipe_or_a_folder_in_its_place_is_named_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    found = []

    def attempt() -> None:
        for path in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
            with pytest.raises(
                (FormatError, ConfigError), match=r"not a regular file|Is a directory; give the name of a file"
            ):
                ColumnReader.open(path, "trace")
            found.append(path)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(timeout=30)
    assert len(found) == 3


GOOD = zstandard.compress(np.arange(4, dtype=np.int32).tobytes())


def test_a_crafted_file_that_is_right_is_read(tmp_path: Path) -> None:
    path = craft(tmp_path / "c", {"blocks": [["items", [record(GOOD, 4)]]], "footer": {}}, GOOD)
    assert read(path)[2] == [("items", {"a": [0, 1, 2, 3]})]


@pytest.mark.parametrize(
    "directory",
    [
        b"{",
        b"[]",
        b"[" * 100_000,
        b'{"blocks": [], "footer": {"a": NaN}}',
        b'{"blocks": [], "footer": ' + b"1" * 5000 + b"}",
        {"blocks": []},
        {"blocks": [], "footer": []},
        {"blocks": {}, "footer": {}},
        {"blocks": [], "footer": {}},  # the data is not accounted for
        {"blocks": [[]], "footer": {}},
        {"blocks": [["items", []]], "footer": {}},
        {"blocks": [["Items!", [record(GOOD, 4)]]], "footer": {}},
        {"blocks": [[["items"], [record(GOOD, 4)]]], "footer": {}},
        {"blocks": [["items", [record(GOOD, 4)] * 2]], "footer": {}},
        {"blocks": [["items", [record(GOOD, 4)] * 65]], "footer": {}},
        *(
            {"blocks": [["items", [[*record(GOOD, 4)[:place], wrong, *record(GOOD, 4)[place + 1 :]]]]], "footer": {}}
            for place, wrongs in enumerate(
                [
                    ["", 3, None, "A"],
                    ["f4", "i3", 4, ["i4"], {}],
                    ["none", 0, ["plain"]],
                    [-1, 1.0, True, "4", 1 << 40, None],
                    [-1, len(GOOD) - 1, len(GOOD) + 1, 1 << 31, 25.0],
                    [-1, 1 << 32, "0", 12345],
                ]
            )
            for wrong in wrongs
        ),
        {"blocks": [["items", [["a", "i4", "plain", 4, len(GOOD)]]]], "footer": {}},
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_directory_that_lies_with_right_checksums_is_refused(tmp_path: Path, directory: object) -> None:
    path = craft(tmp_path / "c", directory, GOOD)
    with pytest.raises(FormatError, match=r"c(:| is)"):
        read(path)


@pytest.mark.parametrize(
    ("data", "num_values"),
    [
        (b"no zstd frame at all", 4),
        (GOOD[:-3], 4),
        (GOOD + GOOD, 8),
        (GOOD + b"x", 4),
        (GOOD, 3),
        (GOOD, 5),
        (b"", 0),
        (zstandard.ZstdCompressor(write_content_size=False).compress(bytes(16)), 4),
        (zstandard.compress(bytes(1 << 27)), 4),  # small on disk, large in memory
        (zstandard.compress(bytes(1 << 29)), 1 << 27),  # and said so: past the limit of a block
    ],
    ids=["foreign", "cut", "two frames", "tail", "more", "fewer", "empty", "no size", "bomb", "large"],
)
def test_a_frame_that_is_not_what_the_directory_says_is_refused(tmp_path: Path, data: bytes, num_values: int) -> None:
    path = craft(tmp_path / "c", {"blocks": [["items", [record(data, num_values)]]], "footer": {}}, data)
    with pytest.raises(FormatError, match="c: block 0"):
        read(path)


def test_a_frame_whose_header_claims_more_than_there_is_allocates_nothing(tmp_path: Path) -> None:
    # magic, descriptor (8-byte content size, single segment), a content size of 2^60, one empty last block
    data = struct.pack("<IBQ", 0xFD2FB528, 0b11100000, 1 << 60) + b"\1\0\0"
    path = craft(tmp_path / "c", {"blocks": [["items", [record(data, 4)]]], "footer": {}}, data)
    with pytest.raises(FormatError, match=f"{1 << 60} bytes of values"):
        read(path)


def test_a_header_that_is_no_object_and_a_directory_past_its_limit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FormatError, match="header is no JSON object"):
        read(craft(tmp_path / "c", {"blocks": [], "footer": {}}, header=b"[]"))
    path = small_file(tmp_path)
    monkeypatch.setattr(column_layout, "DIRECTORY_BYTES_MAX", 50)
    with pytest.raises(FormatError, match="a directory of"):
        read(path)
    with ColumnWriter(tmp_path / "d", "trace", {}) as writer, pytest.raises(ValueError, match="larger blocks"):
        writer.finish({"text": "x" * 60})
    monkeypatch.setattr(column_layout, "HEADER_BYTES_MAX", 10)
    with pytest.raises(FormatError, match="a header of"):
        read(path)
    with pytest.raises(ValueError, match="at most 10"):
        ColumnWriter(tmp_path / "e", "trace", {"text": "x" * 60})
    assert not list(tmp_path.glob("*.new"))


def test_columns_other_than_required_are_an_error(tmp_path: Path) -> None:
    with ColumnReader.open(small_file(tmp_path), "trace") as reader:
        reader.require("items", {"ids": "int32", "ends": "int64", "none": "uint8"})
        reader.require("other", {"ids": "int32"})
        for wrong in ({"ids": "int32"}, {"ids": "int64", "ends": "int64", "none": "uint8"}):
            with pytest.raises(FormatError, match="block of items has columns"):
                reader.require("items", wrong)


WRITES = 6  # of a file of one block: head, two columns, directory, the head once more, and the sync


@pytest.mark.parametrize("fail_at", range(WRITES))
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fills_at_any_write_is_named_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, fail_at: int
) -> None:
    block = {"ids": np.arange(5), "ends": np.arange(2)}
    path = write(tmp_path / "c", block)
    old, done = path.read_bytes(), 0
    calls = {name: getattr(os, name) for name in ("write", "pwrite", "fsync")}

    def failing(name: str, *arguments: object) -> object:
        nonlocal done
        done += 1
        if done > fail_at:
            raise OSError(code, os.strerror(code))
        return calls[name](*arguments)

    expected = {
        errno.ENOSPC: (BudgetError, r"No space left on device: .* \(\d+ bytes\) are free on the disk of .*; free some"),
        errno.EDQUOT: (BudgetError, r"Disk quota exceeded: .* are free .*; remove files of user"),
        errno.EIO: (ConfigError, rf"the disk of {tmp_path} cannot be written; .* mend the disk; then run it again"),
    }[code]
    with monkeypatch.context() as patched:
        for name in calls:
            patched.setattr(os, name, functools.partial(failing, name))
        with pytest.raises(expected[0], match=expected[1]):
            write(path, block)
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (old, [path])


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    before = open_files()
    reader = ColumnReader.open(small_file(tmp_path), "trace")
    assert len(open_files() - before) == 1
    reader.close()
    reader.close()
    assert open_files() <= before
