"""Folders of text and token ids: how they are walked, which data sets are named at their root, and what is left out.

Input: a folder. Output: its files in sorted order. Errors: `ConfigError` for folders that are a data set of another
tool's, which only that tool reads; `OSError` if a folder cannot be read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tierstore.errors import ConfigError
from tierstore.formats.content import Content, content_of

TEXT_BYTES_MIN = 32  # fewer bytes that could be letters may as well be ids
_CONTROL = bytes(code for code in range(32) if code not in b"\t\n\v\f\r\x1b")

# What to do with a file from which token ids are wanted, if it is not what `content` says to whoever wants tensors.
# {path} stands for its path, {lines} for the name of a file of JSON lines, both as Python writes them.
REMEDIES = {
    "safetensors": "take its ids out into a .npy file",
    "torch-zip": "save its ids as .npy: numpy.save('ids.npy', torch.load({path}).numpy())",
    "torch-legacy": "save its ids as .npy: numpy.save('ids.npy', torch.load({path}).numpy())",
    "pickle": "save its ids as .npy",
    "npz": "save its array as .npy",
    "gguf": "give text, or token ids as .npy",
    "ggml": "give text, or token ids as .npy",
    "llmc-model": "give its token files",
    "hdf5": "save its ids as .npy",
    "arrow-file": "write it as JSON lines: datasets.Dataset.from_file({path}).to_json({lines})",
    "arrow-stream": "write it as JSON lines: datasets.Dataset.from_file({path}).to_json({lines})",
    "parquet": "write it as JSON lines: datasets.Dataset.from_parquet({path}).to_json({lines})",
    "llmc-tokens-u16": "give it as it is",
    "llmc-tokens-u32": "give it as it is",
    "npy": "give it as it is",
    "json-lines": "give it as it is",
    "json": "write it as JSON lines, a document a line, or, if it is meant as text, name it .txt",
    "tar": "unpack it first",
    "zip": "unpack it first",
}
# Kinds that lie beside text and ids and hold none: in a folder they are left out. All others that `content` knows are
# data that somebody packed or has not fetched, and a trace without it would be another corpus.
LEFT_OUT_KINDS = {
    "empty", "safetensors", "gguf", "ggml", "torch-zip", "torch-legacy", "pickle", "npz", "zip", "tar", "7z", "rar",
    "hdf5", "sqlite", "json", "apple-double", "ds-store", "pdf", "llmc-model", "html",
}  # fmt: skip
_OWN_MAGIC = {b"TIERCOLS": "a trace or profile", b"TIERPLAC": "a placement"}
_DATASET_FILES = ("dataset_info.json", "state.json")


def files_under(folder: Path) -> Iterator[Path]:
    """Yields the regular files of a folder and those below it, sorted, hidden ones left out."""

    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        _refuse_data_set(Path(parent), folders, names)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = (Path(parent, name) for name in sorted(names) if not name.startswith("."))
        yield from (file for file in files if file.is_file())


def _refuse_data_set(folder: Path, folders: list[str], names: list[str]) -> None:
    """Raises `ConfigError` for folders that only another tool can read, before any file is taken for text."""
    if {"blobs", "snapshots"} <= set(folders):
        raise ConfigError(
            f"{folder} is a repository in the cache of huggingface_hub, which holds each file twice; "
            f"{_snapshot(folder)}"
        )
    if "dataset_dict.json" in names:
        raise ConfigError(
            f"{folder} is a folder of Hugging Face datasets, of several splits; write one as JSON lines and give that: "
            f"datasets.load_from_disk({str(folder)!r})['train'].to_json('train.jsonl')"
        )
    if any(name.endswith(".arrow") for name in names) and any(name in names for name in _DATASET_FILES):
        raise ConfigError(
            f"{folder} is a folder of Hugging Face datasets; write it as JSON lines and give that: "
            f"datasets.load_from_disk({str(folder)!r}).to_json('{folder.name}.jsonl')"
        )
    if "index.json" in names:
        content = content_of(folder / "index.json")
        if content is not None and content.kind in ("mosaic-index", "litdata-index"):
            raise ConfigError(f"{folder} is a data set of chunks: its index.json is {content.name}; {content.remedy}")


def _snapshot(folder: Path) -> str:
    """What to give instead of a repository in huggingface_hub's cache."""
    main = folder / "refs" / "main"
    if main.is_file() and (folder / "snapshots" / main.read_text().strip()).is_dir():
        return f"give {folder / 'snapshots' / main.read_text().strip()}"
    snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    return f"give {snapshots[0]}" if snapshots else "it holds no snapshot: download it first"


def remedy_of(content: Content, path: Path) -> str:
    """Returns what to do with a file of known content that is not read."""
    remedy = REMEDIES.get(content.kind, content.remedy)
    return remedy.replace("{path}", repr(str(path))).replace("{lines}", repr(f"{path.stem}.jsonl"))


def own_file(head: bytes) -> str:
    """Returns what a file of our own is, by its first bytes; "" if it is not ours."""
    return _OWN_MAGIC.get(head[:8], "")


def is_text(head: bytes) -> bool:
    """Whether a file's first bytes are letters beyond doubt: UTF-8 without control characters, and enough of them."""
    if len(head) < TEXT_BYTES_MIN or head.translate(None, _CONTROL) != head:
        return False
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4 and error.reason == "unexpected end of data"
    return True
