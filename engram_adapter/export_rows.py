"""Which rows an export has new: those of a commit of the training, or of a published version.

Input: a store, and a commit or a version. Output: `TouchedTables`, which sort the rows of one table after another.
Errors: `ConfigError` for commits and versions that are not there, and for codecs in which no rows are written.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tierstore.errors import ConfigError, FormatError
from tierstore.formats.catalog import CatalogImage
from tierstore.kernels import StepHistory
from tierstore.offline.exporting.quantized import kernel_codec
from tierstore.offline.exporting.row_readers import RowOrigin
from tierstore.offline.exporting.sorted_rows import memory_to_sort, sort_touched_rows
from tierstore.offline.exporting.touched_rows import TouchedRows
from tierstore.offline.exporting.version_rows import KeptRows, VersionStream
from tierstore.offline.slice_set import SliceSet
from tierstore.training.exported import CommitRows, Encoder, RunStream, describe, history_of, open_commit, widths_of
from tierstore.training.exported_slices import open_commit_of_slices

ID_BYTES = 8
ATTEMPTS_MAX = 3  # at the newest commit
FILES_A_TABLE = 2  # records lie on disk once in stretches, and once sorted, at most


class TouchedTables(Protocol):
    """The rows that an export has new."""

    @property
    def commit(self) -> int | None:
        """The number of the commit that they are of, or None."""

    @property
    def version(self) -> int | None:
        """The number of the version that they are of, or None."""

    @property
    def saturated(self) -> Mapping[str, int]:
        """Changed values beyond the codec's largest, by table, of what was sorted so far."""

    @property
    def tables(self) -> Sequence[str]:
        """Names of the tables that have new rows."""

    @property
    def disk_bytes(self) -> int:
        """Bytes of disk that sorting takes meanwhile, at most."""

    @property
    def states(self) -> Mapping[str, Any] | None:
        """What files of optimizer state say of themselves; None if none are written."""

    def sorting_bytes(self, name: str) -> int:
        """Returns the bytes of memory in which a table is sorted in one piece."""

    def sort(
        self, name: str, base: RowOrigin, folder: Path, memory_bytes: int, stop: threading.Event, threads: int = 1
    ) -> TouchedRows:
        """Sorts the new rows of a table into files of a new folder. Blocks on the disk.

        base: the table's rows before any training: bytes that have not changed stay as they are.
        stop: set by whoever does not want the rows any more. threads: that read and round. Different tables may be
        sorted at the same time.
        """

    def close(self) -> None:
        """Closes what they are read from; twice is harmless."""


class CommitTables:
    """The rows of a commit; keeps the `TouchedTables` contract."""

    version = None

    def __init__(self, rows: CommitRows, *, with_states: bool) -> None:
        """Opens the commit's runs, and reads its rates: a training that goes on may forget it then."""
        self.commit: int | None = rows.commit.number
        self.saturated: dict[str, int] = {}
        self.tables = rows.touched_tables
        self.states = describe(rows) if with_states else None
        self._rows = rows
        self._streams: dict[str, RunStream] = {}
        self._histories: dict[str, StepHistory] = {}
        for name in self.tables:
            kernel_codec(rows.tables[name].spec)  # refuses codecs before anything is written
        try:
            for name in self.tables:
                self._streams[name] = rows.open_stream(name)
                self._histories[name] = history_of(rows, name)
        except BaseException:
            self.close()
            raise

    @property
    def disk_bytes(self) -> int:
        """See `TouchedTables`."""
        return sum(
            FILES_A_TABLE * run.num_records * (ID_BYTES + self._streams[name].record_bytes)
            for name in self.tables
            for run in self._rows.commit.runs[name]
        )

    def sorting_bytes(self, name: str) -> int:
        """See `TouchedTables`."""
        num_records = sum(run.num_records for run in self._rows.commit.runs[name])
        return memory_to_sort(num_records, widths_of(self._rows, name, with_states=self.states is not None))

    def sort(
        self, name: str, base: RowOrigin, folder: Path, memory_bytes: int, stop: threading.Event, threads: int = 1
    ) -> TouchedRows:
        """See `TouchedTables`."""
        encoder = Encoder(self._rows, name, base, self._histories[name], self.states is not None)
        num_rows = self._rows.tables[name].spec.num_rows
        touched = sort_touched_rows(self._streams[name], num_rows, folder, memory_bytes, encoder, stop, threads)
        if encoder.num_nan:
            raise ConfigError(
                f"table {name}: {encoder.num_nan} values of commit {self.commit} are not numbers; export an older "
                f"commit ('tierstore commits')"
            )
        self.saturated[name] = encoder.num_saturated
        return touched

    def close(self) -> None:
        """See `TouchedTables`."""
        for stream in self._streams.values():
            stream.close()


