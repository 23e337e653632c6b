"""What an export is made of: the checkpoint that a store was built from, or the store alone.

Input: a store's catalog, and perhaps a checkpoint or a folder. Output: an `ExportOrigin`, which lays the files out.
Errors: `ConfigError` for a checkpoint that is not the one of the build, by the files that have changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tierstore.errors import ConfigError
from tierstore.formats.catalog import CatalogImage
from tierstore.formats.checkpoint import Checkpoint, TableSource
from tierstore.formats.origin import changed_files, same_checkpoint
from tierstore.offline.exporting.new_files import NewFile
from tierstore.offline.exporting.parts import BytesPart
from tierstore.offline.exporting.row_readers import RowOrigin, SourceRows, origin_of
from tierstore.offline.exporting.touched_rows import TouchedRows
from tierstore.offline.slice_set import SliceSet

from .checkpoints import sources_of_store
from .export_layout import CONFIG_NAME, ExportLayout, TableRows, files_beside, lay_out_export
from .tables_layout import lay_out_tables

FILES_NAMED_MAX = 4  # in a message
_NO_CONFIG = (
    "the store has none, and 'tierstore build' of the export needs the model's: copy it there, or export with "
    "--source FOLDER, which has it"
)


@dataclass(frozen=True)
class ExportOrigin:
    """What an export is made of.

    Attributes:
        image: The store's catalog.
        checkpoint: The store's; None if tables alone are written.
        sources: Its tables.
        folder: Whose files come along if tables alone are written, or None.
        rows: Where the rows of each table come from, without those that training touched.
    """

    image: CatalogImage
    checkpoint: Checkpoint | None
    sources: Sequence[TableSource]
    folder: Path | None
    rows: Mapping[str, TableRows]

    def lay_out(self, touched: Mapping[str, TouchedRows], kept_apart: Sequence[Path]) -> ExportLayout:
        """Returns the files to write, with touched rows in their places; see `lay_out_export`."""
        rows = {name: replace(each, touched=touched.get(name)) for name, each in self.rows.items()}
        if self.checkpoint is not None:
            return lay_out_export(self.checkpoint, self.sources, rows, kept_apart)
        tables = lay_out_tables(self.image, rows)
        files: list[NewFile] = []
        left_out: Mapping[str, str] = {}
        if self.folder is not None:
            files, left_out = files_beside(self.folder, (), kept_apart)
        config = self.image.attachments.get(CONFIG_NAME)
        if any(file.name == CONFIG_NAME for file in files):
            pass
        elif config is not None:
            files = [NewFile(CONFIG_NAME, (BytesPart(config),), is_last=True), *files]
        elif not all(table.spec.is_plain for table in self.image.tables.values()):
            left_out = {**left_out, CONFIG_NAME: _NO_CONFIG}
        return ExportLayout((*tables, *files), left_out)


def find_origin(
    image: CatalogImage, source: Path | None, tables_only: bool, slices: SliceSet | None = None
) -> ExportOrigin:
    """Finds the checkpoint and its tables, or, if tables alone are asked for, the folder of their other files.

    slices: where the rows of `image` lie, if it is that of several stores with slices.
    Raises `ConfigError` if the checkpoint is not that of the build, or is not given and not known.
    """
    if tables_only or image.is_initial:
        if source is not None and not source.is_dir():
            raise ConfigError(f"{source} is not a folder; give the folder of config.json, or leave --source out")
        rows = {name: TableRows(_stored(image, name, slices), None, None) for name in image.tables}
        return ExportOrigin(image, None, (), source, rows)
    checkpoint = Checkpoint.open(source if source is not None else _source_of(image))
    sources = sources_of_store(image, checkpoint)
    _check_same(image, checkpoint, sources)
    changed = set(changed_files(image.origin, sources))
    rows = {}
    for each in sources:
        is_same = not changed & {tensor.path.name for tensor in each.tensors}
        stored = _stored(image, each.spec.name, slices)
        rows[each.spec.name] = TableRows(stored, SourceRows(each) if is_same else None, None)
    return ExportOrigin(image, checkpoint, sources, None, rows)


def _stored(image: CatalogImage, name: str, slices: SliceSet | None) -> RowOrigin:
    """Returns what reads a table's rows out of the store, or the slices, as they were before any training."""
    if slices is None or slices.is_initial:
        return origin_of(image, image.tables[name])
    return SourceRows(next(source for source in slices.sources() if source.spec.name == name))


def _source_of(image: CatalogImage) -> Path:
    """Returns where the checkpoint of a store in place lies; of another store nobody noted that."""
    folders = {Path(file.path).parent for file in image.files}
    if len(folders) != 1:
        raise ConfigError(
            f"{image.path}: the catalog does not say where its checkpoint lies; give it: --source CHECKPOINT; or write "
            f"the tables alone: --tables-only"
        )
    return folders.pop()


def _check_same(image: CatalogImage, checkpoint: Checkpoint, sources: Sequence[TableSource]) -> None:
    """Raises `ConfigError` if a checkpoint is not the one that the store was built from."""
    origin = checkpoint.to_dict()
    for source in sources:
        table = image.tables.get(source.spec.name)
        if table is None or table.spec != source.spec:
            raise ConfigError(
                f"{checkpoint.path}: table {source.spec.name} is {source.spec}, the store has "
                f"{table.spec if table else 'none'}; give the checkpoint that it was built from"
            )
    if not same_checkpoint(image.origin, origin, sources):
        raise ConfigError(
            f"{checkpoint.path} is not the checkpoint that {image.path} was built from: "
            f"{_differences(image.origin, origin)}; give that one, or build a store of this one"
        )


def _differences(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Returns which files are others now, as far as the catalog's record shows."""
    words = {"bytes": "bytes", "header_sha256": "header SHA-256", "samples_sha256": "SHA-256 of samples"}
    then = {entry.get("name"): entry for entry in recorded.get("files", []) if isinstance(entry, dict)}
    parts = []
    for entry in found["files"]:
        before = then.get(entry["name"])
        if before is None:
            parts.append(f"{entry['name']} was not there")
            continue
        changed = [key for key in words if before.get(key) != entry[key]]
        if changed:
            parts.append(
                f"{entry['name']} changed since ({words[changed[0]]} {str(before.get(changed[0]))[:12]} then, "
                f"{str(entry[changed[0]])[:12]} now)"
            )
    parts += [f"{name} is gone" for name in then if name not in {entry["name"] for entry in found["files"]}]
    digests = f"digest {str(recorded.get('digest'))[:12]} then, {found['digest'][:12]} now"
    return ", ".join(parts[:FILES_NAMED_MAX]) + (_more(len(parts))) if parts else digests


def _more(count: int) -> str:
    return f" and {count - FILES_NAMED_MAX} more" if count > FILES_NAMED_MAX else ""
