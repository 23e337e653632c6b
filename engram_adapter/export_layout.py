"""Which files an export consists of, byte for byte: those of a checkpoint, with a store's rows in their places.

Input: a checkpoint, its tables' sources, and where each table's rows come from. Output: `NewFile`s in the checkpoint's
own layout: file names, headers, tensor names and places as they were. Errors: `ConfigError` for files in which rows
cannot be replaced.

A table's rows lie in ranges of files (`formats.table_source`). Everything else in them is copied as it is, headers
included, so that no container has to be written here, only rows into the places of rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tierstore.causes import named
from tierstore.errors import ConfigError
from tierstore.formats.catalog import CATALOG_FILE
from tierstore.formats.checkpoint import Checkpoint, TableSource
from tierstore.formats.checkpoint_files import METADATA_NAME
from tierstore.formats.content import HEAD_BYTES, recognise
from tierstore.formats.stored_tensor import FileIdentity, StoredTensor
from tierstore.offline.exporting.new_files import NewFile
from tierstore.offline.exporting.parts import FilePart, Part, RowsPart
from tierstore.offline.exporting.row_readers import RowOrigin
from tierstore.offline.exporting.touched_rows import TouchedRows

TENSOR_KINDS = {"safetensors", "gguf", "ggml", "torch-zip", "torch-legacy", "pickle", "hdf5", "npz"}
CONFIG_NAME = "config.json"
SUMMED = {"torch-zip", "zip"}  # containers that hold checksums of what lies in them
DEPTH_MAX = 8  # of folders in folders


@dataclass(frozen=True)
class TableRows:
    """Where the rows of a table come from.

    Attributes:
        stored: The store's own.
        in_files: The checkpoint's files, if they are known to hold the same rows, or None.
        touched: Those that training changed, or None.
    """

    stored: RowOrigin
    in_files: RowOrigin | None
    touched: TouchedRows | None

    @property
    def from_files(self) -> bool:
        """Whether the checkpoint's files give the rows that training did not touch."""
        return self.in_files is not None

    @property
    def before(self) -> RowOrigin:
        """The rows before any training, from where they are read fastest."""
        return self.stored if self.in_files is None else self.in_files


@dataclass(frozen=True)
class ExportLayout:
    """The files to write, and those of the checkpoint that are left out, each with the reason."""

    files: tuple[NewFile, ...]
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class _Range:
    """Rows of a plane in a file."""

    tensor: StoredTensor
    source: TableSource
    row_start: int
    column_start: int
    width_bytes: int


def lay_out_export(
    checkpoint: Checkpoint, sources: Sequence[TableSource], rows: Mapping[str, TableRows], kept_apart: Sequence[Path]
) -> ExportLayout:
    """Returns the files of an export in the layout of `checkpoint`.

    Args:
        checkpoint: The source.
        sources: Its tables.
        rows: Where the rows of each come from, by its name.
        kept_apart: Folders within the checkpoint's that are not its own: the store, the export.

    Raises:
        ConfigError: Training touched rows in a container that holds checksums of its own.
    """
    ranges: dict[Path, list[_Range]] = {}
    for each in _ranges(sources):
        ranges.setdefault(each.tensor.path, []).append(each)
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    files = []
    for file, content in zip(checkpoint.files, checkpoint.contents, strict=True):
        whole = FilePart(file, 0, content.identity.num_bytes, content.identity)
        parts = _with_rows(whole, sorted(ranges.get(file, ()), key=lambda r: r.tensor.byte_start), rows)
        files.append(NewFile(os.path.relpath(file, folder), tuple(parts)))
    if not checkpoint.path.is_dir():
        return ExportLayout(tuple(files), {})  # of one file of tensors nothing lies beside it
    others, left_out = files_beside(checkpoint.path, checkpoint.files, kept_apart)
    return ExportLayout((*files, *others), left_out)


def _ranges(sources: Sequence[TableSource]) -> Iterator[_Range]:
    for source in sources:
        column = 0
        for plane in source.planes:
            row = 0
            for tensor in plane.tensors:
                yield _Range(tensor, source, row, column, plane.width_bytes)
                row += tensor.num_bytes // plane.width_bytes
            column += plane.width_bytes


