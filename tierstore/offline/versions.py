"""Publishes a version: rows that take the place of the base's, or of an earlier version's, for readers that open it.

Input: a store's path; for each table, row ids and rows in the table's codec. Output: the number of the new version.
Errors: `ConfigError` while somebody else publishes, `BudgetError` for a disk without room.

Each file is written whole, synced and given its name; then one transaction of the catalog names them all. A publish
that is killed anywhere leaves files that no catalog names, which the next one removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import kernels
from ..causes import named
from ..decisions.budget import overlay_bytes
from ..durable import replacing, sync_folder
from ..errors import BudgetError, ConfigError
from ..formats.catalog import CatalogImage, publish_versions, read_catalog
from ..formats.version_rows import ROWS_MAX, ROWS_SUFFIX, VERSIONS_FOLDER, RowsFile, write_rows_file
from ..formats.versions import VersionRecord, VersionTable
from ..layout import TableLayout
from ..tiers.memory import allocate
from ..tiers.overlay import TableOverlay
from ..tiers.version_files import VersionFiles
from ..units import format_bytes

PUBLISH_LOCK = "publish.lock"
SPARE_DISK_BYTES = 64 << 20  # left free beside what is written
NAME_CHARS_MAX = 80  # of a table, in a file's name

Chunks = Iterable[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class ChangedRows:
    """The rows of one table that a version has.

    rows_max: how many there are at most. chunks: called once; returns (row ids int64 [n], rows uint8 [n, row_bytes])
    one after the other, of any lengths, ids all different; of a slice they count from its first row.
    """

    rows_max: int
    chunks: Callable[[], Chunks]

    @classmethod
    def of(cls, row_ids: np.ndarray, rows: np.ndarray) -> ChangedRows:
        """Returns rows that are in memory."""
        return cls(len(row_ids), lambda: [(row_ids, rows)])


def publish_rows(path: str | os.PathLike[str], changed: Mapping[str, ChangedRows], commit: int | None = None) -> int:
    """Publishes a version of given rows, in the tables' codecs, and returns its number. Blocks on the disk.

    Readers see it when they open the store next, or follow it. Memory: the index of the rows that are published
    already, 18 bytes each, and some MiB.

    Args:
        path: Of a finished store.
        changed: By table; those without rows are left out.
        commit: The training's commit that the rows are of.

    Raises:
        NothingChangedError: No row is given.
        ConfigError: A table or a row that the store does not have; somebody else publishes.
        BudgetError: The disk has too little room.
    """
    path = Path(path)
    read_catalog(path)  # before a lock is made in a folder that is not a store
    with locked_for_publish(path):
        return write_version(path, read_catalog(path), changed, commit)


def write_version(
    path: Path,
    image: CatalogImage,
    changed: Mapping[str, ChangedRows],
    commit: int | None,
    common: str | None = None,
    *,
    may_be_empty: bool = False,
) -> int:
    """Does what `publish_rows` says; the caller holds the lock, and the image was read under it.

    common: See `VersionRecord`. may_be_empty: Publish a version without rows rather than none.
    """
    _check(path, image, changed)
    number = image.newest + 1
    try:
        (path / VERSIONS_FOLDER).mkdir(exist_ok=True)
        sync_folder(path)
        remove_leftovers(path, image)
        written = {name: _write_table(path, image, name, rows) for name, rows in changed.items()}
        tables = {name: table for name, table in written.items() if table is not None}
        if not tables and not may_be_empty:
            raise NothingChangedError(f"{path}: no row changed since version {number - 1}: nothing was published")
        publish_versions(path, [VersionRecord(number, commit, time.time(), tables, common=common)])
    except OSError as error:
        note = "nothing was published; run the same command then"
        raise named(error, path, error.filename, writing=True, note=note) from error
    return number


class NothingChangedError(ConfigError):
    """All rows are what the newest version has already."""


def _check(path: Path, image: CatalogImage, changed: Mapping[str, ChangedRows]) -> None:
    needed = SPARE_DISK_BYTES
    for name, rows in changed.items():
        if name not in image.tables:
            raise ConfigError(f"{path} has no table {name}; its tables are {', '.join(image.tables)}")
        spec = image.tables[name].spec
        published = sum(v.tables[name].num_rows for v in image.versions.values() if name in v.tables)
        if rows.rows_max > spec.num_rows or published + rows.rows_max > ROWS_MAX:
            raise ConfigError(
                f"{path}: {rows.rows_max} rows of table {name}, which has {spec.num_rows}, beside {published} in its "
                f"versions, of {ROWS_MAX} that fit: fold the oldest into one: tierstore versions {path} --keep N, or "
                f"make one store of them all: tierstore compact {path} NEW_STORE"
            )
        needed += RowsFile(0, name, spec.row_bytes, rows.rows_max, "", 0).num_bytes
    check_room(path, needed)


def check_room(path: Path, needed: int) -> None:
    """Raises `BudgetError`, with both numbers, if the disk of a store has no room for so many bytes."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise BudgetError(
            f"{path}: the version needs {format_bytes(needed)} ({needed} bytes), the disk has {format_bytes(free)} "
            f"({free} bytes) free; free some, or compact the store onto another disk"
        )


