"""plan: a profile and budgets -> what goes to which tier, and what to expect of that.

Input: a store's geometry, a `Profile`, budgets of HBM, DRAM and NVMe. Output: a `Plan`; nothing is written. Errors:
profiles of other tables, of a sample of keys, or with nothing counted or held out; budgets that are too small.

Threads: simulations run two at once, beside the main thread, so that Ctrl-C takes effect between two of them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..decisions.item_statistics import TableGroup
from ..decisions.plan import FRACTIONS, Budgets, GroupPlan, plan_group
from ..decisions.ranking import Ranking
from ..errors import ConfigError
from ..formats.catalog import CatalogImage, read_catalog
from ..process.progress import TRYING, OnPhase, no_report
from ..process.workers import Workers
from ..tiers.memory import available_memory
from ..units import format_bytes, parse_bytes
from .profile import Profile, open_profile

SIMULATIONS_AT_ONCE = 2
TRIED_ACCESSES = 3_000_000  # fractions are tried on a share of the items with as many accesses
UNTESTED_FRACTION = 0.75  # static part of DRAM if nothing was held out to choose it by
MEMORY_FRACTION = 0.5  # of what is free, that a recommended budget takes at most


@dataclass(frozen=True, eq=False)
class Plan:
    """What a profile recommends to place within budgets, and what to expect; made by `plan`, taken by `place`.

    Attributes:
        budgets: bytes of HBM, of DRAM, and of packed entries on NVMe, for all tables together.
        why: of the budget of DRAM: "asked for", or what the profile says for it.
        interval_tokens: the length of the streams that the intervals of `to_dict` are for.
        groups: what each group of tables gets, with expected hits and bytes by tier.
        profile: what was planned from; its file says which entries come first, so it must stay until `place` has read
        it.
        rankings: for each group, in which order its entries are placed.
    """

    budgets: Budgets
    why: str
    interval_tokens: int
    groups: tuple[GroupPlan, ...]
    profile: Profile
    rankings: tuple[Ranking, ...] = field(repr=False)

    @property
    def bytes_by_tier(self) -> dict[str, int]:
        """Bytes that the groups take of each tier: {"hbm": .., "dram": .., "nvme": ..}."""
        return {tier: sum(group.bytes_by_tier[tier] for group in self.groups) for tier in ("hbm", "dram", "nvme")}

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan for JSON; sizes are in bytes."""
        return {
            "dram_bytes": self.budgets.dram_bytes,
            "hbm_bytes": self.budgets.hbm_bytes,
            "nvme_bytes": self.budgets.nvme_bytes,
            "why": self.why,
            "held_out_tokens": self.profile.counts.held_out_tokens,
            "groups": [group.to_dict(self.interval_tokens) for group in self.groups],
        }


def plan(
    store_path: str | os.PathLike[str],
    profile: Profile | str | os.PathLike[str],
    dram: int | str | None = "512MiB",
    hbm: int | str = 0,
    nvme_entries: int | str = 0,
    *,
    batch_tokens: int = 1,
    fractions: Sequence[float] = FRACTIONS,
    interval_tokens: int | None = None,
    memory_bytes: int | None = None,
    untested: bool = False,
    on_progress: OnPhase | None = None,
) -> Plan:
    """Chooses what goes to which tier within budgets; also `tierstore.plan`. Writes nothing.

    Blocks: seconds a million held-out accesses.

    Args:
        store_path: the store that was profiled.
        profile: a `Profile`, or the file of a profile of keys.
        dram: bytes for all tables together, or a size such as "8GiB"; None: what the profile recommends.
        hbm: GPU memory to plan for.
        nvme_entries: packed entries on NVMe beyond those in memory, one read each.
        batch_tokens: tokens that are looked up at once.
        fractions: static fractions of DRAM to try.
        interval_tokens: the length of the streams that intervals are for; by default as long as what was held out.
        memory_bytes: of the machine that a recommended budget is for; None: what is free here.
        untested: plan by counts alone if nothing was held out; what is then expected is of no accesses.
        on_progress: called with (phase, done, of how many or None), on any thread.

    Raises:
        StoreNotReadyError, FormatError: there is no finished store, or a file is damaged.
        FingerprintMismatchError: the profile is of other tables.
        ConfigError: the profile's file is gone or another one by now; or it counts a sample, has nothing
            counted or (unless `untested`) nothing held out.
        BudgetError: DRAM is too small to open the store with, or for the indexes of what is placed.
    """
    image = read_catalog(store_path).at_version(None)
    counted = profile if isinstance(profile, Profile) else open_profile(profile)
    counted.mapping.check(image.tables, counted.header)
    dram_bytes, why = (
        recommended_dram(counted, memory_bytes) if dram is None else (parse_bytes(dram, "dram"), "asked for")
    )
    budgets = Budgets(parse_bytes(hbm, "hbm"), dram_bytes, parse_bytes(nvme_entries, "nvme_entries"), image.touched)
    groups, is_tested = _groups_to_plan(counted, untested, on_progress)
    rankings = tuple(Ranking(group) for group in groups)
    planner = _Planner(image, budgets, batch_tokens, fractions if is_tested else (), on_progress or no_report)
    return Plan(
        budgets,
        why,
        counted.counts.held_out_tokens if interval_tokens is None else interval_tokens,
        planner.plans(rankings),
        counted,
        rankings,
    )


