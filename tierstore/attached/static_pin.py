"""The static set of a daemon as a GPU of this process reads it: in place, held at an epoch,
and moved along to the next.

Flows in: a link whose static block the daemon has lent. Flows out: what an hbm tier needs of it (`DramPart`), and the
word that another epoch is there. The daemon writes over nothing that a held epoch names while its block is mapped here,
so that kernels, which cannot look afterwards whether what they copied was still that, need not. Versions of one daemon
share the block; of another daemon nothing is held, since captured graphs know the block by its address.
One thread at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import kernels
from .link import Link

if TYPE_CHECKING:
    from ..tiers.hbm.device import DramPart
    from ..tiers.hbm.pairs import Pairs

logger = logging.getLogger("tierstore")


class HeldStatic:
    """Holds nothing until `hold`. parts: of each table; records lie where they always will."""

    def __init__(self, link: Link) -> None:
        """link: its block stays mapped for as long as this, or who has its parts, lives."""
        from ..tiers.hbm.device import DramPart

        self._block_id = link.static_id
        self._link = link
        self._hold: Any = None  # the version's `EpochPin`,
        self._epochs: list[int] = []  # what is held by it, the newest last,
        self._seen: int | None = None  # and which of these kernels see
        self.parts: list[DramPart] = []
        for name in link.opened.image.tables:
            parts = link.static_parts(name)
            self.parts.append(
                DramPart() if parts is None else DramPart(None, parts.records, partial(self._named, name))
            )

    def hold(self, link: Link) -> bool:
        """Holds the newest epoch of a link's version, which `follow` lets kernels see;
        nothing where that is served no more.

        Returns whether the link's block is the one that is locked here: else nothing is ever held again.
        """
        assert not self._epochs, "it has left what was held before"
        if link.static_id != self._block_id or not link.is_lent:
            logger.warning(
                "%s: the daemon is another than before: its static set goes to the device by way of the host until the "
                "store is connected anew",
                link.opened.image.path,
            )
            return False
        self._link, self._hold = link, link.epoch_hold()
        self._take()
        return True

    def is_behind(self) -> bool:
        """Whether `follow` has something to do."""
        return bool(self._epochs) and (self._seen != self._epochs[-1] or self._is_newer())

    def follow(self, rename: Callable[[], None]) -> None:
        """Holds the newest epoch too, calls `rename`, which returns when kernels see that and none before,
        and leaves those.

        Where `rename` raises, all stay held.
        """
        if self._epochs and self._is_newer():
            self._take()
        rename()
        self._seen = self._epochs[-1] if self._epochs else None  # a store that is collected meanwhile leaves all
        while len(self._epochs) > 1:
            self._hold.unpin(self._epochs.pop(0))

    def leave(self) -> None:
        """Holds nothing any more. No kernel may read what was held."""
        while self._epochs:
            self._hold.unpin(self._epochs.pop())
        self._hold = None

    def _is_newer(self) -> bool:
        return self._hold.newest() not in (None, self._epochs[-1])

    def _take(self) -> None:
        epoch = self._hold.pin()
        if epoch is not None:  # else the version is over, and another one comes
            self._epochs.append(epoch)

    def _named(self, name: str, count: int) -> Pairs:
        """What the newest held epoch names of a table, at their slots, `count` at most.

        A placement fills slots hottest first; what replans bring in lies where there was room.
        """
        from ..tiers.hbm.pairs import Pairs

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
