"""compact: one store of shards out of a store and its versions, whether its own rows lie in shards or in place.

Input: a store and a version. Output: a new store whose base is that version, without an index of rows and without a
checkpoint's files. Errors: those of a build; `CorruptPageError` for a page, a block or a row of a version that is
damaged. A compaction that is killed is resumed by the same command, as a build is.

Memory: some MiB a shard under way, and the index of the rows that versions have, 18 bytes each.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import kernels
from ..decisions.budget import overlay_bytes
from ..errors import ConfigError, CorruptPageError
from ..formats.catalog import CatalogImage, read_catalog
from ..formats.table_source import PlaneReader, TableSource
from ..layout import TableLayout
from ..tiers.files import open_table
from ..tiers.memory import allocate
from ..tiers.overlay import TableOverlay
from ..tiers.version_files import VersionFiles
from .build import BuildReport, build_store


def compact(
    store_path: str | os.PathLike[str],
    new_path: str | os.PathLike[str],
    version: int | None = None,
    **options: Any,
) -> BuildReport:
    """Builds a new store of a store's rows at a version. Blocks until it is ready.

    Placements stay behind: their entries are those of the base. The new store has another digest than the old one, and
    takes its place by `tierstore swap`.

    Args:
        store_path: The store; it stays as it is.
        new_path: A new folder, or that of the same compaction that stopped.
        version: None: the newest; 0: the base.
        **options: `shard_bytes`, `jobs`, `on_progress` and others, as of `build_store`.

    Returns:
        What the build did.

    Raises:
        ConfigError: There is not such a version; `new_path` is another's.
        BudgetError: The disk has too little room.
        CorruptPageError: Something that the rows are read from is damaged.
    """
    image = read_catalog(store_path).at_version(version)
    if os.path.exists(new_path) and os.path.samefile(store_path, new_path):
        raise ConfigError(f"{new_path} is the store itself, which stays as it is: give a new folder")
    digest = hashlib.sha256(f"compacted {image.identity}".encode()).hexdigest()
    origin = {
        "digest": digest, "files": [], "compacted": {
            "store": os.path.abspath(store_path), "version": image.version, "identity": image.identity,
            "origin": image.origin.get("digest"), "common": image.common_identity,
        },
    }  # fmt: skip
    if "slice" in image.origin:
        origin["slice"] = image.origin["slice"]
    sources = tuple(VersionSource(layout.public_spec, (), image, layout) for layout in image.tables.values())
    return build_store(new_path, sources, origin=origin, attachments=image.attachments, **options)


@dataclass(frozen=True)
class VersionSource(TableSource):
    """A table at a version as a source of rows. No tensor holds such rows, so it has no planes."""

    image: CatalogImage
    layout: TableLayout

    def __post_init__(self) -> None:
        """What a catalog says was checked as it was read."""

    def open_reader(self) -> PlaneReader:
        """Opens its files; every row that is read is checked."""
        return VersionReader(self)


class VersionReader(PlaneReader):
    """Reads row ranges of a table at a version; any number of threads may read at once."""

    def __init__(self, source: VersionSource) -> None:
        self.source_row_bytes = source.spec.row_bytes
        self._layout = source.layout
        self._overlay: TableOverlay | None = None
        self._files = open_table(source.image, source.layout, direct=False)
        try:
            if source.spec.name in source.image.touched:
                self._files.versions = VersionFiles(source.image, source.layout)
                memory = allocate(overlay_bytes(self._files.versions.num_touched))
                self._overlay = TableOverlay.within(self._files.versions, memory)
                self._overlay.load_index()
        except BaseException:
            self.close()
            raise

    def read(self, row_start: int, row_end: int) -> list[np.ndarray]:
        """Returns rows [row_start, row_end) as one plane, uint8 [rows, row_bytes]. Blocks on the disk.

        Raises `CorruptPageError` if one of them is damaged.
        """
        per_page = self._layout.rows_per_page
        numbers = np.arange(row_start // per_page, -(-row_end // per_page))
        scratch = np.empty(len(numbers) * self._layout.page_bytes, dtype=np.uint8)
        found = self._files.read_rows(numbers, scratch).reshape(-1, self._layout.spec.row_bytes)
        at = row_start - int(numbers[0]) * per_page
        rows = np.ascontiguousarray(found[at : at + row_end - row_start])
        if self._overlay is not None:
            self._put_newer(self._overlay, rows, row_start)
        return [rows]

    def _put_newer(self, overlay: TableOverlay, rows: np.ndarray, row_start: int) -> None:
        places = kernels.find_entries(overlay.buckets, np.arange(row_start, row_start + len(rows)))
        touched = np.flatnonzero(places >= 0)
        touched = touched[np.argsort(places[touched], kind="stable")]
        for part, newer in overlay.files.read_places(places[touched]):
            if isinstance(newer, str):
                raise CorruptPageError(newer)
            rows[touched[part]] = newer

    def will_read(self, row_start: int, row_end: int) -> None:
        """Nothing is read ahead."""

    def check_unchanged(self) -> None:
        """Nothing to compare: each row is checked as it is read."""

    def close(self) -> None:
        """Closes the files; closing twice is harmless."""
        self._files.close()
