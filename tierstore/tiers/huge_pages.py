"""Blocks of the dram tier on huge pages: kept there in the background, and how much of them is.

Input: a block of memory in use. Output: the native object that has the kernel collapse its small pages
(kernels/cpu/huge_pages.h), and bytes for `stats` and metrics. Errors: none; small pages serve, a little slower.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np

from .. import kernels

logger = logging.getLogger("tierstore")

BLOCK_BYTES_MIN = 64 << 20  # below it, small pages cost too little to have a thread for
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
