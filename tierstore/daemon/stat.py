"""The parts of the stat record that describe a host's tiers; learning, clients and remote lookups describe themselves.

Input: a `Host`. Output: structs of `record`. Errors: none of its own.
"""

from __future__ import annotations

import msgspec
import psutil

from ..decisions.budget import CACHE_WAYS
from ..stats import expected_of, stats_of
from .host import Host
from .record import Counters, EpochInfo, Latency, Memory, PlanInfo, StoreInfo, TableShape


def store_info(host: Host) -> StoreInfo:
    """Returns what is served."""
    version, shares = host.epochs.current, host.tiers.plan.shares
    tables = {
        name: TableShape(
            orders=tuple(layout.spec.orders),
            rows_per_key=layout.spec.rows_per_key,
            row_bytes=layout.spec.row_bytes,
            num_rows=layout.spec.num_rows,
            resident=shares[name].resident,
        )
        for name, layout in version.layouts.items()
    }
    return StoreInfo(
        path=version.path,
        version=version.number,
        previous=host.versions.previous_path,
        tables=tables,
        published=version.published,
    )


def counters_of(host: Host) -> tuple[Counters, Latency]:
    """Returns what all clients have counted, and their latencies."""
    stats = stats_of(host.clients.counters(), [layout.spec for layout in host.epochs.current.layouts.values()])
    latency = msgspec.convert(stats.pop("latency"), Latency)
    return msgspec.convert(stats, Counters), latency


def memory_of(host: Host) -> Memory:
    """Returns the budget, its parts, the resident size of this process, and what lies on huge pages."""
    plan = host.tiers.plan
    present_bytes, huge_page_bytes = host.tiers.huge_page_bytes(host.epochs.current.resident)
    return Memory(
        budget_bytes=plan.budget_bytes,
        used_bytes=plan.dram_bytes,
        static_bytes=plan.static_bytes - plan.index_bytes,
        index_bytes=plan.index_bytes,
        recency_bytes=plan.recency_bytes,
        resident_bytes=plan.resident_bytes,
        staging_bytes=plan.staging.num_bytes,
        counts_bytes=plan.counts_bytes,
        work_bytes=plan.work_bytes,
        process_bytes=psutil.Process().memory_info().rss,
        present_bytes=present_bytes,
        huge_page_bytes=huge_page_bytes,
        overlay_bytes=plan.overlay_bytes,
    )


def epoch_info(host: Host) -> EpochInfo:
    """Returns the epochs, and how full static sets and recency caches are."""
    epochs, tiers = host.epochs, host.tiers
    return EpochInfo(
        current=epochs.newest,
        alive=1 if epochs.reclaimed == epochs.newest else 2,
        changes=epochs.num_changes,
        waiting_for=tuple(host.attachments.waiting_for),
        static_entries={name: slots.num_live for name, slots in tiers.slots.items()},
        static_slots={name: len(slots.keys) for name, slots in tiers.slots.items()},
        recency_entries=tiers.recency_entries(),
        recency_slots={name: tiers.plan.shares[name].num_sets * CACHE_WAYS for name in tiers.slots},
    )


def plan_info(host: Host) -> PlanInfo | None:
    """Returns the hit rates that the plan of the served placement expected; None if no plan made it."""
    placement = host.epochs.current.placement
    expected = None if placement is None else expected_of(placement.details)
    if placement is None or expected is None:
        return None
    return msgspec.convert({"epoch": placement.epoch, "hit_rates": expected}, PlanInfo)
