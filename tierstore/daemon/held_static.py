"""The static set of a daemon as a GPU of this process reads it: in place, held at an epoch, and moved along to the next.

Flows in: a link whose static block the daemon has lent. Flows out: what an hbm tier needs of it (`DramPart`), and the word that
another epoch is there. The daemon writes over nothing that a held epoch names, until this process has ended, so that kernels,
which cannot look afterwards whether what they copied was still that, need not. Versions of one daemon share the block; of
another daemon nothing is held, since captured graphs know the block by its address. One thread at a time.
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
        self._held: tuple[Any, int] | None = None  # the version's `EpochHold`, and the epoch
        self.parts: list[DramPart] = []
        for name in link.opened.image.tables:
            parts = link.static_parts(name)
            self.parts.append(
                DramPart() if parts is None else DramPart(None, parts.records, partial(self._named, name))
            )

    def hold(self, link: Link) -> None:
        """Holds the newest epoch of a link's version; nothing where its block is another, or the version is served no more.

        Nothing is held before.
        """
        if link.static_id != self._block_id or not link.is_lent:
            logger.warning(
                "%s: the daemon is another than before: its static set goes to the device by way of the host until the store "
                "is connected anew",
                link.opened.image.path,
            )
            return
        self._link = link
        hold = link.epoch_hold()
        epoch = hold.take()
        self._held = None if epoch is None else (hold, epoch)

    def is_behind(self) -> bool:
        """Whether there is an epoch that `follow` would move to."""
        if self._held is None:
            return False
        hold, epoch = self._held
        return hold.newest() not in (None, epoch)

    def follow(self, rename: Callable[[], None]) -> None:
        """Holds the newest epoch too, calls `rename`, which returns when no kernel reads the one before, and leaves that."""
        if self._held is None:
            return
        hold, before = self._held
        epoch = hold.take()
        if epoch is None:  # the version is over: another one comes
            return
        self._held = hold, epoch
        rename()
        hold.leave(before)

    def leave(self) -> None:
        """Holds nothing any more. No kernel may read what was held."""
        if self._held is not None:
            hold, epoch = self._held
            self._held = None
            hold.leave(epoch)

    def _named(self, name: str) -> Pairs:
        """What the held epoch names of a table, at their slots, which a placement fills hottest first."""
        from ..tiers.hbm.pairs import Pairs

        if self._held is None:
            return Pairs.nothing()
        parts, parity = self._link.static_parts(name), self._held[1] % 2
        assert parts is not None
        head = parts.heads[parity].view(kernels.INDEX_HEAD)[0]
        pairs = Pairs.joined(
            [
                Pairs.of_index(order, parts.areas[parity][start : start + count])
                for order, (start, count) in enumerate(zip(head["bucket_start"], head["num_buckets"], strict=True))
                if count
            ]
            or [Pairs.nothing()]
        )
        return pairs[np.argsort(pairs.places)]
