"""put: a store's shards -> objects in Mooncake, for `tierstore.open(path, pages="mooncake://...")`.

Input: a finished store with its shards, and an address. Output: an object a stretch of a shard, pinned; a report.
Every page is checked before it goes. Errors: damaged pages, no room, nobody who answers. Blocks; what was put stays if
it is interrupted, and is passed by the next time.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import BudgetError, ConfigError, StoreNotReadyError
from ..formats.catalog import CatalogImage, read_catalog
from ..process.progress import OnProgress
from ..tiers.mooncake import STRETCH_BYTES, Address, MooncakeClient, stretch_bytes
from ..tiers.nvme import TableFiles, read_pages
from ..tiers.served import REPLACES, REQUEST, WRITES, ServedConnection
from ..units import format_bytes

SLOTS = 4  # stretches that are put together


@dataclass(frozen=True)
class PutReport:
    """What a put did: objects and bytes of the whole store, and how many objects were there before and were kept."""

    num_objects: int
    num_bytes: int
    num_kept: int


def put_shards(
    store_path: str | os.PathLike[str], address: str, *, replace: bool = False, on_progress: OnProgress | None = None
) -> PutReport:
    """Puts all shards of a store into Mooncake.

    Args:
        store_path: The store. Versions are no part of its shards; `compact` makes a store of them.
        address: As of `tiers.mooncake`.
        replace: Put also what is there already; without it, an object that is there stays as it is.
        on_progress: Called with (bytes done, bytes in all).

    Raises:
        ConfigError: Rows lie in a checkpoint's files; or the address is wrong, the library is not there, or nobody
            answers.
        CorruptPageError, FormatError: A shard is damaged.
        BudgetError: Mooncake has no room.
        StoreNotReadyError: It stopped answering.
    """
    image = read_catalog(Path(store_path))
    if image.is_in_place:
        raise ConfigError(f"{store_path}: its rows lie in files of a checkpoint; only a built store has pages to put")
    client = MooncakeClient(Address.parse(address), image, check=False)
    try:
        connection = ServedConnection(client.served, SLOTS, STRETCH_BYTES, purpose=REPLACES if replace else WRITES)
        try:
            return _put_all(image, client, connection, on_progress)
        finally:
            connection.close()
    finally:
        client.close()


def _put_all(
    image: CatalogImage, client: MooncakeClient, connection: ServedConnection, on_progress: OnProgress | None
) -> PutReport:
    total = sum(layout.store_bytes for layout in image.tables.values())
    num_objects = num_bytes = num_kept = 0
    for requests in _stretches(image, connection.slots):
        for request, error in zip(requests, connection.exchange(requests), strict=True):
            if error not in (0, errno.EEXIST):
                raise _failed(client, request, int(error), num_bytes, total)
            num_objects += 1
            num_bytes += int(request["num_bytes"])
            num_kept += int(error == errno.EEXIST)
        if on_progress:
            on_progress(num_bytes, total)
    return PutReport(num_objects, num_bytes, num_kept)


def _stretches(image: CatalogImage, slots: np.ndarray) -> Iterator[np.ndarray]:
    """Reads stretches into slots, and yields the requests for them, REQUEST [SLOTS at most]."""
    requests = np.zeros(len(slots), dtype=REQUEST)
    count = 0
    for index, layout in enumerate(image.tables.values()):
        files = TableFiles(image, layout, direct=False)
        pages_each = stretch_bytes(layout) // layout.page_bytes
        try:
            for shard in range(layout.num_shards):
                page_start, page_end = layout.shard_pages(shard)
                for first in range(page_start, page_end, pages_each):
                    numbers = np.arange(first, min(first + pages_each, page_end))
                    num_bytes = len(numbers) * layout.page_bytes
                    read_pages(files, numbers, slots[count, :num_bytes].reshape(-1, layout.page_bytes))
                    requests[count] = count, index, shard, num_bytes, (first - page_start) * layout.page_bytes
                    count += 1
                    if count == len(slots):
                        yield requests
                        count = 0
        finally:
            files.close()
    if count:
        yield requests[:count]


def _failed(client: MooncakeClient, request: np.ndarray, error: int, done: int, total: int) -> Exception:
    served = client.served
    name = served.name_of(int(request["table"]), int(request["shard"]), int(request["byte_start"]))
    if error == errno.ENOSPC:
        return BudgetError(
            f"{served.what} has no room for {name}: {format_bytes(done)} of {format_bytes(total)} are put; start "
            f"clients that give it more memory, then put again: what is there stays"
        )
    return StoreNotReadyError(
        f"{name} was not put into {served.what}: {os.strerror(error)} (within {served.wait_s:g} s); look whether its "
        f"servers run, then put again: what is there stays"
    )
