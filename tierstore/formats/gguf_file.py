"""GGUF files of llama.cpp: which tensors one holds, at which bytes, of which type.

Input: an open file. Output: `StoredTensor`s, sizes in the order of rows and columns, which is the file's reversed.
Their dtype is safetensors' name of it, or "GGUF_" and the name of a type in blocks that a codec reads. Errors:
`FormatError` for files that are cut short, of another version, or lie about themselves; tensors of types that no codec
reads are known by name, with the reason.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian: "GGUF", u32 version, u64 number of
tensors, u64 number of metadata; each metadatum a key, u32 type, value; each tensor a name, u32 number of sizes, u64
sizes, u32 type, u64 offset from the data's start; padding to `general.alignment`; the tensors, each padded to it. A
text is its u64 length and its bytes.
"""

from __future__ import annotations

import hashlib
import reprlib
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..codec import GGUF_BLOCKS
from ..errors import FormatError
from .stored_tensor import FileIdentity, StoredTensor, TensorFile

HEADER_BYTES_MAX = 100_000_000  # metadata hold a whole vocabulary: some 20 MB
TENSORS_MAX = 1 << 20
DIMENSIONS_MAX = 4  # as in ggml
ARRAYS_WITHIN_MAX = 4  # of arrays that lie in arrays
ALIGNMENT, ALIGNMENT_MAX = 32, 1 << 20
VERSIONS = (2, 3)
_READ_BYTES = 1 << 20

# ggml's types: the name, values of a block, bytes of it.
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
# Of metadata: bytes of each type, and the two that are not of a fixed length.
_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _TEXT, _ARRAY = 4, 8, 9


class _Info(NamedTuple):
    """One tensor as the header lists it. sizes: as in the file, the columns first."""

    name: str
    sizes: tuple[int, ...]
    kind: int
    offset: int


