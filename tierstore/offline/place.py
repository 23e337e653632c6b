"""place: a plan -> its entries -> one placement file -> a new epoch in the catalog.

Input: a `Plan`, or for each table the (order index, key) pairs that were chosen, hottest first. Output: an immutable
file with their entries back to back and the indexes that find them, published last. Every page that is needed is read
once, in page order, and its rows go through buckets of the destination, so that memory stays bounded whatever the size.
Killed anywhere, it leaves the old epoch. Errors: before it writes, what the disk has no room for, and plans of other
tables.

Memory: 13 bytes a chosen entry of one table, 32 bytes an entry of one order (its rows of one head, sorted), the index
of one order, and two buckets.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .. import kernels
from ..causes import NEW_SUFFIX, named, naming
from ..durable import replacing, write_all
from ..errors import BudgetError, ConfigError
from ..formats.catalog import CatalogImage, forget_placement, publish_placement, read_catalog, set_epoch
from ..formats.placement import (
    HEAD_BYTES_MAX,
    PLACEMENT_FOLDER,
    RECORDS_MAX,
    PlacedTable,
    Placement,
    TableShape,
    head_bytes,
    lay_out_placement,
)
from ..formats.profile import ProfileReader
from ..layout import PlacementRecord, TableLayout
from ..process.progress import CHOOSING, PLACING, OnPhase, OnProgress, no_report
from ..process.workers import aside
from ..tiers.nvme import TableFiles, read_pages
from ..units import format_bytes
from .build import locked_store
from .plan import Plan
from .ranked_items import ItemRanking

BUCKET_BYTES = 96 << 20  # of the destination, filled at once in memory
SPARE_DISK_BYTES = 64 << 20  # left free beside what is written
READ_BYTES = 8 << 20  # of pages at once
ROWS_AT_ONCE = 1 << 15  # that are taken out of them together, however many keys share a row
DENSE_FRACTION = 0.25  # if more of a stretch of pages is needed, the whole stretch is read
DETAILS_BYTES_MAX = HEAD_BYTES_MAX // 4  # of what a placement says of its plan


@dataclass(frozen=True)
class Chosen:
    """The entries chosen of one table, hottest first: order_index, uint8 [n], and keys, int64 [n]; all pairs differ.

    static_fraction, hbm_entries: as in `PlacedTable`.
    """

    order_index: np.ndarray
    keys: np.ndarray
    static_fraction: float = 1.0
    hbm_entries: int = 0


@dataclass(frozen=True)
class PlacePreflight:
    """What will be written, and what the disk has: the preflight."""

    placement: Placement
    bytes_needed: int
    bytes_free: int


@dataclass(frozen=True)
class PlaceReport:
    """What was made."""

    placement: Placement
    pages_read: int
    seconds: float


def place(
    store_path: str | os.PathLike[str],
    plan: Plan,
    *,
    on_preflight: Callable[[PlacePreflight], None] | None = None,
    on_progress: OnPhase | None = None,
) -> int | None:
    """Makes the placement that a plan recommends, which the store opens with from now on; also `tierstore.place`.

    Blocks until it is durable. Killed or interrupted anywhere, it leaves the placement from before.

    Args:
        store_path: the store that was planned for.
        plan: what to place; its profile's file is read.
        on_preflight: called with what will be written, before anything is.
        on_progress: called with (phase, done, of how many or None): choosing, then placing (in rows).

    Returns:
        The number of the new epoch; None if the plan places nothing, and the store opens without a placement from now
        on.

    Raises:
        StoreNotReadyError, FormatError: there is no finished store, or a file is damaged.
        FingerprintMismatchError: the plan is for other tables.
        ConfigError: the profile's file is gone or another one by now; another build or plan of the
            store is running; or a file cannot be written.
        BudgetError: the disk has too little room.
        CorruptPageError: a page that is needed is damaged.
    """
    report = place_plan(store_path, plan, on_preflight=on_preflight, on_progress=on_progress)
    return None if report is None else report.placement.epoch


def place_plan(
    store_path: str | os.PathLike[str],
    plan: Plan,
    *,
    on_preflight: Callable[[PlacePreflight], None] | None = None,
    on_progress: OnPhase | None = None,
) -> PlaceReport | None:
    """As `place`, but returns all that is known of what was made; None if nothing was."""
    report = on_progress or no_report
    path = Path(store_path)
    image = read_catalog(path)
    report(CHOOSING, 0, None)
    with plan.profile.open() as reader:
        chosen = choose_entries(image, plan, reader)
    if not chosen:
        with locked_store(path):
            set_epoch(path, None)
        return None
    return place_entries(
        path,
        chosen,
        details=_details(plan),
        on_preflight=on_preflight,
        on_progress=lambda done, total: report(PLACING, done, total),
    )


def choose_entries(image: CatalogImage, plan: Plan, reader: ProfileReader) -> dict[str, Chosen]:
    """Reads a plan's profile for the entries to place; returns them by table, hottest first. Blocks."""
    mapping = plan.profile.mapping
    mapping.check(image.tables, plan.profile.header)
    chosen: dict[str, Chosen] = {}
    for ranking, group in zip(plan.rankings, plan.groups, strict=True):
        if group.num_entries == 0:
            continue
        order_index, items = ItemRanking(reader, ranking).first(group.num_entries)
        for name in group.tables:
            keys = mapping.keys_of(items, order_index, name)
            chosen[name] = Chosen(order_index, keys, group.static_fraction, min(group.hbm_entries, len(keys)))
    return chosen


