"""`tierstore plan`: a profile and budgets -> what goes where, what to expect,
and the placement that a store opens warm with.

Flows in: a store, a profile of it, budgets. Flows out: a table of the plan, and a new epoch in the store. What is
chosen is `tierstore.decisions`', making it `tierstore.offline.place`'s. Refuses what those refuse,
before anything is written.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from engram_adapter.hash_spec import HashSpec
from engram_adapter.ngrams import keys_of_windows
from tierstore.decisions.curves import OnPhase
from tierstore.decisions.intervals import prediction_intervals
from tierstore.decisions.plan import FRACTIONS, Budgets, GroupPlan, plan_group
from tierstore.decisions.ranking import Ranking
from tierstore.decisions.recommend import default_choice
from tierstore.decisions.tally import Group
from tierstore.errors import BudgetError, ConfigError
from tierstore.formats.catalog import CatalogImage, read_catalog, set_epoch
from tierstore.formats.placement import HEAD_BYTES_MAX
from tierstore.formats.profile import KEYS, Profile
from tierstore.offline.build import locked_store
from tierstore.offline.place import Chosen, PlacePlan, PlaceReport, place_entries
from tierstore.offline.profile import READING, ItemRanking, groups_of
from tierstore.process.workers import Workers
from tierstore.tiers.memory import available_memory
from tierstore.units import format_bytes, parse_bytes

from .cli import console
from .phases import Phases
from .profile import check_header, documents_of
from .report.tables import exact_bytes

SIMULATIONS_AT_ONCE = 2
TRIED_ACCESSES = 3_000_000
DETAILS_BYTES_MAX = HEAD_BYTES_MAX // 4  # of what the placement says of its plan; groups of many tables are left out
MEMORY_PART = 0.5  # of what is free, that a recommended budget takes at most
UNTESTED_FRACTION = 0.75  # static part of DRAM if nothing was held out to choose it by
TRYING, CHOOSING, PLACING = "trying", "choosing", "placing"
UNITS = {READING: "n-grams", TRYING: "simulations", PLACING: "rows"}


def plan_profile(
    image: CatalogImage,
    profile: Profile,
    budgets: Budgets,
    batch_tokens: int = 1,
    fractions: Sequence[float] = FRACTIONS,
    *,
    untested: bool = False,
    on_progress: OnPhase | None = None,
) -> tuple[list[Ranking], list[GroupPlan]]:
    """Returns the plan of each group of tables, with its ranking. Blocks, seconds a million held-out accesses.

    untested: plan also if nothing is held out, by counts alone; its outcomes are of no accesses. Raises `ConfigError`
    for profiles that cannot be planned with: of a sample of keys, with nothing counted, or, by default,
    with nothing held out.
    """
    check_header(image, profile.header)
    if profile.header.sample_rate < 1:
        raise ConfigError(
            f"{profile.path} counts a sample of {profile.header.sample_rate:g} of the keys: it predicts, but a "
            f"placement needs the keys themselves; record all of them, with store.start_trace(path, share=1)"
        )
    if profile.counts["documents"] == profile.counts["held_out_documents"] > 0:
        raise _nothing_counted(profile)
    groups = groups_of(profile, documents_of(image, profile), on_progress)
    tested = [group for group in groups if len(group.replay.items)]
    if not tested and (not untested or not profile.num_items):
        raise _nothing_held_out(profile)
    rankings = [Ranking(group) for group in tested or map(_by_counts_alone, groups)]
    done, num_runs = itertools.count(), (len(fractions) + 1) * len(rankings)

    def tell() -> None:
        if on_progress:
            on_progress(TRYING, next(done), num_runs)

    tell()
    with Workers(SIMULATIONS_AT_ONCE, "tierstore-simulate") as pool:
        plans = [
            _plan(ranking, image, budgets, batch_tokens, fractions, pool, tell)
            if tested
            else plan_group(ranking, image.tables, budgets, batch_tokens, [UNTESTED_FRACTION])
            for ranking in rankings
        ]
    return rankings, plans


def _by_counts_alone(group: Group) -> Group:
    """Takes what was counted for what will be asked, for want of anything held out."""
    classes = group.classes
    return replace(group, classes=replace(classes, held_out=classes.counts * classes.num_items))


def _plan(
    ranking: Ranking,
    image: CatalogImage,
    budgets: Budgets,
    batch_tokens: int,
    fractions: Sequence[float],
    pool: Workers,
    tell: Callable[[], None],
) -> GroupPlan:
    """Tries the fractions on a share of the items, and the best one on all of them; `tell` hears of each,
    on any thread."""

    def map_telling(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterable[Any]:
        def telling(item: Any) -> Any:
            result = function(item)
            tell()
            return result

        return pool.map(telling, items)

    sampled = Ranking(ranking.group.sampled(TRIED_ACCESSES))
    best = plan_group(sampled, image.tables, budgets, batch_tokens, fractions, map_telling)
    return plan_group(ranking, image.tables, budgets, batch_tokens, [best.static_fraction], map_telling)


def choose(image: CatalogImage, profile: Profile, rankings: list[Ranking], plans: list[GroupPlan]) -> dict[str, Chosen]:
    """Reads the profile for the entries that the plans place; returns them by table, hottest first. Blocks."""
    chosen: dict[str, Chosen] = {}
    spec = None if profile.header.kind == KEYS else HashSpec.from_catalog(image)
    for ranking, plan in zip(rankings, plans, strict=True):
        if plan.num_entries == 0:
            continue
        order_index, items = ItemRanking(profile, ranking).first(plan.num_entries)
        for name in plan.tables:
            keys = items[:, 1].view(np.int64) if spec is None else keys_of(spec, items, order_index, name)
            chosen[name] = Chosen(order_index, keys, plan.static_fraction, min(plan.hbm_entries, len(keys)))
    return chosen


def keys_of(spec: HashSpec, items: np.ndarray, order_index: np.ndarray, table: str) -> np.ndarray:
    """Returns the keys, int64 [n], that a table gives n-grams, uint64 [n, 2], each of the order at its index,
    uint8 [n]."""
    keys = np.empty(len(items), dtype=np.int64)
    for index, order in enumerate(spec.orders):
        of_order = order_index == index
        keys[of_order] = keys_of_windows(spec, items[of_order], order, table)
    return keys


def plan_record(
    plan: GroupPlan, orders: tuple[int, ...], interval_tokens: int, document_tokens: np.ndarray
) -> dict[str, Any]:
    """Returns a plan for JSON. A *rates* is {"2": .., "3": .., "all": ..}; entries are of each table."""
    outcome = plan.outcome
    hits, accesses = (
        np.column_stack([part, part.sum(axis=1)]) for part in (outcome.document_hits, outcome.document_accesses)
    )
    low, high = prediction_intervals(hits, accesses, document_tokens, interval_tokens, np.random.default_rng(0))

    def rates(values: np.ndarray) -> dict[str, float]:
        return {str(name): round(float(rate), 6) for name, rate in zip([*orders, "all"], values, strict=True)}

    return {
        "tables": list(plan.tables),
        "resident": plan.resident,
        "hbm_entries": plan.hbm_entries,
        "static_entries": plan.static_entries,
        "nvme_entries": plan.nvme_entries,
        "recency_sets": plan.recency_sets,
        "static_fraction": plan.static_fraction,
        "hit_rate": rates(outcome.hit_rate),
        "low": rates(low),
        "high": rates(high),
        "hbm_share": rates(plan.hbm_share),
        "static_share": rates(outcome.static_share - plan.hbm_share),
        "recency_share": rates(outcome.recency_share),
        "first_touch_share": rates(outcome.first_touch_share),
        "steps_without_read": outcome.share_without_miss,
        "reads_per_token": plan.reads_per_token,
        "reads_per_token_unpacked": plan.reads_unpacked,
    }


def recommended_dram(profile: Profile, memory_bytes: int | None = None) -> tuple[int, str]:
    """Returns bytes of DRAM to plan with if none were asked for, and why: the profile's knee, as far as memory goes.

    memory_bytes: of the machine that is planned for; None: what is free here.
    """
    groups = profile.footer["analysis"]["groups"]
    if not groups:
        raise _nothing_held_out(profile)
    knee = default_choice(groups)
    whose = "free here" if memory_bytes is None else "there"
    dram_bytes = int(knee["dram_bytes"])
    most = int((available_memory()[0] if memory_bytes is None else memory_bytes) * MEMORY_PART)
    if dram_bytes > most:
        return most, f"half of the memory that is {whose}; the curve's knee is at {format_bytes(dram_bytes)}"
    return dram_bytes, f"the profile's {knee['name']} budget: {knee['why']}"


def _nothing_held_out(profile: Profile) -> ConfigError:
    counts = profile.counts
    return ConfigError(
        f"{profile.path}: {counts['held_out_documents']} of its {counts['documents']} documents are held out, and "
        "plans are tested on those; profile more text, or with a larger --held-out. The store's placement stays as it "
        f"is; --untested with --dram places by counts alone"
    )


def _nothing_counted(profile: Profile) -> ConfigError:
    documents = profile.counts["documents"]
    return ConfigError(
        f"{profile.path}: all of its {documents} documents are held out, so that nothing is counted and nothing can be "
        f"placed; profile more text, or with a smaller --held-out. The store's placement stays as it is"
    )


@click.command("plan")
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("profile", type=click.Path(path_type=Path))
@click.option("--hbm", default="0", show_default=True, metavar="SIZE", help="GPU memory to plan for.")
@click.option("--dram", metavar="SIZE", help="DRAM to plan for.  [default: what the profile recommends]")
@click.option(
    "--nvme-entries", default="0", show_default=True, metavar="SIZE", help="Packed entries on NVMe, one read each."
)
@click.option(
    "--batch-tokens", default=1, show_default=True, type=click.IntRange(min=1), help="Tokens looked up at once."
)
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing. Any budget will do.")
@click.option(
    "--for-machine", metavar="SIZE", help="Hold --dram against a machine with so much memory, instead of this one."
)
@click.option(
    "--untested", is_flag=True, help="Place by counts alone if the profile holds nothing back to test a plan on."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; sizes are in bytes.")
def command(
    store: Path,
    profile: Path,
    hbm: str,
    dram: str | None,
    nvme_entries: str,
    batch_tokens: int,
    dry_run: bool,
    for_machine: str | None,
    untested: bool,
    as_json: bool,
) -> None:
    """Choose what of STORE goes where, by the PROFILE of its use, and make the placement that it opens warm with.

    \b
    Example: tierstore plan v41.tier chats.profile --dram 8GiB --nvme-entries 50GiB
    """
    machine_bytes = None if for_machine is None else parse_bytes(for_machine, "--for-machine")
    image = read_catalog(store)
    with Profile(profile) as opened:
        check_header(image, opened.header)
        why = "asked for"
        if dram is None:
            dram_bytes, why = recommended_dram(opened, machine_bytes)
        else:
            dram_bytes = parse_bytes(dram, "--dram")
        beyond = _check_memory(dram_bytes, machine_bytes, dry_run)
        budgets = Budgets(parse_bytes(hbm, "--hbm"), dram_bytes, parse_bytes(nvme_entries, "--nvme-entries"))
        with Phases(UNITS) as phases:
            rankings, plans = plan_profile(image, opened, budgets, batch_tokens, untested=untested, on_progress=phases)
        tokens = opened.counts["held_out_tokens"]
        records = [
            plan_record(plan, ranking.group.orders, tokens, ranking.group.replay.document_tokens)
            for ranking, plan in zip(rankings, plans, strict=True)
        ]
        expected = {"dram_bytes": dram_bytes, "hbm_bytes": budgets.hbm_bytes, "nvme_bytes": budgets.nvme_bytes}
        record: dict[str, Any] = expected | {"why": why, "held_out_tokens": tokens, "groups": records}
        if not as_json:
            print_plan(record)
            if dry_run and beyond:
                click.echo(beyond)
        if not dry_run:
            report = materialise(image, opened, rankings, plans, record)
            record["epoch"] = report.placement.epoch if report else None
            if not as_json:
                click.echo(_made(store, report))
        if as_json:
            click.echo(json.dumps(record, indent=2))


def _check_memory(dram_bytes: int, machine_bytes: int | None, dry_run: bool) -> str:
    """Refuses a budget beyond the machine that it is for; of a dry run says what this machine lacks, "" if nothing."""
    if machine_bytes is not None:
        if dram_bytes > machine_bytes:
            raise BudgetError(
                f"--dram: {dram_bytes} bytes ({format_bytes(dram_bytes)}), the machine of --for-machine has "
                f"{machine_bytes} bytes ({format_bytes(machine_bytes)}); ask for less"
            )
        return ""
    available, limit = available_memory()
    if dram_bytes <= available:
        return ""
    if dry_run:
        return f"more than this {limit} has left, {format_bytes(available)}: a plan for another one"
    raise BudgetError(
        f"--dram: {dram_bytes} bytes ({format_bytes(dram_bytes)}), the {limit} has {available} bytes "
        f"({format_bytes(available)}) left; ask for less. To see a plan for another machine add --dry-run, to place "
        f"for one --for-machine {exact_bytes(dram_bytes).replace(' ', '')}"
    )


def materialise(
    image: CatalogImage,
    profile: Profile,
    rankings: list[Ranking],
    plans: list[GroupPlan],
    record: Mapping[str, Any],
) -> PlaceReport | None:
    """Makes the placement of plans and publishes it; None where they place nothing,
    and the store opens without. Blocks."""
    with Phases(UNITS) as phases:
        phases(CHOOSING, 0, None)
        chosen = choose(image, profile, rankings, plans)
    if not chosen:
        with locked_store(image.path):
            set_epoch(image.path, None)
        return None
    details: dict[str, Any] = {"profile": profile.path.name, "plan": dict(record)}
    if len(json.dumps(details)) > DETAILS_BYTES_MAX:
        del details["plan"]["groups"]
    with Phases(UNITS) as phases:
        return place_entries(
            image.path,
            chosen,
            details=details,
            on_plan=print_preflight,
            on_progress=lambda done, total: phases(PLACING, done, total),
        )


def _made(store: Path, report: PlaceReport | None) -> str:
    if report is None:
        return f"{store} opens without a placement from now on: the plan leaves DRAM to whole tables and recency"
    placement = report.placement
    return (
        f"{store} opens with epoch {placement.epoch} from now on: {format_bytes(placement.num_bytes)}, "
        f"{report.pages_read:,} pages read, {report.seconds:.1f} s"
    )


def print_preflight(plan: PlacePlan) -> None:
    """Prints what the placement takes on disk."""
    click.echo(
        f"disk: {format_bytes(plan.bytes_needed)} needed, {format_bytes(plan.placement.num_bytes)} of it to stay; "
        f"{format_bytes(plan.bytes_free)} free",
        err=True,
    )


def print_plan(record: Mapping[str, Any]) -> None:
    """Prints what goes where and what to expect."""
    from rich.table import Table

    hbm = f", HBM {format_bytes(record['hbm_bytes'])}" if record["hbm_bytes"] else ""
    click.echo(f"DRAM {format_bytes(record['dram_bytes'])} ({record['why']}){hbm}")
    for group in record["groups"]:
        if not record["held_out_tokens"]:
            click.echo(
                f"{', '.join(group['tables'])}: not tested, because the profile holds nothing back; by counts alone"
            )
            _print_division(group, hbm)
            continue
        title = f"{', '.join(group['tables'])}: expected of {record['held_out_tokens']:,} held-out tokens"
        table = Table("order", "hits", "95 %", "hbm", "dram static", "dram recency", "nvme", "first seen", title=title)
        for order in group["hit_rate"]:
            shown = [
                f"{100 * value:.1f} %"
                for value in (
                    *(group[name][order] for name in ("hbm_share", "static_share", "recency_share")),
                    1 - group["hit_rate"][order],
                    group["first_touch_share"][order],
                )
            ]
            interval = f"{100 * group['low'][order]:.1f} to {100 * group['high'][order]:.1f} %"
            table.add_row(order, f"{100 * group['hit_rate'][order]:.1f} %", interval, *shown)
        console().print(table)
        _print_division(group, hbm)
        if group["resident"]:
            continue
        without = group["steps_without_read"]
        click.echo(
            f"NVMe reads a token: {group['reads_per_token']:.2f}, without packed entries "
            f"{group['reads_per_token_unpacked']:.2f}"
            + ("" if without is None else f"; batches without any: {100 * without:.1f} %")
        )


def _print_division(group: Mapping[str, Any], hbm: str) -> None:
    if group["resident"]:
        beside = f": {group['hbm_entries']:,} entries of each table in HBM" if hbm else ": nothing to place"
        click.echo(f"fits its share of DRAM whole{beside}")
        return
    click.echo(
        f"entries of each table: {group['hbm_entries']:,} in HBM, {group['static_entries']:,} static in DRAM "
        f"({100 * group['static_fraction']:.0f} % of its share), {group['recency_sets'] * 8:,} left to recency, "
        f"{group['nvme_entries']:,} packed on NVMe"
    )
