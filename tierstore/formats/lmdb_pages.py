"""Reads an LMDB file without mapping it. LMDB believes what it reads in its map: a wrong number there, or a file that
somebody cuts meanwhile, ends the process by a signal.

Input: the path of a catalog. Output: the records of its newest committed transaction, in key order. Errors:
`FormatError` if the file is cut short, damaged, no LMDB file or too large; what opening and reading it raise.

The whole file is copied with plain reads, and the meta pages are read once more after it. LMDB never writes to a page
of the newest transaction or of the one before it. So if the meta pages did not change meanwhile, the copy holds the
newest transaction whole; if they did, a writer committed, and the file is copied again. The two trees (free list,
records) of the newer meta page are then walked in that copy.
The older one's pages may hold what a killed transaction left.

What LMDB (data version 1, 64-bit, little-endian) keeps in the file:

    page    u64 page number, u16 unused, u16 kind, u16 lower, u16 upper (overflow pages:
      u32 pages of the run instead of both)
    meta    pages 0 and 1, after the 16 bytes above: u32 magic, u32 version, u64 address, u64 map size, two tree records
            (the first one's u32 is the page size), u64 last page, u64 transaction, odd on page 1, even on page 0
    tree    u32, u16 flags, u16 depth, 4 x u64 counts, u64 root page (2^64 - 1: empty)
    branch, leaf   from byte 16 to lower: u16 offsets of the nodes in key order;
                   nodes fill the page from upper to its end
    node    u16 low, u16 high, u16 flags, u16 key bytes, key, then padding to an even length
            branch: low, high and flags are the child page. leaf: low and high are the value's bytes; it follows the
            key, or with flag 1 its u64 overflow page does
    free list      key: u64 transaction; value: u64 count, then that many u64 pages, descending
"""

from __future__ import annotations

import itertools
import os
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from ..errors import FormatError

MAGIC, DATA_VERSION = 0xBEEFC0DE, 1
PAGE_BYTES_MIN, PAGE_BYTES_MAX = 512, 32768
HEADER_BYTES, NODE_BYTES = 16, 8
BRANCH, LEAF, OVERFLOW = 1, 2, 4
NODE_IN_OVERFLOW = 1
NO_PAGE = 2**64 - 1
FILE_BYTES_MAX = 1 << 30  # writers map no more (`catalog_records.MAP_BYTES`), so no catalog is larger
PIECE_BYTES = 4 << 20  # read at once: a signal waits no longer than that
SNAPSHOT_WAIT_S = 10.0  # for a moment in which no writer commits; a copy takes milliseconds
DEPTH_MAX = 32  # LMDB's own limit on its stack of pages
FREE_LIST_FLAGS, RECORD_FLAGS = 0x08, 0  # integer keys; text keys without duplicates
NO_SUBDIR_FLAG = 0x4000  # LMDB keeps the environment's flags among those of the free list

_PAGE = struct.Struct("<Q2xHHH")
_RUN = struct.Struct("<Q2xHI")
_META = struct.Struct("<IIQQ" + "IHH32xQ" * 2 + "QQ")
_NODE = struct.Struct("<HHHH")
META_BYTES = HEADER_BYTES + _META.size


class _Tree(NamedTuple):
    """A tree record of a meta page."""

    flags: int
    depth: int
    root: int


class _Node(NamedTuple):
    """A node: its 48 bits of size or child, its flags, and where in its page key and value lie."""

    number: int
    flags: int
    key_start: int
    key_end: int


def read_lmdb_records(file: Path) -> list[tuple[bytes, bytes]]:
    """Returns (key, value) of every record of the newest committed transaction, keys ascending.
    Blocks on the disk, shortly.

    A file that passes is safe for LMDB to map and to extend, as long as nobody but LMDB writes to it.

    Raises `FormatError` (see the module), `OSError` if the file cannot be opened or read.
    """
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for its writer
    try:
        data = _snapshot(file, fd)
    finally:
        os.close(fd)
    walk = _Walk(file, data)
    free_list, records = walk.newer_trees()
    for key, value in walk.entries(free_list, "free list", FREE_LIST_FLAGS):
        walk.claim_free(key, value)
    found = list(walk.entries(records, "records", RECORD_FLAGS))
    for (key, _), (next_key, _) in itertools.pairwise(found):
        if key >= next_key:
            walk.refuse(f"record {key!r} stands before {next_key!r}, keys must ascend")
    return found


