"""The head of a new safetensors file, and how tensors are divided among files. Pure.

Input: names, types and sizes of tensors, in the order of their data. Output: the bytes before the data, names of files,
and an index. Errors: none; `tensor_files.py` checks what is read.

The layout is the library's (https://github.com/huggingface/safetensors): u64 length, JSON, data; data begins at a
multiple of 8.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence

FILE_BYTES_WANTED = 5_000_000_000  # as published checkpoints are divided
_ALIGNMENT = 8


def head_bytes(
    tensors: Sequence[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Returns what precedes the data of tensors, (name, dtype, shape, bytes) each, back to back in this order."""
    header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    at = 0
    for name, dtype, shape, num_bytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + num_bytes]}
        at += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def divide(sizes: Sequence[int]) -> list[slice]:
    """Returns which tensors share a file: consecutive ones, up to `FILE_BYTES_WANTED`, a larger one alone."""
    files, start, in_file = [], 0, 0
    for number, num_bytes in enumerate(sizes):
        if number > start and in_file + num_bytes > FILE_BYTES_WANTED:
            files.append(slice(start, number))
            start, in_file = number, 0
        in_file += num_bytes
    files.append(slice(start, len(sizes)))
    return files


def file_names(num_files: int) -> list[str]:
    """Returns the names that loaders look for."""
    if num_files == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{num_files:05d}.safetensors" for number in range(1, num_files + 1)]


def index_bytes(file_of: Mapping[str, str], total_bytes: int) -> bytes:
    """Returns the index of several files: which tensor lies in which."""
    record = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(file_of.items()))}
    return (json.dumps(record, indent=2) + "\n").encode()
