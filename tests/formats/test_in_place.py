"""Where rows lie in place: layouts to a reader that shares no code, and records that lie are named errors."""

from __future__ import annotations

import copy
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.stores import Model

import tierstore
from tierstore import kernels
from tierstore.errors import FormatError, TierStoreError
from tierstore.formats import catalog
from tierstore.formats.catalog import read_catalog
from tierstore.formats.catalog_records import write_records
from tierstore.formats.in_place import InPlaceFile, InPlaceLayout
from tierstore.formats.stored_tensor import FileIdentity, StoredTensor
from tierstore.formats.table_source import Plane, TableSource
from tierstore.kernels import reference
from tierstore.offline.build import build_store
from tierstore.spec import TableSpec


@pytest.mark.parametrize("num_bytes", [0, 1, 4095, 4096, 4097, 3 * 4096 + 17])
def test_checksums_of_blocks_equal_the_reference_and_depend_on_their_number(num_bytes: int) -> None:
    data = np.random.default_rng(num_bytes).integers(0, 256, num_bytes, dtype=np.uint8)
    found = kernels.block_checksums(data, 7, 12345)
    np.testing.assert_array_equal(found, reference.block_checksums(data, 7, 12345))
    assert len(found) == -(-num_bytes // 4096)
    if num_bytes:
        assert found[0] != kernels.block_checksums(data, 8, 12345)[0]
        assert found[0] != kernels.block_checksums(data, 7, 12346)[0]


def test_the_record_is_read_back_and_every_row_lies_where_it_says(in_place_built: Path, model: Model) -> None:
    """A reader of FORMAT.md alone: rows by struct and slices, checksums by the reference."""
    image = read_catalog(in_place_built)
    for name, table in image.tables.items():
        assert isinstance(table, InPlaceLayout)
        record = json.loads(json.dumps(table.to_dict()))
        assert InPlaceLayout.from_dict(record) == table
        checksums = packed(image, record["checksums"], 4).view("<u4")[:, 0]
        column = 0
        for plane in record["planes"]:
            width = plane["width_bytes"]
            rows = model.rows[name][:, column : column + width]
            column += width
            if plane["copy"]:
                np.testing.assert_array_equal(packed(image, plane["copy"], width), rows)
                continue
            ends = [stretch[2] for stretch in plane["stretches"][1:]] + [len(rows)]
            for (file, byte_start, row_start, block_start), row_end in zip(plane["stretches"], ends, strict=True):
                data = Path(image.files[file].path).read_bytes()
                end = byte_start + (row_end - row_start) * width
                assert data[byte_start:end] == rows[row_start:row_end].tobytes()
                blocks = list(enumerate(range(byte_start // 4096 * 4096, end, 4096), block_start))
                for number, at in [*blocks[::20], blocks[-1]]:  # the reference takes its time
                    seed = reference.crc32c(struct.pack("<Q", number), record["seed"])
                    assert reference.crc32c(data[at : at + 4096], seed) == checksums[number]


def packed(image: Any, record: dict[str, Any], width: int) -> np.ndarray:
    """Rows of a side table, read as FORMAT.md draws pages and shards."""
    shards = image.shards[record["spec"]["name"]]
    data = b"".join((image.path / shards[index].file).read_bytes() for index in sorted(shards))
    pages = np.frombuffer(data, dtype=np.uint8).reshape(-1, record["page_bytes"])
    rows = pages[:, : record["rows_per_page"] * width].reshape(-1, width)[: record["spec"]["num_rows"]]
    return np.ascontiguousarray(rows)


def set_in(*path: Any, value: Any) -> Callable[[Any], None]:
    def change(record: Any) -> None:
        for step in path[:-1]:
            record = record[step]
        record[path[-1]] = value

    return change


LIES = {
    "no planes": set_in("planes", value=[]),
    "planes that are no list": set_in("planes", value={"a": 1}),
    "too many planes": set_in("planes", value=[{}] * 65),
    "a plane that is nothing": set_in("planes", 0, value=None),
    "a plane of no bytes": set_in("planes", 0, "width_bytes", value=0),
    "planes that are no row": set_in("planes", 0, "width_bytes", value=31),
    "a stretch of three numbers": set_in("planes", 0, "stretches", value=[[0, 0, 0]]),
    "a stretch of text": set_in("planes", 0, "stretches", value=[[0, "0", 0, 0]]),
    "a stretch before the file": set_in("planes", 0, "stretches", 0, 1, value=-1),
    "a stretch beyond all files": set_in("planes", 0, "stretches", 0, 1, value=1 << 63),
    "rows that begin late": set_in("planes", 0, "stretches", 0, 2, value=1),
    "blocks that begin late": set_in("planes", 0, "stretches", 0, 3, value=1),
    "stretches and a copy": set_in("planes", 1, "stretches", value=[[0, 0, 0, 0]]),
    "a copy of other rows": set_in("planes", 1, "copy", "spec", "num_rows", value=3),
    "nothing in place": set_in("planes", value=[]),
    "no checksums": set_in("checksums", value=None),
    "checksums of other blocks": set_in("checksums", "spec", "num_rows", value=3),
    "no seed": set_in("seed", value=None),
    "a seed of 40 bits": set_in("seed", value=1 << 40),
    "a seed below 0": set_in("seed", value=-1),
    "no spec": set_in("spec", value={}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_layout_that_lies_is_refused(in_place_built: Path, lie: str) -> None:
    record = json.loads(json.dumps(read_catalog(in_place_built).tables["layers.1"].to_dict()))
    LIES[lie](record)
    with pytest.raises(FormatError):
        InPlaceLayout.from_dict(record)


def test_no_damaged_layout_is_more_than_a_named_error(in_place_built: Path) -> None:
    """Any value of the record replaced by any other: read as it is, or refused."""
    whole = json.loads(json.dumps(read_catalog(in_place_built).tables["layers.1"].to_dict()))
    rng = np.random.default_rng(0)
    values = [None, -1, 0, 1, 2**40, 2**70, "x", [], {}, [[]], 1.5, True]
    for _ in range(400):
        record = copy.deepcopy(whole)
        at: Any = record
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            key = keys[int(rng.integers(len(keys)))]
            if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.8:
                at = at[key]
                continue
            at[key] = values[int(rng.integers(len(values)))]
            break
        try:
            InPlaceLayout.from_dict(record)
        except TierStoreError:
            continue


@pytest.mark.parametrize("lie", [(1, 1 << 40), (0, 1)], ids=["beyond the end of its file", "in no file"])
def test_a_catalog_whose_rows_lie_in_no_file_is_refused(
    in_place_built: Path, tmp_path: Path, lie: tuple[int, int]
) -> None:
    shutil.copytree(in_place_built, tmp_path / "store")
    record = read_catalog(in_place_built).tables["plain"].to_dict()
    field, more = lie
    record["planes"][0]["stretches"][0][field] += more
    write_records(tmp_path / "store" / catalog.CATALOG_FILE, {"table/plain": json.dumps(record).encode()})
    with pytest.raises(FormatError, match=r"rows of table plain lie up to byte \d+ of file [01] of its 1"):
        tierstore.open(tmp_path / "store")


@pytest.mark.parametrize(
    "change",
    [
        {"path": "relative/path"},
        {"path": 3},
        {"bytes": "1"},
        {"inode": None},
        {"relative": "a\0b"},
        {"header_sha256": 1},
    ],
    ids=str,
)
def test_a_files_record_that_lies_is_refused(in_place_built: Path, change: dict[str, Any]) -> None:
    record = read_catalog(in_place_built).files[0].to_dict()
    assert InPlaceFile.from_dict(record).to_dict() == record
    with pytest.raises(FormatError, match="of a file in place is damaged"):
        InPlaceFile.from_dict(record | change)


@pytest.mark.parametrize("width", [1, 7, 100, 4095, 4096, 4097, 9000])
def test_rows_of_any_width_at_any_byte_are_read_from_many_stretches(tmp_path: Path, width: int) -> None:
    """Tensors of one table at odd bytes of several files, one of them at a file's end."""
    rng = np.random.default_rng(width)
    tensors, rows = [], []
    for number, (pad, num_rows) in enumerate([(0, 5), (1, 40), (4095, 1), (4096 * 3 + 11, 300), (77, 64)]):
        part = rng.integers(0, 256, (num_rows, width), dtype=np.uint8)
        file = tmp_path / f"part-{number}.bin"
        file.write_bytes(bytes(pad) + part.tobytes() + bytes(number * 13))
        found = file.stat()
        identity = (found.st_size, found.st_mtime_ns, found.st_ino)
        shape = (num_rows, width)
        tensors.append(StoredTensor(f"t.{number}", file, "U8", shape, pad, part.nbytes, FileIdentity(*identity)))
        rows.append(part)
    whole = np.concatenate(rows)
    spec = TableSpec.plain("t", len(whole), width, "raw", width)
    source = TableSource(spec, (Plane(width, tuple(tensors)),))
    build_store(tmp_path / "store", [source], origin={"digest": "d", "files": []}, in_place=True)
    least = 2 << 20
    for io in ("uring", "pread"):
        with tierstore.open(tmp_path / "store", dram=min(least, whole.nbytes // 2 + (600 << 10)), io=io) as store:
            ids = rng.integers(-1, len(whole), 500)
            expected = np.where((ids >= 0)[:, None], whole[ids], 0)
            np.testing.assert_array_equal(store["t"].rows(ids), expected)
            np.testing.assert_array_equal(store["t"].rows(np.arange(len(whole))), whole)
