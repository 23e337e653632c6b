"""CPU of a page that is in the page cache already, through uring: what is left of a read when the disk takes no part.

Input: a folder for a small table. Output: microseconds of CPU for a page, of a lookup with everything that belongs to
it and of the bare loop's reads. Pages go through the page cache where a file system has no O_DIRECT, which is simulated
here: opening with O_DIRECT fails as it would there. (tmpfs is no substitute: it hands each io_uring read to a kernel
thread, which alone costs 3 us a page.) Where the store reads past the page cache all the same, the case is skipped and
named.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import tierstore

from .. import page_cache, stores
from ..pairs import Result
from ..stores import MadeStore
from .loops import BareLoop

CASE = "page-cached pages through buffered uring: CPU of one"
ROWS = 256_000
TOKENS = 1024
LOOKUPS = 8  # in a round: the bare loop's CPU is counted in ticks of 10 ms
CPU_US_MAX = 2.0


def measure(folder: Path, pairs: int, result: Result) -> None:
    """Adds the figures to `result`, or why it has no figures."""
    generator = np.random.default_rng()
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(stores.temporary_store(folder, ROWS))
        with without_o_direct():
            store = stack.enter_context(tierstore.open(made.path, dram=made.spec.table_bytes // 4, io="uring"))
        if not _fills_page_cache(made, store, generator):
            result.skipped[CASE] = "this store reads past the page cache although O_DIRECT was refused"
            return
        page_cache.bring_in(made.files)
        loop = stack.enter_context(BareLoop.uring(made.files, direct=False))
        rounds = [(_store_us(made, store, generator), _bare_us(made, loop, generator)) for _ in range(pairs + 1)][1:]
        result.figure(f"{CASE}, lookup and checksum included", "us/page", [r[0] for r in rounds], CPU_US_MAX)
        result.figure(f"{CASE}, bare loop, unchecked", "us/page", [r[1] for r in rounds])
        result.facts["page-cached pages: served by"] = store.stats()["io"]
        result.facts["page-cached pages: share in the page cache"] = round(page_cache.residency(made.files), 4)


@contextlib.contextmanager
def without_o_direct() -> Iterator[None]:
    """Lets os.open refuse O_DIRECT, as a file system without it does."""
    real_open = os.open

    def refuse(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return real_open(path, flags, *arguments, **named)

    with mock.patch.object(os, "open", refuse):
        yield


def _fills_page_cache(made: MadeStore, store: tierstore.Store, generator: np.random.Generator) -> bool:
    page_cache.drop(made.files)
    before = page_cache.residency(made.files)
    store[stores.TABLE].lookup(stores.fresh_keys(generator, TOKENS))
    return before == 1.0 or page_cache.residency(made.files) > before


def _store_us(made: MadeStore, store: tierstore.Store, generator: np.random.Generator) -> float:
    table, out = store[stores.TABLE], stores.rows_buffer(TOKENS)
    batches = [stores.fresh_keys(generator, TOKENS) for _ in range(LOOKUPS)]
    pages_before, started = store.stats()["pages_read"], time.process_time()
    for keys in batches:
        table.lookup(keys, out)
    cpu_s = time.process_time() - started
    made.check(batches[-1], out)
    return cpu_s / (store.stats()["pages_read"] - pages_before) * 1e6


def _bare_us(made: MadeStore, loop: BareLoop, generator: np.random.Generator) -> float:
    ranges = made.ranges(stores.fresh_keys(generator, TOKENS))
    loop.load(ranges)
    started = loop.cpu_seconds()
    for _ in range(LOOKUPS):
        loop.run()
    return (loop.cpu_seconds() - started) / (LOOKUPS * len(ranges)) * 1e6