def _write_table(path: Path, image: CatalogImage, name: str, rows: ChangedRows) -> VersionTable | None:
    """Writes the next version's file of one table; returns what the catalog says of it, None if no row came."""
    layout, number = image.tables[name], image.newest + 1
    head = RowsFile(number, name, layout.spec.row_bytes, 0, image.identity, layout.seed)
    new = _NewRows(path, image, layout)
    file = path / rows_file(image, number, name)
    with replacing(file) as fd:
        head = write_rows_file(fd, head, new.counted(rows.chunks()), file.parent)
    if not head.num_rows:
        file.unlink()
        return None
    return VersionTable(
        os.fspath(file.relative_to(path)), head.num_bytes, head.num_rows, new.num_touched, sha256_of(file)
    )


def rows_file(image: CatalogImage, number: int, name: str) -> str:
    """Returns the path of a version's file of a table, relative to the store."""
    return f"{VERSIONS_FOLDER}/{number:08d}-{file_stem(image, name)}"


def file_stem(image: CatalogImage, name: str) -> str:
    """Returns what the names of a table's files of rows end in."""
    readable = {table: re.sub(r"[^A-Za-z0-9._-]", "_", table)[:NAME_CHARS_MAX] for table in image.tables}
    stem = readable[name]
    if sum(other == stem for other in readable.values()) > 1:
        stem = f"{stem}-{list(readable).index(name)}"
    return f"{stem}{ROWS_SUFFIX}"


class _NewRows:
    """Counts which rows no version had before. num_touched: rows that some version has, with those counted so far."""

    def __init__(self, path: Path, image: CatalogImage, layout: TableLayout) -> None:
        self._path, self._spec = path, layout.spec
        self.num_touched = image.touched.get(layout.spec.name, 0)
        self._buckets: np.ndarray | None = None
        if self.num_touched:
            files = VersionFiles(image, layout)
            try:
                overlay = TableOverlay.within(files, allocate(overlay_bytes(self.num_touched)))
                overlay.load_index()
                self._buckets = overlay.buckets
            finally:
                files.close()

    def counted(self, chunks: Chunks) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Passes chunks on, checked and counted."""
        for row_ids, rows in chunks:
            ids = np.ascontiguousarray(row_ids, dtype=np.int64)
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self._spec.num_rows:
                raise ConfigError(
                    f"{self._path}: row ids {ids.min()} to {ids.max()} of table {self._spec.name}, which has "
                    f"{self._spec.num_rows} rows"
                )
            if rows.dtype != np.uint8 or rows.shape != (len(ids), self._spec.row_bytes):
                raise ConfigError(
                    f"{self._path}: rows of {self._spec.name} are uint8 [{len(ids)}, {self._spec.row_bytes}], not "
                    f"{rows.dtype} {list(rows.shape)}"
                )
            known = 0 if self._buckets is None else int((kernels.find_entries(self._buckets, ids) >= 0).sum())
            self.num_touched += len(ids) - known
            yield ids, rows


def sha256_of(file: Path) -> str:
    """Returns the SHA-256 of a file, hex. Blocks on the disk."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def remove_leftovers(path: Path, image: CatalogImage) -> None:
    """Removes files of a publish that was killed. The caller holds the lock, and the image was read under it."""
    kept = {path / table.file for version in image.versions.values() for table in version.tables.values()}
    for file in (path / VERSIONS_FOLDER).glob("*"):
        if file.name != PUBLISH_LOCK and file not in kept:
            file.unlink()


@contextlib.contextmanager
def locked_for_publish(path: Path) -> Iterator[None]:
    """Holds the lock that one publisher has at a time; raises `ConfigError` if another process has it."""
    folder = path / VERSIONS_FOLDER
    try:
        folder.mkdir(exist_ok=True)
        lock = (folder / PUBLISH_LOCK).open("ab", buffering=0)
    except OSError as error:
        raise named(error, folder, error.filename, writing=True) from error
    with lock:  # with the file goes the lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process publishes a version of {path}; wait for it, or end it and run again"
            ) from None
        yield