def _details(plan: Plan) -> dict[str, Any]:
    """Returns what a placement says of its plan; groups of so many tables that they take too much room are left out."""
    details: dict[str, Any] = {"profile": plan.profile.path.name, "plan": plan.to_dict()}
    if len(json.dumps(details)) > DETAILS_BYTES_MAX:
        del details["plan"]["groups"]
    return details


def place_entries(
    store_path: str | os.PathLike[str],
    chosen: Mapping[str, Chosen],
    *,
    details: dict[str, Any] | None = None,
    on_preflight: Callable[[PlacePreflight], None] | None = None,
    on_progress: OnProgress | None = None,
) -> PlaceReport:
    """Makes a placement of a store and publishes it as its new current epoch. Blocks until it is durable.

    details: as in `Placement`. on_preflight gets the preflight before anything is written, on_progress (rows done, rows
    in all) now and then. Raises `BudgetError` if the disk has too little room (also midway), `ConfigError` for tables
    that the store lacks, `CorruptPageError` for damaged pages, `FormatError` for details that are too long,
    `ValueError` for what cannot be placed. The old epoch stays until it is published over, and in the store after that.
    """
    path = Path(store_path)
    started = time.monotonic()
    read_catalog(path)  # before a lock is made where no store is
    with naming(path, writing=True), locked_store(path):
        image = read_catalog(path)
        _check_chosen(image, chosen)
        epoch = image.last_epoch + 1
        folder = path / PLACEMENT_FOLDER
        folder.mkdir(exist_ok=True)
        remove_leftovers(folder, image)
        shapes = {name: _shape_of(part, len(image.tables[name].spec.orders)) for name, part in chosen.items()}
        placement = lay_out_placement(epoch, image.tables, shapes, details or {})
        _check_head(placement)
        preflight = PlacePreflight(placement, _bytes_needed(placement, image.tables), shutil.disk_usage(folder).free)
        if on_preflight:
            on_preflight(preflight)
        if preflight.bytes_needed > preflight.bytes_free:
            raise BudgetError(
                f"{folder}: the placement needs {format_bytes(preflight.bytes_needed)} of disk "
                f"({preflight.bytes_needed} bytes, buckets included), "
                f"{format_bytes(preflight.bytes_free)} ({preflight.bytes_free} bytes) are free; "
                f"place fewer entries, or free some"
            )
        file = folder / f"{epoch:08d}.placement"
        try:
            with (
                replacing(file, file.with_suffix(NEW_SUFFIX)) as fd,
                tempfile.TemporaryDirectory(dir=folder, prefix="work-") as work,
            ):
                placement, pages = write_placement(fd, image, placement, chosen, Path(work), on_progress)
            publish_placement(path, PlacementRecord(epoch, f"{PLACEMENT_FOLDER}/{file.name}", placement.num_bytes))
        except BaseException as error:
            kept = read_catalog(path)
            remove_leftovers(folder, kept)
            if not isinstance(error, OSError):
                raise
            note = f"then plan again; the store keeps epoch {kept.epoch}"
            raise named(error, folder, writing=True, needed_bytes=preflight.bytes_needed, note=note) from error
    return PlaceReport(placement, pages, time.monotonic() - started)


