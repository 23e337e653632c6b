"""place: a plan -> its entries -> one placement file -> a new epoch in the catalog.

Input: a `Plan`, or for each table the (order index, key) pairs that were chosen, hottest first. Output: an immutable
file, published last: killed anywhere, it leaves the old epoch. Errors: before it writes, what the disk has no room for,
and plans of other tables.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..causes import NEW_SUFFIX, named, naming
from ..durable import replacing
from ..errors import BudgetError, ConfigError
from ..formats.catalog import CatalogImage, forget_placement, publish_placement, read_catalog, set_epoch
from ..formats.placement import (
    HEAD_BYTES_MAX,
    PLACEMENT_FOLDER,
    RECORDS_MAX,
    Placement,
    TableShape,
    head_bytes,
    lay_out_placement,
)
from ..formats.profile import ProfileReader
from ..layout import PlacementRecord
from ..process.progress import CHOOSING, PLACING, OnPhase, OnProgress, no_report
from ..spec import TableSpec
from ..units import format_bytes
from .placement_file import Chosen, bytes_needed, write_placement
from .plan import Plan
from .ranked_items import ItemRanking
from .store_lock import locked_store

DETAILS_BYTES_MAX = HEAD_BYTES_MAX // 4  # of what a placement says of its plan


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
        slices = [name for name in group.tables if image.tables[name].public_spec.is_slice]
        if len(slices) < len(group.tables):
            order_index, items = ItemRanking(reader, ranking).first(group.num_entries)
            for name in set(group.tables) - set(slices):
                keys = mapping.keys_of(items, order_index, name)
                chosen[name] = Chosen(order_index, keys, group.static_fraction, min(group.hbm_entries, len(keys)))
        for name in slices:
            columns = columns_of_keys(image.tables[name].public_spec, group.orders)
            if not len(columns):
                continue  # of a slice that is cut inside a head, which has no entries
            order_index, items = ItemRanking(reader, ranking, columns).first(group.num_entries)
            keys = mapping.keys_of(items, order_index, name)
            own_order, own_keys = entries_of_slice(image.tables[name].public_spec, columns, order_index, keys)
            own_order, own_keys = own_order[: group.num_entries], own_keys[: group.num_entries]
            hbm_entries = min(group.hbm_entries, len(own_keys))
            chosen[name] = Chosen(own_order, own_keys, group.static_fraction, hbm_entries)
    return {name: chosen[name] for name in image.tables if name in chosen}


def columns_of_keys(spec: TableSpec, orders: tuple[int, ...]) -> np.ndarray:
    """Returns which columns of keys of `orders`, the slice's own or the whole table's, its own columns are."""
    assert spec.whole is not None, "of a slice"
    return np.arange(len(orders)) if orders == spec.orders != spec.whole.orders else spec.columns(orders)


def entries_of_slice(
    spec: TableSpec, columns: np.ndarray, order_index: np.ndarray, keys: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the entries of a slice, as its engine has them, of keys int64 [n] and their columns uint8 [n].

    The order stays: a key becomes one entry for each of its order's groups of heads that the slice has, and none for a
    row of a plain table that lies in another slice.
    """
    if spec.is_plain:
        mine = (keys >= spec.row_start) & (keys < spec.row_end)
        return order_index[mine], keys[mine] - spec.row_start
    is_held = order_index[:, None] == columns  # [n, own orders]
    place, own_order = np.nonzero(is_held)
    return own_order.astype(np.uint8), keys[place]


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
    read_catalog(path)  # before a lock is made in a folder that is not a store
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
        preflight = PlacePreflight(placement, bytes_needed(placement, image.tables), shutil.disk_usage(folder).free)
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
    """Raises `FormatError` if the head will not fit, before hours of work and not after."""
    tables = {
        name: replace(table, indexes=tuple(replace(index, checksum=2**32 - 1) for index in table.indexes))
        for name, table in placement.tables.items()
    }
    head_bytes(replace(placement, tables=tables))


def _shape_of(part: Chosen, num_orders: int) -> TableShape:
    entries_of_order = np.bincount(part.order_index, minlength=num_orders).tolist()
    return TableShape(tuple(entries_of_order), part.static_fraction, part.hbm_entries)


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
