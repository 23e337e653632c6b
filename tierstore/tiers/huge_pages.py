"""Blocks of the dram tier on huge pages: kept there in the background, and how much of them is.

Input: a block of memory in use. Output: the native object that has the kernel collapse its small pages
(kernels/cpu/huge_pages.h), and bytes for `stats` and metrics. Errors: none; small pages serve, a little slower.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterable

import numpy as np

from .. import kernels

logger = logging.getLogger("tierstore")

BLOCK_BYTES_MIN = 64 << 20  # below it, small pages cost too little to have a thread for
HUGE_BYTES = 2 << 20
FIRST_LOOK_S = 2.0  # after the block was made: caches begin to fill


def keep_on_huge_pages(block: np.ndarray) -> kernels.HugePages | None:
    """Starts to bring a block, uint8, onto huge pages; returns what to stop before it goes. None: it is too small."""
    if block.nbytes < BLOCK_BYTES_MIN:
        return None
    pages = kernels.HugePages(block, FIRST_LOOK_S)
    if not pages.start():
        logger.warning("no thread brings DRAM onto huge pages: the system gives none; raise 'ulimit -u'")
    return pages


def bytes_on_huge_pages(blocks: Iterable[kernels.HugePages | None]) -> tuple[int, int]:
    """Returns bytes of blocks that were in memory at the last look, minutes ago at most, and those on huge pages."""
    found = [pages.last() for pages in blocks if pages is not None]
    return sum(present for present, _ in found), sum(huge for _, huge in found)


def share_collapsed(num_bytes: int) -> float:
    """Returns the share of a block on small pages that the kernel brings onto huge ones if it is asked to.

    It is MADV_COLLAPSE, which Linux has from 6.1 on. Takes about a millisecond for 2 MiB.
    """
    if not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return 0.0
    block = mmap.mmap(-1, num_bytes + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_NOHUGEPAGE)
    array = np.frombuffer(block, dtype=np.uint8)
    array[:: mmap.PAGESIZE] = 1
    block.madvise(mmap.MADV_HUGEPAGE)
    start = -array.ctypes.data % HUGE_BYTES
    places = range(start, start + num_bytes, HUGE_BYTES)
    return sum(kernels.collapse(array, at, HUGE_BYTES) == 0 for at in places) / len(places)
