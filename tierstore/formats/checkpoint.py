"""A trained checkpoint on disk: which tensors its files hold, at which bytes, and who it is (its digest).

Input: a Hugging Face-style folder (config.json, *.safetensors with or without an index), its folder in the cache, or
one file of tensors. Output: `StoredTensor`s (`stored_tensor.py`), which a `TableSource` puts together to rows
(`table_source.py`). Errors: `ConfigError` and `FormatError`, with the cause: what is missing, unfinished, of another
kind, split by rank, or of another version than the index.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..causes import Fault, named
from ..errors import ConfigError, FormatError
from ..lazy import lazy
from .checkpoint_files import (
    INDEX_NAME,
    CheckpointFiles,
    find_files,
    in_words,
    numbered_siblings,
    rank_parts,
    read_json,
    split_by_rank,
    why_absent,
)
from .distributed_checkpoint import read_distributed
from .rank_files import one_ranks, put_together
from .stored_tensor import StoredTensor, TensorFile, check_identity, sampled
from .table_source import Plane, PlaneReader, TableSource
from .tensor_files import read_tensor_file

__all__ = ["Checkpoint", "Plane", "PlaneReader", "TableSource"]

_COPY = Fault(ConfigError, "copy it again")
_STALE = "the index is of another version of these files: download it again, or write it anew"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's configuration and tensors. Nothing stays open.

    Attributes:
        path: The folder, or the file.
        config: config.json; empty if it is missing.
        tensors: By name.
        files: Those that are there and have tensors, in order of name.
        contents: What each of `files` has.
        unusable: Of every tensor that is known by name but cannot be read, why not and what to do: its file was not
            downloaded, the index does not name it, its bytes are not rows.
        inner_names: Full names of tensors that lie in dicts within a PyTorch file, by shorter names.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    files: tuple[Path, ...]
    contents: tuple[TensorFile, ...]
    unusable: dict[str, str]
    inner_names: dict[str, list[str]]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Reads the configuration and every header of a folder, or of one file of tensors.

        If the folder has an index, it alone says which file holds which tensor, and a file that is missing or damaged
        is an error only when its tensors are read. Without one, every visible *.safetensors file must be whole.

        Raises `ConfigError` if something is missing or cannot be read, `FormatError` if a header lies about its file.
        """
        path = Path(path)
        try:
            return cls._open(path)
        except OSError as error:
            raise named(error, f"cannot read {error.filename or path}", error.filename or path, fault=_COPY) from error

    @classmethod
    def _open(cls, path: Path) -> Checkpoint:
        found = find_files(path)
        config = found.path / "config.json"
        collected = _Contents(found)
        collected.read()
        return cls(
            path=found.path,
            config=read_json(config) if found.path.is_dir() and config.exists() else {},
            tensors=collected.tensors,
            files=tuple(collected.contents),
            contents=tuple(collected.contents.values()),
            unusable={name: reason for name, reason in collected.unusable.items() if name not in collected.tensors},
            inner_names=collected.inner_names,
        )

    @lazy
    def names(self) -> list[str]:
        """Every tensor's name in order, also of those that cannot be read."""
        return sorted([*self.tensors, *self.unusable])

    def names_under(self, prefix: str) -> list[str]:
        """Returns the names that begin with `prefix`, also of tensors that cannot be read."""
        start = bisect.bisect_left(self.names, prefix)
        return list(
            itertools.takewhile(lambda name: name.startswith(prefix), itertools.islice(self.names, start, None))
        )

    def why_not(self, name: str) -> str:
        """Returns why tensor `name` cannot be read, in words that follow its name, with the remedy."""
        return self.unusable.get(name) or f"is missing; {self.why_missing()}"

    def why_missing(self) -> str:
        """Returns why a tensor that no file has may be missing: the files that are not there, as far as names show."""
        return in_words(self.absent_files) or "config.json does not belong to these tensors, or a file is missing"

    @property
    def absent_files(self) -> list[str]:
        """The files of numbered sets (NAME-00001-of-00003) that are not there, each with the reason;
        not of an index."""
        siblings = {other for file in self.files for other in numbered_siblings(file) or ()}
        return [f"{file.name}: {why_absent(file)}" for file in sorted(siblings) if not file.exists()]

    def full_name(self, name: str) -> str:
        """Returns the name of a tensor that `name` means: itself,
        or the one tensor in a dict of that name within a file.

        Raises `ConfigError` if several dicts of the file have such a tensor.
        """
        if name in self.tensors or name in self.unusable:
            return name
        full = self.inner_names.get(name, [name])
        if len(full) > 1:
            raise ConfigError(
                f"{self.path}: tensor {name} is there {len(full)} times: {in_words(full)}; give one of these"
            )
        return full[0]

    def tensor(self, name: str, dtypes: Sequence[str], ndim: int) -> StoredTensor:
        """Returns the tensor `name`, or raises `ConfigError` if it is missing, unusable,
        or of another dtype or rank."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ConfigError(f"{self.path}: tensor {name} {self.why_not(name)}")
        if tensor.dtype not in dtypes or len(tensor.shape) != ndim:
            raise ConfigError(
                f"{self.path}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, "
                f"expected {' or '.join(dtypes)} of {ndim} dimensions"
            )
        return tensor

    def digest(self) -> str:
        """Returns who this checkpoint is: a SHA-256 (hex) over its configuration, headers and samples of every tensor.

        Samples are up to 16 evenly spaced blocks of 4 KiB a tensor, so that a further-trained checkpoint of the same
        shapes (whose dense weights all differ) has another digest without reading hundreds of gigabytes.
        Blocks on the disk.
        """
        return str(self.to_dict()["digest"])

    def to_dict(self) -> dict[str, Any]:
        """Returns the catalog's record of this checkpoint: a digest, and what identifies each file.

        Of a file: its name, bytes, time of last change, inode, and the digests of its header and of its samples. Blocks
        on the disk. Raises `FormatError` if a file has changed since it was opened.
        """
        whole = hashlib.sha256()
        whole.update(json.dumps(self.config, sort_keys=True).encode())
        files = []
        for file, content in zip(self.files, self.contents, strict=True):
            whole.update(os.fsencode(file.name) + f"\0{content.identity.num_bytes}\0{content.header_digest}\0".encode())
            samples = hashlib.sha256()
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                for part in sampled(fd, content.tensors):
                    whole.update(part)
                    samples.update(part)
                check_identity(file, os.fstat(fd), content.identity)
            finally:
                os.close(fd)
            files.append(
                {
                    "name": file.name,
                    "bytes": content.identity.num_bytes,
                    "header_sha256": content.header_digest,
                    "mtime_ns": content.identity.mtime_ns,
                    "inode": content.identity.inode,
                    "samples_sha256": samples.hexdigest(),
                }
            )
        return {"digest": whole.hexdigest(), "files": files}


class _Contents:
    """What is in the files of a checkpoint, put together by its index."""

    def __init__(self, found: CheckpointFiles) -> None:
        self._found = found
        self._absent = dict(found.absent)
        self.contents: dict[Path, TensorFile] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self.unusable: dict[str, str] = {}
        self.inner_names: dict[str, list[str]] = {}

    def read(self) -> None:
        """Reads every header."""
        if self._found.distributed:
            self._read_distributed()
            return
        for file in self._found.files:
            try:
                self.contents[file] = read_tensor_file(file)
            except (ConfigError, FormatError, OSError) as error:
                if self._found.assigned is None:
                    raise
                self._absent[file.name] = str(error)
        if not self.contents:
            reasons = [f"{name}: {reason}" for name, reason in self._absent.items()]
            raise ConfigError(f"{self._found.path}: no file of its index can be read; {in_words(reasons)}")
        for content in self.contents.values():
            for name, full in content.inner_names.items():
                self.inner_names.setdefault(name, []).extend(full)
        if self._found.assigned is None:
            self._put_all_together()
        else:
            self._assign(self._found.assigned)
        if self._found.path.is_file():
            self._check_whole(self._found.path)

    def _read_distributed(self) -> None:
        """Takes what the metadata of a torch.distributed folder says."""
        found = read_distributed(self._found.path)
        self.contents, self.tensors, self.unusable = found.contents, found.tensors, found.unusable
        self.inner_names = found.inner_names

    def _put_all_together(self) -> None:
        """Without an index each tensor must lie in one file, unless files say which ranks' parts they hold."""
        parts: dict[str, list[tuple[tuple[int, ...], StoredTensor]]] = {}
        for file, content in self.contents.items():
            self.unusable |= content.unusable
            for tensor in content.tensors:
                if tensor.name in content.offsets and self._found.path.is_dir():
                    parts.setdefault(tensor.name, []).append((content.offsets[tensor.name], tensor))
                    continue
                if tensor.name in content.offsets:
                    self.unusable[tensor.name] = one_ranks(file)
                    continue
                other = self.tensors.setdefault(tensor.name, tensor)
                if other is not tensor:
                    raise FormatError(_in_two_files(tensor, other.path, file))
        tensors, unusable = put_together(parts)
        self.tensors |= tensors
        self.unusable |= unusable

    def _assign(self, assigned: dict[str, str]) -> None:
        """With an index only it says which file's tensor counts; what else is there is known by name,
        with the reason."""
        assert self._found.index is not None
        index = self._found.index.name
        of_file = {
            file.name: {tensor.name: tensor for tensor in content.tensors} for file, content in self.contents.items()
        }
        of_ranks = {file.name: content.offsets for file, content in self.contents.items()}
        reasons = {file.name: content.unusable for file, content in self.contents.items()}
        for name, file_name in assigned.items():
            if file_name in self._absent:
                self.unusable[name] = f"lies in {file_name}, which cannot be read: {self._absent[file_name]}"
            elif name in of_ranks.get(file_name, ()):
                self.unusable[name] = one_ranks(self._found.path / file_name)
            elif name in of_file[file_name]:
                self.tensors[name] = of_file[file_name][name]
            else:
                self.unusable[name] = reasons[file_name].get(name) or (
                    f"is not in {file_name}, where {index} says that it lies; {_STALE}"
                )
        for name, files in self._unlisted(assigned).items():
            self.unusable[name] = f"lies in {in_words(files)}, but {index} does not list it; {_STALE}"

    def _unlisted(self, assigned: dict[str, str]) -> dict[str, list[str]]:
        """Returns the files of each tensor that the index does not list,
        those that the index does not name among them."""
        of_file = {
            file.name: [*(tensor.name for tensor in content.tensors), *content.unusable]
            for file, content in self.contents.items()
        }
        for file in self._found.beside:
            with contextlib.suppress(ConfigError, FormatError, OSError):
                of_file[file.name] = [tensor.name for tensor in read_tensor_file(file).tensors]
        found: dict[str, list[str]] = {}
        for file_name, names in of_file.items():
            for name in names:
                if name not in assigned:
                    found.setdefault(name, []).append(file_name)
        return found

    def _check_whole(self, path: Path) -> None:
        """Of one file of a numbered set without an index only tensors are used that no other file of the set has."""
        siblings = numbered_siblings(path)
        if siblings is None or self._found.assigned is not None:
            return
        of_others: dict[str, str] = {}
        for file in siblings:
            with contextlib.suppress(ConfigError, FormatError, OSError):
                of_others |= {tensor.name: file.name for tensor in read_tensor_file(file).tensors}
        count = len(siblings) + 1
        for name, file_name in of_others.items():
            self.unusable[name] = f"lies in {file_name}, one of {count} files; give their folder, with its index"
            self.tensors.pop(name, None)
        if not all(file.is_file() for file in siblings):
            for name in list(self.tensors):
                self.unusable[name] = (
                    f"lies in one of {count} files, and no index says that it lies here whole; give their folder, with "
                    f"its index, or all {count} files"
                )
                del self.tensors[name]


def _in_two_files(tensor: StoredTensor, first: Path, second: Path) -> str:
    """Returns what to say of a tensor that two files hold, without an index that says which of them counts."""
    parts = rank_parts(second)
    if parts:
        return split_by_rank(second, parts)
    return (
        f"tensor {tensor.name} is in {first.name} and again in {second.name}, and no index says which counts; give the "
        f"one file, or the checkpoint's own {INDEX_NAME}; if each holds a part of its rows, put them together first"
    )
