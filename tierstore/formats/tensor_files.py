"""Files of tensors: which tensors a .safetensors or .pt file holds, and at which bytes.

Flows in: a file's path. Flows out: `StoredTensor`s, whose bytes are then read from the file itself. Refuses headers that lie:
every number is checked against the file before it is used.

The safetensors header is parsed here rather than by its library because we need byte offsets, and dtypes (fp8, e8m0) that
NumPy does not have. What the library refuses is refused here, and some that it lets pass: keys that it would not look at,
twice the same key, more than 64 dimensions. Tests hold our verdicts against the library's.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from ..errors import ConfigError, FormatError

HEADER_BYTES_MAX = 100_000_000  # the limit of the safetensors format itself
DIMENSIONS_MAX = 64  # as in torch and NumPy
ELEMENTS_MAX = 2**63 - 1
PT_SUFFIXES = (".pt", ".pth", ".bin")

# Bytes of one element for each safetensors dtype that can be a table's (sub-byte types cannot).
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_DTYPE_BITS = {name: 8 * num_bytes for name, num_bytes in DTYPE_BYTES.items()}
_DTYPE_BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


class TensorFile(NamedTuple):
    """What a file holds: tensors, the SHA-256 (hex) of its header, and why each tensor that cannot be read cannot."""

    tensors: list[StoredTensor]
    header_digest: str
    unusable: dict[str, str]


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


def read_tensor_file(path: Path) -> TensorFile:
    """Finds the tensors of a .safetensors or .pt file. Blocks on the disk.

    Raises `FormatError` where the file is none or lies about itself, `ConfigError` where it is no regular file, or is
    a .pt file and torch is not installed; `OSError` where it cannot be read.
    """
    if not path.is_file():  # opening a FIFO would wait for its writer
        raise ConfigError(f"{path} is no regular file; put the checkpoint's own file there")
    return _read_pt(path) if path.suffix in PT_SUFFIXES else _read_safetensors(path)


def _read_safetensors(path: Path) -> TensorFile:
    """Reads and checks the header of a safetensors file.

    Layout (https://github.com/huggingface/safetensors): u64 header length, JSON header, data. Tensors must fill the data
    without gaps or overlaps, and the data must end with the file.
    """
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
    entries = _parse_header(path, header)
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
    return TensorFile(tensors, hashlib.sha256(header).hexdigest(), {})


def _parse_header(path: Path, header: bytes) -> dict[str, Any]:
    """Returns the entries of a header, as strict about its JSON as the library, which Python's parser is not."""
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
    return entries


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs) or not all(map(_is_text, found)):
        raise ValueError("an object has a key twice, or one that is no text")
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
    raise ValueError(f"{name} is no number")


def _not_negative(digits: str) -> int:
    if digits.startswith("-"):
        raise ValueError(f"{reprlib.repr(digits)} is negative")
    return int(digits)


def _checked_tensor(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
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
    return StoredTensor(name, path, dtype, tuple(shape), data_start + start, end - start)


def _read_pt(path: Path) -> TensorFile:
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
    with path.open("rb") as file:
        utf8_name = f"/proc/self/fd/{file.fileno()}"  # torch maps by name, and takes no other
        try:
            value = torch.load(utf8_name, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many types here (pickle, runtime, zip); all mean an unusable file
            raise FormatError(
                f"{path}: torch cannot load it with weights_only and mmap ({error}); save it again with a current torch"
            ) from error
    named = {os.fsencode(path.stem).decode(errors="replace"): value} if isinstance(value, torch.Tensor) else value
    if not isinstance(named, dict):
        raise FormatError(f"{path}: it holds a {type(named).__name__}, expected a tensor or a dict of tensors")
    tensors, unusable = [], {}
    for name, tensor in named.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        reason = _why_unusable(tensor) or ("" if tensor.dtype in names else f"is {tensor.dtype}; save it as a float")
        if reason:
            unusable[str(name)] = reason
            continue
        num_bytes = tensor.numel() * tensor.element_size()
        byte_start = _file_offset(path, tensor.data_ptr())
        tensors.append(StoredTensor(str(name), path, names[tensor.dtype], tuple(tensor.shape), byte_start, num_bytes))
    header = repr([(t.name, t.dtype, t.shape, t.byte_start) for t in tensors])
    return TensorFile(tensors, hashlib.sha256(header.encode()).hexdigest(), unusable)


def _why_unusable(tensor: Any) -> str:
    """Returns why the bytes of a torch tensor are not its values in row-major order, and the remedy; "" where they are."""
    if tensor.is_nested or str(tensor.layout) != "torch.strided":
        return f"is {'nested' if tensor.is_nested else tensor.layout}; save it dense, w.to_dense()"
    if tensor.device.type != "cpu":
        return f"is on device {tensor.device}, without values in the file; save it from the CPU"
    if tensor.is_quantized:
        return "is quantized; save w.dequantize()"
    if tensor.is_neg():  # a view whose values are the negatives of its bytes
        return "is a negated view; save w.resolve_neg()"
    if tensor.is_conj():
        return "is a conjugated view; save w.resolve_conj()"
    if not tensor.is_contiguous():
        return "is not contiguous; save w.contiguous()"
    return "" if tensor.numel() else "is empty; there is no row to store"


def _file_offset(path: Path, address: int) -> int:
    """Returns which byte of the file `path` is mapped at `address` of this process."""
    inode = path.stat().st_ino
    with open("/proc/self/maps", errors="surrogateescape") as maps:
        for line in maps:
            span, _, offset, _, mapped_inode, *_ = line.split(maxsplit=5)
            start, end = (int(part, 16) for part in span.split("-"))
            if start <= address < end and int(mapped_inode) == inode:
                return int(offset, 16) + address - start
    raise FormatError(f"{path}: torch did not map the file; save it again with a current torch")
