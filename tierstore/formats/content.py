"""What a file is, by its first bytes and never by its name.

Input: a file's first `HEAD_BYTES` bytes and its length. Output: a `Content` with a name for messages and a remedy, or
None for a file of no known kind: plain text, raw integers. Errors: none; `OSError` comes through from the two functions
that look at the disk (`content_of` makes one read, `unfinished_download` only stats).

A reader decides which kinds it reads. The remedy is written for whoever expected tensors, text or token ids there.
"""

from __future__ import annotations

import io
import json
import os
import pickletools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HEAD_BYTES = 4096
PICKLE_OPCODES = 12  # so many in a row are a pickle: random bytes have an unknown one among them
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file
MAX_CONFIG_BYTES = 1 << 20  # of a Mosaic shard's JSON


@dataclass(frozen=True)
class Content:
    """A kind of file. kind: a stable identifier; name: for messages, with its article; remedy: what to do,
    an imperative."""

    kind: str
    name: str
    remedy: str


_DECOMPRESS, _UNPACK = "decompress it first", "unpack it first"
_TENSORS = "use the original model's *.safetensors"
_COLUMN = "if it holds text or token ids, give it to tierstore trace"
_SAMPLES = "if it holds text or token ids, give its folder to tierstore trace"
_CONTENTS = {
    "empty": ("an empty file", "download or copy it again"),
    "git-lfs": ("a Git LFS pointer, not the file itself", "run git lfs pull in its folder"),
    "git-annex": ("a git-annex pointer, not the file itself", "run git annex get for it"),
    "html": ("a web page (HTML), perhaps an error page saved as this file", "log in if needed, and download it again"),
    "xml-error": ("a storage server's error reply (XML)", "check address and permissions, and download it again"),
    "safetensors": ("a safetensors file", "give it to tierstore build"),
    "gguf": ("a GGUF file of llama.cpp", "give it to tierstore build"),
    "ggml": ("a GGML file of llama.cpp", _TENSORS),
    "gzip": ("gzip data", _DECOMPRESS),
    "zstd": ("zstd data", _DECOMPRESS),
    "xz": ("xz data", _DECOMPRESS),
    "bzip2": ("bzip2 data", _DECOMPRESS),
    "lz4": ("lz4 data", _DECOMPRESS),
    "snappy": ("snappy data", _DECOMPRESS),
    "7z": ("a 7z archive", _UNPACK),
    "rar": ("a RAR archive", _UNPACK),
    "torch-zip": ("a PyTorch file (zip archive)", "give it to tierstore build"),
    "npz": ("a NumPy archive (.npz)", "save its array as .npy"),
    "zip": ("a zip archive", _UNPACK),
    "tar": ("a tar archive (.tar, .nemo)", _UNPACK),
    "torch-legacy": ("a PyTorch file of the format before 1.6", "load it and save it again with a current torch"),
    "pickle": ("a bare Python pickle", "load it and save its tensors as .safetensors"),
    "npy": ("a NumPy array (.npy)", "save it as the kind of file that is expected here"),
    "parquet": ("a Parquet file", _COLUMN),
    "arrow-file": ("an Arrow IPC file", _COLUMN),
    "arrow-stream": ("an Arrow IPC stream, as datasets saves it", _COLUMN),
    "hdf5": ("an HDF5 file", "take its array out first, for instance with h5py"),
    "sqlite": ("an SQLite database", "take its column out first"),
    "megatron-index": ("a Megatron index (.idx)", "give the .bin file that it belongs to"),
    "mosaic-index": ("the index.json of a Mosaic (MDS) data set", _SAMPLES),
    "mosaic-shard": ("a Mosaic shard (.mds): a table of offsets, then its samples", _SAMPLES),
    "litdata-index": ("the index.json of a litdata data set", _SAMPLES),
    "litdata-chunk": ("a litdata chunk: a table of offsets, then its items", _SAMPLES),
    "llmc-tokens-u16": (
        "a token file of llm.c or modded-nanogpt: a header of 1024 bytes, then uint16",
        "skip the header",
    ),
    "llmc-tokens-u32": ("a token file of llm.c: a header of 1024 bytes, then uint32", "skip the header"),
    "llmc-model": ("a model file of llm.c", _TENSORS),
    "json-lines": ("JSON lines", "take the text or the ids out of their field"),
    "json": ("a JSON file", "give the file that holds the data"),
    "apple-double": ("a macOS sidecar (AppleDouble)", "give the file without ._ before its name"),
    "ds-store": ("a macOS folder record (.DS_Store)", "remove it"),
    "pdf": ("a PDF file", "take its text out first"),
}

