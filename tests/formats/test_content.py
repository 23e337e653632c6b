"""A file is what its bytes say: written by the real libraries where there are some,
and random numbers are nothing at all."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import zstandard

from tierstore.formats.content import HEAD_BYTES, content_of, recognise, unfinished_download

IDS = np.arange(3000, dtype=np.uint16)


def saved(write: object, *arguments: object, **options: object) -> bytes:
    out = io.BytesIO()
    write(*arguments, out, **options)  # type: ignore[operator]
    return out.getvalue()


def zipped(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def tarred() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model_weights.ckpt"), io.BytesIO(b""))
    return out.getvalue()


def with_offsets(items: list[bytes], between: bytes = b"") -> bytes:
    """A litdata chunk; with the JSON of its columns between, a Mosaic shard."""
    offsets = np.cumsum([0, *map(len, items)]) + 8 + 4 * len(items) + len(between)
    return struct.pack(f"<{len(items) + 2}I", len(items), *offsets) + between + b"".join(items)


def llmc(magic: int, version: int, ids: np.ndarray) -> bytes:
    return np.array([magic, version, len(ids)] + [0] * 253, dtype="<i4").tobytes() + ids.tobytes()


COLUMNS = json.dumps({"column_names": ["tokens"], "format": "mds"}).encode()
FILES = {
    "empty": b"",
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 2206408\n",
    "git-annex": b"/annex/objects/SHA256E-s5--abc.safetensors\n",
    "html": b"\n<!DOCTYPE html>\n<html><body>404</body></html>",
    "xml-error": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "safetensors": safetensors.numpy.save({"a": IDS}, metadata={"format": "pt"}),
    "gguf": b"GGUF" + struct.pack("<IQQ", 3, 2, 5) + bytes(100),
    "gzip": gzip.compress(IDS.tobytes()),
    "zstd": zstandard.compress(IDS.tobytes()),
    "xz": lzma.compress(IDS.tobytes()),
    "bzip2": bz2.compress(IDS.tobytes()),
    "torch-zip": saved(torch.save, {"a": torch.arange(5)}),
    "torch-legacy": saved(torch.save, {"a": torch.arange(5)}, _use_new_zipfile_serialization=False),
    "npz": zipped(**{"a.npy": b"x"}),
    "zip": zipped(**{"model/config.json": b"{}"}),
    "tar": tarred(),
    "pickle": pickle.dumps({"a": IDS, "b": [1, 2, 3]}),
    "npy": saved(lambda out: np.save(out, IDS)),
    "parquet": b"PAR1" + bytes(100) + b"PAR1",
    "arrow-file": b"ARROW1\0\0" + bytes(100),
    "arrow-stream": struct.pack("<iiI", -1, 120, 16) + bytes(500),
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "sqlite": b"SQLite format 3\0" + bytes(100),
    "megatron-index": b"MMIDIDX\0\0" + struct.pack("<QB", 1, 8) + bytes(100),
    "mosaic-index": json.dumps({"version": 2, "shards": [{"column_names": ["t"], "format": "mds"}]}).encode(),
    "mosaic-shard": with_offsets([b"abc", b"de"], COLUMNS),
    "litdata-index": json.dumps({"chunks": [], "config": {"chunk_bytes": 5, "chunk_size": None}}).encode(),
    "litdata-chunk": with_offsets([IDS.tobytes()] * 3),
    "llmc-tokens-u16": llmc(20240520, 1, IDS),
    "llmc-tokens-u32": llmc(20240801, 7, IDS.astype("<u4")),
    "json-lines": b'{"text": "one"}\n{"text": "two"}\n',
    "json": json.dumps({"weight_map": {f"layers.{i}": "a.safetensors" for i in range(500)}}, indent=1).encode(),
    "apple-double": bytes.fromhex("0005160700020000") + b"Mac OS X        " + bytes(4072),
    "ds-store": b"\0\0\0\x01Bud1" + bytes(100),
    "pdf": b"%PDF-1.7\n",
}


def recognised(data: bytes) -> str | None:
    found = recognise(data[:HEAD_BYTES], len(data))
    return found.kind if found else None


@pytest.mark.parametrize("kind", FILES)
def test_a_file_is_known_by_its_bytes_whatever_it_is_called(tmp_path: Path, kind: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(FILES[kind])
    found = content_of(tmp_path / "model.safetensors")
    assert found is not None
    assert found.kind == kind
    assert found.name
    assert found.remedy


def test_long_files_are_known_by_their_first_bytes_alone() -> None:
    assert recognised(with_offsets([IDS.tobytes()] * 5000)) == "litdata-chunk"
    assert recognised(with_offsets([IDS.tobytes()] * 5000, COLUMNS)) == "mosaic-shard"
    assert recognised(pickle.dumps([np.zeros(100_000)])) == "pickle"
    assert recognised(b'{"text": "' + b"a" * 9000 + b'"}\n{"text": "b"}\n') == "json"
    assert recognised(json.dumps(list(range(5000))).encode()) == "json"


TEXTS = [
    "[1] Introduction\nThe paper",
    "{curly} braces",
    "[[wiki link]] text",
    "plain",
    "<p>markup</p>",
    "<?xml version='1.0'?><tei/>",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_not_taken_for_another_kind(text: str) -> None:
    assert recognised(text.encode()) is None
    assert recognised((text + " words" * 2000).encode()) is None


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<u4", "<i8"])
def test_token_ids_are_not_taken_for_another_kind(dtype: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        ids = (rng.zipf(1.2, size=rng.integers(1, 3000)) % 50_000).astype(dtype)
        assert recognised(ids.tobytes()) is None
    for steady in (np.zeros(3000), np.full(3000, -1), np.arange(3000), np.sort(rng.integers(0, 50_000, 3000))):
        assert recognised(steady.astype(dtype).tobytes()) is None


def test_an_unfinished_download_is_known_by_what_stands_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"whole")
    assert unfinished_download(file) is None
    (tmp_path / "model.safetensors.part").write_bytes(b"an older attempt")
    assert unfinished_download(file) is None, "the file itself is there, and not empty"
    file.write_bytes(b"")
    assert "model.safetensors.part stands beside it" in str(unfinished_download(file))
    file.write_bytes(b"allocated at once")
    for suffix, tool in ((".aria2", "aria2"), (".st", "axel")):
        control = tmp_path / f"model.safetensors{suffix}"
        control.write_bytes(b"")
        assert f"by {tool} has not finished: {control.name}" in str(unfinished_download(file))
        control.unlink()
    assert "unfinished part" in str(unfinished_download(tmp_path / "model.safetensors.crdownload"))
