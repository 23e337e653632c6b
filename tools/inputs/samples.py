"""Samples of Mosaic's shards and litdata's chunks as documents, a sample each. Read in order, never mapped.

Input: a `TokenInput` with a `SampleLayout`. Output: documents: str, or integers [tokens]; bytes of the file for each.
Errors: `FormatError` naming file and sample for a shard that is cut, or contradicts itself or its index; `ConfigError`
for what compressed it if that is not read.

Layout, little-endian: samples u32; samples + 1 byte offsets u32 from the file's start; (of Mosaic a JSON object, of the
columns;) the samples. A sample is the sizes u32 of those columns whose size is not fixed, then all columns' bytes.
"""

from __future__ import annotations

import io
import itertools
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import zstandard

from tierstore.errors import ConfigError, FormatError

from .byte_streams import ChunkFile
from .token_input import Document, SampleLayout, TokenInput

SAMPLE_BYTES_MAX = 1 << 28
SAMPLES_MAX = 1 << 26  # of a shard: their offsets are in memory
BUFFER_BYTES = 1 << 20
# Of the numbers that stand for types in each format; others are no integers.
MOSAIC_DTYPES = {8: "u1", 9: "i1", 16: "<u2", 17: "<i2", 32: "<u4", 33: "<i4", 64: "<u8", 65: "<i8"}
TORCH_DTYPES = {11: "u1", 12: "i1", 13: "<i2", 14: "<i2", 15: "<i4", 16: "<i4", 17: "<i8", 18: "<i8", 20: "<u2"}
NUMPY_DTYPES = {0: "i1", 1: "<i2", 2: "<i4", 3: "<i8", 4: "u1", 5: "<u2", 6: "<u4", 7: "<u8"}
DIMENSIONS_MAX = 63
_FRAMED_MAGIC = b"LDFZ01\0\0"
_FRAMED_HEAD, _FRAME = struct.Struct("<8sHHIII"), struct.Struct("<IIQII")


def documents_of_samples(source: TokenInput) -> Iterator[Document]:
    """Yields the field of each sample. Blocks on the disk."""
    layout, path = source.layout, source.path
    assert layout is not None
    decode = decoder_of(layout.encoding)
    with ChunkFile(path, source.codec) as raw, io.BufferedReader(raw, BUFFER_BYTES) as file:
        consumed = 0
        samples = (
            _framed_samples(path, file, layout.num_samples)
            if layout.packing == "batch"
            else _samples(path, file, layout.num_samples, source.kind == "mosaic")
        )
        for number, sample in enumerate(samples):
            where = f"{path}: sample {number}"
            try:
                if layout.packing == "sample":
                    sample = _decompressed(sample, SAMPLE_BYTES_MAX)
                document = decode(_column(sample, layout, where), where)
            except (ValueError, IndexError, struct.error, RecursionError, zstandard.ZstdError) as error:
                raise FormatError(f"{where} is damaged ({error}); copy the data set again") from error
            yield Document(document, raw.consumed - consumed, where)
            consumed = raw.consumed


def _samples(path: Path, file: IO[bytes], num_samples: int, is_whole: bool) -> Iterator[bytes]:
    """Yields the samples. is_whole: nothing may follow the last."""
    (found,) = struct.unpack("<I", _exactly(path, file, 4))
    if found != num_samples or found > SAMPLES_MAX:
        raise FormatError(f"{path} has {found} samples, its index says {num_samples}; copy the data set again")
    offsets = np.frombuffer(_exactly(path, file, 4 * (found + 1)), dtype="<u4").astype(np.int64)
    sizes = np.diff(offsets)
    table_end = 4 * (found + 2)
    if offsets[0] < table_end or (len(sizes) and (sizes.min() < 0 or sizes.max() > SAMPLE_BYTES_MAX)):
        raise FormatError(
            f"{path}: the offsets of its {found} samples are not ascending, or of more than {SAMPLE_BYTES_MAX} bytes a "
            f"sample; copy the data set again"
        )
    _exactly(path, file, int(offsets[0]) - table_end)
    for size in sizes.tolist():
        yield _exactly(path, file, size)
    if is_whole and file.read(1):
        raise FormatError(f"{path} goes on behind the last of its {found} samples; copy the data set again")


def _framed_samples(path: Path, file: IO[bytes], num_samples: int) -> Iterator[bytes]:
    """Yields the samples of a chunk of litdata's that holds some together in each frame of zstd.

    Layout: magic, version u16, flags u16, samples u32, samples of a frame u32, frames u32; samples + 1 offsets u32 into
    what the frames unfold to; for each frame its first sample u32, its samples u32, its first byte u64, its bytes u32,
    and the bytes that it unfolds to u32; the frames.
    """
    magic, version, _, found, _, num_frames = _FRAMED_HEAD.unpack(_exactly(path, file, _FRAMED_HEAD.size))
    if magic != _FRAMED_MAGIC or version != 1:
        raise FormatError(
            f"{path} is not a chunk of frames of version 1 ({magic!r}, {version}); copy the data set again"
        )
    if found != num_samples or max(found, num_frames) > SAMPLES_MAX:
        raise FormatError(f"{path} has {found} samples, its index says {num_samples}; copy the data set again")
    offsets = np.frombuffer(_exactly(path, file, 4 * (found + 1)), dtype="<u4").astype(np.int64)
    frames = [_FRAME.unpack(_exactly(path, file, _FRAME.size)) for _ in range(num_frames)]
    done, at = 0, _FRAMED_HEAD.size + 4 * (found + 1) + _FRAME.size * num_frames
    for first, count, start, size, unfolded in frames:
        where = f"{path}: the frame of samples {first} to {first + count}"
        if (first, start) != (done, at) or first + count > found or unfolded > SAMPLE_BYTES_MAX:
            raise FormatError(f"{where} does not follow the one before, or unfolds to {unfolded} bytes; copy it again")
        try:
            data = _decompressed(_exactly(path, file, size), unfolded)
        except zstandard.ZstdError as error:
            raise FormatError(f"{where} is damaged ({error}); copy the data set again") from error
        bounds = (offsets[first : first + count + 1] - offsets[first]).tolist()
        if bounds != sorted(bounds) or bounds[-1] != len(data):
            raise FormatError(f"{where} has {len(data)} bytes, its samples end at {bounds[-1]}; copy it again")
        yield from (data[begin:end] for begin, end in itertools.pairwise(bounds))
        done, at = first + count, at + size
    if done != found:
        raise FormatError(f"{path} has frames of {done} of its {found} samples; copy the data set again")


