"""repair: damaged shards from their checkpoint, damaged placements from their own records, bit for bit as they were.

Input: a finished store, its checkpoint, and what `verify.py` finds damaged. Output: a report of what was mended and
what is still wrong. A file is written anew beside the damaged one, compared with what the catalog or the old file's own
checksums say of it, synced and renamed over it, under the store's lock: killed anywhere, a repair leaves each file as
it was or mended. Open stores keep the old files until they are opened again. Errors: another checkpoint, no room,
no catalog.
"""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..causes import NEW_SUFFIX, named
from ..durable import replacing, sync_folder
from ..errors import BudgetError, ConfigError, CorruptPageError, FormatError, TierStoreError
from ..formats.catalog import CatalogImage, read_catalog
from ..formats.checkpoint import PlaneReader, TableSource
from ..formats.page import repair_command
from ..formats.placement import PLACEMENT_FOLDER, Placement, TableShape, lay_out_placement
from ..formats.table_source import source_of_slice
from ..layout import TableLayout
from ..process.progress import OnProgress
from ..units import format_bytes
from .in_place import open_readers
from .place import remove_leftovers
from .placed_choice import ChoiceLostError, read_choice
from .placement_file import Chosen, write_placement
from .shards import BuildProgress, write_shard
from .store_lock import locked_store
from .verify import run_parts, verify_placement, verify_shard, verify_store
from .verify_report import VerifyReport, check_not_stopped

# What the system says if something else is in the place of a file of the store, or of its folder.
IN_THE_WAY = {errno.EISDIR, errno.ENOTDIR, errno.EEXIST}


class RowSource(Protocol):
    """The checkpoint that a store was built from, as a model's adapter opens it: `engram_adapter.open_checkpoint`."""

    @property
    def path(self) -> Path:
        """Where it lies."""

    def to_dict(self) -> dict[str, Any]:
        """Returns who it is, as the catalog's origin says it: at least "digest"."""

    def sources_of(self, image: CatalogImage) -> Sequence[TableSource]:
        """Returns the tables of a store as this checkpoint has them; raises `ConfigError` if it lacks them."""


def verify(
    store_path: str | os.PathLike[str],
    source: RowSource | None = None,
    repair: bool = False,
    *,
    sample_rows: int | None = None,
    seed: int = 0,
    jobs: int | None = None,
    on_progress: OnProgress | None = None,
) -> VerifyReport:
    """Checks every page, placed entry and digest of a store, and its rows against its checkpoint; repairs it if asked.

    Blocks, and reads everything. An interrupt takes effect within a chunk of 4 MiB and leaves the store usable.

    Args:
        store_path: a finished store.
        source: the store's checkpoint. Without `repair`, every row is compared with it.
        repair: rebuild exactly the shards that are damaged or missing from `source`, remake damaged placements from
            what is left of them, and check both again. Rows are compared only in shards that were rebuilt: the
            catalog's SHA-256 answers for the others. Without `source`, only placements are repaired.
        sample_rows: check the pages of that many random rows of each table, drawn with `seed`, instead of all.
        jobs: shards at once; by default one for each processor, at most 4.
        on_progress: called with (parts done, parts in all), in the calling thread.

    Returns:
        What was checked, what is wrong now, what was repaired, and the command that mends the rest.

    Raises:
        StoreNotReadyError, FormatError: there is no finished store, or its catalog is damaged. No repair mends a
        catalog. ConfigError: `source` is another checkpoint, a build or plan of the store is running, or a file cannot
        be written. BudgetError: the disk has too little room.
        ValueError: `repair` together with `sample_rows`.
    """
    path = Path(store_path)
    if repair:
        if sample_rows is not None:
            raise ValueError(f"a sample of {sample_rows} rows does not find all damage; repair without it")
        try:
            report = _repair(path, source, jobs, on_progress)
        except OSError as error:
            raise _named(error, path) from error
    else:
        sources = None if source is None else source.sources_of(read_catalog(path))
        origin = None if source is None else source.to_dict()
        report = verify_store(
            path, sources=sources, origin=origin, sample_rows=sample_rows, seed=seed, jobs=jobs, on_progress=on_progress
        )
    if report.damaged_shards:
        report.remedy = repair_command(path, "CHECKPOINT" if source is None else source.path)
    elif report.damaged_placements and not repair:
        report.remedy = repair_command(path, None)
    return report


