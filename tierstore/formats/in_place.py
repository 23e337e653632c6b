"""A table in place: its rows stay in the checkpoint's own files, and the store holds what checks them.

Input: table sources, or what a catalog says of them. Output: `InPlaceLayout`s: where each plane of a row lies, the side
tables (checksums of blocks, copies of narrow planes), and the files' identities. Errors: `ConfigError` for sources that
cannot stay in place, `FormatError` for records that contradict each other.

A plane lies in *stretches* of files, one a tensor. Every block of 4,096 bytes of a file that a stretch touches has a
number; row b of the checksums' side table is the CRC32C of block b. A side table is laid out, built, verified and
repaired like any other table, but nobody looks it up. FORMAT.md has the records.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import kernels
from ..errors import ConfigError, FormatError
from ..layout import SEED_MAX, PageShape, TableLayout, round_up
from ..lazy import lazy
from ..spec import TableSpec
from .page import page_seed
from .stored_tensor import FileIdentity
from .table_source import Plane, TableSource

BLOCK_BYTES = kernels.BLOCK_BYTES
CHECKSUM_BYTES = 4
LINE_BYTES = 64  # what lies in memory begins at multiples of a cache line
COPIED_FRACTION = 1 / 4  # of a row: a plane apart that is no wider is copied, so that a row is one read and not two
PLANES_MAX = 64
NUMBER_MAX = 1 << 62  # of a byte, a row or a block
# Pages of a shard of checksums: what a build reads as one piece of work. Of 256 MiB to 1 GiB of rows: enough pieces for
# its threads, and not too many, because each is synced and noted in the catalog.
SHARD_PAGES_MIN, SHARD_PAGES_MAX = 64, 256
SHARDS_WANTED = 8
CHECKSUMS = "checksums"
SIDE_NAME_BYTES_MAX = 150  # of a table's name; with what its side tables add, theirs are names too


@dataclass(frozen=True)
class Stretch:
    """Rows of a plane, back to back in a file: from row_start on, from byte_start on. Its first block is block_start.

    file: which of the store's `InPlaceFile`s.
    """

    file: int
    byte_start: int
    row_start: int
    block_start: int


@dataclass(frozen=True)
class InPlacePlane:
    """The bytes of a row that lie together: in stretches of the checkpoint's files, or in pages of a side table.

    copy: the side table's layout; None if there are stretches.
    """

    width_bytes: int
    stretches: tuple[Stretch, ...] = ()
    copy: TableLayout | None = None


@dataclass(frozen=True)
class InPlaceFile:
    """A file of the checkpoint: where it was found, and what it was then.

    Attributes:
        path: Absolute; the last name may be a symlink, as in a hub's cache.
        relative: The same from the store's folder on: it holds if both are moved together.
        identity: Length, time and inode.
        header_sha256: The SHA-256 (hex) of its header.
    """

    path: str
    relative: str
    identity: FileIdentity
    header_sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Returns the file as a JSON-able dict."""
        return {
            "path": self.path, "relative": self.relative, "bytes": self.identity.num_bytes,
            "mtime_ns": self.identity.mtime_ns, "inode": self.identity.inode, "header_sha256": self.header_sha256,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, record: Any) -> InPlaceFile:
        """Reads what `to_dict` wrote; raises `FormatError`."""
        found = record if isinstance(record, dict) else {}
        texts = [found.get(name) for name in ("path", "relative", "header_sha256")]
        numbers = [found.get(name) for name in ("bytes", "mtime_ns", "inode")]
        is_good = all(isinstance(text, str) and "\0" not in text for text in texts)
        if not is_good or not all(type(number) is int for number in numbers) or not os.path.isabs(str(texts[0])):
            raise FormatError(f"the catalog's record {found} of a file in place is damaged; restore it or rebuild")
        num_bytes, mtime_ns, inode = (number for number in numbers if isinstance(number, int))
        return cls(str(texts[0]), str(texts[1]), FileIdentity(num_bytes, mtime_ns, inode), str(texts[2]))


