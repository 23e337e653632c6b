"""The nvme tier: the shards of a store, open, and the choice of how their pages are read.

Input: a catalog and what the user asked for (`io`). Output: descriptors, and a mode that this kernel and file system
allow. Errors: `FormatError` for shards that are not what the catalog says, `CorruptPageError` for damaged pages.

The reads themselves are the engines' job; this module also reads pages front to back, for tables that are loaded whole.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from .. import kernels
from ..causes import Fault, allow_open_files, named
from ..decisions.budget import READERS_FEW, READERS_LIMIT
from ..durable import read_up_to
from ..errors import CorruptPageError, FormatError
from ..formats.catalog import CatalogImage
from ..formats.page import check_pages, repair_command
from ..layout import TableLayout
from .memory import usable_cores
from .version_files import VersionFiles

logger = logging.getLogger("tierstore")

IO_MODES = ("auto", "uring", "mmap", "pread")
SERVED = "served"  # the mode of pages that another process has
THREADS_MAX = 16  # by default; more than a few share one memory's bandwidth


def default_threads() -> int:
    """Returns how many threads copy the rows of a large lookup by default: one for each core that this process may
    keep busy, at most 16."""
    return min(usable_cores(), THREADS_MAX)


def default_readers() -> int:
    """Returns how many page readers a store has by default, memory allowing: two for each core that this process may
    keep busy, one that computes while another waits for the disk; at least 4."""
    return min(max(READERS_FEW, 2 * usable_cores()), READERS_LIMIT)


@dataclass(frozen=True)
class IoChoice:
    """How rows come to a process.

    Attributes:
        mode: How pages are read: "uring", "mmap", "pread" or "served".
        use_process_madvise: Whether read-ahead is asked for by process_madvise.
        num_threads: That copy what memory holds of one large lookup, the caller's included.
        num_readers: Page readers at most, each of which reads for one lookup at a time.
        served_by: Of "served": the socket of who has the shards, and the longest wait for an answer in seconds.
    """

    mode: str
    use_process_madvise: bool = False
    num_threads: int = field(default_factory=default_threads)
    num_readers: int = field(default_factory=default_readers)
    served_by: tuple[str, float] = ("", 0.0)


def choose_io(io: str, threads: int | None = None, readers: int | None = None) -> IoChoice:
    """Returns the best mode that this process may use for `io`, and logs, once a call,
    what it fell back from and why. threads, readers: `IoChoice.num_threads` and `num_readers`; None: the defaults."""
    mode, use_process_madvise = _choose_mode(io)
    return IoChoice(
        mode,
        use_process_madvise,
        default_threads() if threads is None else threads,
        default_readers() if readers is None else readers,
    )


def _choose_mode(io: str) -> tuple[str, bool]:
    if io in ("auto", "uring"):
        code = kernels.probe_uring()
        if code == 0:
            return "uring", False
        logger.warning(
            "io_uring is not to be had (%s): pages are read through the page cache, by mmap; run 'tierstore doctor'",
            errno.errorcode.get(code, code),
        )
    if io == "pread":
        return "pread", False
    code = kernels.probe_process_madvise()
    if code != 0:
        logger.warning(
            "process_madvise is not to be had (%s): read-ahead is asked for page by page, with posix_fadvise",
            errno.errorcode.get(code, code),
        )
    return "mmap", code == 0


class TableFiles:
    """The open shards of one table. Any number of threads may read; `close` comes after the last read.

    versions: the files of the versions that it is opened at, which whoever opens them all sets; closed with it.
    """

    versions: VersionFiles | None = None

    def __init__(self, image: CatalogImage, table: TableLayout, *, direct: bool) -> None:
        """Opens every shard and compares its length with the catalog's; raises `FormatError` if it differs.

        direct: open each for O_DIRECT too, if its file system has that.
        """
        self.table = table
        self._fds: list[int] = []
        self._direct_fds: list[int] = []
        allow_open_files(2 * table.num_shards if direct else table.num_shards)
        try:
            for index in range(table.num_shards):
                file, fd = _open_shard(image, table, index)
                self._fds.append(fd)
                self._direct_fds.append(open_direct(file) if direct else -1)
        except BaseException:
            self.close()
            raise

    def fd(self, shard_index: int) -> int:
        """Returns the descriptor of a shard."""
        return self._fds[shard_index]

    @property
    def has_direct(self) -> bool:
        """Whether every shard can be read past the page cache."""
        return all(fd >= 0 for fd in self._direct_fds)

    def handles(self) -> list[tuple[int, int, int]]:
        """Returns (descriptor, O_DIRECT descriptor or -1, bytes) of every shard."""
        sizes = [os.fstat(fd).st_size for fd in self._fds]
        return list(zip(self._fds, self._direct_fds, sizes, strict=True))

    def read_rows(self, page_numbers: np.ndarray, scratch: np.ndarray, /) -> np.ndarray:
        """Reads pages, int64 [P] ascending without repeats; returns their rows, uint8 [P, rows_per_page, row_bytes].

        scratch: uint8, of P pages at least, in which the rows then lie. Blocks. Raises `CorruptPageError`.
        """
        table = self.table
        pages = scratch[: len(page_numbers) * table.page_bytes].reshape(-1, table.page_bytes)
        read_pages(self, page_numbers, pages)
        return table.shape.rows_of(pages)

    def drop_cache(self) -> None:
        """Drops what was read of the shards from the page cache."""
        for fd in self._fds:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Closes the descriptors; closing twice is harmless."""
        if self.versions is not None:
            self.versions.close()
        for fds in (self._fds, self._direct_fds):
            while fds:
                fd = fds.pop()
                if fd >= 0:
                    os.close(fd)