# Kinds that begin with fixed bytes. The first that fits counts.
_PREFIXES: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs.github.com/spec/", "git-lfs"),
    (b"version https://hawser.github.com/spec/", "git-lfs"),  # its name before 2014
    (b"/annex/objects/", "git-annex"),
    (b"GGUF", "gguf"),
    (b"lmgg", "ggml"),
    (b"tjgg", "ggml"),
    (b"fmgg", "ggml"),
    (b"\x1f\x8b\x08", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"\xff\x06\0\0sNaPpY", "snappy"),
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"Rar!\x1a\x07", "rar"),
    (b"PK\x05\x06", "zip"),
    (b"\x93NUMPY", "npy"),
    (b"PAR1", "parquet"),
    (b"PARE", "parquet"),
    (b"ARROW1\0\0", "arrow-file"),
    (b"SQLite format 3\0", "sqlite"),
    (b"MMIDIDX\0\0", "megatron-index"),
    (b"TNTIDX\0\0", "megatron-index"),
    (b"\0\x05\x16\x07", "apple-double"),
    (b"\0\0\0\x01Bud1", "ds-store"),
    (b"%PDF-", "pdf"),
)
# The first int32 of a file of llm.c (https://github.com/karpathy/llm.c); a small version number follows it.
_LLMC = {
    20240520: "llmc-tokens-u16",
    20240522: "llmc-tokens-u16",  # HellaSwag and other evaluations
    20240801: "llmc-tokens-u32",
    20240326: "llmc-model",
    20240327: "llmc-model",
}
_LLMC_VERSION_MAX = 16
_LEGACY_TORCH = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # a pickled magic number


def recognise(head: bytes, size: int) -> Content | None:
    """Returns what a file is. Pure.

    Args:
        head: its first HEAD_BYTES bytes, fewer if it is shorter.
        size: its length in bytes.

    Returns:
        None for text, raw integers and all else that no rule fits.
    """
    if size == 0:
        return Content("empty", *_CONTENTS["empty"])
    kinds = (test(head, size) for test in _TESTS)
    kind = next((kind for kind in kinds if kind), None)
    return Content(kind, *_CONTENTS[kind]) if kind else None


def content_of(path: str | os.PathLike[str]) -> Content | None:
    """Returns what the file at `path`, a regular one, is. One read of at most HEAD_BYTES."""
    with open(path, "rb") as file:
        return recognise(file.read(HEAD_BYTES), os.fstat(file.fileno()).st_size)


def _by_prefix(head: bytes, _size: int) -> str | None:
    if head.startswith(b"BZh") and head[4:10] == b"1AY&SY":
        return "bzip2"
    if head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F:
        return "zstd"  # a skippable frame before the first
    return next((kind for prefix, kind in _PREFIXES if head.startswith(prefix)), None)


def _by_place(head: bytes, _size: int) -> str | None:
    """Kinds whose mark is not at the start."""
    if any(head[at : at + 8] == b"\x89HDF\r\n\x1a\n" for at in (0, 512, 1024, 2048)):
        return "hdf5"
    return "tar" if head[257:262] == b"ustar" else None


def _safetensors(head: bytes, _size: int) -> str | None:
    header_bytes = int.from_bytes(head[:8], "little")
    starts = re.match(rb'\{\s*("|\}\s*$)', head[8:64])
    return "safetensors" if 2 <= header_bytes <= MAX_HEADER_BYTES and starts else None


def _zip(head: bytes, _size: int) -> str | None:
    if not head.startswith(b"PK\x03\x04") or len(head) < 30:
        return None
    name = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    if name.endswith((b"/data.pkl", b"/.format_version", b"/byteorder", b"/version", b"/.data/serialization_id")):
        return "torch-zip"
    return "npz" if name.endswith(b".npy") else "zip"


def _pickle(head: bytes, size: int) -> str | None:
    if head.startswith(_LEGACY_TORCH):
        return "torch-legacy"
    if not re.match(rb"\x80[\x02-\x05]", head):
        return None
    opcodes = 0
    try:
        for opcode, _, _ in pickletools.genops(io.BytesIO(head)):
            opcodes += 1
            if opcode.name == "STOP" or opcodes == PICKLE_OPCODES:
                return "pickle"
    except ValueError:  # an unknown opcode, or one whose argument goes on behind the head
        return "pickle" if opcodes > 1 and size > len(head) and head[2:3] == b"\x95" else None
    return None


