"""A version of a store over shared blocks: the same in the daemon, which writes them, and in its clients, which read.

Input: an open store, how its tables lie in the blocks (`SharedShare`), the blocks as memory. Output: what an engine is
made of. Errors: `DaemonError` for a part outside its block. A client has the layout from a daemon's message, so every
part is checked against the length of its block before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from .. import kernels
from ..decisions.budget import cache_set_bytes, overlay_bytes
from ..decisions.shared_budget import HEAD_BYTES, SharedShare
from ..errors import DaemonError
from ..formats.catalog import CatalogImage
from ..formats.in_place import InPlaceLayout
from ..layout import TableLayout, record_bytes
from ..spec import TableSpec
from ..tiers.files import AnyFiles, open_tables
from ..tiers.in_place import SideMemory, side_memory
from ..tiers.native import TableMemory
from ..tiers.overlay import TableOverlay
from ..tiers.placed import PlacementFile


@dataclass(frozen=True)
class Blocks:
    """The memory of one version: control, static, recency, and, if tables are resident, resident; uint8 each."""

    control: np.ndarray
    static: np.ndarray
    recency: np.ndarray
    resident: np.ndarray


class OpenVersion:
    """A store's open files: shards and placement. `close` must come after the last read."""

    def __init__(self, image: CatalogImage, placed: PlacementFile | None, *, direct: bool) -> None:
        """Opens every shard; takes `placed` over, also if that fails."""
        self.image, self.placed = image, placed
        self.files: list[AnyFiles] = []
        try:
            self.files = open_tables(image, direct=direct)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes all; closing twice is harmless."""
        for files in self.files:
            files.close()
        if self.placed:
            self.placed.close()


def part_of(block: np.ndarray, start: int, num_bytes: int, what: str) -> np.ndarray:
    """Returns a part of a block, uint8 [num_bytes]; raises `DaemonError` if the block ends before it."""
    if start + num_bytes > len(block):
        raise DaemonError(
            f"{what}: bytes {start} to {start + num_bytes} of a block of {len(block)}; the daemon's message "
            f"contradicts its blocks: is it of another release?"
        )
    return block[start : start + num_bytes]


@dataclass(frozen=True)
class StaticParts:
    """The static set's parts of a table: records [S, record_bytes], heads [128] and areas [n, 64],
    the file's index likewise."""

    records: np.ndarray
    heads: tuple[np.ndarray, np.ndarray]
    areas: tuple[np.ndarray, np.ndarray]
    file_head: np.ndarray
    file_area: np.ndarray


def static_parts(block: np.ndarray, layout: TableLayout, share: SharedShare) -> StaticParts:
    """Returns where a table's static set lies; raises `DaemonError` if it lies outside the block."""
    name, record, bucket = layout.spec.name, record_bytes(layout.spec.entry_bytes), kernels.INDEX_BUCKET.itemsize
    records = part_of(block, share.records_start, share.num_slots * record, f"records of {name}")
    heads = tuple(part_of(block, start, HEAD_BYTES, f"head of {name}") for start in share.head_starts)
    areas = tuple(
        part_of(block, start, share.area_buckets * bucket, f"index of {name}").reshape(-1, bucket)
        for start in share.area_starts
    )
    return StaticParts(
        records.reshape(-1, record),
        (heads[0], heads[1]),
        (areas[0], areas[1]),
        part_of(block, share.file_head_start, HEAD_BYTES, f"head of {name}"),
        part_of(block, share.file_start, share.file_buckets * bucket, f"index of {name}").reshape(-1, bucket),
    )


def recency_part(block: np.ndarray, layout: TableLayout, share: SharedShare) -> np.ndarray:
    """Returns where a table's recency cache lies."""
    return part_of(
        block, share.recency_start, share.num_sets * cache_set_bytes(layout), f"recency cache of {layout.spec.name}"
    )