def recommended_dram(profile: Profile, memory_bytes: int | None = None) -> tuple[int, str]:
    """Returns bytes of DRAM to plan with if nobody asks for any, and why: the profile's knee, as far as memory goes.

    memory_bytes: of the machine that is planned for; None: what is free here. Raises `ConfigError` if nothing was held
    out.
    """
    choice = profile.recommended
    if choice is None:
        raise _nothing_held_out(profile)
    whose = "free here" if memory_bytes is None else "there"
    most = int((available_memory()[0] if memory_bytes is None else memory_bytes) * MEMORY_FRACTION)
    if choice.dram_bytes > most:
        return most, f"half of the memory that is {whose}; the curve's knee is at {format_bytes(choice.dram_bytes)}"
    return choice.dram_bytes, f"the profile's {choice.name} budget: {choice.why}"


def _groups_to_plan(profile: Profile, untested: bool, on_progress: OnPhase | None) -> tuple[Sequence[TableGroup], bool]:
    """Returns the groups of which anything was held out, or else, if asked, all of them by counts alone."""
    if profile.header.sample_rate < 1:
        raise ConfigError(
            f"{profile.path} counts a sample of {profile.header.sample_rate:g} of the keys: it predicts, but a "
            f"placement needs the keys themselves; record all of them, with store.start_trace(path, share=1)"
        )
    counts = profile.counts
    if counts.documents == counts.held_out_documents > 0:
        raise _nothing_counted(profile)
    groups = profile.groups(on_progress)
    tested = [group for group in groups if len(group.replay.items)]
    if tested:
        return tested, True
    if not untested or not any(map(sum, (group.distinct for group in groups))):
        raise _nothing_held_out(profile)
    return [_by_counts_alone(group) for group in groups], False


def _by_counts_alone(group: TableGroup) -> TableGroup:
    """Takes what was counted for what will be asked, for want of anything held out."""
    classes = group.classes
    return replace(group, classes=replace(classes, held_out=classes.counts * classes.num_items))


class _Planner:
    """Plans groups one after the other. Without fractions to try, it takes UNTESTED_FRACTION."""

    def __init__(
        self, image: CatalogImage, budgets: Budgets, batch_tokens: int, fractions: Sequence[float], report: OnPhase
    ) -> None:
        self._layouts, self._budgets, self._batch_tokens = image.tables, budgets, batch_tokens
        self._fractions, self._report = fractions, report
        self._done = itertools.count()  # its next number is taken in one step, whatever the thread
        self._num_runs = 0

    def plans(self, rankings: Sequence[Ranking]) -> tuple[GroupPlan, ...]:
        """Returns the plan of each group; blocks."""
        self._num_runs = (len(self._fractions) + 1) * len(rankings)
        self._report_run()
        with Workers(SIMULATIONS_AT_ONCE, "tierstore-simulate") as pool:
            return tuple(self._plan(ranking, pool) for ranking in rankings)

    def _plan(self, ranking: Ranking, pool: Workers) -> GroupPlan:
        """Tries the fractions on a share of the items, and the best one on all of them."""

        def map_reporting(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterable[Any]:
            def reporting(item: Any) -> Any:
                result = function(item)
                self._report_run()
                return result

            return pool.map(reporting, items)

        def planned(ranking: Ranking, fractions: Sequence[float]) -> GroupPlan:
            return plan_group(ranking, self._layouts, self._budgets, self._batch_tokens, fractions, map_reporting)

        if not self._fractions:
            return planned(ranking, [UNTESTED_FRACTION])
        best = planned(Ranking(ranking.group.sampled(TRIED_ACCESSES)), self._fractions)
        return planned(ranking, [best.static_fraction])

    def _report_run(self) -> None:
        self._report(TRYING, next(self._done), self._num_runs)


def _nothing_held_out(profile: Profile) -> ConfigError:
    counts = profile.counts
    return ConfigError(
        f"{profile.path}: {counts.held_out_documents} of its {counts.documents} documents are held out, and plans are "
        f"tested on those; profile more text, or with a larger --held-out. The store's placement stays as it is; "
        f"--untested with --dram places by counts alone"
    )


def _nothing_counted(profile: Profile) -> ConfigError:
    return ConfigError(
        f"{profile.path}: all of its {profile.counts.documents} documents are held out, so that nothing is counted and "
        f"nothing can be placed; profile more text, or with a smaller --held-out. The store's placement stays as it is"
    )
