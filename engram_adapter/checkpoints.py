"""A checkpoint as the source of a store's rows: what a store is built from, compared with and repaired from.

Input: the path of a checkpoint. Output: its store, or a `CheckpointRows`, which finds the tables of any store that was
built from it. Errors: a checkpoint that lacks those tables, or a store that does not say how it was built.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tierstore.errors import ConfigError, FormatError
from tierstore.formats.catalog import CATALOG_FILE, CatalogImage
from tierstore.formats.checkpoint import Checkpoint, TableSource
from tierstore.formats.table_source import cut_sources, find_hole
from tierstore.offline.build import BuildPlan, BuildReport, build_from_store, build_store

from .families import plain_source, read_model
from .hash_spec import RECORD_NAME

SHARD_BYTES = 1 << 30


@dataclass(frozen=True)
class CheckpointRows:
    """An open checkpoint; keeps the `tierstore.offline.repair.RowSource` contract.
    Nothing is read before it is asked for."""

    checkpoint: Checkpoint

    @property
    def path(self) -> Path:
        """Where the checkpoint lies."""
        return self.checkpoint.path

    def to_dict(self) -> dict[str, Any]:
        """Returns who it is: its digest, its files. Blocks: reads samples of every tensor."""
        return self.checkpoint.to_dict()

    def sources_of(self, image: CatalogImage) -> Sequence[TableSource]:
        """Returns its tables as a store was built from them: see `sources_of_store`."""
        return sources_of_store(image, self.checkpoint)


def open_checkpoint(folder: str | os.PathLike[str]) -> CheckpointRows:
    """Opens a checkpoint as a source of rows, for `tierstore.verify(store_path, source=...)`.

    Args:
        folder: a folder with config.json and *.safetensors, or one file of tensors, as `tierstore build` takes it.

    Raises:
        ConfigError: something is missing or cannot be read.
        FormatError: a header lies about its file.
    """
    return CheckpointRows(Checkpoint.open(folder))


def build_checkpoint(
    folder: str | os.PathLike[str],
    store_path: str | os.PathLike[str],
    *,
    family: str | None = None,
    tensor: str | None = None,
    jobs: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    allow_network_fs: bool = False,
    allow_holes: bool = False,
    in_place: bool = False,
    slice: tuple[int, int] | None = None,
    on_plan: Callable[[BuildPlan], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> BuildReport:
    """Builds the store of a checkpoint, or resumes it; also `engram_adapter.build_checkpoint`.

    Blocks until the store is ready.

    Args:
        folder: the checkpoint: a folder with config.json and *.safetensors, or one file of tensors; or a store in
            place, of which this makes one with shards.
        store_path: the store's folder; a build that was killed goes on there.
        family: which layout to read; by default found from config.json.
        tensor: take this one 2-D tensor as a plain table (row id = key) instead.
        jobs: shards built at once; by default one for each processor, at most 4.
        shard_bytes: the largest shard.
        allow_network_fs: build on a network file system that only this host uses.
        allow_holes: take parts of the checkpoint that were never written for zeros.
        in_place: leave the rows in the checkpoint's files, and write only what checks them. The files must stay as
            they are, where they are; the same build again compares them, and notes where they are now.
        slice: (I, N): only slice I of N of every table, from 0 on. Of the tables' bytes only its own are read, but for
            samples of every tensor, which say whose checkpoint it is.
        on_plan: called with what will be written, before anything is.
        on_progress: called with (bytes done, bytes in all), in the calling thread.

    Raises:
        ConfigError: the checkpoint cannot be read or has holes, or the path is another's or cannot be written; or there
            is no such slice.
        FormatError: a header lies about its file.
        BudgetError: the disk has too little room.
        ValueError: both `family` and `tensor` are given.
    """
    if family is not None and tensor is not None:
        raise ValueError(f"--family {family} and --tensor {tensor}: a plain tensor has no family; give one of them")
    options: dict[str, Any] = {
        "shard_bytes": shard_bytes, "jobs": jobs, "allow_network_fs": allow_network_fs, "on_plan": on_plan,
        "on_progress": on_progress, "slice": slice,
    }  # fmt: skip
    if (Path(folder) / CATALOG_FILE).is_file():
        if in_place or family is not None or tensor is not None:
            raise ConfigError(f"{folder} is a store: only a store with shards can be made of it; leave the options out")
        return build_from_store(folder, store_path, **options)
    checkpoint = Checkpoint.open(folder)
    sources: tuple[TableSource, ...]
    attachments: dict[str, bytes] = {}
    if tensor is not None:
        sources = (plain_source(checkpoint, tensor),)
    else:
        model = read_model(checkpoint, family)
        sources, attachments = model.sources, model.hash_spec.attachments()
    hole = None if allow_holes else find_hole(sources if slice is None else cut_sources(sources, *slice))
    if hole is not None:
        raise ConfigError(
            f"{hole}; finish or repeat it, or, if these rows are zeros in truth (a sparse copy, a file system that "
            f"leaves zeros out), pass --allow-holes"
        )
    return build_store(
        store_path,
        sources,
        origin=checkpoint.to_dict(),
        attachments=attachments,
        in_place=in_place,
        **options,
    )


def sources_of_store(image: CatalogImage, checkpoint: Checkpoint) -> tuple[TableSource, ...]:
    """Returns the checkpoint's tables as the store was built from them: by its family, or its plain tables by name.

    Raises `ConfigError` if the checkpoint lacks them, `FormatError` if the store's record of its hash is damaged.
    """
    if all(layout.public_spec.is_plain for layout in image.tables.values()):
        return tuple(plain_source(checkpoint, name) for name in image.tables)
    try:
        family = json.loads(image.attachments[RECORD_NAME])["family"]
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{image.path}: the catalog does not say which family its tables are of ({error!r}); restore it or rebuild"
        ) from error
    return read_model(checkpoint, family).sources