def read_gguf(path: Path, file: BinaryIO, identity: FileIdentity) -> TensorFile:
    """Reads and checks the header of a GGUF file. Blocks on the disk."""
    file.seek(0)
    header = _Header(path, file, identity.num_bytes)
    header.take(4)
    version = header.number("<I")
    if version not in VERSIONS:
        if version and version & 0xFFFF == 0:
            raise FormatError(f"{path}: a GGUF file of big-endian numbers; convert it with gguf-convert-endian")
        raise FormatError(
            f"{path}: a GGUF file of version {version}, expected {' or '.join(map(str, VERSIONS))}; download it again, "
            "or write it anew with a current llama.cpp"
        )
    num_tensors, num_metadata = header.number("<Q"), header.number("<Q")
    if num_tensors > TENSORS_MAX:
        raise header.damaged(f"{num_tensors} tensors, at most {TENSORS_MAX}")
    alignment = _read_metadata(header, num_metadata)
    header.check_count(num_tensors, 24, "tensors")
    infos = [_read_info(header) for _ in range(num_tensors)]
    if len({info.name for info in infos}) != num_tensors:
        raise header.damaged("a tensor's name twice")
    data_start = -(-header.at // alignment) * alignment
    tensors, unusable = _place(header, infos, data_start, alignment, identity)
    return TensorFile(tensors, header.digest(), identity, unusable)


class _Header:
    """Reads the header from its start on, as far as it is asked for."""

    def __init__(self, path: Path, file: BinaryIO, file_bytes: int) -> None:
        self.path, self.file_bytes = path, file_bytes
        self.at = 0
        self._file = file
        self._bytes = bytearray()

    def take(self, num_bytes: int) -> int:
        """Steps over bytes that must be there; returns where they start."""
        start = self.at
        self.at += num_bytes
        if self.at > len(self._bytes):
            self._read_more()
        return start

    def number(self, form: str) -> Any:
        """Returns the number that comes next; form: as of `struct`."""
        return struct.unpack_from(form, self._bytes, self.take(struct.calcsize(form)))[0]

    def text(self, what: str) -> str:
        """Returns the text that comes next."""
        start = self.take(self.number("<Q"))
        try:
            return self._bytes[start : self.at].decode()
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is not UTF-8") from None

    def check_count(self, count: int, bytes_each: int, what: str) -> None:
        """Refuses a number of things that the rest of the file cannot hold, before any is read."""
        if count * bytes_each > self.file_bytes - self.at:
            raise self.damaged(f"{count} {what} in the {self.file_bytes - self.at} bytes from byte {self.at} on")

    def damaged(self, what: str) -> FormatError:
        return FormatError(f"{self.path}: a GGUF file with {what}; it is cut short or damaged: download it again")

    def digest(self) -> str:
        """Returns the SHA-256 (hex) of what was stepped over."""
        return hashlib.sha256(memoryview(self._bytes)[: self.at]).hexdigest()

    def _read_more(self) -> None:
        if self.at > min(self.file_bytes, HEADER_BYTES_MAX):
            raise self.damaged(
                f"a header of {self.at} bytes and more in a file of {self.file_bytes} bytes, at most {HEADER_BYTES_MAX}"
            )
        self._bytes += self._file.read(max(self.at - len(self._bytes), _READ_BYTES))
        if self.at > len(self._bytes):
            raise self.damaged(f"{len(self._bytes)} bytes, it had {self.file_bytes}")


def _read_metadata(header: _Header, count: int) -> int:
    """Steps over all metadata; returns the alignment that they say."""
    header.check_count(count, 13, "metadata")
    alignment, seen = ALIGNMENT, set()
    for _ in range(count):
        key = header.text("a key")
        if key in seen:
            raise header.damaged(f"the key {reprlib.repr(key)} twice")
        seen.add(key)
        kind = header.number("<I")
        if key == "general.alignment":
            alignment = header.number("<I") if kind == _UINT32 else 0
            if not 0 < alignment <= ALIGNMENT_MAX or alignment & (alignment - 1):
                raise header.damaged(f"general.alignment {alignment} of type {kind}, a power of two was expected")
        else:
            _skip_value(header, kind, 0)
    return alignment


def _skip_value(header: _Header, kind: int, depth: int) -> None:
    if kind in _VALUE_BYTES:
        header.take(_VALUE_BYTES[kind])
    elif kind == _TEXT:
        header.take(header.number("<Q"))
    elif kind == _ARRAY and depth < ARRAYS_WITHIN_MAX:
        inner, count = header.number("<I"), header.number("<Q")
        header.check_count(count, _VALUE_BYTES.get(inner, 8), "values of an array")
        if inner in _VALUE_BYTES:
            header.take(count * _VALUE_BYTES[inner])
        else:
            for _ in range(count):
                _skip_value(header, inner, depth + 1)
    else:
        raise header.damaged(f"metadata of type {kind} at byte {header.at}")


def _read_info(header: _Header) -> _Info:
    name = header.text("a tensor's name")
    num_sizes = header.number("<I")
    if num_sizes > DIMENSIONS_MAX:
        raise header.damaged(f"tensor {reprlib.repr(name)} of {num_sizes} sizes, at most {DIMENSIONS_MAX}")
    sizes = tuple(header.number("<Q") for _ in range(num_sizes))
    return _Info(name, sizes, header.number("<I"), header.number("<Q"))


def _place(
    header: _Header, infos: list[_Info], data_start: int, alignment: int, identity: FileIdentity
) -> tuple[list[StoredTensor], dict[str, str]]:
    """Returns the tensors whose types are read, and why each other one is not. They must fill the data, but for padding
    and for tensors of unknown types, whose lengths nobody knows."""
    tensors: list[StoredTensor] = []
    unusable: dict[str, str] = {}
    end: int | None = data_start
    for info in sorted(infos, key=lambda info: info.offset):
        start = data_start + info.offset
        if info.offset % alignment or (end is not None and start != -(-end // alignment) * alignment):
            raise header.damaged(f"tensor {reprlib.repr(info.name)} at byte {start}, the one before it ends at {end}")
        num_bytes = _num_bytes(header, info)
        end = None if num_bytes is None else start + num_bytes
        if (end or start) > identity.num_bytes:
            raise header.damaged(
                f"tensor {reprlib.repr(info.name)} in bytes {start} to {end}, of {identity.num_bytes} in all"
            )
        dtype, reason = _dtype_of(info.kind)
        if reason:
            unusable[info.name] = reason
        else:
            shape = tuple(reversed(info.sizes))
            tensors.append(StoredTensor(info.name, header.path, dtype, shape, start, num_bytes or 0, identity))
    if end is not None and identity.num_bytes >= -(-end // alignment) * alignment + alignment:
        raise header.damaged(f"{identity.num_bytes} bytes, its header says {end}")
    return tensors, unusable


def _num_bytes(header: _Header, info: _Info) -> int | None:
    """Returns a tensor's bytes; None for a type that is not known."""
    if info.kind not in _TYPES:
        return None
    name, block, block_bytes = _TYPES[info.kind]
    columns = info.sizes[0] if info.sizes else 1
    if columns % block:
        raise header.damaged(f"tensor {reprlib.repr(info.name)} of {columns} columns, {name} has blocks of {block}")
    num_blocks = columns // block
    for size in info.sizes[1:]:
        num_blocks *= size
    return num_blocks * block_bytes


def _dtype_of(kind: int) -> tuple[str, str]:
    """Returns a type's name as of a `StoredTensor`, or why no rows are read of it."""
    readable = [name.removeprefix("gguf_").upper() for name in GGUF_BLOCKS]
    remedy = f"quantize it as {', '.join(readable)}, F16 or BF16, or use the original model's *.safetensors"
    if kind not in _TYPES:
        return "", f"is of type {kind} of a GGUF file, which this version does not know; {remedy}"
    name, block, _ = _TYPES[kind]
    if block == 1:
        return name, ""
    if name in readable:
        return f"GGUF_{name}", ""
    return "", f"holds blocks of {name}, which no codec of a store reads; {remedy}"
