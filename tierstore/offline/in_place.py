"""What a build in place writes of its checkpoint's files, and how a store in place becomes a source of rows again.

Input: the checkpoint's table sources and its record. Output: the layouts of tables and side tables, the files' records;
of a finished store in place, readers of its rows, every block checked. Errors: `ConfigError` for sources that cannot
stay in place, `CorruptPageError` for blocks that are not what they were.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, FormatError
from ..formats.block_reader import side_readers
from ..formats.catalog import CatalogImage
from ..formats.in_place import InPlaceFile, InPlaceLayout, lay_out_in_place
from ..formats.page import page_seed
from ..formats.stored_tensor import StoredTensor
from ..formats.table_source import Plane, PlaneReader, TableSource
from ..layout import TableLayout
from ..spec import TableSpec
from ..tiers.in_place import InPlaceFiles


def lay_out_tables_in_place(
    sources: Sequence[TableSource], origin_digest: str, shard_bytes: int
) -> dict[str, TableLayout]:
    """Returns where each table lies in place, by name. Pure. Raises `ConfigError` for no tables, or two of one name."""
    if not sources:
        raise ConfigError("the checkpoint has no table to build; name a tensor with --tensor")
    numbers = {path: number for number, path in enumerate(_paths(sources))}
    tables: dict[str, TableLayout] = {}
    names: set[str] = set()
    for index, source in enumerate(sources):
        layout = lay_out_in_place(index, source, page_seed(source.spec, origin_digest), shard_bytes, numbers)
        for name in (source.spec.name, *(side.spec.name for side in layout.side_tables)):
            if name in names:
                raise ConfigError(f"two tables are called {name}; a store needs different names")
            names.add(name)
        tables[source.spec.name] = layout
    return tables


def files_of(store_path: Path, sources: Sequence[TableSource], origin: dict[str, Any]) -> tuple[InPlaceFile, ...]:
    """Returns the records of the files that tables lie in, as they were when their headers were read.

    Raises `ConfigError` if nobody knows what a file was then: such a source cannot stay in place.
    """
    headers = {entry.get("name"): str(entry.get("header_sha256")) for entry in origin.get("files", [])}
    identities = {tensor.path: tensor.identity for source in sources for tensor in source.tensors}
    store = os.path.realpath(store_path)
    files = []
    for path in _paths(sources):
        identity = identities[path]
        if identity is None:
            raise ConfigError(f"{path}: its rows cannot stay in place: nobody noted what the file was; build a store")
        # Folders are resolved, so that '..' holds; the last name is kept: in a hub's cache it is the model's own.
        absolute = os.path.join(os.path.realpath(path.parent), path.name)
        if _is_within(absolute, store):
            raise FormatError(f"{path} lies in the store's own folder {store_path}; give the store another folder")
        files.append(InPlaceFile(absolute, os.path.relpath(absolute, store), identity, headers.get(path.name, "")))
    return tuple(files)


def _is_within(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _paths(sources: Sequence[TableSource]) -> list[Path]:
    return list(dict.fromkeys(tensor.path for source in sources for tensor in source.tensors))


def open_readers(
    sources: Sequence[TableSource], tables: Mapping[str, TableLayout], stack: ExitStack
) -> dict[str, PlaneReader]:
    """Opens a reader for all that gets shards, by name: tables, or, of those in place, their side tables."""
    readers: dict[str, PlaneReader] = {}
    for source in sources:
        table = tables[source.spec.name]
        opened = (
            side_readers(source, table) if isinstance(table, InPlaceLayout) else {table.spec.name: source.open_reader()}
        )
        for reader in opened.values():
            stack.callback(reader.close)
        readers |= opened
    return readers


@dataclass(frozen=True)
class InPlaceSource(TableSource):
    """A table of a store in place as a source of rows, for a store with shards.

    planes: those that lie in blocks, for whoever asks which files they lie in.
    """

    image: CatalogImage
    layout: InPlaceLayout

    def __post_init__(self) -> None:
        """What a catalog says was checked as it was read."""

    def cut(self, spec: TableSpec) -> InPlaceSource:
        """Returns the source of a slice of the table: see `TableSource.cut`."""
        return replace(self, spec=spec)

    def open_reader(self) -> PlaneReader:
        """Opens its files; every row that is read is checked by its blocks' checksums."""
        return InPlaceReader(self)


def sources_in_place(image: CatalogImage) -> tuple[InPlaceSource, ...]:
    """Returns the tables of a store in place as sources of rows; opens nothing."""
    return tuple(_source_of(image, table) for table in image.tables.values() if isinstance(table, InPlaceLayout))


def _source_of(image: CatalogImage, table: InPlaceLayout) -> InPlaceSource:
    planes = []
    for plane in table.planes:
        tensors = []
        for stretch, row_end in zip(plane.stretches, table.row_ends(plane), strict=plane.copy is None):
            file, num_rows = image.files[stretch.file], row_end - stretch.row_start
            tensors.append(
                StoredTensor(
                    f"{table.spec.name}[{stretch.row_start}:{row_end}]", Path(file.path), "U8",
                    (num_rows, plane.width_bytes), stretch.byte_start, num_rows * plane.width_bytes, file.identity,
                )
            )  # fmt: skip
        planes.append(Plane(plane.width_bytes, tuple(tensors)))
    return InPlaceSource(table.public_spec, tuple(planes), image, table)


class InPlaceReader(PlaneReader):
    """Reads row ranges of a store in place; any number of threads may read at once."""

    def __init__(self, source: InPlaceSource) -> None:
        self._files = InPlaceFiles(source.image, source.layout, direct=False)
        self._layout = source.layout
        self.source_row_bytes = source.spec.row_bytes
        self._shift = source.spec.row_start - source.layout.public_spec.row_start

    def read(self, row_start: int, row_end: int) -> list[np.ndarray]:
        """Returns rows [row_start, row_end) as one plane, uint8 [rows, row_bytes]. Blocks on the disk.

        Raises `CorruptPageError` if a block is not what it was when the store was built.
        """
        row_start, row_end = row_start + self._shift, row_end + self._shift
        per_page = self._layout.rows_per_page
        numbers = np.arange(row_start // per_page, -(-row_end // per_page))
        rows = self._files.read_rows(numbers, np.empty(0, dtype=np.uint8)).reshape(-1, self._layout.spec.row_bytes)
        at = row_start - int(numbers[0]) * per_page
        return [np.ascontiguousarray(rows[at : at + row_end - row_start])]

    def will_read(self, row_start: int, row_end: int) -> None:
        """Nothing is read ahead."""

    def check_unchanged(self) -> None:
        """Nothing to compare: each block was checked as it was read."""

    def close(self) -> None:
        """Closes the files; closing twice is harmless."""
        self._files.close()
