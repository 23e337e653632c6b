"""Slices that together hold every row of a store's tables once: checked, and read as if they were one store.

Input: the catalogs of stores with slices, in any order; a store with whole tables counts as one slice. Output: a
`SliceSet`, and sources of rows for a build. Errors: `ConfigError` for slices that are missing, that overlap, or that
are not of one checkpoint, with the stores' names; `CorruptPageError` for a damaged page or block.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..formats.catalog import CatalogImage
from ..formats.initial import InitialLayout, lay_out_initial
from ..formats.page import page_seed
from ..formats.table_source import PlaneReader, TableSource
from ..layout import TableLayout
from ..spec import TableSpec
from .build import lay_out_tables
from .compact import VersionSource

logger = logging.getLogger("tierstore")

SLICE_KEYS = ("slice", "resliced")  # of an origin: about one store, and not its checkpoint


@dataclass(frozen=True)
class SliceSet:
    """Stores with slices, by the rows that they hold, ascending.

    Attributes:
        images: Of the stores, at the version that is read.
        specs: The whole tables', in the catalogs' order.
    """

    images: tuple[CatalogImage, ...]
    specs: tuple[TableSpec, ...]

    @property
    def is_initial(self) -> bool:
        """Whether rows that training did not touch are drawn."""
        return self.images[0].is_initial

    def parts(self, name: str, row_start: int, row_end: int) -> list[tuple[CatalogImage, TableLayout]]:
        """Returns the stores that hold some of rows [row_start, row_end) of a table, and its layout there."""
        layouts = [(image, image.tables[name]) for image in self.images]
        return [
            (image, layout)
            for image, layout in layouts
            if layout.public_spec.row_start < row_end and row_start < layout.public_spec.row_end
        ]

    def origin(self) -> dict[str, Any]:
        """Returns who the rows are of: the checkpoint, or, at a version, the versions of all slices."""
        first = self.images[0]
        origin = {key: value for key, value in first.origin.items() if key not in SLICE_KEYS}
        if first.version == 0:
            return origin
        identities = [image.identity for image in self.images]
        digest = hashlib.sha256(f"resliced {identities}".encode()).hexdigest()
        return {
            "digest": digest,
            "files": [],
            "compacted": {"version": first.version, "identities": identities, "origin": origin.get("digest")},
        }

    def sources(self) -> tuple[SliceSource, ...]:
        """Returns the whole tables as sources of rows; opens nothing."""
        return tuple(SliceSource(spec, (), self) for spec in self.specs)

    def whole_image(self) -> CatalogImage:
        """Returns the catalog that a store of whole tables would have, without shards: rows are those of `sources`."""
        first, origin = self.images[0], self.origin()
        tables: dict[str, TableLayout] = {}
        for spec in self.specs:
            layout = first.tables[spec.name]
            if isinstance(layout, InitialLayout):
                tables[spec.name] = lay_out_initial(spec, page_seed(spec, str(origin["digest"])), layout.initializer)
        if not tables:
            tables = lay_out_tables(self.sources(), str(origin["digest"]), self.shard_bytes())
        return replace(first, origin=origin, tables=tables, shards={}, versions={}, version=0)

    def shard_bytes(self) -> int:
        """Returns the size of the largest shard, as the slices were built."""
        return max(
            (layout.pages_per_shard * layout.page_bytes for image in self.images for layout in image.paged.values()),
            default=1 << 30,
        )


def join_slices(images: Sequence[CatalogImage]) -> SliceSet:
    """Returns the set that slices are. Raises `ConfigError` if they do not hold every row of every table once."""
    if not images:
        raise ConfigError("no slices: name the stores that hold them")
    names = sorted(images[0].tables)
    for image in images:
        if sorted(image.tables) != names:
            raise ConfigError(
                f"{image.path} has tables {', '.join(image.tables)}, {images[0].path} has "
                f"{', '.join(images[0].tables)}: they are not slices of one store"
            )
    first_table = next(iter(images[0].tables))
    ordered = sorted(images, key=lambda image: image.tables[first_table].public_spec.row_start)
    first = ordered[0]
    for image in ordered[1:]:
        _check_same(first, image)
    for name in first.tables:
        _check_rows(name, ordered)
    specs = [layout.public_spec.whole or layout.public_spec for layout in first.tables.values()]
    return SliceSet(tuple(ordered), tuple(specs))


def at_one_version(slices: SliceSet, version: int | None) -> SliceSet:
    """Returns the set at a version; None: the newest that all slices hold, whatever number each gives it.

    Raises `ConfigError` if a slice does not hold it, or if some have versions and none of them is in all.
    """
    if version is None:
        return replace(slices, images=_at_newest_common(slices.images))
    images = tuple(image.at_version(version) for image in slices.images)
    first = images[0]
    differs = next((image for image in images if image.common_identity != first.common_identity), None)
    if first.version and differs is not None:
        raise ConfigError(
            f"version {first.version} of {first.path} and version {differs.version} of {differs.path} were published "
            "from different commits: publish the same commit on all, or say which version"
        )
    return replace(slices, images=images)


def _at_newest_common(images: Sequence[CatalogImage]) -> tuple[CatalogImage, ...]:
    by_identity = [
        {image.at_version(number).common_identity: number for number in sorted({0, *image.versions})}
        for image in images
    ]
    newest = max(images, key=lambda image: image.newest)
    common = set(by_identity[0]).intersection(*by_identity[1:])
    numbers = max(([of[identity] for of in by_identity] for identity in common), default=[0] * len(images))
    if newest.newest and not any(numbers):
        held = "; ".join(f"{image.path} has versions up to {image.newest}" for image in images)
        raise ConfigError(
            f"no version is in every slice: {held}: publish the same commit on all, or say which version (0: the base)"
        )
    found = tuple(image.at_version(number) for image, number in zip(images, numbers, strict=True))
    behind = next((image for image, number in zip(images, numbers, strict=True) if number < image.newest), None)
    if behind is not None:
        at = ", ".join(f"{image.version} of {image.path}" for image in found)
        logger.warning("%s has versions up to %d; the newest that all slices hold: %s", behind.path, behind.newest, at)
    return found


def _check_same(one: CatalogImage, other: CatalogImage) -> None:
    """Raises `ConfigError` if two slices are not of one checkpoint, hash and build."""
    if one.origin.get("digest") != other.origin.get("digest"):
        raise ConfigError(
            f"{one.path} and {other.path} are of different checkpoints (digests {str(one.origin.get('digest'))[:12]} "
            f"and {str(other.origin.get('digest'))[:12]}): build all slices from one"
        )
    for name, layout in one.tables.items():
        mine, theirs = layout.public_spec, other.tables[name].public_spec
        if mine.fingerprint != theirs.fingerprint:
            raise ConfigError(
                f"table {name} has fingerprint {mine.fingerprint[:12]} in {one.path} and {theirs.fingerprint[:12]} in "
                f"{other.path}: they are of different hashes"
            )
        if (mine.whole or mine) != (theirs.whole or theirs):
            raise ConfigError(
                f"table {name} is {mine.whole or mine} in {one.path} and {theirs.whole or theirs} in {other.path}: "
                "they are not slices of one table"
            )
        if _initializer(layout) != _initializer(other.tables[name]):
            raise ConfigError(
                f"table {name} of {one.path} and of {other.path} are drawn from different seeds or deviations, or only "
                "one of them is drawn: they are not slices of one store"
            )
    if one.attachments != other.attachments:
        raise ConfigError(f"{one.path} and {other.path} have different records of the model: build all slices alike")


def _initializer(layout: TableLayout) -> object:
    return layout.initializer if isinstance(layout, InitialLayout) else None


def _check_rows(name: str, ordered: Sequence[CatalogImage]) -> None:
    """Raises `ConfigError` if slices, ascending, do not hold every row of a table once."""
    at, before = 0, None
    for image in ordered:
        spec = image.tables[name].public_spec
        if spec.row_start < at:
            assert before is not None, "the first slice begins at row 0 or later"
            raise ConfigError(
                f"rows {spec.row_start} to {min(at, spec.row_end)} of table {name} are in {before.path} and in "
                f"{image.path}: name each slice once"
            )
        if spec.row_start > at:
            raise ConfigError(_missing(name, at, spec.row_start, spec.num_rows))
        at, before = spec.row_end, image
    num_rows = ordered[0].tables[name].public_spec.num_rows
    if at < num_rows:
        raise ConfigError(_missing(name, at, num_rows, num_rows))


def _missing(name: str, row_start: int, row_end: int, num_rows: int) -> str:
    return (
        f"rows {row_start} to {row_end} of the {num_rows} of table {name} are in no slice: name the one that has them"
    )


@dataclass(frozen=True)
class SliceSource(TableSource):
    """A table, or a slice of it, whose rows lie in the stores of a set. No tensor holds them: it has no planes."""

    slices: SliceSet

    def __post_init__(self) -> None:
        """What catalogs say was checked as they were read."""

    def cut(self, spec: TableSpec) -> SliceSource:
        """Returns the source of a slice: see `TableSource.cut`."""
        return replace(self, spec=spec)

    def open_reader(self) -> PlaneReader:
        """Opens the stores' files; every row that is read is checked."""
        return SliceReader(self)


