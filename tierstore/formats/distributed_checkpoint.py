"""Folders of torch.distributed.checkpoint (DCP): tables whose rows lie in the files of several ranks.

Input: the folder's `.metadata`, which says which rectangle of which tensor lies where in which `*.distcp` file. Output:
tensors whose pieces are row ranges, with the bytes of each in its file. Errors: `FormatError` for a `.metadata` that is
damaged, of another kind or contradicts itself; a tensor that cannot be read as rows (split by columns, in a file that
is missing, of a size that its file contradicts) is known by name, with the reason. Loads no torch, runs no code.

`.metadata` is a pickle of dataclasses: for each tensor its dtype, size and chunks (offsets, sizes), and for each chunk
a file, an offset and a length, at which torch.save's archive of the chunk lies (`torch_archive.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError, FormatError
from . import restricted_pickle
from .checkpoint_files import METADATA_NAME, why_absent
from .restricted_pickle import PickleError, Record, Word, named_records, shown
from .stored_tensor import FileIdentity, StoredTensor, TensorFile, stacked
from .torch_archive import DTYPES, saved_tensor

METADATA_BYTES_MAX = 256 << 20
_SAVE = "save the checkpoint again, or give another step's folder"
_DATACLASSES = (
    "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "BytesStorageMetadata",
    "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
_NAMES: dict[tuple[str, str], Any] = {
    **named_records("torch.distributed.checkpoint.metadata", *_DATACLASSES),
    **named_records("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties", "MEM_FORMAT_ENCODING"),
    **named_records("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    **named_records("pathlib", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path"),
    **named_records("pathlib._local", "PosixPath", "WindowsPath"),
    ("torch", "Size"): restricted_pickle.size,
    ("torch", "*"): Word,
    ("torch.serialization", "_get_layout"): restricted_pickle.word,
}


class _Chunk(NamedTuple):
    """A rectangle of a tensor, and the bytes of the file that hold torch.save's archive of it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file_name: str
    start: int
    num_bytes: int


class _Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[_Chunk, ...]


class DistributedFolder(NamedTuple):
    """What a folder holds; the fields are those of `Checkpoint`. contents: what each file has, by its path."""

    tensors: dict[str, StoredTensor]
    unusable: dict[str, str]
    inner_names: dict[str, list[str]]
    contents: dict[Path, TensorFile]


def read_distributed(folder: Path) -> DistributedFolder:
    """Finds the tensors of a DCP folder. Blocks on the disk: some small reads for each chunk.

    Raises `FormatError` if `.metadata` cannot be read, `OSError` if the disk fails.
    """
    path = folder / METADATA_NAME
    data = _metadata_bytes(path)
    try:
        described, paths, unusable = _described(restricted_pickle.load(data, _NAMES))
    except PickleError as error:
        raise FormatError(
            f"{path}: it is no metadata of torch.distributed.checkpoint that this version reads: {error}; {_SAVE}"
        ) from error
    files = _Files(folder)
    tensors: dict[str, StoredTensor] = {}
    with contextlib.closing(files):
        for name, tensor in described.items():
            try:
                tensors[name] = files.rows_of(name, tensor)
            except (FormatError, ConfigError) as error:
                unusable[name] = str(error)
    digest = hashlib.sha256(data).hexdigest()
    return DistributedFolder(tensors, unusable, _inner_names(paths), files.contents(tensors, digest))


def _metadata_bytes(path: Path) -> bytes:
    num_bytes = path.stat().st_size
    if not path.is_file() or num_bytes > METADATA_BYTES_MAX:
        raise FormatError(f"{path}: {num_bytes} bytes of metadata, expected a file of up to {METADATA_BYTES_MAX}")
    return path.read_bytes()


def _described(metadata: Any) -> tuple[dict[str, _Tensor], dict[str, tuple[Any, ...]], dict[str, str]]:
    """Returns the tensors, the keys that lead to each in nested dicts, and why others cannot be read."""
    if not isinstance(metadata, Record) or type(metadata).__name__ != "Metadata":
        raise PickleError(f"it holds a {type(metadata).__name__}")
    stored = {}
    for index, info in metadata.of("storage_data", dict).items():
        if not isinstance(index, Record) or not isinstance(info, Record):
            raise PickleError("storage_data is not of this format")
        offset = index.__dict__.get("offset")
        stored[index.of("fqn", str), offset if offset is None else _sizes(offset)] = info
    tensors: dict[str, _Tensor] = {}
    unusable: dict[str, str] = {}
    for name, tensor in metadata.of("state_dict_metadata", dict).items():
        if not isinstance(name, str) or not isinstance(tensor, Record):
            raise PickleError("state_dict_metadata is not of this format")
        if type(tensor).__name__ != "TensorStorageMetadata":
            continue  # an object that is no tensor, such as the step's number
        try:
            tensors[name] = _tensor(name, tensor, stored)
        except FormatError as error:
            unusable[name] = str(error)
    planned = metadata.__dict__.get("planner_data")
    paths = {
        name: keys
        for name, keys in (planned.items() if isinstance(planned, dict) else ())
        if isinstance(name, str) and name in tensors and _is_path(keys)
    }
    return tensors, paths, unusable


def _is_path(keys: Any) -> bool:
    return isinstance(keys, tuple) and all(isinstance(key, (str, int)) for key in keys)