def prune_placements(store_path: str | os.PathLike[str], keep: int) -> list[PlacementRecord]:
    """Removes all placements but the current one and the newest `keep` others; returns those removed.

    A store that has one open keeps reading it until it closes.
    """
    path = Path(store_path)
    read_catalog(path)
    with naming(path, writing=True), locked_store(path):
        image = read_catalog(path)
        others = sorted(epoch for epoch in image.placements if epoch != image.epoch)
        removed = [image.placements[epoch] for epoch in others[: max(0, len(others) - keep)]]
        for record in removed:
            forget_placement(path, record.epoch)
            (path / record.file).unlink(missing_ok=True)
        if (path / PLACEMENT_FOLDER).is_dir():
            remove_leftovers(path / PLACEMENT_FOLDER, read_catalog(path))
    return removed


def _check_chosen(image: CatalogImage, chosen: Mapping[str, Chosen]) -> None:
    for name, part in chosen.items():
        if name not in image.tables:
            raise ConfigError(f"{image.path} has no table {name}; it has {', '.join(image.tables)}")
        spec = image.tables[name].spec
        if len(part.keys) > RECORDS_MAX:
            raise ConfigError(f"table {name}: {len(part.keys)} entries to place, at most {RECORDS_MAX}; place fewer")
        if len(part.keys) and (part.keys.min() < 0 or part.order_index.max() >= len(spec.orders)):
            raise ValueError(f"table {name}: keys below 0, or orders that it has not, cannot be placed")
        if spec.is_plain and len(part.keys) and part.keys.max() >= spec.num_rows:
            raise ValueError(f"table {name}: key {part.keys.max()} is outside its {spec.num_rows} rows")
        if not 0 <= part.static_fraction <= 1 or not 0 <= part.hbm_entries <= len(part.keys):
            raise ValueError(
                f"table {name}: static_fraction {part.static_fraction} must be within 0 and 1, hbm_entries "
                f"{part.hbm_entries} within 0 and its {len(part.keys)} entries"
            )


def _check_head(placement: Placement) -> None:
    """Raises `FormatError` where the head will not fit, before hours of work and not after."""
    tables = {
        name: replace(table, indexes=tuple(replace(index, checksum=2**32 - 1) for index in table.indexes))
        for name, table in placement.tables.items()
    }
    head_bytes(replace(placement, tables=tables))


def _shape_of(part: Chosen, num_orders: int) -> TableShape:
    entries_of_order = np.bincount(part.order_index, minlength=num_orders).tolist()
    return TableShape(tuple(entries_of_order), part.static_fraction, part.hbm_entries)


def _bytes_needed(placement: Placement, layouts: Mapping[str, TableLayout]) -> int:
    """The file; and beside it the rows of the largest table that does not fit one bucket, each with its place."""
    spilled = [
        table.num_entries * layouts[name].spec.rows_per_key * _placed_row(layouts[name]).itemsize
        for name, table in placement.tables.items()
        if table.num_entries > _entries_of_bucket(table)
    ]
    return placement.num_bytes + max(spilled, default=0) + SPARE_DISK_BYTES


