"""reslice: the slices of W stores become those of M stores, with what training made of them.

Input: stores with slices that hold every row once, built or from scratch, trained or not. Output: M stores, or one
store with whole tables. Errors: those of `slice_set` and `resliced_commit`, and of a build; `ConfigError` for a new
folder that holds something else.

A new store has its name only once it is whole. Before, it lies beside it as `.NAME.resliced`, and the same call goes on
there. Memory: some MiB a shard under way; of trained stores, 18 bytes a row that one slice's commit has.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..causes import named
from ..durable import sync_folder
from ..errors import ConfigError, TierStoreError
from ..formats.catalog import CATALOG_FILE, LOCK_FILE, CatalogImage, create_catalog, mark_ready, read_catalog
from ..formats.initial import InitialLayout, lay_out_initial
from ..formats.page import page_seed
from ..formats.training_records import read_training
from ..offline.build import build_store, check_place
from ..offline.slice_set import SliceSet, at_one_version, join_slices
from ..offline.store_lock import locked_store
from ..process.progress import OnProgress
from ..slices import slice_bounds
from ..spec import TableSpec
from .resliced_commit import SlicesCommit, choose_commit, write_commit

RESLICED = "resliced"  # in an origin: the commits that a store's first commit was made of


@dataclass(frozen=True)
class ResliceReport:
    """What was done.

    Attributes:
        stores: The new stores, by slice.
        step: Of the commit that they hold; None without one.
        version: Of which their rows are; 0: of the base.
        bytes_written: Of shards; kept ones of an earlier call are not counted.
    """

    stores: tuple[Path, ...]
    step: int | None
    version: int
    bytes_written: int


def reslice(
    slices: Sequence[str | os.PathLike[str]],
    into: str | os.PathLike[str],
    num_slices: int,
    *,
    step: int | None = None,
    version: int | None = None,
    shard_bytes: int | None = None,
    jobs: int | None = None,
    allow_network_fs: bool = False,
    on_progress: OnProgress | None = None,
) -> ResliceReport:
    """Makes new slices of stores with slices; also `tierstore.reslice`. Blocks until all are ready.

    The old stores stay as they are. Rows, training records and the optimizer's state are copied bit for bit. If it
    stops, the same call goes on.

    Args:
        slices: Stores that hold every row of their tables once, in any order; a store with whole tables is one slice.
        into: Where the new stores go: "{}" in it stands for a slice's number. Without it, one store goes there, and
            several go to folders "0", "1", ... in it.
        num_slices: How many; 1 makes a store with whole tables.
        step: Of trained slices, the commit of this step, which all must hold. None: the newest that all hold.
        version: Of slices without a commit, the published version whose rows are taken; None: the newest that all
            hold.
        shard_bytes: The largest shard; None: as the old stores have it.
        jobs: Shards built at once; None: one for each processor, at most 4.
        allow_network_fs: Make them on a network file system that only this host uses.
        on_progress: (bytes done, bytes in all) of the store under way, now and then.

    Returns:
        What was done. New stores of trained slices have one commit, number 1; versions that were published stay
        behind: publish again. Its payload is that of the slice with row 0.

    Raises:
        ConfigError: Slices are missing, overlap, or are of different checkpoints or trainings; there is no such step;
            there are more slices than rows; a new folder holds something else.
        BudgetError: The disk has too little room.
        CorruptPageError: A row or a record is damaged.
    """
    joined = join_slices([read_catalog(path, may_be_initial=True) for path in slices])
    for spec in joined.specs:
        slice_bounds(spec, num_slices)  # refuses what cannot be
    commit = choose_commit(joined, step)
    joined = at_one_version(joined, 0 if commit is not None or joined.is_initial else version)
    paths = _paths(into, num_slices)
    for path in paths:
        if any(path.exists() and os.path.samefile(path, old) for old in slices):
            raise ConfigError(f"{path} is one of the slices, which stay as they are: give a new folder")
    options: dict[str, Any] = {
        "shard_bytes": joined.shard_bytes() if shard_bytes is None else shard_bytes, "jobs": jobs,
        "allow_network_fs": allow_network_fs, "on_progress": on_progress,
    }  # fmt: skip
    written = 0
    for index, path in enumerate(paths):
        part = None if num_slices == 1 else (index, num_slices)
        written += _make(path, joined, commit, part, options)
    version = joined.images[0].version
    return ResliceReport(tuple(paths), None if commit is None else commit.step, version, written)


def _paths(into: str | os.PathLike[str], num_slices: int) -> list[Path]:
    text = os.fspath(into)
    if Path(text).name in ("", ".."):  # the unfinished store's name is made of the folder's own
        text = os.path.abspath(text)
    if "{}" in text:
        paths = [Path(text.replace("{}", str(index))) for index in range(num_slices)]
        if len(set(paths)) != num_slices:
            raise ConfigError(f"{text}: two slices would go to one folder")
        return paths
    return [Path(text)] if num_slices == 1 else [Path(text) / str(index) for index in range(num_slices)]


def _make(
    path: Path, slices: SliceSet, commit: SlicesCommit | None, part: tuple[int, int] | None, options: dict[str, Any]
) -> int:
    """Makes one new store, unless it is there; returns how many bytes of shards were written."""
    origin = slices.origin()
    if commit is not None:
        origin |= {RESLICED: {"step": commit.step, "commits": commit.digests}}
    specs = [spec if part is None else spec.cut_slice(*part) for spec in slices.specs]
    if _is_there(path, specs, origin):
        return 0
    unfinished = path.with_name(f".{path.name}.resliced")
    if _is_of_others(unfinished, specs, origin):
        shutil.rmtree(unfinished)
    try:
        check_place(path, options["allow_network_fs"])
        written = _build(unfinished, slices, origin, part, options)
        image = read_catalog(unfinished, may_be_initial=True)
        records = read_training(unfinished)
        if commit is not None and (records is None or not records.commits):
            write_commit(unfinished, image, slices, commit)
        (unfinished / LOCK_FILE).unlink(missing_ok=True)
        if path.is_dir():
            path.rmdir()
        unfinished.rename(path)
        sync_folder(path.parent)
    except TierStoreError as error:
        error.args = (str(error).replace(os.fspath(unfinished), os.fspath(path)),)  # people know only the final name
        raise
    except OSError as error:
        raise named(error, path, error.filename, writing=True, note="run the same command then: it goes on") from error
    return written


def _is_there(path: Path, specs: list[TableSpec], origin: dict[str, Any]) -> bool:
    """Whether a new store is finished already; raises `ConfigError` if its folder holds another one."""
    if not (path / CATALOG_FILE).is_file():
        return False
    image = read_catalog(path, must_be_ready=False, may_be_initial=True)
    if not image.ready or not _is_of(image, specs, origin):
        raise ConfigError(f"{path} holds another store; give another path, or remove it")
    return True


def _is_of(image: CatalogImage, specs: list[TableSpec], origin: dict[str, Any]) -> bool:
    if [layout.public_spec for layout in image.tables.values()] != specs:
        return False
    return all(image.origin.get(key) == origin.get(key) for key in ("digest", RESLICED))


def _is_of_others(unfinished: Path, specs: list[TableSpec], origin: dict[str, Any]) -> bool:
    """Whether what an earlier call left is of other rows, slices or commits, or of no use."""
    if not unfinished.exists():
        return False
    if not (unfinished / CATALOG_FILE).is_file():
        return True
    return not _is_of(read_catalog(unfinished, must_be_ready=False, may_be_initial=True), specs, origin)


def _build(
    path: Path, slices: SliceSet, origin: dict[str, Any], part: tuple[int, int] | None, options: dict[str, Any]
) -> int:
    """Builds the rows of one new store, or goes on with it; returns the bytes of shards that were written."""
    attachments = slices.images[0].attachments
    if not slices.is_initial:
        report = build_store(path, slices.sources(), origin=origin, attachments=attachments, slice=part, **options)
        return report.bytes_written
    if part is not None:
        origin = origin | {"slice": f"{part[0]}/{part[1]}"}
    tables = {}
    for spec in slices.specs:
        own, layout = spec if part is None else spec.cut_slice(*part), slices.images[0].tables[spec.name]
        assert isinstance(layout, InitialLayout)
        tables[spec.name] = lay_out_initial(own, page_seed(own, str(origin["digest"])), layout.initializer)
    with locked_store(path) as made:
        made.clear()
        if not (path / CATALOG_FILE).exists():
            create_catalog(path, tables, origin, attachments)
        mark_ready(path)
    return 0