def table_memories(
    version: OpenVersion,
    shares: Mapping[str, SharedShare],
    blocks: Blocks,
    tag: int,
    caches: Mapping[str, kernels.EntryCache],
    bad_pages: Mapping[str, Mapping[int, str]],
) -> list[TableMemory]:
    """Returns what an engine over the blocks is made of, a `TableMemory` for each table in the catalog's order.

    caches: a `kernels.EntryCache` for each table that is not resident. bad_pages: of tables and side tables in memory.
    """
    memories, overlays = [], overlays_in(version, shares, blocks.resident)
    for name, layout in version.image.tables.items():
        share = shares[name]
        if share.resident:
            rows = part_of(blocks.resident, share.resident_start, layout.spec.table_bytes, f"rows of {name}")
            memories.append(TableMemory(rows))
            continue
        parts = static_parts(blocks.static, layout, share)
        placed = version.placed.placement.tables.get(name) if version.placed and share.file_buckets else None
        statics = kernels.StaticRecord(
            areas=list(zip(parts.heads, parts.areas, strict=True)),
            records=parts.records,
            num_placed=placed.num_entries if placed else 0,
            byte_start=placed.byte_start if placed else 0,
            file=version.placed.handle if placed and version.placed else None,
            in_file=(parts.file_head, parts.file_area) if placed else None,
        )
        side = _side_memory(blocks, layout, share, bad_pages)
        memories.append(TableMemory(caches[name], statics, tag, side, overlays.get(name)))
    return memories


def overlay_sizes(image: CatalogImage, shares: Mapping[str, SharedShare]) -> dict[str, int]:
    """Returns the bytes of the index of versions' rows of each table that has some and is not resident."""
    return {name: overlay_bytes(num) for name, num in image.touched.items() if not shares[name].resident}


def overlays_in(
    version: OpenVersion, shares: Mapping[str, SharedShare], resident: np.ndarray
) -> dict[str, TableOverlay]:
    """Returns the overlays of tables, whose indexes lie at the end of a version's own block, in the order of the
    catalog; raises `DaemonError` if the block is too short."""
    sizes = overlay_sizes(version.image, shares)
    start, overlays = len(resident) - sum(sizes.values()), {}
    if start < 0:
        raise DaemonError(
            f"the index of versions' rows takes {sum(sizes.values())} bytes, the daemon's block of the version has "
            f"{len(resident)}: is it of another release?"
        )
    for files in version.files:
        name = files.table.spec.name
        if name in sizes:
            memory = part_of(resident, start, sizes[name], f"index of rows of {name}")
            overlays[name] = TableOverlay.within(files.versions, memory)
            start += sizes[name]
    return overlays


def side_part(resident: np.ndarray, layout: InPlaceLayout, share: SharedShare) -> np.ndarray:
    """Returns where a version's block has the checksums and copied planes of a table in place; raises `DaemonError`."""
    name = layout.spec.name
    if share.side_bytes < layout.checksum_bytes:
        raise DaemonError(
            f"table {name}: its checksums take {layout.checksum_bytes} bytes, and the daemon's memory was divided with "
            f"{share.side_bytes} for them: for a store of another kind, or over other files; serve it by a daemon of "
            f"its own"
        )
    return part_of(resident, share.resident_start, share.side_bytes, f"checksums of {name}")


def _side_memory(
    blocks: Blocks, layout: TableLayout, share: SharedShare, bad_pages: Mapping[str, Mapping[int, str]]
) -> SideMemory | None:
    if not isinstance(layout, InPlaceLayout):
        return None
    return side_memory(
        layout, side_part(blocks.resident, layout, share), [name for name, bad in bad_pages.items() if bad]
    )


def same_tables(ours: Sequence[TableSpec], theirs: Sequence[TableSpec]) -> str | None:
    """Returns in what the specs of two versions differ: table, field and both values. None if they do not."""
    mine, other = {spec.name: spec for spec in ours}, {spec.name: spec for spec in theirs}
    if list(mine) != list(other):
        return f"tables are {', '.join(mine)}, and there {', '.join(other)}"
    for name, spec in mine.items():
        for field in fields(spec):  # and nothing that a spec computes and keeps
            value, there = getattr(spec, field.name), getattr(other[name], field.name)
            if there != value:
                return f"table {name}: {field.name} is {str(value)[:80]}, and there {str(there)[:80]}"
    return None
