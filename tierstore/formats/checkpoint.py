"""A trained checkpoint on disk: which tensors its files hold, at which bytes, and who it is (its digest).

Flows in: a Hugging Face-style folder (config.json, *.safetensors with or without an index), or one .safetensors or .pt file.
Flows out: `StoredTensor`s, whose rows `PlaneReader` reads straight into the caller's buffer, so that memory does not grow
with the checkpoint. Refuses headers that lie: every offset is checked against the file before it is used.

The safetensors header is parsed here rather than by its library because we need byte offsets, and dtypes (fp8, e8m0) that
NumPy does not have; a test holds our verdicts against the library's.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, FormatError
from ..spec import TableSpec

HEADER_BYTES_MAX = 100_000_000  # the limit of the safetensors format itself
DIGEST_BLOCK_BYTES = 4096
DIGEST_BLOCKS_PER_TENSOR = 16

# Bytes of one element for each safetensors dtype that can be a table's (sub-byte types cannot).
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: row-major elements of `dtype` (safetensors' names) from byte `byte_start` on."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    byte_start: int
    num_bytes: int

    def read_bytes(self) -> bytes:
        """Reads the whole tensor: for scalars and hash buffers, not for tables. Blocks on the disk."""
        out = np.empty(self.num_bytes, dtype=np.uint8)
        fd = os.open(self.path, os.O_RDONLY)
        try:
            read_exactly(fd, out, self.byte_start, f"tensor {self.name} in {self.path}")
        finally:
            os.close(fd)
        return out.tobytes()


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
            raise ConfigError(f"cannot open checkpoint file {error.filename}: {error.strerror}") from error

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


def read_exactly(fd: int, out: np.ndarray, byte_start: int, what: str) -> None:
    """Fills `out` (contiguous uint8) from `byte_start` of `fd` on; raises `FormatError` where the file ends before."""
    view = out.reshape(-1).data
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], byte_start + done)
        if count == 0:
            raise FormatError(
                f"{what}: the file ends {len(view) - done} bytes early, at byte {byte_start + done}; copy it again"
            )
        done += count


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's configuration and tensors. `files` are the files that hold tensors; nothing stays open."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    files: tuple[Path, ...]
    header_digests: tuple[str, ...]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Reads the configuration and every header of a folder, or of one .safetensors or .pt file.

        Raises `ConfigError` where something is missing, `FormatError` where a header lies about its file.
        """
        path = Path(path)
        if path.is_dir():
            files = _tensor_files(path)
            config = _read_json(path / "config.json") if (path / "config.json").exists() else {}
        elif path.is_file():
            files, config = [path], {}
        else:
            raise ConfigError(f"there is no checkpoint at {path}; give a folder with *.safetensors, or one file")
        tensors: dict[str, StoredTensor] = {}
        digests = []
        for file in files:
            found, digest = _read_pt(file) if file.suffix in (".pt", ".pth", ".bin") else _read_safetensors(file)
            for tensor in found:
                if tensor.name in tensors:
                    raise FormatError(
                        f"tensor {tensor.name} is in {tensors[tensor.name].path.name} and again in {file.name}; remove one file"
                    )
                tensors[tensor.name] = tensor
            digests.append(digest)
        return cls(path, config, tensors, tuple(files), tuple(digests))

    def tensor(self, name: str, dtypes: Sequence[str], ndim: int) -> StoredTensor:
        """Returns the tensor `name`, or raises `ConfigError` where it is missing, or of another dtype or rank."""
        tensor = self.tensors.get(name)
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
            digest.update(f"{file.name}\0{file.stat().st_size}\0{header_digest}\0".encode())
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
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} cannot be read as JSON: {error}; download it again") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a {type(value).__name__}, expected an object; download it again")
    return value


