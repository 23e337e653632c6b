"""The daemon's static set as a GPU of this process reads it: in place, pinned at an epoch, and moved along to the next.

Input: a link whose static block the daemon exports to this process. Output: what an hbm tier needs of it (`DramPart`),
and whether a newer epoch is there. The daemon overwrites nothing that a pinned epoch names while its block is mapped
here. Kernels need that: unlike lookups of the host, they cannot check after a copy that the epoch was still the same.
Errors: none; a static set that cannot be pinned is logged.

Versions of one daemon share the block. Another daemon's is never pinned, since captured graphs know the block by its
address.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import numpy as np

from .. import kernels
from ..tiers.hbm.device import DramPart
from ..tiers.hbm.pairs import Pairs
from .link import Link

logger = logging.getLogger("tierstore")


class PinnedStaticSet:
    """The pins of one store on the static set that its device reads; none until `pin`. One thread at a time may call.

    Attributes:
        parts: Of each table; their records keep their addresses in all epochs and versions.
    """

    def __init__(self, link: Link) -> None:
        """link: its static block stays mapped for as long as this lives, or anybody who has the parts."""
        self._block_id = link.static_id
        self._link = link
        self._pin: kernels.EpochPin | None = None  # of the version
        self._epochs: list[int] = []  # pinned by it, the newest last
        self._seen: int | None = None  # the one of these that kernels see
        self.parts: list[DramPart] = []
        for name in link.opened.image.tables:
            parts = link.static_parts(name)
            self.parts.append(
                DramPart() if parts is None else DramPart(None, parts.records, partial(self._named, name))
            )

    def pin(self, link: Link) -> bool:
        """Pins the newest epoch of a link's version, which `follow` lets kernels see. Pins nothing if the version is
        over.

        Returns:
            False if the link's block is another than the one that the device reads: then nothing is pinned, now or
            later.
        """
        assert not self._epochs, "a version's pins are released before the next version's are taken"
        if link.static_id != self._block_id or not link.is_exported:
            logger.warning(
                "%s: the daemon is another than before: its static set goes to the device by way of the host until the "
                "store is connected anew",
                link.opened.image.path,
            )
            return False
        self._link, self._pin = link, link.epoch_pin()
        self._pin_newest()
        return True

    def is_behind(self) -> bool:
        """Whether `follow` has something to do."""
        return bool(self._epochs) and (self._seen != self._epochs[-1] or self._has_newer())

    def follow(self, rename: Callable[[], None]) -> None:
        """Moves kernels to the newest epoch: pins it, calls `rename`, and releases the older ones.

        Args:
            rename: Names the newest epoch's records to the device; returns when kernels see those and no older ones. If
                it raises, all stay pinned.
        """
        if self._epochs and self._has_newer():
            self._pin_newest()
        rename()
        # Only now may the older epochs be released: until `rename` returned, kernels were reading them.
        self._seen = self._epochs[-1] if self._epochs else None  # none if `rename` closed the store, by collecting it
        while len(self._epochs) > 1:
            self._native_pin().unpin(self._epochs.pop(0))

    def unpin(self) -> None:
        """Pins nothing any more. No kernel may read what was pinned."""
        while self._epochs:
            self._native_pin().unpin(self._epochs.pop())
        self._pin = None

    def _native_pin(self) -> kernels.EpochPin:
        assert self._pin is not None, "nothing is pinned"
        return self._pin

    def _has_newer(self) -> bool:
        return self._native_pin().newest() not in (None, self._epochs[-1])

    def _pin_newest(self) -> None:
        epoch = self._native_pin().pin()
        if epoch is not None:  # else the version is over, and the next one is on its way
            self._epochs.append(epoch)

    def _named(self, name: str, count: int) -> Pairs:
        """Returns what the newest pinned epoch names of a table, each entry at its slot; `count` at most.

        A placement fills slots hottest first, so that lower slots are the hotter ones; re-plans put entries wherever
        there is room.
        """
        if not self._epochs:
            return Pairs.nothing()
        parts, parity = self._link.static_parts(name), self._epochs[-1] % 2
        assert parts is not None
        head = parts.heads[parity].view(kernels.INDEX_HEAD)[0]
        found = [Pairs.nothing()]
        for order, (start, length) in enumerate(zip(head["bucket_start"], head["num_buckets"], strict=True)):
            if length:
                found.append(Pairs.of_index(order, parts.areas[parity][start : start + length], len(parts.records)))
        pairs = Pairs.joined(found)
        return pairs[np.argsort(pairs.places)[:count]]
