"""Files of tensors: which tensors a safetensors, PyTorch or GGUF file holds, and at which bytes.

Input: a file's path. Output: `StoredTensor`s, whose bytes are then read from the file itself. Errors: `FormatError` for
headers that lie (every number is checked against the file before it is used), `ConfigError` for files of another kind,
recognised by their bytes, and for downloads that have not finished; each says what the file is and what to do.

The safetensors header is parsed here rather than by its library because we need byte offsets, and dtypes (fp8, e8m0)
that NumPy does not have. What the library refuses is refused here, and some that it lets pass: keys that it would not
look at, twice the same key, more than 64 dimensions. Tests hold our verdicts against the library's.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import struct
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from ..errors import ConfigError, FormatError
from .content import HEAD_BYTES, Content, recognise, unfinished_download
from .gguf_file import read_gguf
from .pt_file import read_pt
from .rank_files import saved_offsets
from .stored_tensor import FileIdentity, StoredTensor, TensorFile

__all__ = ["DTYPE_BYTES", "StoredTensor", "read_tensor_file"]

HEADER_BYTES_MAX = 100_000_000  # the limit of the safetensors format itself
DIMENSIONS_MAX = 64  # as in torch and NumPy
ELEMENTS_MAX = 2**63 - 1
PT_SUFFIXES = (".pt", ".pth", ".bin")

_ARRAYS = ("npy", "npz", "hdf5")
_NO_TENSORS = (
    "json", "json-lines", "parquet", "arrow-file", "arrow-stream", "sqlite", "pdf", "megatron-index", "mosaic-index",
    "mosaic-shard", "litdata-index", "litdata-chunk", "llmc-tokens-u16", "llmc-tokens-u32",
)  # fmt: skip

# Bytes of one element for each safetensors dtype that can be a table's (sub-byte types cannot).
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_DTYPE_BITS = {name: 8 * num_bytes for name, num_bytes in DTYPE_BYTES.items()}
_DTYPE_BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


def read_tensor_file(path: Path) -> TensorFile:
    """Finds the tensors of a safetensors, PyTorch or GGUF file. Blocks on the disk.

    Raises `FormatError` if the file lies about itself, `ConfigError` if it is not a regular file, is of another kind,
    has not been downloaded whole, or is a PyTorch file and torch is not installed; `OSError` if it cannot be read.
    """
    if not path.is_file():  # opening a FIFO would wait for its writer
        unfinished = unfinished_download(path)
        raise ConfigError(
            f"{path}: {unfinished}"
            if unfinished
            else f"{path} is not a regular file; put the checkpoint's own file there"
        )
    unfinished = unfinished_download(path)
    if unfinished:
        raise ConfigError(f"{path}: {unfinished}")
    with path.open("rb") as file:
        identity = FileIdentity.of(os.fstat(file.fileno()))
        content = recognise(file.read(HEAD_BYTES), identity.num_bytes)
        kind = content.kind if content else None
        if kind == "torch-zip" or (kind in (None, "zip") and path.suffix in PT_SUFFIXES):
            return read_pt(path, file.fileno(), identity)
        if kind == "gguf":
            return read_gguf(path, file, identity)
        if content is not None and kind != "safetensors":
            raise _of_another_kind(path, content)
        file.seek(0)
        return _read_safetensors(path, file, identity)


def _of_another_kind(path: Path, content: Content) -> ConfigError | FormatError:
    error = FormatError if content.kind in ("empty", "torch-legacy", "pickle") else ConfigError
    remedy = content.remedy
    if content.kind in _ARRAYS:
        remedy = "save its array as .safetensors"
    elif content.kind in _NO_TENSORS:
        remedy = "give the checkpoint's folder, or one of its *.safetensors or .pt files"
    return error(f"{path} is {content.name}; {remedy}")


def _read_safetensors(path: Path, file: BinaryIO, identity: FileIdentity) -> TensorFile:
    """Reads and checks the header of a safetensors file.

    Layout (https://github.com/huggingface/safetensors): u64 header length, JSON header, data. Tensors must fill the
    data without gaps or overlaps, and the data must end with the file.
    """
    file_bytes = identity.num_bytes
    prefix = file.read(8)
    header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= header_bytes <= min(HEADER_BYTES_MAX, file_bytes - 8):
        zeros = not any(prefix)
        cause = (
            "its first bytes are zeros: its download has not finished"
            if zeros
            else "it is truncated or no safetensors file"
        )
        raise FormatError(
            f"{path}: a header of {header_bytes} bytes in a file of {file_bytes} bytes; {cause}: download it again"
        )
    header = file.read(header_bytes)
    entries, metadata = _parse_header(path, header)
    data_start = 8 + header_bytes
    tensors = [_checked_tensor(path, name, entry, data_start, identity) for name, entry in entries.items()]
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
    offsets = saved_offsets(path, metadata)
    return TensorFile(tensors, hashlib.sha256(header).hexdigest(), identity, offsets=offsets)


def _parse_header(path: Path, header: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns a header's entries and metadata, as strict about JSON as the library, which Python's parser is not."""
    try:
        entries = json.loads(
            header.decode(), object_pairs_hook=_unique_keys, parse_constant=_no_number, parse_int=_not_negative
        )
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: its header is not JSON ({error}); download it again") from error
    if not isinstance(entries, dict):
        raise FormatError(f"{path}: its header is not a JSON object; download it again")
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(map(_is_text, metadata.values()))):
        raise FormatError(f"{path}: its __metadata__ is not an object of texts; download it again")
    return entries, metadata or {}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs) or not all(map(_is_text, found)):
        raise ValueError("an object has a key twice, or one that is not text")
    return found


