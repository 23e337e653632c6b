"""One tensor that `torch.save` wrote, as an archive within a file: at which bytes its values lie. Loads no torch.

Input: an open file, where the archive begins and how long it is. Output: `SavedTensor`. Errors: `FormatError` without a
file's name for archives whose bytes are not the values of one dense tensor in row-major order.

Layout: a zip archive of stored records; NAME/data.pkl says dtype, shape, strides and which record has the values,
NAME/data/KEY. https://pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections import OrderedDict
from typing import Any, NamedTuple

from ..errors import FormatError
from . import restricted_pickle
from .restricted_pickle import PickleError, Word, shown

PICKLE_BYTES_MAX = 1 << 20
RECORDS_MAX = 64
DIMENSIONS_MAX = 64
_LOCAL_HEADER_BYTES = 30
_ENCRYPTED = 1
# Of torch's dtypes, safetensors' names and the bytes of an element.
DTYPES = {
    "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2), "float64": ("F64", 8), "int8": ("I8", 1),
    "uint8": ("U8", 1), "int16": ("I16", 2), "int32": ("I32", 4), "int64": ("I64", 8), "bool": ("BOOL", 1),
    "uint16": ("U16", 2), "uint32": ("U32", 4), "uint64": ("U64", 8), "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1), "float8_e8m0fnu": ("F8_E8M0", 1), "float8_e4m3fnuz": ("F8_E4M3FNUZ", 1),
    "float8_e5m2fnuz": ("F8_E5M2FNUZ", 1),
}  # fmt: skip
_STORAGES = {
    "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "DoubleStorage": "float64",
    "CharStorage": "int8", "ByteStorage": "uint8", "ShortStorage": "int16", "IntStorage": "int32",
    "LongStorage": "int64", "BoolStorage": "bool",
}  # fmt: skip


class SavedTensor(NamedTuple):
    """A tensor's dtype (torch's name), shape, and the bytes of the file that are its values."""

    dtype: str
    shape: tuple[int, ...]
    byte_start: int
    num_bytes: int


class _Storage(NamedTuple):
    kind: str
    key: str


class _Tensor(NamedTuple):
    storage: Any
    offset: Any
    shape: Any
    strides: Any
    dtype: str | None


def saved_tensor(fd: int, start: int, num_bytes: int) -> SavedTensor:
    """Finds the values of the one tensor of an archive at bytes [start, start + num_bytes) of a file. Blocks.

    Raises `FormatError`, without the file's name, and `OSError`.
    """
    try:
        with zipfile.ZipFile(io.BufferedReader(_Slice(fd, start, num_bytes))) as archive:
            infos = archive.infolist()
            if len(infos) > RECORDS_MAX:
                raise FormatError(f"an archive of {len(infos)} records, expected one tensor's")
            if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED for info in infos):
                raise FormatError("a record is compressed or encrypted, so its bytes are not the tensor's values")
            pickles = [info for info in infos if info.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > PICKLE_BYTES_MAX:
                raise FormatError("no data.pkl of one tensor")
            prefix = pickles[0].filename.removesuffix("data.pkl")
            order = [info for info in infos if info.filename == f"{prefix}byteorder"]
            if order and (order[0].file_size != len("little") or archive.read(order[0]) != b"little"):
                raise FormatError("its tensor is not little-endian; save it on a little-endian machine")
            tensor = _described(archive.read(pickles[0]))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise FormatError(f"no whole archive of torch.save ({error})") from error
    info = next((info for info in infos if info.filename == f"{prefix}data/{tensor.storage.key}"), None)
    if info is None:
        raise FormatError(f"no record data/{tensor.storage.key}, which has its values")
    return _placed(fd, start, num_bytes, info, tensor)


def _described(data: bytes) -> _Tensor:
    """Returns the tensor that a data.pkl describes."""
    names = {
        ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
        ("torch._utils", "_rebuild_tensor_v3"): _rebuilt_typed,
        ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        ("collections", "OrderedDict"): lambda: OrderedDict(),  # filled by opcodes, which are checked
        ("torch.storage", "*"): Word,
        ("torch", "Size"): restricted_pickle.size,
        ("torch", "*"): Word,
    }
    try:
        tensor = restricted_pickle.load(data, names, _storage)
    except PickleError as error:
        raise FormatError(f"it is no tensor: {error}") from error
    if not isinstance(tensor, _Tensor) or not isinstance(tensor.storage, _Storage):
        raise FormatError(f"it holds a {type(tensor).__name__}, not a tensor")
    return tensor


def _storage(pid: Any) -> _Storage:
    match pid:
        case ("storage", Word() as kind, str(key), str(), int()):
            return _Storage(str(kind), key)
    raise PickleError("a persistent id that is no storage")


def _rebuilt(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, shape, strides, None)


def _rebuilt_typed(storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any) -> _Tensor:
    if type(dtype) is not Word:
        raise PickleError("a tensor without a dtype")
    return _Tensor(storage, offset, shape, strides, str(dtype))


def _placed(fd: int, start: int, num_bytes: int, info: zipfile.ZipInfo, tensor: _Tensor) -> SavedTensor:
    """Returns where the values lie, after checking all that the archive says of them."""
    dtype = tensor.dtype or _STORAGES.get(tensor.storage.kind, tensor.storage.kind)
    if dtype not in DTYPES:
        raise FormatError(f"it is {dtype}, which no table has; save it as a float")
    shape, strides = tensor.shape, tensor.strides
    sizes = (*shape, *strides, tensor.offset) if isinstance(shape, tuple) and isinstance(strides, tuple) else (None,)
    if (
        not all(type(size) is int and 0 <= size < 2**62 for size in sizes)
        or len(shape) != len(strides)
        or len(shape) > DIMENSIONS_MAX
    ):
        raise FormatError(f"a tensor of shape {shown(shape)} and strides {shown(strides)}")
    dense, expected = True, 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        dense &= size <= 1 or stride == expected
        expected *= max(size, 1)
    if not dense:
        raise FormatError(f"strides {list(strides)} of shape {list(shape)}: it is not contiguous; save w.contiguous()")
    element_bytes = DTYPES[dtype][1]
    tensor_bytes = math.prod(shape) * element_bytes
    local = os.pread(fd, _LOCAL_HEADER_BYTES, start + info.header_offset)
    if len(local) < _LOCAL_HEADER_BYTES or local[:4] != b"PK\x03\x04":
        raise FormatError(f"record {info.filename} is not at byte {info.header_offset}, where the directory has it")
    data_start = info.header_offset + _LOCAL_HEADER_BYTES
    data_start += int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    first = tensor.offset * element_bytes
    if first + tensor_bytes > info.file_size or data_start + info.file_size > num_bytes:
        raise FormatError(
            f"{math.prod(shape)} values of {element_bytes} bytes from {first} on in a record of {info.file_size} bytes "
            f"at {data_start} of {num_bytes}"
        )
    return SavedTensor(dtype, shape, start + data_start + first, tensor_bytes)


class _Slice(io.RawIOBase):
    """A part of an open file as a file of its own, read by offset: the descriptor's place does not move."""

    def __init__(self, fd: int, start: int, num_bytes: int) -> None:
        self._fd, self._start, self._num_bytes, self._at = fd, start, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._num_bytes}[whence]
        if base + offset < 0:
            raise ValueError("a place before the archive")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self._num_bytes - self._at))
        data = os.pread(self._fd, wanted, self._start + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
