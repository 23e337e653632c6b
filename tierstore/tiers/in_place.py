"""The nvme tier of a table in place: the checkpoint's own files, open, and the side tables that check their blocks.

Input: a catalog. Output: descriptors for the page readers; rows, every block checked, for whoever reads front to back;
checksums and copied planes in memory. Errors: `FormatError` for files that are not those that the store was built over,
`CorruptPageError` for blocks that are not what they were then.

Nothing here maps a file: what others may cut or overwrite is read, never loaded from a mapping.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .. import kernels
from ..causes import Fault, allow_open_files, named
from ..durable import read_up_to
from ..errors import CorruptPageError, FormatError, TierStoreError
from ..formats.catalog import CatalogImage
from ..formats.in_place import (
    BLOCK_BYTES,
    CHECKSUM_BYTES,
    InPlaceFile,
    InPlaceLayout,
    InPlacePlane,
    Stretch,
    stretch_array,
)
from ..formats.page import PAGE_VERSION
from ..formats.stored_tensor import FileIdentity
from .nvme import TableFiles, load_rows, open_direct, read_pages
from .version_files import VersionFiles

logger = logging.getLogger("tierstore")

WINDOW_PAGES = 64  # of checksums that are read at once: those of 256 MiB of rows
PLANE_SHIFT = 56  # of a plane's index in the numbers by which page readers name units; as in page_reader.cpp


def rebuild_command(store: str | os.PathLike[str] = "STORE") -> str:
    """Returns the command that compares a store in place with its checkpoint, and notes where that is now."""
    return f"tierstore build --in-place CHECKPOINT {os.fspath(store)}"


@dataclass(frozen=True)
class BlockNames:
    """Says where a unit of a table in place lies, and what is wrong with it. Holds nothing open.

    bad_checksums: pages of checksums that could not be loaded, and why; filled by `load_side`.
    """

    layout: InPlaceLayout
    paths: tuple[str, ...]
    bad_checksums: dict[int, str] = field(default_factory=dict)

    def where(self, page: int) -> str:
        """Returns words for a unit, by the number that a page reader gives it."""
        plane, unit = self.layout.planes[page >> PLANE_SHIFT], page & ((1 << PLANE_SHIFT) - 1)
        if plane.copy is not None:
            return f"page {unit} of table {plane.copy.spec.name}"
        return self.block(plane, unit)

    def is_block(self, page: int) -> bool:
        """Whether a unit is a block of the checkpoint's files, and not a page of the store's own."""
        return self.layout.planes[page >> PLANE_SHIFT].copy is None

    def fault(self, page: int) -> str:
        """Returns the message of a block whose checksum is wrong, or is lost."""
        where, unit = self.where(page), page & ((1 << PLANE_SHIFT) - 1)
        lost = self.bad_checksums.get(unit // self.layout.checksums.rows_per_page)
        return block_fault(where) if lost is None else f"{where}: its checksum is lost: {lost}"

    def block(self, plane: InPlacePlane, block: int) -> str:
        """Returns words for a block of a plane."""
        stretch = max((s for s in plane.stretches if s.block_start <= block), key=lambda s: s.block_start)
        byte_start = (stretch.byte_start // BLOCK_BYTES + block - stretch.block_start) * BLOCK_BYTES
        return (
            f"block {block} of table {self.layout.spec.name} (from byte {byte_start} of {self.paths[stretch.file]} on)"
        )


def block_fault(where: str) -> str:
    """Returns the message of a block whose checksum is wrong."""
    return (
        f"{where}: its checksum is wrong: the file was overwritten or damaged since the store was built in place; put "
        f"the checkpoint's own file back, or, if it is meant to be another, remove the store and build again: "
        f"{rebuild_command()}"
    )


def block_cut(where: str) -> str:
    """Returns the message of a block that its file no longer has."""
    return f"{where}: the file ends before it; it was cut while open; put the checkpoint's own file back"


class InPlaceFiles:
    """The open files of one table in place. Any number of threads may read; `close` comes after the last read.

    Has what `TableFiles` has for whoever reads pages; a page is a range of rows here.
    """

    versions: VersionFiles | None = None

    def __init__(self, image: CatalogImage, table: InPlaceLayout, *, direct: bool) -> None:
        """Opens the files and the side tables' shards; raises `FormatError` if one is not what the catalog says.

        direct: open each for O_DIRECT too, if its file system has that.
        """
        self.table = table
        self.sides: list[TableFiles] = []
        self._fds: dict[int, int] = {}
        self._direct_fds: dict[int, int] = {}
        # As it was compared at the opening: another length later is a file that is cut, or grows, while it is open.
        self._num_bytes = [file.identity.num_bytes for file in image.files]
        paths = [file.path for file in image.files]
        used = sorted({stretch.file for plane in table.planes for stretch in plane.stretches})
        allow_open_files(2 * len(used) if direct else len(used))
        try:
            for number in used:
                path, self._fds[number] = open_file(image, image.files[number])
                paths[number] = str(path)
                if direct:
                    self._direct_fds[number] = open_direct(path)
            for side in table.side_tables:
                self.sides.append(TableFiles(image, side, direct=direct))
        except BaseException:
            self.close()
            raise
        self.names = BlockNames(table, tuple(paths))
        self._window: tuple[int, np.ndarray] = (0, np.empty(0, dtype=np.uint32))

    @property
    def has_direct(self) -> bool:
        """Whether every file can be read past the page cache."""
        return all(fd >= 0 for fd in self._direct_fds.values()) and all(side.has_direct for side in self.sides)

    def handles(self) -> list[tuple[int, int, int]]:
        """Returns (descriptor, O_DIRECT descriptor or -1, bytes) of every file of the store; -1, -1, 0 of those that
        other tables lie in."""
        return [
            (self._fds[number], self._direct_fds.get(number, -1), num_bytes) if number in self._fds else (-1, -1, 0)
            for number, num_bytes in enumerate(self._num_bytes)
        ]

    def plane_records(self, side: SideMemory) -> list[kernels.PlaneRecord]:
        """Returns the planes as an engine takes them; `side` must live as long as that."""
        records, handles = [], self.handles()
        for number, plane in enumerate(self.table.planes):
            if plane.copy is None:
                records.append(
                    kernels.PlaneRecord.blocks(
                        width_bytes=plane.width_bytes, files=handles, stretches=stretch_array(plane),
                        checksums=side.checksums, seed=self.table.seed,
                    )
                )  # fmt: skip
                continue
            copy, files = plane.copy, next(files for files in self.sides if files.table == plane.copy)
            records.append(
                kernels.PlaneRecord.pages(
                    width_bytes=plane.width_bytes, files=files.handles(), page_bytes=copy.page_bytes,
                    rows_per_page=copy.rows_per_page, pages_per_shard=copy.pages_per_shard, page_version=PAGE_VERSION,
                    seed=copy.seed, resident=side.copies.get(number),
                )
            )  # fmt: skip
        return records

    def read_rows(self, page_numbers: np.ndarray, _scratch: np.ndarray, /) -> np.ndarray:
        """Reads pages, int64 [P] ascending without repeats, as uint8 [P, rows_per_page, row_bytes]; every block is
        checked. Blocks.

        Raises `CorruptPageError`.
        """
        table = self.table
        rows = np.zeros((len(page_numbers), table.rows_per_page, table.spec.row_bytes), dtype=np.uint8)
        flat = rows.reshape(-1, table.spec.row_bytes)
        breaks = np.flatnonzero(np.diff(page_numbers) != 1) + 1
        for i, j in zip([0, *breaks.tolist()], [*breaks.tolist(), len(page_numbers)], strict=True):
            if j > i:
                row_start = int(page_numbers[i]) * table.rows_per_page
                row_end = min((int(page_numbers[j - 1]) + 1) * table.rows_per_page, table.spec.num_rows)
                at = i * table.rows_per_page
                self._read_range(row_start, row_end, flat[at : at + row_end - row_start])
        return rows

    def _read_range(self, row_start: int, row_end: int, out: np.ndarray) -> None:
        column = 0
        for plane in self.table.planes:
            part = out[:, column : column + plane.width_bytes]
            column += plane.width_bytes
            if plane.copy is not None:
                files = next(files for files in self.sides if files.table == plane.copy)
                part[:] = read_packed(files, row_start, row_end)
                continue
            for stretch, end in zip(plane.stretches, self.table.row_ends(plane), strict=True):
                start, end = max(row_start, stretch.row_start), min(row_end, end)
                if start < end:
                    self._read_stretch(plane, stretch, start, part[start - row_start : end - row_start])

    def _read_stretch(self, plane: InPlacePlane, stretch: Stretch, row_start: int, out: np.ndarray) -> None:
        byte_start = stretch.byte_start + (row_start - stretch.row_start) * plane.width_bytes
        byte_end = byte_start + len(out) * plane.width_bytes
        first = byte_start // BLOCK_BYTES
        block = stretch.block_start + first - stretch.byte_start // BLOCK_BYTES
        data = self.read_blocks(stretch.file, first, -(-byte_end // BLOCK_BYTES), self.names.block(plane, block))
        found = kernels.block_checksums(data, block, self.table.seed)
        bad = np.flatnonzero(found != self.checksums_of(block, block + len(found)))
        if len(bad):
            raise CorruptPageError(block_fault(self.names.block(plane, block + int(bad[0]))))
        offset = byte_start - first * BLOCK_BYTES
        out[:] = data[offset : offset + out.size].reshape(out.shape)

    def read_blocks(self, file: int, first: int, end: int, what: str) -> np.ndarray:
        """Reads blocks [first, end) of a file, uint8 [n]; the file's last may be short. Blocks on the disk."""
        byte_start = first * BLOCK_BYTES
        num_bytes = min(end * BLOCK_BYTES, self._num_bytes[file]) - byte_start
        data = np.empty(num_bytes, dtype=np.uint8)
        try:
            done = read_up_to(self._fds[file], data, byte_start)
        except OSError as error:
            raise CorruptPageError(f"{what} cannot be read: {error}; check the disk") from error
        if done < num_bytes:
            raise CorruptPageError(block_cut(what))
        return data

    def checksums_of(self, block_start: int, block_end: int) -> np.ndarray:
        """Returns the checksums of blocks, uint32 [n]: from a window of them that moves on. Blocks on the disk."""
        start, window = self._window  # once: another thread may move it
        if not start <= block_start <= block_end <= start + len(window):
            side = self.sides[0]
            per_page = side.table.rows_per_page
            page_start = block_start // per_page
            page_end = min(max(-(-block_end // per_page), page_start + WINDOW_PAGES), side.table.num_pages)
            row_end = min(page_end * per_page, side.table.spec.num_rows)
            rows = read_packed(side, page_start * per_page, row_end)
            start, window = page_start * per_page, rows.reshape(-1).view("<u4").astype(np.uint32)
            self._window = start, window
        return window[block_start - start : block_end - start]

    def blocks_of(self, page_numbers: np.ndarray) -> int:
        """Returns about how many blocks hold these pages, int64 [P]: for counts."""
        table = self.table
        in_place = sum(plane.width_bytes for plane in table.planes if plane.copy is None)
        return -(-len(page_numbers) * table.rows_per_page * in_place // BLOCK_BYTES)

    def drop_cache(self) -> None:
        """Drops what was read of the files from the page cache."""
        for fd in self._fds.values():
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        for side in self.sides:
            side.drop_cache()

    def close(self) -> None:
        """Closes the descriptors; closing twice is harmless."""
        if self.versions is not None:
            self.versions.close()
        for side in self.sides:
            side.close()
        for fds in (self._fds, self._direct_fds):
            while fds:
                _, fd = fds.popitem()
                if fd >= 0:
                    os.close(fd)


def read_packed(files: TableFiles, row_start: int, row_end: int) -> np.ndarray:
    """Returns rows [row_start, row_end) of a table in pages, uint8 [n, row_bytes]; each page is checked. Blocks."""
    table = files.table
    numbers = np.arange(row_start // table.rows_per_page, -(-row_end // table.rows_per_page))
    pages = np.empty((len(numbers), table.page_bytes), dtype=np.uint8)
    read_pages(files, numbers, pages)
    rows = table.shape.rows_of(pages).reshape(-1, table.spec.row_bytes)
    at = row_start - int(numbers[0]) * table.rows_per_page
    return rows[at : at + row_end - row_start]


def open_file(image: CatalogImage, file: InPlaceFile) -> tuple[Path, int]:
    """Opens a file that rows lie in, by its path from the store on or its absolute one; returns path and descriptor.

    Raises `FormatError` if neither is the file that the store was built over, and says in what it differs.
    """
    near = Path(os.path.realpath(image.path)) / file.relative
    remedy = f"put it back, or build again over the checkpoint as it is now: {rebuild_command(image.path)}"
    missing = FormatError(f"{file.path}, in which rows lie, is not there: it was moved or removed; {remedy}")
    wrong: list[TierStoreError] = [missing]
    for path in dict.fromkeys((near, Path(file.path))):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would block for ever
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                wrong.insert(0, named(error, f"{path}, in which rows lie", path, fault=Fault(FormatError, remedy)))
            continue
        difference = _difference(fd, file)
        if difference is None:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            return path, fd
        os.close(fd)
        what = f"{path}, in which rows lie, is not the file that the store was built over: {difference}"
        wrong.insert(0, FormatError(f"{what}; {remedy}"))
    raise wrong[0]


def _difference(fd: int, file: InPlaceFile) -> str | None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        return "it is no regular file"
    found = FileIdentity.of(status)
    if found == file.identity:
        return None
    parts = zip(("bytes", "mtime_ns", "inode"), file.identity, found, strict=True)
    return ", ".join(f"{what} {then} then, {now} now" for what, then, now in parts if then != now)


@dataclass(frozen=True)
class SideMemory:
    """What memory holds of a table in place: checksums, uint32 [blocks]; copied planes, uint8 [rows, width], by index;
    and why pages of either are not there."""

    checksums: np.ndarray
    copies: dict[int, np.ndarray]


def side_memory(layout: InPlaceLayout, memory: np.ndarray, bad: Sequence[str] = ()) -> SideMemory:
    """Returns the parts of a table's side memory, uint8 [n]: the checksums, and as many copies as it has room for.

    bad: side tables of which a page could not be loaded: copies are read by page then.
    """
    checksums = memory[: layout.num_blocks * CHECKSUM_BYTES].view("<u4")
    copies, at = {}, layout.checksum_bytes
    for number, plane in enumerate(layout.planes):
        if plane.copy is None:
            continue
        end = at + layout.spec.num_rows * plane.width_bytes
        if end <= len(memory) and plane.copy.spec.name not in bad:
            copies[number] = memory[at:end].reshape(-1, plane.width_bytes)
        at = end
    return SideMemory(checksums, copies)


def load_side(
    files: InPlaceFiles, memory: np.ndarray, poll: Callable[[], None] | None = None
) -> dict[str, dict[int, str]]:
    """Loads a table's checksums, and the copied planes that there is room for; returns bad pages by side table. Blocks.

    poll: as of `load_rows`.
    """
    bad: dict[str, dict[int, str]] = {}
    scratch = np.empty(1 << 20, dtype=np.uint8)
    parts = side_memory(files.table, memory)
    for side, rows in _parts_to_load(files, parts):
        found = load_rows(side, rows, scratch, poll)
        if found:
            bad[side.table.spec.name] = found
            if side is files.sides[0]:
                files.names.bad_checksums.update(found)
            logger.error("%s", next(iter(found.values())))
    return bad


def _parts_to_load(files: InPlaceFiles, parts: SideMemory) -> Iterator[tuple[TableFiles, np.ndarray]]:
    yield files.sides[0], parts.checksums.view(np.uint8).reshape(-1, CHECKSUM_BYTES)
    for number, rows in parts.copies.items():
        yield next(side for side in files.sides if side.table == files.table.planes[number].copy), rows
