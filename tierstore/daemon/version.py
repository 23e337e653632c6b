"""A version: one store that the daemon serves, open, with the engine by which the daemon reads it.

Input: an open store and an engine over it. Output: both under one name, until `close`. Errors: none of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from ..formats.placement import Placement
from ..ipc.events import event
from ..ipc.mapped import OpenVersion
from ..layout import TableLayout
from ..tiers.native import READ_WAIT_S, NativeEngine
from ..tiers.shared import SharedBlock

logger = logging.getLogger("tierstore.daemon")


@dataclass(eq=False)
class Version:
    """A store that the daemon serves, or served last. number: 1, 2, ...; tag: of its entries in the recency caches."""

    number: int
    tag: int
    opened: OpenVersion
    resident: SharedBlock | None
    bad_pages: Mapping[str, Mapping[int, str]]  # of resident tables
    engine: NativeEngine
    epoch: int = 0  # the last one that was published of it

    @property
    def path(self) -> str:
        """The store's path."""
        return str(self.opened.image.path)

    @property
    def identity(self) -> str:
        """The digest of its catalog."""
        return self.opened.image.identity

    @property
    def base_identity(self) -> str:
        """The digest of its base, whichever published version of it this is."""
        return self.opened.image.base_identity

    @property
    def published(self) -> int:
        """Which published version of the store's rows it is; 0: the base."""
        return self.opened.image.version

    @property
    def folded(self) -> int:
        """Which of the store's versions had the rows of all before it when this one was opened; 0: none."""
        return self.opened.image.folded

    @property
    def layouts(self) -> Mapping[str, TableLayout]:
        """The layouts of its tables."""
        return self.opened.image.tables

    @property
    def placement(self) -> Placement | None:
        """The placement that it was opened with."""
        return self.opened.placed.placement if self.opened.placed else None

    def index_of(self, name: str) -> int:
        """Returns a table's index in the engine."""
        return list(self.layouts).index(name)

    def close(self) -> None:
        """Waits for the daemon's own lookups, then closes engine and files.
        Files of reads that do not end stay open."""
        if self.resident:
            self.resident.close()
        if self.engine.close(READ_WAIT_S):
            self.opened.close()
        else:
            event(logger, logging.ERROR, "reads_do_not_end", store=self.path, version=self.number, seconds=READ_WAIT_S)
