"""Token files of others' layouts, written byte by byte, so that tests share no code with the readers."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zstandard


def samples_with_table(samples: Sequence[bytes], between: bytes = b"") -> bytes:
    """A count, the samples' offsets and one more, what lies between, and the samples."""
    ends = np.cumsum([0, *map(len, samples)]) + 8 + 4 * len(samples) + len(between)
    return struct.pack(f"<{len(samples) + 2}I", len(samples), *ends) + between + b"".join(samples)


def mosaic_array(values: np.ndarray, *, with_type: bool) -> bytes:
    """One value of a column `ndarray` (with_type) or `ndarray:DTYPE`: its type, its shape, its values."""
    codes = {"uint16": 16, "int32": 33, "int64": 65}
    width = next(bits for bits in range(4) if max(values.shape) < 1 << (8 << bits))
    shape = np.array(values.shape, dtype=f"<u{1 << width}").tobytes()
    head = bytes([codes[values.dtype.name]]) if with_type else b""
    return head + bytes([values.ndim << 2 | width]) + shape + values.tobytes()


def mosaic_folder(folder: Path, columns: dict[str, str], shards: Sequence[Sequence[dict[str, bytes]]]) -> Path:
    """An MDS data set. columns: encoding by name; shards: for each its samples, the bytes of each column."""
    folder.mkdir(parents=True)
    names, records = sorted(columns), []
    sizes = [8 if columns[name] == "int" else None for name in names]
    for number, samples in enumerate(shards):
        shard = {
            "column_encodings": [columns[name] for name in names],
            "column_names": names,
            "column_sizes": sizes,
            "compression": None,
            "format": "mds",
            "hashes": [],
            "size_limit": 1 << 26,
            "version": 2,
        }
        packed = []
        for sample in samples:
            stated = [len(sample[name]) for name, size in zip(names, sizes, strict=True) if size is None]
            packed.append(struct.pack(f"<{len(stated)}I", *stated) + b"".join(sample[name] for name in names))
        data = samples_with_table(packed, json.dumps(shard, sort_keys=True).encode())
        basename = f"shard.{number:05}.mds"
        (folder / basename).write_bytes(data)
        raw = {"basename": basename, "bytes": len(data), "hashes": {}}
        records.append(shard | {"raw_data": raw, "samples": len(samples), "zip_data": None})
    (folder / "index.json").write_text(json.dumps({"shards": records, "version": 2}))
    return folder


def litdata_folder(
    folder: Path, leaves: dict[str, str], chunks: Sequence[Sequence[dict[str, bytes]]], **config: Any
) -> Path:
    """A litdata data set of dicts. leaves: format by name; chunks: for each its items, the bytes of each leaf."""
    folder.mkdir(parents=True)
    leaf = {"type": None, "context": None, "children_spec": []}
    spec = {"type": "builtins.dict", "context": json.dumps(list(leaves)), "children_spec": [leaf] * len(leaves)}
    records = []
    for number, items in enumerate(chunks):
        packed = []
        for item in items:
            parts = [item[name] for name in leaves]
            is_tokens = config.get("item_loader") == "TokensLoader"
            sizes = b"" if is_tokens else struct.pack(f"<{len(parts)}I", *map(len, parts))
            packed.append(sizes + b"".join(parts))
        level = config.get("compression_level")
        if level == "sample":
            packed = [zstandard.compress(item) for item in packed]
        data = _framed(packed, 3) if level == "batch" else samples_with_table(packed)
        filename = f"chunk-0-{number}.bin"
        (folder / filename).write_bytes(data)
        records.append({"chunk_bytes": len(data), "chunk_size": len(items), "dim": None, "filename": filename})
    described = {
        "chunk_bytes": 1 << 26,
        "chunk_size": None,
        "compression": None,
        "data_format": list(leaves.values()),
        "data_spec": json.dumps([1, spec]),
        "encryption": None,
        "item_loader": "PyTreeLoader",
    }
    (folder / "index.json").write_text(json.dumps({"chunks": records, "config": described | config}))
    return folder


def _framed(items: Sequence[bytes], together: int) -> bytes:
    """A chunk of litdata's with so many items together in each frame of zstd."""
    groups = [items[start : start + together] for start in range(0, len(items), together)]
    frames = [zstandard.compress(b"".join(group)) for group in groups]
    head = struct.pack("<8sHHIII", b"LDFZ01\0\0", 1, 0, len(items), together, len(frames))
    head += np.cumsum([0, *map(len, items)]).astype("<u4").tobytes()
    at, table = len(head) + 24 * len(frames), b""
    for number, (group, frame) in enumerate(zip(groups, frames, strict=True)):
        unfolded = sum(map(len, group))
        table += struct.pack("<IIQII", number * together, len(group), at, len(frame), unfolded)
        at += len(frame)
    return head + table + b"".join(frames)


def megatron_pair(binary: Path, documents: Sequence[np.ndarray], code: int) -> Path:
    """A .bin with its .idx, a sequence a document."""
    lengths = np.array([len(document) for document in documents], dtype="<i4")
    starts = np.cumsum([0, *lengths[:-1]]).astype("<i8") * documents[0].itemsize
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1)
    ends = np.arange(len(lengths) + 1, dtype="<i8")
    binary.write_bytes(b"".join(document.tobytes() for document in documents))
    binary.with_suffix(".idx").write_bytes(head + lengths.tobytes() + starts.tobytes() + ends.tobytes())
    return binary


def archive_of(members: Sequence[tuple[str, bytes]], format_: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar archive, by the standard library."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format_) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()
