"""A store's current placement, read again: what a daemon adopts after 'tierstore plan' made another one.

Input: the version that is served. Output: placed entries by table, hottest first. Errors: `FormatError` for a damaged
placement; `ConfigError` if the store at the path is another one by now.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from .. import kernels
from ..errors import ConfigError
from ..store.embedded import open_placement
from ..tiers.placed import PlacementFile, load_indexes
from .epochs import Pairs
from .version import Version


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
