"""PyTorch files: at which bytes of a file that `torch.save` wrote its tensors lie. Needs torch,
which is imported when called.

Input: a zip archive, open. Output: a `TensorFile`; nested dicts give names joined by dots. Errors: `FormatError` for
archives whose bytes are not the values (compressed, of another byte order) and for what torch cannot load without
running code; `ConfigError` if torch is not installed.

torch maps the file (`mmap=True`, `weights_only=True`: nothing is executed) and says where each tensor lies in memory;
/proc/self/maps says which byte of the file that is. torch looks neither at the compression of a record nor at its
length when it maps. So each tensor must lie within one record that the archive's own directory says is stored as it is,
and a sample of its bytes, read back from the file, must be what torch has.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..durable import read_exactly
from ..errors import FormatError
from ..extras import missing
from .stored_tensor import FileIdentity, StoredTensor, TensorFile

DEPTH_MAX = 8  # of dicts in dicts
SAMPLE_BYTES = 4096
_LOCAL_HEADER_BYTES = 30
_ENCRYPTED = 1  # a bit of a zip record's flags
_DTYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int8": "I8", "uint8": "U8",
    "int16": "I16", "int32": "I32", "int64": "I64", "bool": "BOOL", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float4_e2m1fn_x2": "F4",
}  # fmt: skip


class _Record(NamedTuple):
    """The data of one record of the archive: bytes [start, end) of the file."""

    start: int
    end: int
    name: str


def read_pt(path: Path, fd: int, identity: FileIdentity) -> TensorFile:
    """Finds the tensors of a file that `torch.save` wrote: a tensor, or a dict of them. `fd` is the file, open.

    Blocks on the disk. Raises as the module says, and `OSError`.
    """
    records = _stored_records(path, fd)
    value = _loaded(path, fd)
    named: Any = value
    if not isinstance(value, dict):
        import torch

        if not isinstance(value, torch.Tensor):
            raise FormatError(f"{path}: it holds a {type(value).__name__}, expected a tensor or a dict of tensors")
        named = {os.fsencode(path.stem).decode(errors="replace"): value}
    tensors: list[StoredTensor] = []
    unusable: dict[str, str] = {}
    inner_names: dict[str, list[str]] = {}
    mappings = _mappings(path)
    for keys, tensor in _walk(named, ()):
        name = ".".join(keys)
        for depth in range(1, len(keys)):
            inner_names.setdefault(".".join(keys[depth:]), []).append(name)
        reason = _why_unusable(tensor)
        if reason:
            unusable[name] = reason
        else:
            byte_start = _file_offset(path, mappings, tensor.data_ptr())
            tensors.append(_located(path, fd, name, tensor, byte_start, records, identity))
    header = repr([(t.name, t.dtype, t.shape, t.byte_start) for t in tensors])
    return TensorFile(tensors, hashlib.sha256(header.encode()).hexdigest(), identity, unusable, inner_names)


def _stored_records(path: Path, fd: int) -> list[_Record]:
    """Returns the archive's records by their offset; refuses archives whose bytes are not the tensors' own."""
    try:
        with os.fdopen(os.dup(fd), "rb") as file, zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            if not any(info.filename.endswith("data.pkl") for info in infos):
                raise FormatError(f"{path} is a zip archive without data.pkl, so not one of PyTorch; unpack it first")
            for info in infos:
                if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED:
                    how = "encrypted" if info.flag_bits & _ENCRYPTED else "compressed"
                    raise FormatError(
                        f"{path}: its record {info.filename} is {how}, so its bytes are not the tensors' values; load "
                        f"it with torch and save it again with torch.save, which does not compress, or as .safetensors"
                    )
            for info in infos:
                if info.filename.endswith("/byteorder") and archive.read(info) != b"little":
                    raise FormatError(
                        f"{path}: its tensors are {archive.read(info)[:20]!r}-endian, a store is little-endian; load "
                        f"it with torch on a little-endian machine and save it again"
                    )
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise FormatError(
            f"{path}: it is not a whole zip archive ({error}), so it is not a PyTorch file; download it again"
        ) from error
    records = []
    for info in infos:
        local = os.pread(fd, _LOCAL_HEADER_BYTES, info.header_offset)
        if len(local) < _LOCAL_HEADER_BYTES or local[:4] != b"PK\x03\x04":
            raise FormatError(
                f"{path}: record {info.filename} is not at byte {info.header_offset}, where the archive's directory "
                f"says; download it again"
            )
        names_bytes = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        start = info.header_offset + _LOCAL_HEADER_BYTES + names_bytes
        records.append(_Record(start, start + info.file_size, info.filename))
    return sorted(records)


def _loaded(path: Path, fd: int) -> Any:
    """Returns what torch makes of the file, mapped and without running code."""
    try:
        import torch
    except ImportError as error:
        raise missing(f"{path} is a PyTorch file, which", "torch", error) from error
    utf8_name = f"/proc/self/fd/{fd}"  # torch maps by name, and takes no other
    try:
        return torch.load(utf8_name, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many types here (pickle, runtime, zip); all mean an unusable file
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign:
            raise FormatError(
                f"{path}: beside tensors it holds objects of {foreign[1]}, which torch makes only by running code (it "
                "is loaded with weights_only); load it where you trust it, and save its tensors alone: "
                "torch.save(tensors, ...)"
            ) from error
        raise FormatError(
            f"{path}: torch cannot load it with weights_only and mmap ({error}); save it again with a current torch"
        ) from error


def _walk(value: dict[Any, Any], keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields every tensor of a dict of dicts with the keys that lead to it."""
    import torch

    for key, inner in value.items():
        if isinstance(inner, torch.Tensor):
            yield (*keys, str(key)), inner
        elif isinstance(inner, dict) and len(keys) < DEPTH_MAX:
            yield from _walk(inner, (*keys, str(key)))


