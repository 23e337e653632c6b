"""Embedded: a store opened in this process, with all of its tiers.

Flows in: a path, budgets and options. Flows out: a `Store` over a `Backing` that holds the open shards, the placement, and the
engine that they were given to. Refuses stores that are not finished, foreign or damaged, and budgets that cannot be kept.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from . import kernels
from .backing import Backing
from .decisions.budget import DramPlan, divide_dram
from .errors import BudgetError, ConfigError, FormatError
from .formats.catalog import CatalogImage, read_catalog
from .store import Store
from .tiers.engine import Engine
from .tiers.memory import available_memory
from .tiers.native import open_native
from .tiers.nvme import IO_MODES, IoChoice, choose_io, open_tables
from .tiers.placed import OnProgress, PlacementFile
from .tiers.portable import PortableEngine
from .units import format_bytes, parse_bytes

logger = logging.getLogger("tierstore")

PLACEMENT_ATTEMPTS_MAX = 5


def open_store(
    path: str | os.PathLike[str],
    dram: int | str = "2GiB",
    io: str = "auto",
    hbm: int | str | None = None,
    device: str | None = None,
    placement: int | str | None = None,
    on_progress: OnProgress | None = None,
) -> Store:
    """Opens a built store in this process; also `tierstore.open`.

    dram: bytes of memory that it may take, all included ("2GiB"); tables that fit are loaded whole, others get a cache of
    entries. io: how pages are read: "uring" (io_uring, past the page cache), "mmap" (memory-mapped shards and the page
    cache), "pread" (a pool of threads), or "auto", the first of these that the kernel allows; what cannot be had falls
    back to the next, saying so. placement: the epoch whose entries the store starts with; None: the current one, if there is
    any; "none": none. on_progress: called with (bytes done, bytes in all) while the placement's hottest entries load. hbm,
    device: for a tier that this version does not have yet.

    Blocks while resident tables and placed entries load. Raises `StoreNotReadyError` (no finished store), `FormatError`
    (foreign, damaged, newer), `BudgetError` (too small, or more than the machine has), `ConfigError` (an option). A damaged
    page does not keep a store from opening: lookups of its rows raise.
    """
    if io not in IO_MODES:
        raise ConfigError(f"io: {io!r} is not one of {', '.join(IO_MODES)}")
    if hbm is not None or device is not None:
        raise ConfigError(f"hbm={hbm!r}, device={device!r}: this version has no hbm tier; leave both out")
    budget_bytes = parse_bytes(dram, "dram")
    choice = choose_io(io)
    image, placed = open_placement(path, placement, direct=choice.mode == "uring")
    try:
        plan = divide_dram(image.tables, budget_bytes, placed.placement if placed else None)
        check_available(plan.dram_bytes)
        return Store(Embedded(image, plan, choice, placed, on_progress))
    except BaseException:
        if placed:
            placed.close()
        raise


def open_placement(
    path: str | os.PathLike[str], placement: int | str | None, *, direct: bool
) -> tuple[CatalogImage, PlacementFile | None]:
    """Reads the catalog and opens the placement that is asked for; again where it was pruned between the two.

    placement: as in `open_store`; direct: for O_DIRECT too. Raises as `open_store` does.
    """
    if placement not in (None, "none") and type(placement) is not int:
        raise ConfigError(f"placement: {placement!r} is no epoch; pass a number, None for the current one, or 'none'")
    image = read_catalog(path)
    for _ in range(PLACEMENT_ATTEMPTS_MAX):
        epoch = image.epoch if placement is None else None if placement == "none" else int(placement)
        if epoch is None:
            return image, None
        if epoch not in image.placements:
            there = ", ".join(map(str, sorted(image.placements))) or "no placement at all"
            raise ConfigError(f"placement: epoch {epoch} does not exist in {image.path}; there is {there}")
        try:
            return image, PlacementFile(image, epoch, direct=direct)
        except FormatError:
            again = read_catalog(path)
            if again.placements == image.placements and again.epoch == image.epoch:
                raise
            image = again
    raise FormatError(
        f"{path}: its placements changed {PLACEMENT_ATTEMPTS_MAX} times while it was opened; open it again"
    )


def check_available(dram_bytes: int) -> None:
    """Raises `BudgetError` where the machine, or the cgroup, has not so much memory left."""
    available, limit = available_memory()
    if dram_bytes > available:
        raise BudgetError(
            f"dram: {format_bytes(dram_bytes)} ({dram_bytes} bytes) would be used, the {limit} has "
            f"{format_bytes(available)} ({available} bytes) left; ask for less"
        )


class Embedded(Backing):
    """The backing of a store opened in this process."""

    def __init__(
        self,
        image: CatalogImage,
        plan: DramPlan,
        choice: IoChoice,
        placed: PlacementFile | None,
        on_progress: OnProgress | None,
    ) -> None:
        """Opens the shards and loads resident tables and placed entries; `open_store` is the way in."""
        self.name = str(image.path)
        self.specs = [layout.spec for layout in image.tables.values()]
        self.attachments = image.attachments
        self._plan = plan
        self._placed = placed
        self._files = open_tables(image, direct=choice.mode == "uring")
        try:
            self.engine = self._make_engine(choice, on_progress)
        except BaseException:
            self.close()
            raise

    def _make_engine(self, choice: IoChoice, on_progress: OnProgress | None) -> Engine:
        what = f"the store {self.name}"
        make = open_native if kernels.native else PortableEngine
        engine: Engine = make(what, self._files, self._plan, choice, self._placed, on_progress)
        if engine.bad_pages:
            first = next(iter(engine.bad_pages.values()))
            logger.error("%s: %d pages will not be served: %s", what, len(engine.bad_pages), first)
        return engine

    def details(self) -> dict[str, Any]:
        shares = self._plan.shares
        memory = {
            "budget_bytes": self._plan.budget_bytes,
            "dram_bytes": self._plan.dram_bytes,
            "staging_bytes": self._plan.staging.num_bytes,
            "resident_tables": [name for name, share in shares.items() if share.resident],
        }
        placement = {
            "epoch": self._placed.placement.epoch if self._placed else None,
            "static_entries": {name: share.static_entries for name, share in shares.items()},
            "recency_sets": {name: share.num_sets for name, share in shares.items()},
            "static_bytes": sum(share.static_bytes for share in shares.values()),
            "index_bytes": sum(share.index_bytes for share in shares.values()),
        }
        return {"io": self.engine.io, "memory": memory, "placement": placement}

    def close(self) -> None:
        for files in self._files:
            files.close()
        if self._placed:
            self._placed.close()