@dataclass(frozen=True)
class InPlaceLayout(TableLayout):
    """A table whose rows lie in files of a checkpoint. It has no shards of its own; its side tables have.

    Its pages are ranges of `rows_per_page` rows, which is what readers count, sample and refuse; `page_bytes` is the
    longest read that a row takes.
    """

    planes: tuple[InPlacePlane, ...] = ()
    checksums: TableLayout = field(kw_only=True)

    @property
    def num_shards(self) -> int:
        """None: see `side_tables`."""
        return 0

    @property
    def store_bytes(self) -> int:
        """Bytes of all shards of its side tables."""
        return sum(table.store_bytes for table in self.side_tables)

    @lazy
    def side_tables(self) -> tuple[TableLayout, ...]:
        """What the store holds for the table: checksums first, then copied planes."""
        return (self.checksums, *(plane.copy for plane in self.planes if plane.copy is not None))

    @property
    def num_blocks(self) -> int:
        """Blocks of files that have a checksum."""
        return self.checksums.spec.num_rows

    @property
    def checksum_bytes(self) -> int:
        """Bytes of memory that the checksums take: they must be there, or no block can be checked."""
        return round_up(self.num_blocks * CHECKSUM_BYTES, LINE_BYTES)

    @property
    def copy_bytes(self) -> int:
        """Bytes of memory that all copied planes take, if they are kept there."""
        return sum(plane.width_bytes for plane in self.planes if plane.copy is not None) * self.spec.num_rows

    def row_ends(self, plane: InPlacePlane) -> list[int]:
        """Returns where the rows of each stretch of a plane end."""
        return [stretch.row_start for stretch in plane.stretches[1:]] + [self.spec.num_rows]

    def to_dict(self) -> dict[str, Any]:
        """Returns the layout as a JSON-able dict."""
        planes = [
            {
                "width_bytes": plane.width_bytes,
                "stretches": [[s.file, s.byte_start, s.row_start, s.block_start] for s in plane.stretches],
                "copy": None if plane.copy is None else plane.copy.to_dict(),
            }
            for plane in self.planes
        ]
        return {
            "spec": self.spec.to_dict(), "seed": self.seed, "checksums": self.checksums.to_dict(), "planes": planes
        }  # fmt: skip

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> InPlaceLayout:
        """Reads what `to_dict` wrote; raises `FormatError` if numbers are missing or contradict each other."""
        spec = TableSpec.from_dict(record.get("spec", {}))
        seed, planes = record.get("seed"), record.get("planes")
        if type(seed) is not int or not 0 <= seed <= SEED_MAX:
            raise FormatError(f"table {spec.name}: the catalog's seed {seed} is damaged; restore it or rebuild")
        if not isinstance(planes, list) or not 1 <= len(planes) <= PLANES_MAX:
            raise FormatError(f"table {spec.name}: the catalog's planes are damaged; restore it or rebuild")
        made = [_plane_from(spec, plane) for plane in planes]
        layout = make_layout(spec, seed, made, _paged_from(record.get("checksums")))
        _check_layout(layout)
        return layout


def check_files(path: Path, layout: InPlaceLayout, files: Sequence[InPlaceFile]) -> None:
    """Raises `FormatError` if a stretch of a table lies in none of a catalog's files, or beyond the end of one."""
    for plane in layout.planes:
        for stretch, row_end in zip(plane.stretches, layout.row_ends(plane), strict=plane.copy is None):
            byte_end = stretch.byte_start + (row_end - stretch.row_start) * plane.width_bytes
            num_bytes = files[stretch.file].identity.num_bytes if stretch.file < len(files) else 0
            if byte_end > num_bytes:
                raise FormatError(
                    f"{path}: the catalog says that rows of table {layout.spec.name} lie up to byte {byte_end} of file "
                    f"{stretch.file} of its {len(files)}, which has {num_bytes}; restore it or rebuild"
                )


