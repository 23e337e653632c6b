"""The open files of a store's tables: shards, here or served by another process, or a checkpoint's in which rows stay.

Input: a catalog. Output: for each table what page readers read from. Errors: `FormatError` for files that are not what
the catalog says.
"""

from __future__ import annotations

import logging

from ..errors import ConfigError
from ..file_systems import warn_unless_local
from ..formats.catalog import CatalogImage
from ..formats.in_place import InPlaceLayout
from ..layout import TableLayout
from .in_place import InPlaceFiles
from .nvme import TableFiles, open_direct
from .served import ServedBy, ServedFiles
from .version_files import VersionFiles

logger = logging.getLogger("tierstore")

AnyFiles = TableFiles | InPlaceFiles | ServedFiles


def open_table(image: CatalogImage, layout: TableLayout, *, direct: bool) -> AnyFiles:
    """Opens one table's files; arguments and errors as of `TableFiles` and `InPlaceFiles`."""
    if isinstance(layout, InPlaceLayout):
        return InPlaceFiles(image, layout, direct=direct)
    return TableFiles(image, layout, direct=direct)


def _served_table(image: CatalogImage, layout: TableLayout, index: int, served: ServedBy) -> ServedFiles:
    if isinstance(layout, InPlaceLayout):
        raise ConfigError(f"{image.path}: rows of table {layout.spec.name} lie in the checkpoint's files, and no pages")
    of_table = image.shards[layout.spec.name]
    return ServedFiles(served, layout, index, [of_table[shard].num_bytes for shard in range(layout.num_shards)])


def open_tables(image: CatalogImage, *, direct: bool, served: ServedBy | None = None) -> list[AnyFiles]:
    """Opens the files of every table, in the catalog's order, with those of the image's version. Logs a warning if
    `direct` is wanted and not available. served: who has the shards, if they are not here."""
    opened: list[AnyFiles] = []
    warn_unless_local(image.path)
    try:
        for index, layout in enumerate(image.tables.values()):
            files: AnyFiles
            if served is not None:
                files = _served_table(image, layout, index, served)
            else:
                files = open_table(image, layout, direct=direct)
            opened.append(files)
            if layout.spec.name in image.touched:
                files.versions = VersionFiles(image, layout, open_direct if direct else None)
    except BaseException:
        for files in opened:
            files.close()
        raise
    if direct and not all(files.has_direct for files in opened):
        logger.warning("%s: its file system has no O_DIRECT: reads fill the page cache", image.path)
    return opened
