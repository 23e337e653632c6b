"""Inputs damaged by seed are read or refused by name: no other error, nothing left behind."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from support.token_files import archive_of, litdata_folder, megatron_pair, mosaic_array, mosaic_folder

from tierstore.errors import TierStoreError
from tierstore.tools.inputs.columns import ColumnReader
from tierstore.tools.inputs.fields import Field
from tierstore.tools.trace import write_trace

DOCUMENTS = [np.arange(length, dtype=np.int32) * 7 for length in (5, 1, 90, 30)]
SEEDS, SEEDS_SLOW = 15, 690  # of each of 20 layouts: 300, and 13,500
COLUMN_SEEDS, COLUMN_SEEDS_SLOW = 4, 340  # of each of 3 formats: 1,020


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes flipped, set, removed, doubled, or cut off."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(len(changed))) if rng.random() < 0.5 else int(rng.integers(min(len(changed), 80)))
        match int(rng.integers(6)):
            case 0:
                changed[at] ^= 1 << int(rng.integers(8))
            case 1:
                changed[at] = int(rng.choice([0, 1, 127, 128, 255]))
            case 2:
                changed[at : at + 4] = int(rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1])).to_bytes(4, "little")
            case 3:
                del changed[at : at + int(rng.integers(1, 9))]
            case 4:
                changed[at:at] = changed[at : at + int(rng.integers(1, 9))]
            case _:
                del changed[max(at, 1) :]
        if not changed:
            return data[:1]
    return bytes(changed)


def npy(folder: Path) -> Path:
    np.save(folder / "ids.npy", np.concatenate(DOCUMENTS))
    return folder / "ids.npy"


def llmc(folder: Path) -> Path:
    ids = np.concatenate(DOCUMENTS).astype("<u2")
    (folder / "ids.bin").write_bytes(np.array([20240520, 1, len(ids), *[0] * 253], "<i4").tobytes() + ids.tobytes())
    return folder / "ids.bin"


def lines(folder: Path, compress: Callable[[bytes], bytes] = bytes) -> Path:
    text = "".join(json.dumps({"input_ids": document.tolist()}) + "\n" for document in DOCUMENTS)
    (folder / "ids.jsonl").write_bytes(compress(text.encode()))
    return folder / "ids.jsonl"


def tar(folder: Path, compress: Callable[[bytes], bytes] = bytes) -> Path:
    members = [
        (f"{'d' * 120}/{n}.json", json.dumps(document.tolist()).encode()) for n, document in enumerate(DOCUMENTS)
    ]
    (folder / "ids.tar").write_bytes(compress(archive_of(members)))
    return folder / "ids.tar"


def bare_lines(folder: Path) -> Path:
    (folder / "ids.jsonl").write_text("".join(json.dumps(document.tolist()) + "\n" for document in DOCUMENTS))
    return folder / "ids.jsonl"


def tar_of_arrays(folder: Path) -> Path:
    """As webdataset writes them: several members a document, and headers with long names."""
    members = []
    for number, document in enumerate(DOCUMENTS):
        array = io.BytesIO()
        np.save(array, document.astype("<u8" if number % 2 else ">i4"))
        members += [(f"{'ä' * 90}/{number}.ids.npy", array.getvalue()), (f"{number}.cls", b"1")]
    (folder / "ids.tar").write_bytes(archive_of(members, tarfile.PAX_FORMAT))
    return folder / "ids.tar"


def mosaic_columns(folder: Path) -> Path:
    """A column of ids in JSON beside one of arrays whose type the index states."""
    samples = [
        {"ids": json.dumps(document.tolist()).encode(), "x": mosaic_array(document, with_type=False)}
        for document in DOCUMENTS
    ]
    return mosaic_folder(folder / "mds", {"ids": "json", "x": "ndarray:int32"}, [samples])


def litdata_arrays(folder: Path, **config: str) -> Path:
    """Arrays with their own heads."""
    items = [{"ids": struct.pack("<III", 2, 1, len(document)) + document.tobytes()} for document in DOCUMENTS]
    return litdata_folder(folder / "lit", {"ids": "numpy"}, [items], **config)


def mosaic(folder: Path) -> Path:
    samples = [{"n": bytes(8), "tokens": mosaic_array(document, with_type=True)} for document in DOCUMENTS]
    return mosaic_folder(folder / "mds", {"n": "int", "tokens": "ndarray"}, [samples])


def litdata(folder: Path) -> Path:
    items = [{"ids": document.tobytes(), "n": bytes(8)} for document in DOCUMENTS]
    return litdata_folder(folder / "lit", {"ids": "no_header_numpy:2", "n": "int"}, [items])


def framed(folder: Path) -> Path:
    items = [{"ids": document.tobytes()} for document in DOCUMENTS]
    leaves = {"ids": "no_header_numpy:2"}
    return litdata_folder(folder / "lit", leaves, [items], compression="zstd", compression_level="batch")


def pair(folder: Path) -> Path:
    return megatron_pair(folder / "text.bin", DOCUMENTS, 4)


# What is written, and which of its files is damaged.
LAYOUTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "npy": (npy, "ids.npy"),
    "llm.c": (llmc, "ids.bin"),
    "lines": (lines, "ids.jsonl"),
    "lines in zstd": (lambda folder: lines(folder, zstandard.compress), "ids.jsonl"),
    "lines in gzip": (lambda folder: lines(folder, gzip.compress), "ids.jsonl"),
    "lines in xz": (lambda folder: lines(folder, lzma.compress), "ids.jsonl"),
    "lines in bzip2": (lambda folder: lines(folder, bz2.compress), "ids.jsonl"),
    "tar": (tar, "ids.tar"),
    "tar in gzip": (lambda folder: tar(folder, gzip.compress), "ids.tar"),
    "bare lines": (bare_lines, "ids.jsonl"),
    "tar of arrays": (tar_of_arrays, "ids.tar"),
    "Mosaic shard of columns": (mosaic_columns, "mds/shard.00000.mds"),
    "litdata arrays": (litdata_arrays, "lit/chunk-0-0.bin"),
    "litdata in zstd": (
        lambda folder: litdata_arrays(folder, compression="zstd", compression_level="sample"),
        "lit/chunk-0-0.bin",
    ),
    "Mosaic shard": (mosaic, "mds/shard.00000.mds"),
    "Mosaic index": (mosaic, "mds/index.json"),
    "litdata chunk": (litdata, "lit/chunk-0-0.bin"),
    "litdata frames": (framed, "lit/chunk-0-0.bin"),
    "litdata index": (litdata, "lit/index.json"),
    "Megatron index": (pair, "text.idx"),
}


def check(layout: str, seed: int, folder: Path) -> None:
    write, name = LAYOUTS[layout]
    given = write(folder)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(damaged(data, np.random.default_rng([seed, *layout.encode()])))
    before = sorted(path for path in folder.rglob("*"))
    refusal = ""
    try:
        write_trace([given], folder / "t.trace", vocab_size=60_000)
        (folder / "t.trace").unlink()
    except (TierStoreError, ValueError) as error:
        refusal = str(error)
    assert not refusal or str(folder) in refusal, f"{layout}, seed {seed}: {refusal}"
    assert sorted(path for path in folder.rglob("*")) == before, f"{layout}, seed {seed}"
    (folder / name).write_bytes(data)


def sweep(layout: str, seeds: range, folder: Path) -> None:
    for seed in seeds:
        inside = folder / str(seed)
        inside.mkdir()
        try:
            check(layout, seed, inside)
        except Exception as error:
            raise AssertionError(f"{layout}, seed {seed}") from error


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_damaged_input_is_read_or_refused_by_name(tmp_path: Path, layout: str) -> None:
    sweep(layout, range(SEEDS), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_thousand_damaged_inputs_are_read_or_refused_by_name(tmp_path: Path, layout: str) -> None:
    sweep(layout, range(SEEDS, SEEDS_SLOW), tmp_path)


# Columns, by workers


def columns_of(format_: str) -> bytes:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"input_ids": [document.tolist() for document in DOCUMENTS] * 3, "n": list(range(12))})
    out: Any = io.BytesIO()
    if format_ == "parquet":
        pyarrow.parquet.write_table(table, out, row_group_size=5)
    else:
        new = pyarrow.ipc.new_file if format_ == "arrow-file" else pyarrow.ipc.new_stream
        with new(out, table.schema) as file:
            file.write_table(table, max_chunksize=5)
    return bytes(out.getvalue())


def sweep_columns(format_: str, seeds: range, path: Path) -> None:
    pytest.importorskip("pyarrow")
    data = columns_of(format_)
    with ColumnReader() as columns:
        for seed in seeds:
            path.write_bytes(damaged(data, np.random.default_rng([seed, *format_.encode()])))
            refusal = ""
            try:
                columns.field_of(path, format_, None)
                for _ in columns.id_pieces(path, format_, Field("input_ids", "ids"), 60_000):
                    pass
            except (TierStoreError, ValueError) as error:
                refusal = str(error)
            assert not refusal or str(path) in refusal, f"{format_}, seed {seed}: {refusal}"


@pytest.mark.parametrize("format_", ["parquet", "arrow-file", "arrow-stream"])
def test_a_damaged_file_of_columns_is_read_or_refused_by_name(tmp_path: Path, format_: str) -> None:
    sweep_columns(format_, range(COLUMN_SEEDS), tmp_path / "ids")


@pytest.mark.slow
@pytest.mark.parametrize("format_", ["parquet", "arrow-file", "arrow-stream"])
def test_a_thousand_damaged_files_of_columns_are_read_or_refused_by_name(tmp_path: Path, format_: str) -> None:
    sweep_columns(format_, range(COLUMN_SEEDS, COLUMN_SEEDS_SLOW), tmp_path / "ids")
