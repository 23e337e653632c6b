"""Folders of text and token ids: how they are walked, which data sets are named at their root, and what is left out.

Input: a folder. Output: its files in sorted order, and `DataSet`s, whose index says which files they have.
Errors: `ConfigError` for data sets of several splits and for cached repositories that are not whole; `OSError` if a
folder cannot be read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tierstore.errors import ConfigError, FormatError
from tierstore.formats.content import Content, content_of

TEXT_BYTES_MIN = 32  # fewer bytes that could be letters may as well be ids
INDEX_BYTES_MAX = 1 << 28  # of an index.json, which is in memory at once
_CONTROL = bytes(code for code in range(32) if code not in b"\t\n\v\f\r\x1b")

# What to do with a file from which token ids are wanted, if it is not what `content` says to whoever wants tensors.
# {path} stands for its path, as Python writes it; {folder} for its folder.
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
    "llmc-tokens-u16": "give it as it is",
    "llmc-tokens-u32": "give it as it is",
    "npy": "give it as it is",
    "parquet": "give it as it is",
    "arrow-file": "give it as it is",
    "arrow-stream": "give it as it is",
    "tar": "give it as it is",
    "json-lines": "give it as it is",
    "json": "write it as JSON lines, a document a line, or, if it is meant as text, name it .txt",
    "zip": "unpack it first",
    "mosaic-index": "give its folder",
    "mosaic-shard": "give its folder, with the index.json",
    "litdata-index": "give its folder",
    "litdata-chunk": "give its folder, with the index.json",
}
# Kinds that lie beside text and ids and hold none: in a folder they are left out. All others that `content` knows are
# data that somebody packed or has not fetched, and a trace without it would be another corpus.
LEFT_OUT_KINDS = {
    "empty", "safetensors", "gguf", "ggml", "torch-zip", "torch-legacy", "pickle", "npz", "zip", "7z", "rar",
    "hdf5", "sqlite", "json", "apple-double", "ds-store", "pdf", "llmc-model", "html",
}  # fmt: skip
_OWN_MAGIC = {b"TIERCOLS": "a trace or profile", b"TIERPLAC": "a placement"}


@dataclass(frozen=True)
class DataSet:
    """A folder that is one data set. kind: "mosaic" or "litdata"; index: its index.json, parsed."""

    folder: Path
    kind: str
    index: dict[str, Any]


def entries_under(folder: Path) -> Iterator[Path | DataSet]:
    """Yields the regular files of a folder and those below it, sorted, hidden ones left out; data sets as a whole."""

    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        here = Path(parent)
        if {"blobs", "snapshots"} <= set(folders):
            folders[:] = []
            yield from entries_under(_snapshot(here))
            continue
        if "dataset_dict.json" in names:
            _refuse_splits(here)
        found = _data_set(here, names)
        folders[:] = [] if found else sorted(name for name in folders if not name.startswith("."))
        if isinstance(found, DataSet):
            yield found
            continue
        for file in found or (here / name for name in sorted(names) if not name.startswith(".")):
            is_broken = file.is_symlink() and not file.exists()
            if is_broken and is_of_snapshot(file) and not is_about_repository(file):
                raise ConfigError(
                    f"{file} is a link to {os.readlink(file)}, which is not in the cache; download the repository again"
                )
            if found or file.is_file():
                yield file


def _data_set(folder: Path, names: list[str]) -> DataSet | list[Path] | None:
    """Returns the data set that a folder is, the files of a saved one of Hugging Face, or None."""
    if "state.json" in names and any(name.endswith(".arrow") for name in names):
        return _saved_files(folder)
    if "index.json" in names:
        content = content_of(folder / "index.json")
        if content is not None and content.kind in ("mosaic-index", "litdata-index"):
            return DataSet(folder, content.kind.removesuffix("-index"), read_index_json(folder / "index.json"))
    return None


def read_index_json(path: Path) -> dict[str, Any]:
    """Returns a JSON object of a data set; raises `FormatError` if it is not one."""
    size = path.stat().st_size
    if size > INDEX_BYTES_MAX:
        raise FormatError(f"{path} has {size} bytes, at most {INDEX_BYTES_MAX} are read; split the data set")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON ({error}); it was cut: copy the folder again") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path} is not a JSON object; copy the folder again")
    return found


def _saved_files(folder: Path) -> list[Path]:
    """The files of a data set of Hugging Face's save_to_disk, in its order; others beside them are its caches."""
    state = read_index_json(folder / "state.json")
    listed = state.get("_data_files")
    names = [each.get("filename") if isinstance(each, dict) else None for each in listed or []]
    if not isinstance(listed, list) or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise FormatError(f"{folder / 'state.json'} does not list the files of the data set; copy the folder again")
    files = [folder / str(name) for name in names]
    if absent := [file for file in files if not file.is_file()]:
        raise FormatError(
            f"{absent[0]} is missing: state.json lists {len(files)} files, {len(files) - len(absent)} are there; copy "
            f"the folder again"
        )
    return files


def _refuse_splits(folder: Path) -> None:
    splits = sorted(path.name for path in folder.iterdir() if (path / "state.json").is_file())
    if not splits:
        raise FormatError(f"{folder} is a data set of several splits, and holds none of them; copy the folder again")
    raise ConfigError(
        f"{folder} is a data set of {len(splits)} splits: {', '.join(splits)}; give those that you mean, such as "
        f"{folder / splits[0]}"
    )


def _snapshot(repository: Path) -> Path:
    """Returns the snapshot of a repository in the cache of huggingface_hub, which holds each file twice."""
    snapshots = sorted(path for path in (repository / "snapshots").iterdir() if path.is_dir())
    main = repository / "refs" / "main"
    if main.is_file() and (named := repository / "snapshots" / main.read_text().strip()) in snapshots:
        return named
    if len(snapshots) == 1:
        return snapshots[0]
    if not snapshots:
        raise ConfigError(f"{repository} is a repository in huggingface_hub's cache without a snapshot; download it")
    raise ConfigError(
        f"{repository} is a repository in huggingface_hub's cache with {len(snapshots)} snapshots, and refs/main names "
        f"none of them; give one, such as {snapshots[0]}"
    )


def is_of_snapshot(file: Path) -> bool:
    """Whether a file lies in a snapshot of huggingface_hub's cache."""
    return any(
        folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir() for folder in file.parents
    )


def is_about_repository(file: Path) -> bool:
    """Whether a file of a snapshot is about the repository, such as its README, and none of its data."""
    return is_of_snapshot(file) and (file.suffix == ".md" or file.stem.upper() in ("LICENSE", "README", "CITATION"))


def remedy_of(content: Content, path: Path) -> str:
    """Returns what to do with a file of known content that is not read."""
    return REMEDIES.get(content.kind, content.remedy).replace("{path}", repr(str(path)))


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
