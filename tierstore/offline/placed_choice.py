"""The choice that can still be read from a damaged placement file: which (order, key) pairs it placed, in which order.

Input: a store's catalog and the number of a placement. Output: its head, and the entries chosen of each table, ready to
be placed again. Every key is in the file twice: in the index of its order with its place, and in the record at that
place. An index that matches its checksum is believed first; records fill in for indexes that do not.
Errors: `ChoiceLostError`.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from .. import kernels
from ..durable import read_up_to
from ..errors import FormatError
from ..formats.catalog import CatalogImage
from ..formats.placement import PlacedIndex, PlacedTable, Placement, read_head
from .placement_file import Chosen

RECORDS_BYTES = 4 << 20  # of records read at once


class ChoiceLostError(Exception):
    """The file says no longer what was chosen."""


def read_choice(image: CatalogImage, epoch: int) -> tuple[Placement, dict[str, Chosen]]:
    """Returns the head of a placement that may be damaged or cut, and what it chose of each table, in the file's order.

    Blocks on the disk. Memory: 18 bytes an entry of one table, and one index. Raises `ChoiceLostError`.
    """
    file = Path(image.path) / image.placements[epoch].file
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for its writer
    except OSError as error:
        raise ChoiceLostError(str(error.strerror)) from error
    try:
        placement = read_head(file, fd, image.placements[epoch], image.tables, whole=False)
        tables = sorted(placement.tables.values(), key=lambda table: table.indexes[0].byte_start)
        return placement, {table.name: _choice_of(fd, table, image.tables[table.name].seed) for table in tables}
    except (FormatError, OSError) as error:
        raise ChoiceLostError(f"its head cannot be read: {error}") from error
    finally:
        os.close(fd)


def _choice_of(fd: int, table: PlacedTable, seed: int) -> Chosen:
    keys = np.full(table.num_entries, -1, dtype=np.int64)
    order_index = np.zeros(table.num_entries, dtype=np.uint8)
    damaged = [
        order for order, index in enumerate(table.indexes) if not _from_index(fd, index, order, keys, order_index)
    ]
    if damaged:
        _from_records(fd, table, seed, damaged, keys, order_index)
    num_lost = int((keys < 0).sum())
    if num_lost:
        raise ChoiceLostError(
            f"the index of order {damaged[0] if damaged else 0} of table {table.name} is damaged, and so are "
            f"{num_lost} of its {table.num_entries} records"
        )
    return Chosen(order_index, keys, table.static_fraction, table.hbm_entries)


def _from_index(fd: int, index: PlacedIndex, order: int, keys: np.ndarray, order_index: np.ndarray) -> bool:
    """Fills in the keys that an index names; returns whether it is whole."""
    buckets = _read(fd, index.num_bytes, index.byte_start)
    if kernels.crc32c(buckets) != index.checksum:
        return False
    entries = buckets.view(kernels.INDEX_BUCKET)
    used = (entries["keys"] >= 0) & (entries["places"] < len(keys))
    places = entries["places"][used]
    keys[places], order_index[places] = entries["keys"][used], order
    return True


def _from_records(
    fd: int, table: PlacedTable, seed: int, orders: list[int], keys: np.ndarray, order_index: np.ndarray
) -> None:
    """Fills in the keys of whole records whose order is one of `orders`, if none is known yet."""
    step = max(1, RECORDS_BYTES // table.record_bytes)
    for start in range(0, table.num_entries, step):
        end = min(start + step, table.num_entries)
        records = _read(fd, (end - start) * table.record_bytes, table.byte_start + start * table.record_bytes)
        records = records.reshape(-1, table.record_bytes)
        kernels.invalidate_bad_records(records, table.entry_bytes, seed)
        trailer_bytes = kernels.RECORD_TRAILER.itemsize
        trailers = np.ascontiguousarray(records[:, -trailer_bytes:]).view(kernels.RECORD_TRAILER)[:, 0]
        fits = (trailers["key"] >= 0) & np.isin(trailers["order_index"], orders) & (keys[start:end] < 0)
        keys[start:end][fits] = trailers["key"][fits]
        order_index[start:end][fits] = trailers["order_index"][fits]


def _read(fd: int, num_bytes: int, byte_start: int) -> np.ndarray:
    """Returns num_bytes of the file, uint8; zeros for those behind its end, or that the disk cannot read."""
    data = np.zeros(num_bytes, dtype=np.uint8)
    read_up_to(fd, data, byte_start, on_error=lambda *_: None)
    return data