def make_layout(spec: TableSpec, seed: int, planes: Sequence[InPlacePlane], checksums: TableLayout) -> InPlaceLayout:
    """Returns a table's layout: pages are as many rows as about a block holds."""
    rows_per_page = max(1, BLOCK_BYTES // spec.row_bytes)
    num_pages = -(-spec.own_rows // rows_per_page)
    widest = max(plane.width_bytes for plane in planes)
    page_bytes = (-(-(BLOCK_BYTES - 1 + widest) // BLOCK_BYTES)) * BLOCK_BYTES
    page_bytes = max([page_bytes, *(plane.copy.page_bytes for plane in planes if plane.copy)])
    return InPlaceLayout(
        spec, page_bytes, rows_per_page, num_pages, num_pages, seed, checksums.folder, tuple(planes),
        checksums=checksums,
    )  # fmt: skip


def lay_out_in_place(
    index: int, source: TableSource, seed: int, shard_bytes: int, file_index: Mapping[Path, int]
) -> InPlaceLayout:
    """Returns where a table lies that stays in place, and its side tables. Pure.

    Args:
        index: The table's place in the store's list.
        source: Its planes and tensors.
        seed: Of its checksums.
        shard_bytes: The largest shard of a side table.
        file_index: The number of each file.
    """
    spec = source.spec.local
    if len(source.planes) > PLANES_MAX:
        raise ConfigError(f"table {spec.name}: {len(source.planes)} planes, at most {PLANES_MAX} can stay in place")
    widest = max(plane.width_bytes for plane in source.planes)
    planes, block = [], 0
    for number, plane in enumerate(source.planes):
        if plane.width_bytes < widest and plane.width_bytes <= COPIED_FRACTION * spec.row_bytes:
            copy = _side_table(index, spec, f"plane-{number}", spec.num_rows, plane.width_bytes, seed, shard_bytes)
            planes.append(InPlacePlane(plane.width_bytes, copy=copy))
            continue
        stretches, row = [], 0
        for tensor in plane.tensors:
            if tensor.num_bytes:
                stretches.append(Stretch(file_index[tensor.path], tensor.byte_start, row, block))
                row += tensor.num_bytes // plane.width_bytes
                block += num_blocks_of(tensor.byte_start, tensor.num_bytes)
        planes.append(InPlacePlane(plane.width_bytes, tuple(stretches)))
    num_pages = PageShape.of_rows(CHECKSUM_BYTES).num_pages(block)
    shard_pages = min(SHARD_PAGES_MAX, max(SHARD_PAGES_MIN, -(-num_pages // SHARDS_WANTED)))
    checksums = _side_table(index, spec, CHECKSUMS, block, CHECKSUM_BYTES, seed, shard_bytes, shard_pages)
    return make_layout(spec, seed, planes, checksums)


def num_blocks_of(byte_start: int, num_bytes: int) -> int:
    """Returns how many blocks of a file hold some of these bytes."""
    return -(-(byte_start + num_bytes) // BLOCK_BYTES) - byte_start // BLOCK_BYTES


def _side_table(
    index: int,
    spec: TableSpec,
    kind: str,
    num_rows: int,
    row_bytes: int,
    seed: int,
    shard_bytes: int,
    pages_max: int = 1 << 40,
) -> TableLayout:
    shape = PageShape.of_rows(row_bytes)
    if shard_bytes < shape.page_bytes:
        raise ConfigError(f"--shard-bytes {shard_bytes} is less than one page of {shape.page_bytes} bytes")
    name = side_name(index, spec.name, kind)
    side = TableSpec.plain(name, num_rows, row_bytes, "raw", row_bytes)
    return TableLayout(
        spec=side,
        page_bytes=shape.page_bytes,
        rows_per_page=shape.rows_per_page,
        num_pages=shape.num_pages(num_rows),
        pages_per_shard=min(shard_bytes // shape.page_bytes, pages_max),
        seed=page_seed(side, f"{seed:08x}"),
        folder=f"shards/{index}-{kind}",
    )


def side_name(index: int, table_name: str, kind: str) -> str:
    """Returns the name of a side table: the table's, or its place if that is long, and what it holds."""
    return f"{table_name if len(table_name.encode()) <= SIDE_NAME_BYTES_MAX else f'table {index}'}/{kind}"


def stretch_array(plane: InPlacePlane) -> np.ndarray:
    """Returns a plane's stretches as int64 [n, 4]: row_start, byte_start, block_start, file."""
    rows = [[s.row_start, s.byte_start, s.block_start, s.file] for s in plane.stretches]
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


def source_of_copy(source: TableSource, layout: InPlaceLayout, copy: TableLayout) -> TableSource:
    """Returns the plane that a side table copies as a source of its own."""
    number = next(i for i, plane in enumerate(layout.planes) if plane.copy == copy)
    plane = source.planes[number]
    return TableSource(copy.spec, (Plane(plane.width_bytes, plane.tensors),))


def _paged_from(record: Any) -> TableLayout:
    return TableLayout.from_dict(record if isinstance(record, dict) else {})


def _plane_from(spec: TableSpec, record: Any) -> InPlacePlane:
    found: dict[str, Any] = record if isinstance(record, dict) else {}
    width, stretches, copy = (found.get(name) for name in ("width_bytes", "stretches", "copy"))
    if type(width) is int and width > 0 and isinstance(stretches, list) and bool(stretches) == (copy is None):
        if copy is not None:
            return InPlacePlane(width, copy=_paged_from(copy))
        if all(map(_is_stretch, stretches)):
            return InPlacePlane(width, tuple(Stretch(*stretch) for stretch in stretches))
    raise FormatError(f"table {spec.name}: the catalog's record of a plane is damaged; restore it or rebuild")


def _is_stretch(record: Any) -> bool:
    is_list = isinstance(record, list) and len(record) == len(Stretch.__dataclass_fields__)
    return is_list and all(type(number) is int and 0 <= number < NUMBER_MAX for number in record)


def _check_layout(layout: InPlaceLayout) -> None:
    """Raises `FormatError` if planes and blocks contradict each other."""
    spec, block = layout.spec, 0

    def refuse(what: str) -> None:
        raise FormatError(f"table {spec.name}: the catalog says {what}; restore it or rebuild")

    if sum(plane.width_bytes for plane in layout.planes) != spec.row_bytes:
        refuse(f"planes of {[plane.width_bytes for plane in layout.planes]} bytes of a row of {spec.row_bytes}")
    if not any(plane.stretches for plane in layout.planes):
        refuse("that no plane lies in place")
    for plane in layout.planes:
        if plane.copy is not None:
            if (plane.copy.spec.num_rows, plane.copy.spec.row_bytes) != (spec.num_rows, plane.width_bytes):
                refuse(f"a copied plane of {plane.copy.spec.num_rows} rows, the table has {spec.num_rows}")
            continue
        if plane.stretches[0].row_start != 0:
            refuse("that a plane does not begin with row 0")
        for stretch, row_end in zip(plane.stretches, layout.row_ends(plane), strict=True):
            if row_end <= stretch.row_start or stretch.block_start != block:
                refuse(f"a stretch of rows {stretch.row_start} to {row_end} with block {stretch.block_start} first")
            block += num_blocks_of(stretch.byte_start, (row_end - stretch.row_start) * plane.width_bytes)
    if (layout.num_blocks, layout.checksums.spec.row_bytes) != (block, CHECKSUM_BYTES):
        refuse(f"{layout.num_blocks} checksums for {block} blocks")
