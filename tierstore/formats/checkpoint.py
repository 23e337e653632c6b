"""A trained checkpoint on disk: which tensors its files hold, at which bytes, and who it is (its digest).

Flows in: a Hugging Face-style folder (config.json, *.safetensors with or without an index), or one .safetensors or .pt file.
Flows out: `StoredTensor`s (`tensor_files.py`), whose rows `PlaneReader` reads straight into the caller's buffer, so that
memory does not grow with the checkpoint. Refuses checkpoints that lack files, or of which two files hold one tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, FormatError
from ..spec import TableSpec
from .tensor_files import StoredTensor, read_exactly, read_tensor_file

DIGEST_BLOCK_BYTES = 4096
DIGEST_BLOCKS_PER_TENSOR = 16


@dataclass(frozen=True)
class Plane:
    """The bytes that one part of a row comes from: `width_bytes` of each row, in tensors stacked by rows."""

    width_bytes: int
    tensors: tuple[StoredTensor, ...]


@dataclass(frozen=True)
class TableSource:
    """A table as it lies in a checkpoint: row r of the table is row r of every plane, side by side, in this order."""

    spec: TableSpec
    planes: tuple[Plane, ...]

    def __post_init__(self) -> None:
        width_bytes = sum(plane.width_bytes for plane in self.planes)
        if width_bytes != self.spec.row_bytes:
            raise ConfigError(
                f"table {self.spec.name}: its planes give {width_bytes} bytes a row, its codec needs {self.spec.row_bytes}"
            )
        for plane in self.planes:
            num_bytes = sum(tensor.num_bytes for tensor in plane.tensors)
            names = ", ".join(tensor.name for tensor in plane.tensors[:3])
            if num_bytes != plane.width_bytes * self.spec.num_rows:
                raise ConfigError(
                    f"table {self.spec.name}: tensors {names} hold {num_bytes / max(plane.width_bytes, 1):g} rows of "
                    f"{plane.width_bytes} bytes, the table has {self.spec.num_rows} rows; "
                    f"config.json does not belong to these tensors, or a file is missing"
                )
            for tensor in plane.tensors:
                if tensor.num_bytes % max(plane.width_bytes, 1):
                    raise ConfigError(
                        f"tensor {tensor.name}: {tensor.num_bytes} bytes are no whole rows of {plane.width_bytes} bytes"
                    )


class PlaneReader:
    """Reads row ranges of a table's planes. Holds one descriptor a file; any number of threads may read at once."""

    def __init__(self, source: TableSource) -> None:
        self._source = source
        self._fds: dict[Path, int] = {}
        try:
            for plane in source.planes:
                for tensor in plane.tensors:
                    if tensor.path not in self._fds:
                        self._fds[tensor.path] = os.open(tensor.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self.close()
            raise ConfigError(
                f"cannot open checkpoint file {error.filename}: {error.strerror}; make it readable, or copy it again"
            ) from error

    def read(self, row_start: int, row_end: int) -> list[np.ndarray]:
        """Returns for each plane the rows [row_start, row_end) as uint8 [rows, width_bytes]. Blocks on the disk.

        Raises `FormatError` where the file has become shorter than its header says, `OSError` where the disk fails.
        """
        assert 0 <= row_start <= row_end <= self._source.spec.num_rows
        planes = []
        for plane in self._source.planes:
            out = np.empty((row_end - row_start, plane.width_bytes), dtype=np.uint8)
            tensor_row_start = 0
            for tensor in plane.tensors:
                tensor_row_end = tensor_row_start + tensor.num_bytes // plane.width_bytes
                start, end = max(row_start, tensor_row_start), min(row_end, tensor_row_end)
                if start < end:
                    byte_start = tensor.byte_start + (start - tensor_row_start) * plane.width_bytes
                    what = f"rows {start} to {end} of tensor {tensor.name} in {tensor.path}"
                    read_exactly(self._fds[tensor.path], out[start - row_start : end - row_start], byte_start, what)
                tensor_row_start = tensor_row_end
            planes.append(out)
        return planes

    def close(self) -> None:
        """Closes the descriptors; closing twice is harmless."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def __enter__(self) -> PlaneReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's configuration and tensors. `files` are the files that hold tensors; nothing stays open.

    `unusable` says of tensors that a file holds, but not as plain rows, why not and what to do.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    files: tuple[Path, ...]
    header_digests: tuple[str, ...]
    unusable: dict[str, str]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Reads the configuration and every header of a folder, or of one .safetensors or .pt file.

        Raises `ConfigError` where something is missing or cannot be read, `FormatError` where a header lies about its file.
        """
        path = Path(path)
        try:
            return cls._open(path)
        except OSError as error:
            raise ConfigError(
                f"cannot read {error.filename or path}: {error.strerror}; make it readable for this user, or mend its disk"
            ) from error

    @classmethod
    def _open(cls, path: Path) -> Checkpoint:
        if path.is_dir():
            files = _tensor_files(path)
            config = _read_json(path / "config.json") if (path / "config.json").exists() else {}
        elif path.exists():
            files, config = [path], {}
        else:
            raise ConfigError(f"there is no checkpoint at {path}; give a folder with *.safetensors, or one file")
        tensors: dict[str, StoredTensor] = {}
        unusable: dict[str, str] = {}
        digests = []
        for file in files:
            found = read_tensor_file(file)
            for tensor in found.tensors:
                if tensor.name in tensors:
                    raise FormatError(
                        f"tensor {tensor.name} is in {tensors[tensor.name].path.name} and again in {file.name}; remove one file"
                    )
                tensors[tensor.name] = tensor
            unusable |= found.unusable
            digests.append(found.header_digest)
        return cls(path, config, tensors, tuple(files), tuple(digests), unusable)

    def tensor(self, name: str, dtypes: Sequence[str], ndim: int) -> StoredTensor:
        """Returns the tensor `name`, or raises `ConfigError` where it is missing, unusable, or of another dtype or rank."""
        tensor = self.tensors.get(name)
        if tensor is None and name in self.unusable:
            raise ConfigError(f"{self.path}: tensor {name} {self.unusable[name]}")
        if tensor is None:
            raise ConfigError(
                f"{self.path}: tensor {name} is missing; a file of the checkpoint was not downloaded, or config.json is another's"
            )
        if tensor.dtype not in dtypes or len(tensor.shape) != ndim:
            raise ConfigError(
                f"{self.path}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, "
                f"expected {' or '.join(dtypes)} of {ndim} dimensions"
            )
        return tensor

    def digest(self) -> str:
        """Returns who this checkpoint is: a SHA-256 (hex) over its configuration, headers and samples of every tensor.

        Samples are up to 16 evenly spaced blocks of 4 KiB a tensor, so that a further-trained checkpoint of the same shapes
        (whose dense weights all differ) has another digest without reading hundreds of gigabytes. Blocks on the disk.
        """
        digest = hashlib.sha256()
        digest.update(json.dumps(self.config, sort_keys=True).encode())
        block = np.empty(DIGEST_BLOCK_BYTES, dtype=np.uint8)
        for file, header_digest in zip(self.files, self.header_digests, strict=True):
            digest.update(os.fsencode(file.name) + f"\0{file.stat().st_size}\0{header_digest}\0".encode())
            fd = os.open(file, os.O_RDONLY)
            try:
                for tensor in sorted((t for t in self.tensors.values() if t.path == file), key=lambda t: t.byte_start):
                    for byte_start, num_bytes in _sample_blocks(tensor.num_bytes):
                        part = block[:num_bytes]
                        read_exactly(fd, part, tensor.byte_start + byte_start, f"tensor {tensor.name} in {file}")
                        digest.update(part.data)
            finally:
                os.close(fd)
        return digest.hexdigest()

    def as_record(self) -> dict[str, Any]:
        """Returns what the catalog keeps of where rows came from: digest, and each file's name, bytes, header digest."""
        files = [
            {"name": file.name, "bytes": file.stat().st_size, "header_sha256": digest}
            for file, digest in zip(self.files, self.header_digests, strict=True)
        ]
        return {"digest": self.digest(), "files": files}


def _sample_blocks(num_bytes: int) -> list[tuple[int, int]]:
    """Returns (start, length) of the blocks of a tensor that go into its checkpoint's digest: first and last included."""
    if num_bytes <= DIGEST_BLOCK_BYTES * DIGEST_BLOCKS_PER_TENSOR:
        return [
            (start, min(DIGEST_BLOCK_BYTES, num_bytes - start)) for start in range(0, num_bytes, DIGEST_BLOCK_BYTES)
        ]
    last = num_bytes - DIGEST_BLOCK_BYTES
    return [(last * i // (DIGEST_BLOCKS_PER_TENSOR - 1), DIGEST_BLOCK_BYTES) for i in range(DIGEST_BLOCKS_PER_TENSOR)]


def _tensor_files(folder: Path) -> list[Path]:
    """Returns the folder's safetensors files: those that its index names, else all."""
    index_path = folder / "model.safetensors.index.json"
    if not index_path.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ConfigError(
                f"{folder} holds no *.safetensors file; give the folder of a checkpoint, or one .safetensors or .pt file"
            )
        return files
    weight_map = _read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise FormatError(f"{index_path}: it has no weight_map of tensor names to file names; download it again")
    names = sorted(set(weight_map.values()))
    if any("/" in name or name.startswith(".") for name in names):
        raise FormatError(f"{index_path}: it names files outside its folder; download it again")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"{folder}: {len(missing)} of {len(names)} files of the index are missing, first {missing[0]}; download them"
        )
    return [folder / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():  # opening a FIFO would wait for its writer
        raise ConfigError(f"{path} is no regular file; put the checkpoint's own file there")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} cannot be read as JSON: {error}; download it again") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a {type(value).__name__}, expected an object; download it again")
    return value
