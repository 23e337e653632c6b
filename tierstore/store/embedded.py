"""Embedded: a store opened in this process, with all of its tiers.

Input: a path, budgets and options. Output: a `Store` over a `Backing` that owns the open shards, the placement, and the
engine that they were given to. Errors: named ones, for stores that are not finished, foreign or damaged, and for
budgets that cannot be kept.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Any

import numpy as np

from ..decisions.budget import DramPlan
from ..decisions.division import divide_budgets
from ..decisions.hbm_budget import HbmPlan, pinned_bytes
from ..errors import BudgetError, ConfigError, FormatError
from ..formats.catalog import CatalogImage, read_catalog
from ..process.progress import OnProgress
from ..stats import expected_of
from ..tiers.engine import DeviceEngine, Engine
from ..tiers.files import AnyFiles, open_tables
from ..tiers.memory import available_memory
from ..tiers.mooncake import Address, MooncakeClient
from ..tiers.native import open_native
from ..tiers.nvme import SERVED, IoChoice, choose_io
from ..tiers.placed import PlacementFile
from ..units import format_bytes, parse_bytes
from .backing import Backing
from .options import DEFAULT_DEVICE, HbmOptions, check_options, check_readers, check_threads
from .store import Store

logger = logging.getLogger("tierstore")

PLACEMENT_ATTEMPTS_MAX = OPENING_ATTEMPTS_MAX = 5


def open_store(
    path: str | os.PathLike[str],
    dram: int | str = "2GiB",
    io: str = "auto",
    hbm: int | str | None = None,
    device: str | None = None,
    placement: int | str | None = None,
    on_progress: OnProgress | None = None,
    threads: int | None = None,
    readers: int | None = None,
    version: int | None = None,
    pages: str | None = None,
) -> Store:
    """Opens a built store in this process; also `tierstore.open`.

    dram: bytes of memory that it may take, all included ("2GiB"); tables that fit are loaded whole, others get a cache
    of entries. io: how pages are read: "uring" (io_uring, past the page cache), "mmap" (memory-mapped shards and the
    page cache), "pread" (a pool of threads), or "auto", the first of these that the kernel allows; what cannot be had
    falls back to the next, saying so. placement: the epoch whose entries the store starts with; None: the current one,
    if there is any; "none": none. on_progress: called with (bytes done, bytes in all) while the placement's hottest
    entries load, those of HBM first. hbm: bytes of GPU memory for the very hottest, all included ("4GiB"); None: no
    such tier. device: "cuda:0" and the like, by default the first GPU; "cpu" runs the same kernels in Triton's
    interpreter, for tests. A sixteenth of dram, at most 256 MiB, is page-locked then,
    for what the device asks of the host. threads: that copy the rows of one large lookup, the caller's included; None:
    as many as this process may use cores, at most 16; 1: the caller alone. Small lookups are always the caller's alone.
    readers: how many lookups may read pages at once, at most. They share a sixteenth of dram, and there are fewer if
    that is small: each has 512 KiB at least, and if there are more than 4, all the pages in flight that a disk
    deserves, about 1.3 MiB. None: two for each core that this process may use, at least 4.

    version: which published version of the rows to read; None: the newest; 0: the base, as it was built. The store is
    of this version until it is closed, whatever is published meanwhile. What is not resident needs 18 bytes of dram for
    each row that versions have.

    pages: where the shards are, if they are not here: "mooncake://HOST:PORT" of a Mooncake's master, into which
    `tierstore mooncake put` has put them; needs the extra `mooncake`. The catalog, placements and versions are read
    from `path`. io does not matter then. A page that does not come within 36 s is an error. A forked child's reads end
    with its parent's store.

    Blocks while resident tables and placed entries load. Raises `StoreNotReadyError` (no finished store), `FormatError`
    (foreign, damaged, newer), `BudgetError` (too small, or more than the machine or the GPU has), `ConfigError` (an
    option; no such device, no kernels for it). A damaged page does not keep a store from opening:
    lookups of its rows raise.
    """
    hbm_options = check_options(io, hbm, device)
    budget_bytes = parse_bytes(dram, "dram")
    if pages is None:
        choice = choose_io(io, check_threads(threads), check_readers(readers))
    else:
        choice = replace(choose_io("pread", check_threads(threads), check_readers(readers)), mode=SERVED)
    for attempt in range(1, OPENING_ATTEMPTS_MAX + 1):
        image, placed = open_placement(path, placement, version, direct=choice.mode == "uring")
        try:
            return _open_image(image, placed, budget_bytes, hbm_options, choice, pages, on_progress)
        except FormatError:
            if attempt == OPENING_ATTEMPTS_MAX or not was_folded(image):
                raise
    raise AssertionError("the last attempt returns or raises")


def _open_image(
    image: CatalogImage,
    placed: PlacementFile | None,
    budget_bytes: int,
    hbm: HbmOptions | None,
    choice: IoChoice,
    pages: str | None,
    on_progress: OnProgress | None,
) -> Store:
    """Opens the store of a catalog; takes `placed` over, also if that fails."""
    client: MooncakeClient | None = None
    try:
        heading, hbm_bytes = placed.placement if placed else None, hbm.num_bytes if hbm else None
        plan, hbm_plan = divide_budgets(
            image.tables, budget_bytes, hbm_bytes, heading, choice.num_readers, image.touched
        )
        check_available(plan.dram_bytes + (beside_hbm(plan, hbm_plan) if hbm_plan else 0))
        on_device = hbm.device if hbm else DEFAULT_DEVICE
        client = None if pages is None else MooncakeClient(Address.parse(pages), image)
        return Store(Embedded(image, plan, choice, placed, on_progress, hbm_plan, on_device, client))
    except BaseException:
        if placed:
            placed.close()
        if client:
            client.close()
        raise


def was_folded(image: CatalogImage) -> bool:
    """Whether versions of a store were folded since its catalog was read: files that it names may be gone."""
    return read_catalog(image.path).folded != image.folded


def open_placement(
    path: str | os.PathLike[str], placement: int | str | None, version: int | None = None, *, direct: bool
) -> tuple[CatalogImage, PlacementFile | None]:
    """Reads the catalog and opens the placement that is asked for; again where it was pruned between the two.

    placement, version: as in `open_store`; the image is of that version. direct: for O_DIRECT too. Raises as
    `open_store` does.
    """
    if placement not in (None, "none") and type(placement) is not int:
        raise ConfigError(f"placement: {placement!r} is no epoch; pass a number, None for the current one, or 'none'")
    image = read_catalog(path).at_version(version)
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
            again = read_catalog(path).at_version(version)
            if again.placements == image.placements and again.epoch == image.epoch:
                raise
            image = again
    raise FormatError(
        f"{path}: its placements changed {PLACEMENT_ATTEMPTS_MAX} times while it was opened; open it again"
    )


def beside_hbm(plan: DramPlan, hbm: HbmPlan) -> int:
    """Returns the bytes of DRAM that an hbm tier takes: what is page-locked for mailboxes,
    and the host's copies of indexes."""
    return pinned_bytes(plan.budget_bytes) + hbm.host_index_bytes