class SliceReader(PlaneReader):
    """Reads row ranges out of several stores; any number of threads may read at once."""

    def __init__(self, source: SliceSource) -> None:
        spec = source.spec
        self.source_row_bytes = spec.row_bytes
        self._shift = spec.row_start
        self._starts: list[int] = []  # of the parts, in the table's own rows
        self._ends: list[int] = []
        self._stack = contextlib.ExitStack()
        self._readers: list[PlaneReader] = []
        try:
            for image, layout in source.slices.parts(spec.name, spec.row_start, spec.row_end):
                reader = VersionSource(layout.public_spec, (), image, layout).open_reader()
                self._stack.callback(reader.close)
                self._readers.append(reader)
                self._starts.append(layout.public_spec.row_start)
                self._ends.append(layout.public_spec.row_end)
        except BaseException:
            self.close()
            raise

    def read(self, row_start: int, row_end: int) -> list[np.ndarray]:
        """Returns rows [row_start, row_end), counted from the slice's first, as one plane, uint8 [rows, row_bytes].

        Blocks on the disk. Raises `CorruptPageError` if one of them is damaged.
        """
        start, end = row_start + self._shift, row_end + self._shift
        parts = []
        place = bisect.bisect_right(self._starts, start) - 1
        while start < end:
            part_end = min(end, self._ends[place])
            first = self._starts[place]
            parts += self._readers[place].read(start - first, part_end - first)
            start, place = part_end, place + 1
        return [parts[0] if len(parts) == 1 else np.concatenate(parts)]

    def will_read(self, row_start: int, row_end: int) -> None:
        """Nothing is read ahead."""

    def check_unchanged(self) -> None:
        """Nothing to compare: each row is checked as it is read."""

    def close(self) -> None:
        """Closes the files; closing twice is harmless."""
        self._stack.close()