def _arrow_stream(head: bytes, size: int) -> str | None:
    """A continuation mark, the length of the schema's message, and a flatbuffer's root offset within it."""
    if len(head) < 12 or head[:4] != b"\xff\xff\xff\xff":
        return None
    num_bytes, root = struct.unpack("<iI", head[4:12])
    return "arrow-stream" if 8 <= num_bytes <= size - 8 and num_bytes % 8 == 0 and 4 <= root <= 64 else None


def _llmc(head: bytes, size: int) -> str | None:
    if size < 1024 or len(head) < 8:
        return None
    magic, version = struct.unpack("<ii", head[:8])
    return _LLMC.get(magic) if 0 < version <= _LLMC_VERSION_MAX else None


def _offset_table(head: bytes, size: int) -> str | None:
    """A count n, then n + 1 ascending u32 offsets of which the first is behind the table and the last the file's end.

    litdata puts its items right behind the table, Mosaic a JSON object between the two.
    """
    words = np.frombuffer(head, dtype="<u4", count=len(head) // 4).astype(np.int64)
    if len(words) < 3 or not 1 <= words[0] <= size // 4:
        return None
    table_end = 8 + 4 * int(words[0])
    offsets = words[1 : 2 + int(words[0])]
    whole = len(offsets) == words[0] + 1
    config_bytes = int(offsets[0]) - table_end
    if not 0 <= config_bytes <= MAX_CONFIG_BYTES or (np.diff(offsets) < 0).any() or offsets[-1] > size:
        return None
    if (whole and offsets[-1] != size) or (not whole and len(offsets) < 64):
        return None
    if config_bytes == 0:
        return "litdata-chunk"
    return "mosaic-shard" if head[table_end : table_end + 1] in (b"{", b"") else None


def _markup(head: bytes, _size: int) -> str | None:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:512].lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "html"
    return "xml-error" if start.startswith((b"<?xml", b"<error>")) and b"<error>" in start else None


def _json(head: bytes, size: int) -> str | None:
    try:
        text = head.decode("utf-8-sig", errors="strict" if size == len(head) else "ignore").strip()
    except UnicodeDecodeError:
        return None
    if not re.match(r'\{\s*("|\}$)|\[', text) or "\0" in text:
        return None
    lines = text.splitlines()
    if len(lines) > 1 and _parses(lines[0]) and lines[1].lstrip()[:1] in ("{", "["):
        return "json-lines"
    starts = re.match(r'\{\s*"(?:[^"\\]|\\.)*("\s*:|$)|\[\s*(-?\d+(\.\d+)?\s*,|\{\s*"|\[\s*[-\d"])', text)
    if not (_parses(text) if size == len(head) else starts):
        return None
    if re.search(r'"shards"\s*:\s*\[', text) and re.search(r'"(column_names|raw_data|format)"', text):
        return "mosaic-index"
    return "litdata-index" if re.search(r'"chunk_(size|bytes)"\s*:', text) else "json"


def _parses(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


_TESTS: tuple[Callable[[bytes, int], str | None], ...] = (
    _by_prefix, _by_place, _safetensors, _zip, _pickle, _arrow_stream, _llmc, _offset_table, _markup, _json,
)  # fmt: skip

# Files that downloaders keep beside an unfinished file of full length,
# and endings of files that hold the part that came.
CONTROL_SUFFIXES = {".aria2": "aria2", ".st": "axel", ".lftp-pget-status": "lftp"}
PARTIAL_SUFFIXES = {
    ".aria2": "aria2", ".crdownload": "Chrome", ".part": "Firefox or curl", ".partial": "rclone", ".download": "Safari",
    ".incomplete": "huggingface_hub", ".!qB": "qBittorrent", ".!ut": "uTorrent", ".filepart": "WinSCP",
    ".opdownload": "Opera", ".aria2__temp": "aria2", ".lftp-pget-status": "lftp",
}  # fmt: skip


def unfinished_download(path: str | os.PathLike[str]) -> str | None:
    """Returns why the file at `path` is a download that has not finished, with the remedy; None if nothing says so.

    It has not finished if a downloader's control file stands beside it (aria2 allocates the full length at once), if
    its own name is that of a part, or if it is missing or empty and the part stands beside it.
    """
    path = Path(path)
    for suffix, tool in CONTROL_SUFFIXES.items():
        control = path.with_name(path.name + suffix)
        if control.is_file():
            return f"its download by {tool} has not finished: {control.name} stands beside it; finish the download"
    for suffix, tool in PARTIAL_SUFFIXES.items():
        part = path.with_name(path.name + suffix)
        if path.name.endswith(suffix):
            return f"it is the unfinished part of a download by {tool}; finish the download"
        if part.is_file() and (not path.exists() or path.stat().st_size == 0):
            return f"its download by {tool} has not finished: {part.name} stands beside it; finish the download"
    return None