def _entries_of_bucket(table: PlacedTable) -> int:
    return max(1, BUCKET_BYTES // table.record_bytes)


def _placed_row(layout: TableLayout) -> np.dtype[np.void]:
    """A row on its way: the head-th of the entry at a place of its bucket."""
    return np.dtype([("place", "<u4"), ("head", "<u4"), ("row", "u1", (layout.spec.row_bytes,))])


def remove_leftovers(folder: Path, image: CatalogImage) -> None:
    """Removes what killed runs left: nothing that the catalog does not name is anybody's."""
    named = {Path(record.file).name for record in image.placements.values()}
    for entry in folder.iterdir():
        if entry.name in named:
            continue
        if entry.is_dir() and entry.name.startswith("work-"):
            shutil.rmtree(entry)
        elif entry.suffix in (".new", ".placement"):
            entry.unlink()


def write_placement(
    fd: int,
    image: CatalogImage,
    placement: Placement,
    chosen: Mapping[str, Chosen],
    work: Path,
    on_progress: OnProgress | None,
) -> tuple[Placement, int]:
    """Fills the empty file `fd`; returns the placement with its indexes' checksums, and how many pages were read."""
    total = sum(len(part.keys) * image.tables[name].spec.rows_per_key for name, part in chosen.items())
    done = pages_read = 0
    os.ftruncate(fd, placement.num_bytes)
    tables = {}
    for name, part in chosen.items():
        layout, table = image.tables[name], placement.tables[name]
        tables[name] = _write_indexes(fd, table, part)
        destination = _Destination(fd, layout, table, part, work)
        files = TableFiles(image, layout, direct=False)
        try:
            for places, heads, rows, num_pages in _needed_rows(files, part):
                destination.add(places, heads, rows)
                pages_read += num_pages
                done += len(rows)
                if on_progress:
                    on_progress(done, total)
        finally:
            files.close()
        destination.finish()
    placement = replace(placement, tables=tables)
    write_all(fd, head_bytes(placement), 0)
    return placement, pages_read


def _write_indexes(fd: int, table: PlacedTable, part: Chosen) -> PlacedTable:
    indexes = []
    for order_index, index in enumerate(table.indexes):
        places = np.flatnonzero(part.order_index == order_index)
        buckets = np.empty((index.num_buckets, kernels.INDEX_BUCKET.itemsize), dtype=np.uint8)
        room = aside(kernels.index_entries, part.keys[places], places.astype(np.uint32), buckets)
        assert room, "lay_out_placement gives a bucket for 3.5 keys"
        write_all(fd, buckets, index.byte_start)
        indexes.append(replace(index, checksum=aside(kernels.crc32c, buckets)))
    return replace(table, indexes=tuple(indexes))


def _needed_rows(files: TableFiles, part: Chosen) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    """Yields (places [R], heads [R], rows [R, row_bytes], pages read) in page order, head by head:
    a head is a range of rows."""
    layout, spec = files.table, files.table.spec
    pages = np.empty((max(1, READ_BYTES // layout.page_bytes), layout.page_bytes), dtype=np.uint8)
    heads = sorted(range(spec.num_heads), key=lambda head: spec.offsets[head])
    for head in heads:
        order_index, of_entry = divmod(head, spec.rows_per_key)
        places = np.flatnonzero(part.order_index == order_index)
        row_ids = part.keys[places] % spec.moduli[head] + spec.offsets[head]
        by_row = np.argsort(row_ids)
        places, row_ids = places[by_row].astype(np.uint32), row_ids[by_row]
        for stretch_start, stretch_end, page_numbers in _stretches(row_ids // layout.rows_per_page, len(pages)):
            read_pages(files, page_numbers, pages[: len(page_numbers)])
            rows = layout.shape.rows_of(pages[: len(page_numbers)])
            num_read = len(page_numbers)
            for start in range(stretch_start, stretch_end, ROWS_AT_ONCE):
                end = min(start + ROWS_AT_ONCE, stretch_end)
                at = np.searchsorted(page_numbers, row_ids[start:end] // layout.rows_per_page)
                found = rows[at, row_ids[start:end] % layout.rows_per_page]
                yield places[start:end], np.full(end - start, of_entry, dtype=np.uint32), found, num_read
                num_read = 0
    for shard_index in range(layout.num_shards):
        os.posix_fadvise(files.fd(shard_index), 0, 0, os.POSIX_FADV_DONTNEED)


def _stretches(pages: np.ndarray, pages_max: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Cuts pages, int64 [R] ascending, into (start, end, pages to read): those needed,
    or all between where many are."""
    needed, firsts = np.unique(pages, return_index=True)
    bounds = np.append(firsts, len(pages))
    i = 0
    while i < len(needed):
        dense_end = int(np.searchsorted(needed, needed[i] + pages_max))
        is_dense = dense_end - i > DENSE_FRACTION * pages_max
        j = dense_end if is_dense else min(i + pages_max, len(needed))
        read = np.arange(needed[i], needed[j - 1] + 1) if is_dense else needed[i:j]
        yield int(bounds[i]), int(bounds[j]), read
        i = j


class _Destination:
    """A table's records on their way into the file: filled in memory where they fit one bucket, else through a file.

    That file has a region for each bucket, which its rows fill in the order in which they are read.
    """

    def __init__(self, fd: int, layout: TableLayout, table: PlacedTable, part: Chosen, work: Path) -> None:
        self._fd, self._layout, self._table, self._part = fd, layout, table, part
        self._per_bucket = _entries_of_bucket(table)
        self._num_buckets = -(-table.num_entries // self._per_bucket)
        self._placed_row = _placed_row(layout)
        self._memory = np.empty((min(self._per_bucket, table.num_entries), table.record_bytes), dtype=np.uint8)
        self._file = (work / "rows").open("w+b") if self._num_buckets > 1 else None
        self._rows_added = np.zeros(self._num_buckets, dtype=np.int64)

    def add(self, places: np.ndarray, heads: np.ndarray, rows: np.ndarray) -> None:
        """Takes rows, uint8 [R, row_bytes], each the head-th of the entry at its place."""
        if self._file is None:
            self._rows_of(self._memory)[places, heads] = rows
            return
        bucket = places // self._per_bucket
        by_bucket = np.argsort(bucket, kind="stable")
        placed = np.empty(len(rows), dtype=self._placed_row)
        placed["place"], placed["head"] = places[by_bucket] % self._per_bucket, heads[by_bucket]
        placed["row"] = rows[by_bucket]
        buckets, starts = np.unique(bucket[by_bucket], return_index=True)
        for number, start, end in zip(
            buckets.tolist(), starts.tolist(), [*starts.tolist()[1:], len(rows)], strict=True
        ):
            at = self._region_start(number) + int(self._rows_added[number]) * self._placed_row.itemsize
            write_all(self._file.fileno(), placed[start:end].view(np.uint8), at)
            self._rows_added[number] += end - start

    def _region_start(self, bucket: int) -> int:
        return bucket * self._per_bucket * self._layout.spec.rows_per_key * self._placed_row.itemsize

    def finish(self) -> None:
        """Seals every record and writes it to its place."""
        for bucket in range(self._num_buckets):
            start = bucket * self._per_bucket
            records = self._memory[: min(self._per_bucket, self._table.num_entries - start)]
            if self._file is not None:
                self._gather(self._file, bucket, records)
            keys = self._part.keys[start : start + len(records)]
            order_index = self._part.order_index[start : start + len(records)].astype(np.uint32)
            aside(kernels.seal_records, records, keys, order_index, self._table.entry_bytes, self._layout.seed)
            write_all(self._fd, records, self._table.byte_start + start * self._table.record_bytes)
        if self._file is not None:
            self._file.close()
            Path(self._file.name).unlink()

    def _gather(self, file: BinaryIO, bucket: int, records: np.ndarray) -> None:
        num_rows = len(records) * self._layout.spec.rows_per_key
        assert self._rows_added[bucket] == num_rows, "every row of every entry was added once"
        placed = np.fromfile(file.name, self._placed_row, num_rows, offset=self._region_start(bucket))
        self._rows_of(records)[placed["place"], placed["head"]] = placed["row"]

    def _rows_of(self, records: np.ndarray) -> np.ndarray:
        """The rows of records, uint8 [n, H, row_bytes]; no copy."""
        spec = self._layout.spec
        shape, strides = (len(records), spec.rows_per_key, spec.row_bytes), (records.shape[1], spec.row_bytes, 1)
        return np.lib.stride_tricks.as_strided(records, shape, strides)