def _open_shard(image: CatalogImage, table: TableLayout, index: int) -> tuple[Path, int]:
    shard = image.shards[table.spec.name][index]
    file = Path(image.path) / shard.file
    what, remedy = f"shard {index} of table {table.spec.name} ({file})", f"repair it: {repair_command(image.path)}"
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe in its place would block for ever
    except OSError as error:
        raise named(error, what, file, fault=Fault(FormatError, remedy)) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FormatError(f"{what}: it is no regular file; {remedy}")
    found_bytes = os.fstat(fd).st_size
    if found_bytes != shard.num_bytes:
        os.close(fd)
        raise FormatError(
            f"{what}: {found_bytes} bytes on disk, the catalog says {shard.num_bytes}; "
            f"it was cut short or is another file; {remedy}"
        )
    # Rows lie scattered: without this, every read of one page would bring in a window of its neighbours.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    return file, fd


def open_direct(file: Path) -> int:
    """Returns a descriptor that reads past the page cache, -1 if the file system has none."""
    try:
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise named(error, file, fault=Fault(FormatError, f"repair it: {repair_command()}")) from error
        return -1


def read_pages(files: TableFiles, page_numbers: np.ndarray, out: np.ndarray) -> None:
    """Reads pages, int64 [P] ascending without repeats, into out, uint8 [P, page_bytes] contiguous, and checks each.

    Portable and without threads: asks the kernel for every run of neighbouring pages first, so that the disk sees the
    whole batch at once, then copies run by run. Blocks. Raises `CorruptPageError` naming the first bad page.
    """
    table = files.table
    assert out.shape == (len(page_numbers), table.page_bytes)
    assert out.flags.c_contiguous
    try:
        runs = list(_runs(files, page_numbers))
        for fd, byte_start, i, j in runs if len(runs) > 1 else ():
            os.posix_fadvise(fd, byte_start, (j - i) * table.page_bytes, os.POSIX_FADV_WILLNEED)
        for fd, byte_start, i, j in runs:
            _read_run(fd, byte_start, out[i:j], f"page {page_numbers[i]} of table {table.spec.name}")
    except OSError as error:
        raise CorruptPageError(
            f"pages of table {table.spec.name} cannot be read: {error}; check the disk, then run 'tierstore verify'"
        ) from error
    check_pages(out, page_numbers, table.seed, table.spec.name)


def _runs(files: TableFiles, page_numbers: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """Yields (descriptor, byte start, first, end) of every run of neighbouring pages;
    first and end count page_numbers."""
    table = files.table
    shard = page_numbers // table.pages_per_shard
    breaks = np.flatnonzero((np.diff(page_numbers) != 1) | (np.diff(shard) != 0)) + 1
    starts = np.concatenate([[0], breaks]).tolist()
    ends = np.concatenate([breaks, [len(page_numbers)]]).tolist()
    byte_starts = ((page_numbers - shard * table.pages_per_shard) * table.page_bytes).tolist()
    for i, j in zip(starts, ends, strict=True):
        if j > i:
            yield files.fd(int(shard[i])), byte_starts[i], i, j


def _read_run(fd: int, byte_start: int, pages: np.ndarray, what: str) -> None:
    done = read_up_to(fd, pages, byte_start)
    if done < pages.nbytes:
        raise CorruptPageError(
            f"{what}: its shard ends at byte {byte_start + done}; it was cut while open; repair it: {repair_command()}"
        )


class RowFiles(Protocol):
    """The open files of a table, whose rows are read by page: `TableFiles`, or those of a table in place."""

    versions: VersionFiles | None

    @property
    def table(self) -> TableLayout:
        """How its rows lie."""

    def read_rows(self, page_numbers: np.ndarray, scratch: np.ndarray, /) -> np.ndarray:
        """See `TableFiles.read_rows`."""

    def drop_cache(self) -> None:
        """See `TableFiles.drop_cache`."""


def load_rows(
    files: RowFiles, rows: np.ndarray, scratch: np.ndarray, poll: Callable[[], None] | None = None
) -> dict[int, str]:
    """Reads a whole table, front to back, into rows, uint8 [num_rows, row_bytes]; scratch: uint8, at least one page.

    poll: called between two reads of `scratch`; what it raises ends the loading.

    Rows are those of the version that the files are opened at. Returns the pages that are bad, with what is wrong with
    each: they cost their own rows only. Blocks. Leaves nothing of it in the page cache.
    """
    table = files.table
    bad_pages: dict[int, str] = {}
    pages_per_chunk = len(scratch) // table.page_bytes
    for page_start in range(0, table.num_pages, pages_per_chunk):
        if poll:
            poll()
        page_end = min(page_start + pages_per_chunk, table.num_pages)
        try:
            _load_pages(files, rows, page_start, page_end, scratch)
        except CorruptPageError:
            for page_number in range(page_start, page_end):
                try:
                    _load_pages(files, rows, page_number, page_number + 1, scratch)
                except CorruptPageError as error:
                    bad_pages[page_number] = str(error)
    files.drop_cache()
    if files.versions is not None:
        files.versions.apply(rows, bad_pages, table.rows_per_page)
        files.versions.drop_cache()
    return bad_pages


def _load_pages(files: RowFiles, rows: np.ndarray, page_start: int, page_end: int, scratch: np.ndarray) -> None:
    table = files.table
    row_start = page_start * table.rows_per_page
    found = files.read_rows(np.arange(page_start, page_end), scratch).reshape(-1, table.spec.row_bytes)
    part = rows[row_start : row_start + len(found)]
    part[:] = found[: len(part)]