class VersionTables:
    """The rows of a published version; keeps the `TouchedTables` contract."""

    commit = None
    states = None

    def __init__(self, image: CatalogImage) -> None:
        """Opens the files of the image's version, and of those before it."""
        self.version: int | None = image.version
        self.saturated: dict[str, int] = {}
        self.tables = [name for name in image.tables if image.touched.get(name)]
        self._image = image
        self._streams: dict[str, VersionStream] = {}
        try:
            for name in self.tables:
                self._streams[name] = VersionStream(image, image.tables[name])
        except BaseException:
            self.close()
            raise

    @property
    def disk_bytes(self) -> int:
        """See `TouchedTables`."""
        return sum(
            FILES_A_TABLE * table.num_rows * (ID_BYTES + self._image.tables[name].spec.row_bytes)
            for version in self._image.used_versions
            for name, table in version.tables.items()
        )

    def sorting_bytes(self, name: str) -> int:
        """See `TouchedTables`."""
        num_records = sum(of.tables[name].num_rows for of in self._image.used_versions if name in of.tables)
        return memory_to_sort(num_records, KeptRows(self._image.tables[name].spec.row_bytes).widths)

    def sort(
        self, name: str, base: RowOrigin, folder: Path, memory_bytes: int, stop: threading.Event, threads: int = 1
    ) -> TouchedRows:
        """See `TouchedTables`."""
        del base  # a version's rows are in the codec already
        spec = self._image.tables[name].spec
        rounding = KeptRows(spec.row_bytes)
        return sort_touched_rows(self._streams[name], spec.num_rows, folder, memory_bytes, rounding, stop, threads)

    def close(self) -> None:
        """See `TouchedTables`."""
        for stream in self._streams.values():
            stream.close()


def open_touched(
    image: CatalogImage, version: int | None, commit: int | None, *, states: bool, slices: SliceSet | None = None
) -> TouchedTables:
    """Returns the new rows of a commit or a version; of neither: of the newest commit, else of the newest version.

    slices: whose rows they are, if `image` is that of several stores with slices.
    Raises `ConfigError` for one that is not there, `ValueError` for both, and for states of a version.
    """
    if version is not None and commit is not None:
        raise ValueError(f"version {version} and commit {commit}: an export has the rows of one of them; give one")
    if version is not None and states:
        raise ValueError(f"states of version {version}: optimizer state is kept with commits; give one, or none")
    rows = _open_commit(image, commit, slices) if version is None else None
    for attempt in range(1, ATTEMPTS_MAX + 1):
        if rows is None:
            break
        try:
            return CommitTables(rows, with_states=states)
        except FormatError:
            newest = _open_commit(image, commit, slices) if attempt < ATTEMPTS_MAX else None
            if newest is None or newest.commit.number == rows.commit.number:
                raise
            rows = newest  # a training that goes on has forgotten the one that was the newest
    if states:
        raise ConfigError(f"{image.path} was never trained: there is no optimizer state")
    if slices is not None and version != 0 and any(part.versions for part in slices.images):
        raise ConfigError(
            f"{slices.images[0].path} and the other slices have published versions: make one store of them first, "
            f"tierstore reslice SLICE... --into STORE --slices 1, and export that"
        )
    return VersionTables(image.at_version(version))


def _open_commit(image: CatalogImage, number: int | None, slices: SliceSet | None) -> CommitRows | None:
    return open_commit(image, number) if slices is None else open_commit_of_slices(slices, image.tables, number)