def _decompressed(data: bytes, most: int) -> bytes:
    """Returns what a frame of zstd unfolds to, at most `most` bytes; raises `ZstdError`."""
    if (claimed := zstandard.frame_content_size(data)) > most:
        raise zstandard.ZstdError(f"it unfolds to {claimed} bytes, at most {most} are expected")
    return zstandard.ZstdDecompressor().decompress(data, max_output_size=most)


def _exactly(path: Path, file: IO[bytes], count: int) -> bytes:
    data = file.read(count) if count <= SAMPLE_BYTES_MAX else b""
    if len(data) != count:
        raise FormatError(f"{path} ends {count - len(data)} bytes before a sample does: it was cut; copy it again")
    return data


def _column(sample: bytes, layout: SampleLayout, where: str) -> bytes:
    """Returns the bytes of the wanted column of a sample."""
    num_stated = layout.sizes.count(None)
    stated = iter(struct.unpack_from(f"<{num_stated}I", sample))
    sizes = [next(stated) if size is None else size for size in layout.sizes]
    if not sizes:
        return sample  # of litdata's loader of tokens
    if 4 * num_stated + sum(sizes) != len(sample):
        raise FormatError(
            f"{where} has {len(sample)} bytes, its columns add up to {4 * num_stated + sum(sizes)}; copy the data set "
            f"again"
        )
    start = 4 * num_stated + sum(sizes[: layout.column])
    return sample[start : start + sizes[layout.column]]


def decoder_of(encoding: str) -> Callable[[bytes, str], str | np.ndarray]:
    """Returns the function that makes a document of a column's bytes, with where it lies, for errors.

    encoding: "text", "json", "raw:DTYPE", "mosaic" (an array with type and shape), "mosaic:DTYPE" (with its shape),
    "torch" or "numpy" (of litdata, each with its own head).
    """
    name, _, dtype = encoding.partition(":")
    if name == "text":
        return lambda data, _where: data.decode(errors="replace")
    if name == "json":
        return _json_ids
    if name == "raw":
        return lambda data, _where: np.frombuffer(data, dtype=dtype)
    if name == "mosaic":
        return lambda data, where: _mosaic_array(data, dtype, where)
    head, dtypes = (">II", TORCH_DTYPES) if name == "torch" else ("<II", NUMPY_DTYPES)
    return lambda data, where: _array_with_head(data, head, dtypes, where)


def _json_ids(data: bytes, where: str) -> np.ndarray:
    value = json.loads(data)
    if not isinstance(value, list) or not all(type(each) is int for each in value):
        raise ConfigError(f"{where} is {value!r:.60}, expected a list of integers; name another field with --field")
    try:
        return np.array(value, dtype=np.int64)
    except OverflowError as error:
        raise ConfigError(f"{where} has an id beyond 64 bits; no vocabulary has that") from error


def _mosaic_array(data: bytes, dtype: str, where: str) -> np.ndarray:
    """An array that carries its own shape, and its own type if the column does not state it."""
    at = 0
    if not dtype:
        if data[0] not in MOSAIC_DTYPES:
            raise ConfigError(f"{where} is an array of type {data[0]}, expected integers; name another with --field")
        dtype, at = MOSAIC_DTYPES[data[0]], 1
    num_dimensions, width = data[at] >> 2, 1 << (data[at] & 3)
    at += 1
    shape = np.frombuffer(data, dtype=f"<u{width}", count=num_dimensions, offset=at)
    return _shaped(data, at + width * num_dimensions, dtype, shape.tolist(), where)


def _array_with_head(data: bytes, head: str, dtypes: dict[int, str], where: str) -> np.ndarray:
    code, num_dimensions = struct.unpack_from(head, data)
    if code not in dtypes:
        raise ConfigError(f"{where} is an array of type {code}, expected integers; name another field with --field")
    if num_dimensions > DIMENSIONS_MAX:
        raise FormatError(f"{where} has {num_dimensions} dimensions; copy the data set again")
    shape = struct.unpack_from(f"{head[0]}{num_dimensions}I", data, 8)
    return _shaped(data, 8 + 4 * num_dimensions, dtypes[code], list(shape), where)


def _shaped(data: bytes, start: int, dtype: str, shape: list[int], where: str) -> np.ndarray:
    """The values behind a head, in one row; raises `FormatError` if they are not as many as the shape says."""
    values = np.frombuffer(data, dtype=dtype, offset=start) if start < len(data) else np.empty(0, dtype=dtype)
    expected = 1
    for dimension in shape:
        expected *= dimension
    if expected != len(values):
        raise FormatError(f"{where} has {len(values)} ids, its shape {shape} says {expected}; copy the data set again")
    return values
