"""The open files of a store's tables: shards, or the files of a checkpoint in which rows stay.

Input: a catalog. Output: for each table what page readers read from. Errors: `FormatError` for files that are not what
the catalog says.
"""

from __future__ import annotations

import logging

from ..file_systems import warn_unless_local
from ..formats.catalog import CatalogImage
from ..formats.in_place import InPlaceLayout
from ..layout import TableLayout
from .in_place import InPlaceFiles
from .nvme import TableFiles, open_direct
from .version_files import VersionFiles

logger = logging.getLogger("tierstore")

AnyFiles = TableFiles | InPlaceFiles


def open_table(image: CatalogImage, layout: TableLayout, *, direct: bool) -> AnyFiles:
    """Opens one table's files; arguments and errors as of `TableFiles` and `InPlaceFiles`."""
    if isinstance(layout, InPlaceLayout):
        return InPlaceFiles(image, layout, direct=direct)
    return TableFiles(image, layout, direct=direct)


def open_tables(image: CatalogImage, *, direct: bool) -> list[AnyFiles]:
    """Opens the files of every table, in the catalog's order, with those of the image's version. Logs a warning if
    `direct` is wanted and not available."""
    opened: list[AnyFiles] = []
    warn_unless_local(image.path)
    try:
        for layout in image.tables.values():
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
