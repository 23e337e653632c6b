"""Slices of the tests' small tables, and servers of them in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from support.remote_servers import serving
from support.stores import Model

from tierstore.offline.place import place_entries
from tierstore.offline.placement_file import Chosen


def build_slices(model: Model, folder: Path, num_slices: int, hot: np.ndarray | None = None) -> list[Path]:
    """Builds all slices of a model's tables under a folder; returns their stores.

    hot: keys [N, 3] that the placements of `layers.1` and `layers.14` have, the first the hottest.
    """
    paths = [folder / f"{index}-of-{num_slices}" for index in range(num_slices)]
    for index, path in enumerate(paths):
        model.build(path, slice=(index, num_slices), shard_bytes=65536)
        if hot is not None:
            place_keys(model, path, index, num_slices, hot)
    return paths


def place_keys(model: Model, path: Path, index: int, num_slices: int, hot: np.ndarray) -> None:
    """Places the entries of keys [N, 3] in a slice's store."""
    chosen = {}
    for source in model.sources[:2]:
        columns = source.spec.cut_slice(index, num_slices).columns(source.spec.orders)
        pairs = [(own, int(key)) for keys in hot for own, key in enumerate(keys[columns]) if key >= 0]
        order_index, keys = zip(*dict.fromkeys(pairs), strict=True)
        chosen[source.spec.name] = Chosen(np.array(order_index, np.uint8), np.array(keys, np.int64), 0.5)
    place_entries(path, chosen)


@contextlib.contextmanager
def serving_all(paths: Sequence[Path], dram: str = "600KiB", **options: object) -> Iterator[list[str]]:
    """Servers in this process, one for each store; yields their URLs."""
    with contextlib.ExitStack() as stack:
        yield [f"grpc://{stack.enter_context(serving(path, dram=dram, **options)).address}" for path in paths]