def _repair(path: Path, source: RowSource | None, jobs: int | None, on_progress: OnProgress | None) -> VerifyReport:
    try:
        read_catalog(path)  # before a lock is made in a folder that is not a store
    except FormatError as error:
        raise FormatError(f"a repair needs the catalog, and no repair mends the catalog itself: {error}") from error
    with locked_store(path):
        image = read_catalog(path)
        _remove_leftovers(image)
        report = verify_store(path, jobs=jobs, on_progress=on_progress)
        if report.damaged_shards and source is not None:
            _repair_shards(image, source, report, jobs, on_progress)
        for epoch in sorted(report.damaged_placements):
            _repair_placement(image, epoch, report)
    report.sort_faults()
    return report


def _remove_leftovers(image: CatalogImage) -> None:
    """Removes the temporary files of builds, plans and repairs that were killed."""
    for leftover in (image.path / "shards").glob("*/*.new"):
        leftover.unlink()
    if (image.path / PLACEMENT_FOLDER).is_dir():
        remove_leftovers(image.path / PLACEMENT_FOLDER, image)


def _repair_shards(
    image: CatalogImage, source: RowSource, report: VerifyReport, jobs: int | None, on_progress: OnProgress | None
) -> None:
    """Rebuilds every damaged shard of `report` and checks it again; `report` then says what is so now."""
    damaged = sorted(report.damaged_shards)
    names = sorted({image.owner_of(name) for name, _ in damaged})
    specs = {name: layout.public_spec for name, layout in image.tables.items()}
    found_sources = (each for each in source.sources_of(image) if each.spec.name in specs)
    sources = {each.spec.name: source_of_slice(each, specs[each.spec.name]) for each in found_sources}
    for name in names:
        found = sources[name].spec if name in sources else "no such table"
        if found != specs[name]:
            raise ConfigError(
                f"table {name}: {source.path} gives {found}, the store has {specs[name]}: it is another "
                "checkpoint, or an older tierstore read it otherwise; give the one that the store was built from, or "
                f"build the store again"
            )
    jobs = jobs or min(os.cpu_count() or 1, 4)
    _check_room(image, damaged, jobs)
    for folder in {(image.path / image.shards[name][index].file).parent for name, index in damaged}:
        if not folder.is_dir():
            folder.mkdir(parents=True)
            sync_folder(folder.parent)
            sync_folder(image.path)
    with ExitStack() as stack:
        readers = open_readers([sources[name] for name in names], image.tables, stack)
        parts = [partial(_repair_shard, image, image.paged[name], index, readers[name]) for name, index in damaged]
        for shard, again in zip(damaged, run_parts(parts, jobs, on_progress), strict=True):
            mended = report.damaged_shards.pop(shard)
            report.faults = [fault for fault in report.faults if fault not in mended] + again.faults
            report.damaged_shards |= again.damaged_shards
            report.rows_compared += again.rows_compared
            if not again.damaged_shards:
                name, index = shard
                report.repaired.append(f"shard {index} of table {name} ({image.shards[name][index].file})")


def _repair_shard(
    image: CatalogImage, table: TableLayout, index: int, reader: PlaneReader, stop: threading.Event
) -> VerifyReport:
    shard = image.shards[table.spec.name][index]
    progress = BuildProgress(0, stop)
    write_shard(image.path / shard.file, reader, table, index, progress, expected_sha256=shard.sha256)
    check_not_stopped(stop)
    return verify_shard(image, table, index, reader, None, stop)