def check_available(dram_bytes: int) -> None:
    """Raises `BudgetError` if the machine, or the cgroup, has less memory left."""
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
        hbm_plan: HbmPlan | None = None,
        device: str = DEFAULT_DEVICE,
        client: MooncakeClient | None = None,
    ) -> None:
        """Opens the shards and loads resident tables and placed entries; `open_store` is the way in.

        hbm_plan: None without an hbm tier; device: what that is on. client: who has the shards, if they are not here;
        closed with this, or if this raises.
        """
        self.name = str(image.path)
        self._image = image
        self.specs = [layout.public_spec for layout in image.tables.values()]
        self.attachments = image.attachments
        self._plan = plan
        self._placed = placed
        self._hbm_plan = hbm_plan
        self._identity = image.identity
        self._hbm_epoch = placed.placement.epoch if placed else None
        self._client = client
        self._files: list[AnyFiles] = []
        try:
            if client is not None:
                choice = replace(choice, served_by=(os.fspath(client.served.socket_path), client.served.patience_s))
            served = None if client is None else client.served
            self._files = open_tables(image, direct=choice.mode == "uring", served=served)
            self.engine = self._make_engine(choice, on_progress, device)
        except BaseException:
            self.close()
            raise

    @property
    def build(self) -> str:
        return self._image.identity

    @property
    def common_build(self) -> str:
        return self._image.common_identity

    def placed_keys(self, index: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        if self._placed is None:
            return super().placed_keys(index, start, count)
        return self._placed.keys(self._files[index].table, start, count)

    def _make_engine(self, choice: IoChoice, on_progress: OnProgress | None, device: str) -> Engine:
        what = f"the store {self.name}"
        if self._hbm_plan is not None:
            from ..tiers.hbm.opening import open_with_hbm  # loads torch and triton

            engine: Engine = open_with_hbm(
                what, self._files, self._plan, self._hbm_plan, choice, self._placed, device, on_progress
            )
        else:
            engine = open_native(what, self._files, self._plan, choice, self._placed, on_progress)
        if engine.bad_pages:
            first = next(iter(engine.bad_pages.values()))
            logger.error("%s: %d pages will not be served: %s", what, len(engine.bad_pages), first)
        return engine

    def change_hbm(self, placement: int | None) -> int:
        if self.engine.device is None or not isinstance(self.engine, DeviceEngine):
            return super().change_hbm(placement)
        image, placed = open_placement(self.name, placement, self._image.version, direct=self.engine.io == "uring")
        if placed is None:
            raise ConfigError(f"{self.name}: there is no placement; run 'tierstore plan'")
        try:
            if image.identity != self._identity:
                raise FormatError(f"{self.name} was built anew since it was opened; open it again")
            self.engine.change_entries(placed)
        finally:
            placed.close()
        self._hbm_epoch = placed.placement.epoch
        return self._hbm_epoch

    def details(self) -> dict[str, Any]:
        shares = self._plan.shares
        present_bytes, huge_bytes = self.engine.huge_page_bytes()
        memory: dict[str, Any] = {
            "budget_bytes": self._plan.budget_bytes,
            "dram_bytes": self._plan.dram_bytes,
            "present_bytes": present_bytes,
            "huge_page_bytes": huge_bytes,
            "staging_bytes": self._plan.staging.num_bytes,
            "resident_tables": [name for name, share in shares.items() if share.resident],
            "side_bytes": sum(share.side_bytes for share in shares.values()),
            "overlay_bytes": sum(share.overlay_bytes for share in shares.values()),
        }
        placement: dict[str, Any] = {
            "epoch": self._placed.placement.epoch if self._placed else None,
            "expected": expected_of(self._placed.placement.details) if self._placed else None,
            "static_entries": {name: share.static_entries for name, share in shares.items()},
            "recency_sets": {name: share.num_sets for name, share in shares.items()},
            "static_bytes": sum(share.static_bytes for share in shares.values()),
            "index_bytes": sum(share.index_bytes for share in shares.values()),
        }
        if self._hbm_plan is not None:
            hbm = self._hbm_plan
            memory |= {"hbm_budget_bytes": hbm.budget_bytes, "hbm_bytes": hbm.hbm_bytes}
            memory |= {"pinned_bytes": pinned_bytes(self._plan.budget_bytes), "hbm_index_bytes": hbm.host_index_bytes}
            memory["dram_bytes"] += beside_hbm(self._plan, hbm)
            placement["hbm_epoch"] = self._hbm_epoch
            placement["hbm_entries"] = {name: share.num_entries for name, share in hbm.shares.items()}
        return {"io": self.engine.io, "memory": memory, "placement": placement, "version": self._image.version}

    def close(self) -> None:
        for files in self._files:
            files.close()
        if self._placed:
            self._placed.close()
        if self._client is not None:
            self._client.close()