def _why_unusable(tensor: Any) -> str:
    """Returns why the bytes of a torch tensor are not its values in row-major order, and the remedy; "" if they are."""
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
    if str(tensor.dtype).removeprefix("torch.") not in _DTYPES:
        return f"is {tensor.dtype}; save it as .safetensors, or as a float"
    return "" if tensor.numel() else "is empty; there is no row to store"


def _located(
    path: Path, fd: int, name: str, tensor: Any, byte_start: int, records: list[_Record], identity: FileIdentity
) -> StoredTensor:
    """Returns where a tensor lies in the file, after comparing what lies there with what torch has."""
    num_bytes = tensor.numel() * tensor.element_size()
    index = bisect.bisect_right(records, (byte_start, identity.num_bytes + 1, "")) - 1
    record = records[index] if index >= 0 else _Record(0, 0, "none")
    if not record.start <= byte_start <= byte_start + num_bytes <= record.end:
        raise FormatError(
            f"{path}: tensor {name} is at bytes {byte_start} to {byte_start + num_bytes}, record {record.name} of the "
            f"archive at {record.start} to {record.end}; the archive was changed: load it with torch and save it again"
        )
    import torch

    in_memory = tensor.detach().reshape(-1).view(torch.uint8)
    for start in sorted({0, num_bytes // 2, max(0, num_bytes - SAMPLE_BYTES)}):
        out = np.empty(min(SAMPLE_BYTES, num_bytes - start), dtype=np.uint8)
        read_exactly(fd, out, byte_start + start, f"tensor {name} in {path}")
        if not np.array_equal(out, in_memory[start : start + len(out)].numpy()):
            raise FormatError(
                f"{path}: torch has other bytes for tensor {name} than the file at byte {byte_start + start}; it was "
                f"changed meanwhile, or save it again with a current torch"
            )
    dtype, shape = _DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape)
    if dtype == "F4" and shape:
        shape = (*shape[:-1], 2 * shape[-1])  # torch counts bytes, safetensors values
    return StoredTensor(name, path, dtype, shape, byte_start, num_bytes, identity)


def _mappings(path: Path) -> list[tuple[int, int, int]]:
    """Returns (first address, last + 1, byte of the file) of every part of the file that this process has mapped."""
    inode = path.stat().st_ino
    found = []
    with open("/proc/self/maps", errors="surrogateescape") as maps:
        for line in maps:
            span, _, offset, _, mapped_inode, *_ = line.split(maxsplit=5)
            if int(mapped_inode) == inode:
                start, end = (int(part, 16) for part in span.split("-"))
                found.append((start, end, int(offset, 16)))
    return found


def _file_offset(path: Path, mappings: list[tuple[int, int, int]], address: int) -> int:
    """Returns which byte of the file is mapped at `address` of this process."""
    for start, end, offset in mappings:
        if start <= address < end:
            return offset + address - start
    raise FormatError(f"{path}: torch did not map the file; save it again with a current torch")