def _check_room(image: CatalogImage, damaged: Sequence[tuple[str, int]], jobs: int) -> None:
    """A rebuilt shard lies beside the damaged one until it is whole: as many at once as there are jobs."""
    shards = [image.shards[name][index] for name, index in damaged]
    largest = sorted((shard.num_bytes for shard in shards), reverse=True)[:jobs]
    missing = [shard.num_bytes for shard in shards if not (image.path / shard.file).is_file()]
    needed, free = min(sum(largest) + sum(missing), sum(shard.num_bytes for shard in shards)), _free_bytes(image.path)
    if needed > free:
        raise BudgetError(
            f"{image.path}: the repair of {len(shards)} shards needs {format_bytes(needed)} ({needed} bytes), the disk "
            f"has {format_bytes(free)} free ({free} bytes); free some, or repair with fewer --jobs"
        )


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(path).free


def _repair_placement(image: CatalogImage, epoch: int, report: VerifyReport) -> None:
    """Remakes a damaged placement and checks it again, or says why it cannot; `report` then says what is so now."""
    placement: Placement | None = None
    try:
        placement, chosen = read_choice(image, epoch)
        _remake(image, placement, chosen)
    except ChoiceLostError as error:
        report.faults.append(f"placement {epoch}: it cannot be remade: {error}; {_instead(image, epoch, placement)}")
    except (CorruptPageError, FormatError) as error:
        report.faults.append(f"placement {epoch}: it cannot be remade before the shards are whole: {error}")
    else:
        again = verify_placement(image, epoch, threading.Event())
        mended = report.damaged_placements.pop(epoch)
        report.faults = [fault for fault in report.faults if fault not in mended] + again.faults
        report.damaged_placements |= again.damaged_placements
        if not again.faults:
            report.repaired.append(f"placement {epoch} ({image.placements[epoch].file})")


def _remake(image: CatalogImage, placement: Placement, chosen: dict[str, Chosen]) -> None:
    """Writes a placement's file anew and puts it in the place of the old one, if it is the same but for the damage."""
    file = image.path / image.placements[placement.epoch].file
    shapes = {
        name: TableShape(
            tuple(np.bincount(part.order_index, minlength=len(image.tables[name].spec.orders)).tolist()),
            part.static_fraction,
            part.hbm_entries,
        )
        for name, part in chosen.items()
    }
    layout = lay_out_placement(placement.epoch, image.tables, shapes, placement.details)
    with replacing(file, file.with_suffix(NEW_SUFFIX)) as fd:
        with tempfile.TemporaryDirectory(dir=file.parent, prefix="work-") as work:
            remade, _ = write_placement(fd, image, layout, chosen, Path(work), None)
        if remade != placement:  # checksums of indexes included
            raise ChoiceLostError(
                "what its records and indexes still say does not make the indexes that its head names"
            )


def _instead(image: CatalogImage, epoch: int, placement: Placement | None) -> str:
    """What to do about a placement that cannot be remade: the commands."""
    drop = f"tierstore epochs {shlex.quote(str(image.path))} --prune --keep 0"
    if epoch != image.epoch:
        return f"it is not the current one: remove all that are not: {drop}"
    details = placement.details if placement is not None else {}
    plan = details.get("plan") or {}
    words = ["tierstore", "plan", str(image.path), str(details.get("profile", "PROFILE"))]
    words += ["--dram", str(plan.get("dram_bytes", "SIZE"))]
    for option, name in (("--hbm", "hbm_bytes"), ("--nvme-entries", "nvme_bytes")):
        if plan.get(name):
            words += [option, str(plan[name])]
    return f"plan again: {shlex.join(words)}, and then remove it: {drop}"


def _named(error: OSError, path: Path) -> TierStoreError:
    """Turns what the operating system refused into an error that says what to do."""
    if error.errno in IN_THE_WAY:
        where = error.filename2 or error.filename or path
        return ConfigError(f"{where}: {error.strerror}; it is in the place of a file of the store: move it away")
    return named(
        error, path, error.filename, writing=True, note="run the same command again: what is repaired stays repaired"
    )