def _read_safetensors(path: Path) -> tuple[list[StoredTensor], str]:
    """Reads and checks the header of a safetensors file; returns its tensors and the header's SHA-256 (hex).

    Layout (https://github.com/huggingface/safetensors): u64 header length, JSON header, data. Tensors must fill the data
    without gaps or overlaps, and the data must end with the file.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= header_bytes <= min(HEADER_BYTES_MAX, file_bytes - 8):
                raise FormatError(
                    f"{path}: a header of {header_bytes} bytes in a file of {file_bytes} bytes; "
                    f"it is truncated or no safetensors file"
                )
            header = file.read(header_bytes)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: its header is not JSON ({error}); download it again") from error
    if not isinstance(entries, dict):
        raise FormatError(f"{path}: its header is not a JSON object; download it again")
    entries.pop("__metadata__", None)
    data_start = 8 + header_bytes
    tensors = [_checked_tensor(path, name, entry, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.byte_start, tensor.num_bytes))
    expected = data_start
    for tensor in tensors:
        if tensor.byte_start != expected:
            raise FormatError(
                f"{path}: tensor {tensor.name} starts at byte {tensor.byte_start}, expected {expected}; "
                f"the header lies, download it again"
            )
        expected += tensor.num_bytes
    if expected != file_bytes:
        raise FormatError(
            f"{path}: {file_bytes} bytes on disk, its header says {expected}; "
            f"the copy was cut short or is another file: download it again"
        )
    return tensors, hashlib.sha256(header).hexdigest()


def _checked_tensor(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    """Checks one header entry on its own, before any of its numbers is used."""
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: tensor {name} has no dtype, shape or data_offsets; download it again") from error
    numbers = [start, end, *shape] if isinstance(shape, list) else [None]
    if (
        not all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        or end < start
        or not isinstance(dtype, str)
    ):
        raise FormatError(
            f"{path}: tensor {name} has dtype {dtype!r}, shape {shape!r}, offsets {start!r} to {end!r}; download it again"
        )
    num_elements = 1
    for size in shape:
        num_elements *= size
    element_bytes = DTYPE_BYTES.get(dtype)
    if element_bytes is not None and num_elements * element_bytes != end - start:
        raise FormatError(
            f"{path}: tensor {name}, {dtype} {shape}, needs {num_elements * element_bytes} bytes, "
            f"its offsets give {end - start}; "
            f"the header lies, download it again"
        )
    return StoredTensor(name, path, dtype, tuple(shape), data_start + start, end - start)


def _read_pt(path: Path) -> tuple[list[StoredTensor], str]:
    """Finds the tensors of a file that `torch.save` wrote: a tensor, or a dict of them. Needs torch.

    torch maps the file (`mmap=True`, `weights_only=True`: nothing is executed) and says where each tensor lies in memory;
    /proc/self/maps says which byte of the file that is. The rows are then read like any other, so memory does not grow.
    """
    try:
        import torch
    except ImportError as error:
        raise ConfigError(
            f"{path} is a PyTorch file, and torch is not installed; pip install torch, or save it as .safetensors"
        ) from error
    names = {
        torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int8: "I8",
        torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
        torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    }  # fmt: skip
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many types here (pickle, runtime, zip errors); all mean an unusable file
        raise FormatError(
            f"{path}: torch cannot load it with weights_only and mmap ({error}); save it again with a current torch"
        ) from error
    named = {path.stem: value} if isinstance(value, torch.Tensor) else value
    if not isinstance(named, dict):
        raise FormatError(f"{path}: it holds a {type(named).__name__}, expected a tensor or a dict of tensors")
    tensors = []
    for name, tensor in named.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_contiguous() and tensor.numel() and tensor.dtype in names:
            num_bytes = tensor.numel() * tensor.element_size()
            byte_start = _file_offset(path, tensor.data_ptr())
            tensors.append(
                StoredTensor(str(name), path, names[tensor.dtype], tuple(tensor.shape), byte_start, num_bytes)
            )
    header = repr([(t.name, t.dtype, t.shape, t.byte_start) for t in tensors])
    return tensors, hashlib.sha256(header.encode()).hexdigest()


def _file_offset(path: Path, address: int) -> int:
    """Returns which byte of the file `path` is mapped at `address` of this process."""
    inode = path.stat().st_ino
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, _, offset, _, mapped_inode, *_ = line.split(maxsplit=5)
            start, end = (int(part, 16) for part in span.split("-"))
            if start <= address < end and int(mapped_inode) == inode:
                return int(offset, 16) + address - start
    raise OSError(errno.ENXIO, "torch did not map the file; save it again with a current torch", str(path))