def _with_rows(whole: FilePart, ranges: Sequence[_Range], rows: Mapping[str, TableRows]) -> list[Part]:
    """Returns the parts of a file: itself, where nothing takes the place of its bytes."""
    parts: list[Part] = []
    at = 0
    for each in ranges:
        table = rows[each.source.spec.name]
        if not each.tensor.num_bytes or (table.from_files and table.touched is None):
            continue
        if table.touched is not None:
            _refuse_summed(whole.path)
        start, num_bytes = each.tensor.byte_start, each.tensor.num_bytes
        if start < at:
            raise ConfigError(
                f"{whole.path}: tensor {each.tensor.name} begins at byte {start}, within another table's, which ends "
                f"at {at}; two tables share rows, which cannot be written apart"
            )
        parts += _copied(whole, at, start)
        same = FilePart(whole.path, start, num_bytes, whole.identity)
        parts.append(
            RowsPart(
                each.row_start,
                num_bytes // each.width_bytes,
                each.column_start,
                each.width_bytes,
                each.source.spec.row_bytes,
                same if table.from_files else table.stored,
                table.touched,
            )
        )
        at = start + num_bytes
    return [*parts, *_copied(whole, at, whole.num_bytes)]


def _copied(whole: FilePart, start: int, end: int) -> list[Part]:
    return [FilePart(whole.path, start, end - start, whole.identity)] if start < end else []


def _refuse_summed(file: Path) -> None:
    """Raises `ConfigError` for a PyTorch file: torch compares the CRC-32 that its archive has of each tensor."""
    with file.open("rb") as opened:
        content = recognise(opened.read(HEAD_BYTES), file.stat().st_size)
    if content is not None and content.kind in SUMMED:
        raise ConfigError(
            f"{file} is {content.name}, whose archive holds checksums of the rows that training changed: rows can be "
            f"replaced in safetensors and GGUF files only; convert the checkpoint to safetensors, and give that as "
            f"--source"
        )


def files_beside(folder: Path, own: Sequence[Path], kept_apart: Sequence[Path]) -> tuple[list[NewFile], dict[str, str]]:
    """Returns a checkpoint's files that hold no tensors, config.json and index last; and what is left out, and why.

    own: the checkpoint's files of tensors. kept_apart: folders that are not its own.
    """
    files, left_out = [], {}
    for path in _files_under(folder, kept_apart):
        name = os.path.relpath(path, folder)
        if path in own:
            continue
        reason = _why_left_out(path, folder, own)
        if reason:
            left_out[name] = reason
            continue
        found = path.stat()
        part = FilePart(path, 0, found.st_size, FileIdentity.of(found))
        files.append(NewFile(name, (part,), is_last=_is_last(name)))
    return sorted(files, key=lambda file: (file.name.endswith(".index.json"), file.name)), left_out


def _is_last(name: str) -> bool:
    return name in (CONFIG_NAME, METADATA_NAME) or (name.endswith(".index.json") and os.sep not in name)


def _files_under(folder: Path, kept_apart: Sequence[Path]) -> Iterator[Path]:
    """Yields the visible files of a folder and of those in it, but for stores and what is kept apart.

    The metadata of a torch.distributed folder is hidden, and belongs to it.
    """
    apart = {os.path.realpath(path) for path in kept_apart}
    for at, folders, names in os.walk(folder):
        depth = len(Path(at).relative_to(folder).parts)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and depth < DEPTH_MAX
            and os.path.realpath(os.path.join(at, name)) not in apart
            and not os.path.exists(os.path.join(at, name, CATALOG_FILE))
        )
        yield from (Path(at, name) for name in sorted(names) if not name.startswith(".") or name == METADATA_NAME)


def _why_left_out(path: Path, folder: Path, own: Sequence[Path]) -> str:
    """Returns why a file beside the tensors is no part of the export, "" if it is one."""
    if not path.is_file():
        return "it is no regular file"
    try:
        with path.open("rb") as opened:
            content = recognise(opened.read(HEAD_BYTES), path.stat().st_size)
    except OSError as error:
        raise named(error, path) from error
    if content is not None and content.kind in TENSOR_KINDS and path.name != METADATA_NAME:
        return f"it is {content.name} that the store was not built from: its rows may be old"
    if path.name.endswith(".index.json") and path.parent == folder and not _names_files(path, own):
        return "it is the index of files that are left out"
    return ""


def _names_files(index: Path, own: Sequence[Path]) -> bool:
    """Whether an index is of files that the export has."""
    text = index.read_text(encoding="utf-8", errors="replace")
    return any(f'"{file.name}"' in text for file in own)