def _tensor(name: str, tensor: Record, stored: dict[tuple[str, Any], Record]) -> _Tensor:
    """Returns one tensor with its chunks; raises `FormatError` if no storage is given for one."""
    properties = tensor.of("properties", Record).__dict__
    state = properties.get("state")
    dtype = state[0] if isinstance(state, tuple) and state else properties.get("dtype")
    chunks = []
    for chunk in tensor.of("chunks", list):
        if not isinstance(chunk, Record):
            raise PickleError(f"chunks of {name} are not of this format")
        offsets, sizes = _sizes(chunk.of("offsets", tuple)), _sizes(chunk.of("sizes", tuple))
        info = stored.get((name, offsets))
        if info is None:
            raise FormatError(f"has no storage for its chunk at {list(offsets)}: a rank's part is missing; {_SAVE}")
        if info.__dict__.get("transform_descriptors"):
            transforms = shown(info.__dict__["transform_descriptors"])
            raise FormatError(f"is stored through {transforms}; save it without transforms")
        file_name, start, num_bytes = info.of("relative_path", str), info.of("offset", int), info.of("length", int)
        if "/" in file_name or file_name.startswith(".") or not file_name or min(start, num_bytes) < 0:
            raise PickleError(f"{name} lies at byte {start} of {file_name!r}, outside of the folder's files")
        chunks.append(_Chunk(offsets, sizes, file_name, start, num_bytes))
    return _Tensor(str(dtype) if type(dtype) is Word else "unknown", _sizes(tensor.of("size", tuple)), tuple(chunks))


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(type(value) is int and 0 <= value < 2**62 for value in values):
        raise PickleError(f"{shown(values)} are no sizes of a tensor")
    return values


def _inner_names(paths: dict[str, tuple[Any, ...]]) -> dict[str, list[str]]:
    """Returns the full names of tensors in nested dicts, by the shorter names that lead to them from within."""
    found: dict[str, list[str]] = {}
    for name, keys in paths.items():
        for depth in range(1, len(keys)):
            found.setdefault(".".join(map(str, keys[depth:])), []).append(name)
    return found


class _Files:
    """The folder's files of chunks, each opened once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, tuple[int, FileIdentity]] = {}

    def close(self) -> None:
        """Closes what is open."""
        while self._open:
            os.close(self._open.popitem()[1][0])

    def rows_of(self, name: str, tensor: _Tensor) -> StoredTensor:
        """Returns a tensor as its row ranges; raises `FormatError` or `ConfigError` if it does not lie so."""
        if tensor.dtype not in DTYPES:
            raise ConfigError(f"is {tensor.dtype}; save it as a float")
        chunks = sorted(tensor.chunks)
        _check_rows(tensor.shape, chunks)
        return stacked([self._piece(name, tensor, chunk) for chunk in chunks if all(chunk.sizes)], name, tensor.shape)

    def _piece(self, name: str, tensor: _Tensor, chunk: _Chunk) -> StoredTensor:
        path = self._folder / chunk.file_name
        fd, identity = self._opened(path)
        if chunk.start + chunk.num_bytes > identity.num_bytes:
            raise FormatError(
                f"lies at bytes {chunk.start} to {chunk.start + chunk.num_bytes} of {path}, which has "
                f"{identity.num_bytes}: the file was cut short; copy it again"
            )
        try:
            found = saved_tensor(fd, chunk.start, chunk.num_bytes)
        except FormatError as error:
            raise FormatError(f"cannot be read at byte {chunk.start} of {path}: {error}; {_SAVE}") from error
        if (found.dtype, found.shape) != (tensor.dtype, chunk.sizes):
            raise FormatError(
                f"is {tensor.dtype} {list(chunk.sizes)} from row {chunk.offsets[:1]} on in .metadata, and "
                f"{found.dtype} {list(found.shape)} in {path}: they are of two saves; {_SAVE}"
            )
        dtype = DTYPES[found.dtype][0]
        return StoredTensor(name, path, dtype, found.shape, found.byte_start, found.num_bytes, identity)

    def _opened(self, path: Path) -> tuple[int, FileIdentity]:
        if path.name not in self._open:
            if not path.is_file():
                raise ConfigError(f"lies in {path.name}, which is not there: {why_absent(path)}")
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._open[path.name] = fd, FileIdentity.of(os.fstat(fd))
        return self._open[path.name]

    @staticmethod
    def contents(tensors: dict[str, StoredTensor], digest: str) -> dict[Path, TensorFile]:
        """Returns the pieces of each file, in order of its name; digest: of the metadata."""
        of_file: dict[Path, list[StoredTensor]] = {}
        for piece in (piece for tensor in tensors.values() for piece in tensor.places):
            of_file.setdefault(piece.path, []).append(piece)
        found = {}
        for path, pieces in sorted(of_file.items()):
            identity = pieces[0].identity
            assert identity is not None
            found[path] = TensorFile(pieces, digest, identity)
        return found


def _check_rows(shape: tuple[int, ...], chunks: list[_Chunk]) -> None:
    """Raises `FormatError` unless chunks, sorted, are row ranges that make up the whole tensor."""
    row = 0
    for chunk in chunks:
        if len(chunk.offsets) != len(shape) or len(chunk.sizes) != len(shape):
            raise FormatError(f"of shape {list(shape)} has a chunk at {list(chunk.offsets)} of {list(chunk.sizes)}")
        if any(chunk.offsets[1:]) or chunk.sizes[1:] != shape[1:]:
            raise FormatError(
                f"of shape {list(shape)} is split by columns over ranks (a chunk at {list(chunk.offsets)} of "
                f"{list(chunk.sizes)}), and a row must lie in one piece; save it split by rows, Shard(0), or replicated"
            )
        if shape and chunk.offsets[0] != row:
            raise FormatError(
                f"has its rows up to {row}, then a chunk from row {chunk.offsets[0]} on: a rank's part is missing or "
                f"there twice; {_SAVE}"
            )
        row += chunk.sizes[0] if shape else 0
    if shape and row != shape[0]:
        raise FormatError(f"has {row} of its {shape[0]} rows: a rank's part is missing; {_SAVE}")
