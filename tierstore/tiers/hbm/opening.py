"""Opens an engine with an hbm tier above it: the device first, so that one that is not there costs nothing.

Input: what `open_native` takes, a plan for HBM, a device's name. Output: an `HbmEngine`. Errors:
`ConfigError` and `BudgetError` for devices and budgets that cannot be had. A tier that nothing can fill is logged once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ... import kernels
from ...decisions.budget import DramPlan
from ...decisions.hbm_budget import HbmPlan, divide_hbm, pinned_bytes
from ...formats.placement import RECORDS_MAX
from ...process.progress import OnProgress
from ..engine import READ_WAIT_S, Engine, HostEngine
from ..files import AnyFiles
from ..native import NativeEngine, open_native
from ..nvme import IoChoice
from ..placed import PlacementFile
from .device import DramPart, open_device
from .pairs import Pairs

if TYPE_CHECKING:
    from .engine import HbmEngine

logger = logging.getLogger("tierstore")


def open_with_hbm(
    what: str,
    files: Sequence[AnyFiles],
    plan: DramPlan,
    hbm_plan: HbmPlan,
    choice: IoChoice,
    placed: PlacementFile | None,
    device_name: str,
    on_progress: OnProgress | None,
) -> HbmEngine:
    """Opens the device, loads what goes to DRAM, then what goes to HBM, and returns the engine over both. Blocks.

    Raises `ConfigError` (no such device, no kernels for it, nothing compiled), `BudgetError` (the device has not so
    much memory).
    """
    device = open_device(device_name)
    from .engine import HbmEngine  # these load the kernels, for the device that is open now
    from .tier import HbmTier

    if placed is None:
        logger.warning(
            "%s: hbm stays empty: no placement says what belongs there; run 'tierstore plan', open again", what
        )
    engine = open_native(what, files, plan, choice, placed, on_progress)
    above: Engine = engine  # what closes all that there is
    try:
        dram = [_dram_part(engine, index) for index in range(len(files))]
        above = HbmEngine(
            what, engine, HbmTier(device, hbm_plan, engine.layouts, dram, pinned_bytes(plan.budget_bytes))
        )
        if placed is not None:
            _fill(above, dram, placed, hbm_plan, on_progress)
    except BaseException:
        above.close(READ_WAIT_S)
        raise
    return above


def _fill(
    above: HbmEngine,
    dram: Sequence[DramPart],
    placed: PlacementFile,
    hbm_plan: HbmPlan,
    on_progress: OnProgress | None,
) -> None:
    """Brings the placement's first entries into HBM. Nobody looks up yet."""
    tables = placed.placement.tables
    total = sum(hbm_plan.shares[name].num_entries * table.record_bytes for name, table in tables.items())
    done = 0

    def on_bytes(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if on_progress:
            on_progress(done, total)

    for part, damaged in zip(dram, above.change_entries(placed, on_bytes), strict=True):
        if part.area is not None and len(damaged):  # the engine below must not look for these records either
            index = part.area.reshape(-1).view(kernels.INDEX_BUCKET)
            index["keys"][np.isin(index["places"], damaged)] = -1


def put_above(
    what: str, engine: HostEngine, dram: Sequence[DramPart], hbm_bytes: int, pinned: int, device_name: str
) -> HbmEngine:
    """Puts an empty tier of its own above an engine whose DRAM is not this process's; `change_entries` fills it.

    dram: what of that the device may read, of each table. hbm_bytes, pinned: bytes of the device, and of host memory
    for mailboxes. Slots are as many as fit, for whatever placement comes. Raises as `open_with_hbm` does. The engine
    stays the caller's if that fails.
    """
    device = open_device(device_name)
    from .engine import HbmEngine
    from .tier import HbmTier

    tables = {layout.spec.name: layout for layout in engine.layouts}
    most = {name: RECORDS_MAX for name, layout in tables.items() if not layout.spec.is_plain}
    static_entries = {
        name: len(part.records) for name, part in zip(tables, dram, strict=True) if part.records is not None
    }
    plan = divide_hbm(tables, hbm_bytes, most, static_entries)
    return HbmEngine(what, engine, HbmTier(device, plan, engine.layouts, dram, pinned))


def _dram_part(engine: NativeEngine, index: int) -> DramPart:
    """What DRAM holds of a table that a device may read."""
    memory, spec = engine.memories[index], engine.layouts[index].spec
    if isinstance(memory.rows_or_cache, np.ndarray):
        # Rows that could not be loaded are refused by the host.
        whole = all(table != index for table, _ in engine.bad_pages)
        return DramPart(memory.rows_or_cache[: spec.table_bytes] if whole else None)
    if memory.statics is None:
        return DramPart()
    records, (_, area), num_orders = memory.statics.records, memory.statics.areas[0], len(spec.orders)
    if not len(records):
        return DramPart(area=area)

    def named(count: int) -> Pairs:
        return Pairs.of_records(records[:count], np.arange(len(records[:count])), num_orders)

    return DramPart(None, records, named, area)