def _is_text(value: Any) -> bool:
    """Whether a value is a string of whole characters: half a surrogate pair is JSON to Python, and to nobody else."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _not_negative(digits: str) -> int:
    if digits.startswith("-"):
        raise ValueError(f"{reprlib.repr(digits)} is negative")
    return int(digits)


def _checked_tensor(path: Path, name: str, entry: Any, data_start: int, identity: FileIdentity) -> StoredTensor:
    """Checks one header entry on its own, before any of its numbers is used."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{path}: tensor {name} does not have dtype, shape and data_offsets; download it again")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if (
        not all(type(number) is int and number <= ELEMENTS_MAX for number in numbers)
        or len(numbers) != len(shape) + 2
        or len(shape) > DIMENSIONS_MAX
        or offsets[1] < offsets[0]
        or not isinstance(dtype, str)
    ):
        raise FormatError(
            f"{path}: tensor {name} has dtype {reprlib.repr(dtype)}, shape {reprlib.repr(shape)}, offsets "
            f"{reprlib.repr(offsets)}; expected up to {DIMENSIONS_MAX} sizes and two offsets: download it again"
        )
    if dtype not in _DTYPE_BITS:
        raise FormatError(
            f"{path}: tensor {name} is of dtype {reprlib.repr(dtype)}, which this version does not know; it knows "
            f"{', '.join(_DTYPE_BITS)}"
        )
    num_elements, (start, end) = 1, offsets
    for size in shape:
        num_elements *= size
        if num_elements > ELEMENTS_MAX:
            raise FormatError(
                f"{path}: tensor {name}, shape {reprlib.repr(shape)}, has more than {ELEMENTS_MAX} elements; "
                f"the header lies, download it again"
            )
    if num_elements * _DTYPE_BITS[dtype] != (end - start) * 8:
        raise FormatError(
            f"{path}: tensor {name}, {dtype} {reprlib.repr(shape)}, needs {num_elements * _DTYPE_BITS[dtype] / 8:.15g} "
            f"bytes, its offsets give {end - start}; the header lies, download it again"
        )
    return StoredTensor(name, path, dtype, tuple(shape), data_start + start, end - start, identity)
