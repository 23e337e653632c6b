"""The open files of a table's versions, and their rows by place.

Input: a catalog at a version. Output: descriptors for the page readers; row ids and rows, checked, for whoever loads
them. Errors: `FormatError` for files that are not what the catalog says, or whose row ids are damaged. A damaged page
of rows costs those rows; of a table that is in memory whole, the rows of each page of the table that has one of them.

A *place* is a row's number in all files of a table together, oldest first: of a row that several have, the highest
place counts.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..causes import Fault, allow_open_files, named
from ..errors import CorruptPageError, FormatError
from ..formats.catalog import CatalogImage
from ..formats.version_rows import (
    CHUNK_BYTES,
    FILES_MAX,
    REMEDY,
    ROWS_MAX,
    RowsFile,
    read_row_ids,
    read_rows_head,
    read_version_pages,
)
from ..formats.versions import identity_of
from ..layout import TableLayout
from ..spec import TableSpec


@dataclass(frozen=True)
class OpenRows:
    """An open file of a version's rows. place_start: of its first row."""

    path: Path
    fd: int
    direct_fd: int
    head: RowsFile
    place_start: int


class VersionFiles:
    """The open files of one table's rows, of all versions up to the image's. Any number of threads may read; `close`
    comes after the last read.

    Attributes:
        num_touched: Rows that are in any of them, as the catalog says.
    """

    def __init__(
        self, image: CatalogImage, layout: TableLayout, open_direct: Callable[[Path], int] | None = None
    ) -> None:
        """Opens each and checks its head; raises `FormatError`. open_direct: opens a file for O_DIRECT too."""
        self.spec: TableSpec = layout.spec
        self.num_touched = image.touched.get(layout.spec.name, 0)
        self.files: list[OpenRows] = []
        self._table_seed = layout.seed
        versions = image.used_versions
        wanted = sum(layout.spec.name in version.tables for version in versions)
        if wanted > FILES_MAX:
            raise FormatError(f"{image.path}: {wanted} versions of table {layout.spec.name}: {_FEWER}")
        allow_open_files(2 * wanted)
        try:
            identity = image.base_identity
            for version in versions:
                part = version.tables.get(layout.spec.name)
                if part is not None:
                    self._open(Path(image.path) / part.file, version.number, part.num_rows, identity, open_direct)
                identity = identity_of(identity, [version])
        except BaseException:
            self.close()
            raise

    def _open(
        self, path: Path, version: int, num_rows: int, identity: str, open_direct: Callable[[Path], int] | None
    ) -> None:
        fd = direct_fd = -1
        try:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would block for ever
            except OSError as error:
                what = f"{path} (rows of version {version})"
                raise named(error, what, path, fault=Fault(FormatError, REMEDY)) from error
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise FormatError(f"{path} (rows of version {version}): it is no regular file; {REMEDY}")
            head, spec = read_rows_head(path, fd), self.spec
            wanted = RowsFile(version, spec.name, spec.row_bytes, num_rows, identity, self._table_seed)
            if head != wanted:
                raise FormatError(f"{path}: it holds {_words(head)}, the catalog says {_words(wanted)}; {REMEDY}")
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            direct_fd = open_direct(path) if open_direct else -1
            if self.num_rows + num_rows > ROWS_MAX:
                raise FormatError(f"{path}: more than {ROWS_MAX} rows in the versions of {spec.name}: {_FEWER}")
            self.files.append(OpenRows(path, fd, direct_fd, head, self.num_rows))
        except BaseException:
            _close(fd, direct_fd)
            raise

    @property
    def num_rows(self) -> int:
        """Rows in all files; of one that several have, each counts."""
        return sum(file.head.num_rows for file in self.files)

    @property
    def names(self) -> list[tuple[str, int]]:
        """The path of each file and the number of its version: what errors name."""
        return [(str(file.path), file.head.version) for file in self.files]

    def row_ids(self, file: OpenRows) -> Iterator[np.ndarray]:
        """Yields the ids of a file's rows; see `read_row_ids`."""
        return read_row_ids(file.path, file.fd, file.head, self.spec.num_rows)

    def read_places(self, places: np.ndarray) -> Iterator[tuple[slice, np.ndarray | str]]:
        """Reads rows by place, int64 [n] ascending, repeats allowed, some MiB of pages at once. Blocks on the disk.

        Yields:
            A slice of `places`, and its rows, uint8 [m, row_bytes], or what is wrong with the page that they lie on.
        """
        for file in self.files:
            first, end = np.searchsorted(places, [file.place_start, file.place_start + file.head.num_rows]).tolist()
            within = places[first:end] - file.place_start
            pages = within // file.head.shape.rows_per_page
            for at, until in _parts(pages, max(1, CHUNK_BYTES // file.head.shape.page_bytes)):
                for part, rows in _read_part(file, within[at:until], pages[at:until]):
                    yield slice(first + at + part.start, first + at + part.stop), rows

    def apply(self, rows: np.ndarray, bad_pages: dict[int, str], rows_per_page: int) -> None:
        """Puts the rows of all versions into a whole table, uint8 [num_rows, row_bytes], oldest first. Blocks.

        bad_pages: gets, by page of the table, what is wrong with rows that cannot be read.
        """
        for file in self.files:
            place = file.place_start
            for ids in self.row_ids(file):
                for part, found in self.read_places(np.arange(place, place + len(ids))):
                    if isinstance(found, str):
                        bad_pages |= dict.fromkeys((ids[part] // rows_per_page).tolist(), found)
                    else:
                        rows[ids[part]] = found
                place += len(ids)

    def drop_cache(self) -> None:
        """Drops what was read of the files from the page cache."""
        for file in self.files:
            os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Closes the descriptors; closing twice is harmless."""
        while self.files:
            file = self.files.pop()
            _close(file.fd, file.direct_fd)


_FEWER = "fold the oldest into one: tierstore versions STORE --keep N, or: tierstore compact STORE NEW_STORE"


def _words(head: RowsFile) -> str:
    return (
        f"{head.num_rows} rows of {head.row_bytes} bytes of table {head.table} at version {head.version} over a store "
        f"with digest {head.identity[:12]}"
    )


def _close(*fds: int) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)


def _parts(pages: np.ndarray, pages_max: int) -> Iterator[tuple[int, int]]:
    """Cuts ascending page numbers into ranges of at most pages_max different ones."""
    at = 0
    while at < len(pages):
        number = np.cumsum(np.diff(pages[at:], prepend=pages[at] - 1) != 0)  # of each, which different one it is
        until = at + int(np.searchsorted(number, pages_max, side="right"))
        yield at, until
        at = until


def _read_part(file: OpenRows, within: np.ndarray, pages: np.ndarray) -> Iterator[tuple[slice, np.ndarray | str]]:
    """Yields as `read_places` does, of rows that lie on few pages; if one is damaged, page by page."""
    shape = file.head.shape
    numbers = np.unique(pages)
    try:
        rows = read_version_pages(file.path, file.fd, file.head, numbers)
        at = np.searchsorted(numbers, pages) * shape.rows_per_page + within % shape.rows_per_page
        yield slice(0, len(within)), rows[at]
    except CorruptPageError as error:
        if len(numbers) == 1:
            yield slice(0, len(within)), str(error)
            return
        for number in numbers.tolist():
            start, end = np.searchsorted(pages, [number, number + 1]).tolist()
            for _, found in _read_part(file, within[start:end], pages[start:end]):
                yield slice(start, end), found
