"""Placements of stores that a daemon serves: the one that it began with, and the current one, read again.

Input: paths of stores; the version that is served. Output: open stores with the placement whose records they can be
read from; placed entries by table, hottest first, to be adopted. Errors: what opening a store raises; `FormatError` for
a damaged placement; `ConfigError` if the store at the path is another one by now.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import kernels
from ..errors import ConfigError, FormatError
from ..formats.catalog import read_catalog
from ..formats.placement import Placement
from ..ipc.events import event
from ..ipc.mapped import OpenVersion
from ..store.embedded import OPENING_ATTEMPTS_MAX, open_placement, was_folded
from ..tiers.nvme import IoChoice
from ..tiers.placed import PlacementFile, load_indexes
from .epochs import Pairs
from .version import Version

logger = logging.getLogger("tierstore.daemon")


@dataclass(frozen=True)
class BegunPlacement:
    """The placement that a daemon began with: the index of its records in the file lies in the static block."""

    base_identity: str
    placement: Placement

    @classmethod
    def of(cls, opened: OpenVersion) -> BegunPlacement | None:
        """Returns the placement of a store that is open; None without one."""
        return cls(opened.image.base_identity, opened.placed.placement) if opened.placed else None


def open_version(path: str | os.PathLike[str], placement: int | str | None, choice: IoChoice) -> OpenVersion:
    """Opens a store's files. Raises what `tierstore.open` raises."""
    direct = choice.mode == "uring"
    for attempt in range(1, OPENING_ATTEMPTS_MAX + 1):
        image, placed = open_placement(Path(path).absolute(), placement, direct=direct)  # clients work in other folders
        try:
            return OpenVersion(image, placed, direct=direct)
        except FormatError:
            if attempt == OPENING_ATTEMPTS_MAX or not was_folded(image):
                raise
    raise AssertionError("the last attempt returns or raises")


def open_next(path: str | os.PathLike[str], begun: BegunPlacement | None, choice: IoChoice) -> OpenVersion:
    """Opens a store to serve next: if it is a version of the base that the daemon began with, and still has that
    placement, with its records; else without any. Raises what `tierstore.open` raises."""
    image = read_catalog(path)
    if begun and image.base_identity == begun.base_identity and begun.placement.epoch in image.placements:
        epoch = begun.placement.epoch
        try:
            opened = open_version(path, epoch, choice)
        except (ConfigError, FormatError) as error:  # pruned meanwhile, or damaged: pages have the rows
            event(logger, logging.WARNING, "placement_not_read", store=path, epoch=epoch, error=error)
        else:
            if BegunPlacement.of(opened) == begun:
                return opened
            opened.close()
    return open_version(path, "none", choice)


def placed_entries(version: Version, names: Collection[str]) -> dict[str, Pairs]:
    """Returns what the placement that a store has now says of some tables: order index and key, hottest first.

    Args:
        version: that is served, of which only path and identity are used.
        names: of the tables.
    """
    image, placed = open_placement(version.path, None, version.published, direct=False)
    if placed is None:
        return {}
    try:
        if image.identity != version.identity:
            raise ConfigError(
                f"{version.path} is another store now than the one that is served; use 'tierstore swap' to serve it"
            )
        return {name: _hottest_first(placed, name) for name in placed.placement.tables if name in names}
    finally:
        placed.close()


def _hottest_first(placed: PlacementFile, name: str) -> Pairs:
    """Returns a table's placed (order index, key) pairs, hottest first, as the indexes of a placement file have them.

    Raises `FormatError` for a damaged one.
    """
    table = placed.placement.tables[name]
    area = np.empty((sum(index.num_buckets for index in table.indexes), kernels.INDEX_BUCKET.itemsize), dtype=np.uint8)
    order_index, keys, numbers = [], [], []
    for order, loaded in enumerate(load_indexes(placed, table, area)):
        buckets = loaded.view(kernels.INDEX_BUCKET)[:, 0]
        there = buckets["keys"] >= 0
        keys.append(buckets["keys"][there])
        numbers.append(buckets["places"][there])
        order_index.append(np.full(len(keys[-1]), order, dtype=np.uint8))
    by_number = np.argsort(np.concatenate(numbers))
    return np.concatenate(order_index)[by_number], np.concatenate(keys)[by_number]
