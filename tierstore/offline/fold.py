"""fold: the oldest versions of a store become one, which has the newest row of each that any of them had.

Input: a store's path, and how many versions should stay. Output: the same store with fewer versions: the base and those
that stay are what they were, with the digests that they had. Errors: `ConfigError` while somebody else publishes,
`BudgetError` for a disk without room, `CorruptPageError` for a damaged row. Nothing changed then.

Each file is written whole, synced and named; then one transaction names the folded version in place of the others.
Stores that are open read on from the files that they have open. Memory: the index of the rows that are folded, 18 bytes
each, and some MiB.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .. import kernels
from ..causes import named
from ..decisions.budget import overlay_bytes
from ..durable import replacing, sync_folder
from ..errors import ConfigError, CorruptPageError
from ..formats.catalog import CatalogImage, publish_folded, read_catalog
from ..formats.version_rows import VERSIONS_FOLDER, RowsFile, write_rows_file
from ..formats.versions import VersionTable
from ..layout import TableLayout
from ..process.progress import OnProgress
from ..tiers.memory import allocate
from ..tiers.overlay import TableOverlay
from ..tiers.version_files import VersionFiles
from .versions import Chunks, check_room, file_stem, locked_for_publish, remove_leftovers, sha256_of


@dataclass(frozen=True)
class FoldReport:
    """What a fold did.

    Attributes:
        version: The oldest version that is left beside the base, or 0.
        num_folded: Versions that went into it, itself among them; 0 if there was nothing to fold.
        num_bytes: Bytes of its files.
        freed_bytes: Bytes of the files that were removed.
    """

    version: int
    num_folded: int
    num_bytes: int
    freed_bytes: int


def fold_versions(store_path: str | os.PathLike[str], keep: int, on_progress: OnProgress | None = None) -> FoldReport:
    """Keeps the newest versions of a store, and folds all before them into the oldest of these. Blocks on the disk.

    A version that is gone is refused by name from then on. A daemon that serves one of the others follows by a swap to
    the same store; `serve --follow` does that by itself.

    Args:
        store_path: The store.
        keep: How many versions stay beside the base, at least 1.
        on_progress: Called with (rows done, rows in all), in the calling thread.

    Raises:
        ConfigError: `keep` is below 1; somebody else publishes.
        BudgetError: The disk has too little room.
        FormatError: A file of a version is missing, or is not what the catalog says.
        CorruptPageError: A row that is folded is damaged.
    """
    path = Path(store_path)
    if keep < 1:
        raise ConfigError(f"keep: {keep}; at least 1 version stays beside the base: its rows are what readers see")
    read_catalog(path)  # before a lock is made in a folder that is not a store
    with locked_for_publish(path):
        image = read_catalog(path)
        number = sorted(image.versions)[-keep] if len(image.versions) > keep else min(image.versions, default=0)
        before = image.at_version(number)
        if len(before.used_versions) <= 1:
            return FoldReport(number, 0, 0, 0)
        try:
            return _fold(path, before, on_progress)
        except OSError as error:
            raise named(error, path, error.filename, writing=True, note="no version changed") from error


def _fold(path: Path, image: CatalogImage, on_progress: OnProgress | None) -> FoldReport:
    """Folds all versions up to the image's. The caller holds the lock, and the image was read under it."""
    heads = {name: _head(image, name, num_rows) for name, num_rows in image.touched.items()}
    check_room(path, sum(head.num_bytes for head in heads.values()))
    remove_leftovers(path, image)
    done, total = 0, sum(image.touched.values())
    tables = {}
    for name, head in heads.items():
        tables[name] = _fold_table(path, image, head)
        done += head.num_rows
        if on_progress:
            on_progress(done, total)
    sync_folder(path / VERSIONS_FOLDER)
    newest = image.versions[image.version]
    record = replace(newest, tables=tables, folded=image.identity)
    publish_folded(path, record)
    gone = [table.num_bytes for version in image.used_versions for table in version.tables.values()]
    remove_leftovers(path, read_catalog(path))
    num_bytes = sum(table.num_bytes for table in tables.values())
    return FoldReport(image.version, len(image.used_versions), num_bytes, sum(gone))


def _head(image: CatalogImage, name: str, num_rows: int) -> RowsFile:
    layout = image.tables[name]
    return RowsFile(image.version, name, layout.spec.row_bytes, num_rows, image.base_identity, layout.seed)


def _fold_table(path: Path, image: CatalogImage, wanted: RowsFile) -> VersionTable:
    layout = image.tables[wanted.table]
    file = path / f"{VERSIONS_FOLDER}/folded-{image.version:08d}-{file_stem(image, wanted.table)}"
    with replacing(file) as fd:
        head = write_rows_file(fd, wanted, _newest_rows(image, layout), file.parent)
        if head != wanted:
            raise ConfigError(
                f"{path}: versions up to {image.version} have {head.num_rows} rows of table {wanted.table}, the "
                f"catalog says {wanted.num_rows}; restore the catalog"
            )
    relative = os.fspath(file.relative_to(path))
    return VersionTable(relative, head.num_bytes, head.num_rows, head.num_rows, sha256_of(file))


def _newest_rows(image: CatalogImage, layout: TableLayout) -> Chunks:
    """Yields (row ids, rows) of all versions, oldest first, without those that a later one has again."""
    with contextlib.closing(VersionFiles(image, layout)) as files:
        overlay = TableOverlay.within(files, allocate(overlay_bytes(files.num_touched)))
        overlay.load_index()
        for file in files.files:
            place = file.place_start
            for ids in files.row_ids(file):
                places = np.arange(place, place + len(ids))
                newest = kernels.find_entries(overlay.buckets, ids) == places
                yield from _rows(files, ids[newest], places[newest])
                place += len(ids)


def _rows(files: VersionFiles, ids: np.ndarray, places: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for part, rows in files.read_places(places):
        if isinstance(rows, str):
            raise CorruptPageError(rows)
        yield ids[part], rows