def _snapshot(file: Path, fd: int) -> bytes:
    """Returns the whole file as of one moment at which no transaction was being committed."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise FormatError(f"{file} is not a regular file; restore it from a copy or rebuild")
    deadline = time.monotonic() + SNAPSHOT_WAIT_S
    while True:
        data = _read_whole(file, fd)
        if _metas(data) == _metas(os.pread(fd, 2 * PAGE_BYTES_MAX, 0)):
            return data
        if time.monotonic() > deadline:
            raise FormatError(
                f"{file} changed during every one of the reads of {SNAPSHOT_WAIT_S:.0f} s; open the store again when "
                f"the process that writes it (a build, a plan) has ended"
            )


def _read_whole(file: Path, fd: int) -> bytes:
    """Reads from the start until the file ends. The meta pages come first,
    and LMDB writes them after what they name."""
    pieces: list[bytes] = []
    num_bytes = 0
    while piece := os.pread(fd, PIECE_BYTES, num_bytes):
        num_bytes += len(piece)
        pieces.append(piece)
        if num_bytes > FILE_BYTES_MAX:
            file_bytes = os.fstat(fd).st_size
            raise FormatError(
                f"{file}: {file_bytes} bytes, a catalog has at most {FILE_BYTES_MAX}; restore it from a copy or rebuild"
            )
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _metas(data: bytes) -> tuple[bytes, bytes]:
    """Returns the bytes of both meta pages that LMDB changes, as far as they are there."""
    page_bytes = int.from_bytes(data[HEADER_BYTES + 24 : HEADER_BYTES + 28], "little")
    second = page_bytes if PAGE_BYTES_MIN <= page_bytes <= PAGE_BYTES_MAX else PAGE_BYTES_MIN
    return data[:META_BYTES], data[second : second + META_BYTES]


class _Walk:
    """One pass over a copy of a file. A tree, an overflow run or the free list may claim each page once: no circles."""

    def __init__(self, file: Path, data: bytes) -> None:
        self._file, self._data = file, data
        self._page_bytes = self._last_page = 0
        self._claimed: set[int] = set()

    def newer_trees(self) -> tuple[_Tree, _Tree]:
        """Checks both meta pages against each other; returns free list and records."""
        file_bytes = len(self._data)
        metas = []
        for index in (0, 1):
            start = index * self._page_bytes
            if file_bytes < start + META_BYTES:
                self._cut_short(2 * max(self._page_bytes, PAGE_BYTES_MIN))
            magic, version, *_ = meta = _META.unpack_from(self._data, start + HEADER_BYTES)
            page_bytes = meta[4]
            fits = PAGE_BYTES_MIN <= page_bytes <= PAGE_BYTES_MAX and page_bytes & (page_bytes - 1) == 0
            if (magic, version) != (MAGIC, DATA_VERSION) or not fits or page_bytes != (self._page_bytes or page_bytes):
                raise FormatError(
                    f"{self._file} is no LMDB file: meta page {index} has magic {magic:#x} (LMDB's is {MAGIC:#x}), "
                    f"format {version}, pages of {page_bytes} bytes; give the path of a store, "
                    "or restore it from a copy"
                )
            self._page_bytes = page_bytes
            metas.append(meta)
        transactions = [meta[-1] for meta in metas]
        newer = int(transactions[1] > transactions[0])
        follow = abs(transactions[1] - transactions[0]) == 1 and transactions[newer] % 2 == newer
        if not follow and transactions != [0, 0]:  # both are 0 until the first commit
            self.refuse(f"meta pages are of transactions {transactions}, expected an even number and the one beside it")
        self._last_page = metas[newer][-2]  # may lie behind the file's end: a page that was freed before it was written
        if self._last_page >= FILE_BYTES_MAX // self._page_bytes:
            self.refuse(f"its last page is {self._last_page}, files have at most {FILE_BYTES_MAX} bytes")
        _, _, _, _, _, flags, depth, root, _, *records = metas[newer][:-2]
        return _Tree(flags & ~NO_SUBDIR_FLAG, depth, root), _Tree(*records)

    def entries(self, tree: _Tree, what: str, flags: int) -> Iterator[tuple[bytes, bytes]]:
        """Yields keys and values of a tree in key order; before it yields one,
        it has checked all pages that led there."""
        if tree.flags != flags or tree.depth > DEPTH_MAX or (tree.root == NO_PAGE) != (tree.depth == 0):
            self.refuse(f"{what}: flags {tree.flags:#x}, depth {tree.depth}, root page {tree.root}")
        pending = [(tree.root, 1)] if tree.depth else []
        while pending:
            page, level = pending.pop()
            self._claim(page, 1, f"a page of the {what}")
            data = self._read(page, 1)
            nodes = self._nodes(page, data, LEAF if level == tree.depth else BRANCH)
            if level < tree.depth:
                if len(nodes) < 2 and flags == RECORD_FLAGS:  # LMDB aborts on such a page
                    self.refuse(f"branch page {page} has {len(nodes)} child, expected two or more")
                pending += [(node.number, level + 1) for node in reversed(nodes)]
                continue
            for node in nodes:
                yield data[node.key_start : node.key_end], self._value(page, data, node)

    def _nodes(self, page: int, data: bytes, kind: int) -> list[_Node]:
        """Returns the nodes of a branch or leaf page in key order; they must tile it from `upper` to its end."""
        number, found_kind, lower, upper = _PAGE.unpack_from(data)
        if (number, found_kind) != (page, kind):
            self.refuse(f"page {page} says that it is page {number} of kind {found_kind}, expected kind {kind}")
        if not HEADER_BYTES + 2 <= lower <= upper <= self._page_bytes or lower % 2:
            self.refuse(f"page {page} has its free space from {lower} to {upper} of {self._page_bytes} bytes")
        offsets = struct.unpack_from(f"<{(lower - HEADER_BYTES) // 2}H", data, HEADER_BYTES)
        nodes = {}
        expected = upper
        for start in sorted(offsets):
            if start != expected or start + NODE_BYTES > self._page_bytes:
                self.refuse(f"page {page} has a node at {start}, expected {expected}")
            low, high, flags, key_bytes = _NODE.unpack_from(data, start)
            key_start, key_end = start + NODE_BYTES, start + NODE_BYTES + key_bytes
            number = low | high << 16 | (flags << 32 if kind == BRANCH else 0)
            value_bytes = 0 if kind == BRANCH else 8 if flags == NODE_IN_OVERFLOW else number
            if kind == LEAF and (flags not in (0, NODE_IN_OVERFLOW) or not key_bytes):
                self.refuse(f"page {page} has a node at {start} with flags {flags:#x} and a key of {key_bytes} bytes")
            expected = (key_end + value_bytes + 1) & ~1
            nodes[start] = _Node(number, flags, key_start, key_end)
        if expected != self._page_bytes:
            self.refuse(f"page {page} has nodes up to {expected}, expected {self._page_bytes}")
        return [nodes[start] for start in offsets]

    def _value(self, page: int, data: bytes, node: _Node) -> bytes:
        """Returns a leaf node's value, after checking its overflow run, if it has one."""
        if node.flags != NODE_IN_OVERFLOW:
            return data[node.key_end : node.key_end + node.number]
        (run,) = struct.unpack_from("<Q", data, node.key_end)
        num_pages = (HEADER_BYTES - 1 + node.number) // self._page_bytes + 1
        self._claim(run, num_pages, f"a value of {node.number} bytes of page {page}")
        head = self._read(run, num_pages)
        number, kind, found_pages = _RUN.unpack_from(head)
        if (number, kind, found_pages) != (run, OVERFLOW, num_pages):
            self.refuse(
                f"page {run} says that it is page {number} of kind {kind}, the first of {found_pages}; expected kind "
                f"{OVERFLOW} and {num_pages} pages"
            )
        return head[HEADER_BYTES : HEADER_BYTES + node.number]

    def claim_free(self, key: bytes, value: bytes) -> None:
        """Claims the pages of one entry of the free list: a writer would take any that it names."""
        count = int.from_bytes(value[:8], "little")
        if len(key) != 8 or len(value) < 8 or count > len(value) // 8 - 1:
            self.refuse(f"an entry of the free list has a key of {len(key)} and {len(value)} bytes for {count} pages")
        pages = struct.unpack_from(f"<{count}Q", value, 8)
        if list(pages) != sorted(pages, reverse=True):
            self.refuse(f"an entry of the free list has {count} pages that do not descend")
        for page in pages:
            self._claim(page, 1, "the free list")

    def _claim(self, page: int, num_pages: int, what: str) -> None:
        if not 2 <= page <= page + num_pages - 1 <= self._last_page:
            self.refuse(f"{what} lies on pages {page} to {page + num_pages - 1}, the last is {self._last_page}")
        pages = range(page, page + num_pages)
        if not self._claimed.isdisjoint(pages):
            self.refuse(f"{what} lies on pages {page} to {page + num_pages - 1}, which are used already")
        self._claimed.update(pages)

    def _read(self, page: int, num_pages: int) -> bytes:
        data = self._data[page * self._page_bytes : (page + num_pages) * self._page_bytes]
        if len(data) < num_pages * self._page_bytes:
            self._cut_short((page + num_pages) * self._page_bytes)
        return data

    def _cut_short(self, needed_bytes: int) -> NoReturn:
        raise FormatError(
            f"{self._file}: {len(self._data)} bytes on disk, it needs {needed_bytes}; "
            f"the copy was cut short: copy it again or rebuild"
        )

    def refuse(self, what: str) -> NoReturn:
        """Raises `FormatError`: the file is damaged, and what is wrong with it."""
        raise FormatError(f"{self._file} is damaged: {what}; restore it from a copy or rebuild")
