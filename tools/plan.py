"""`tierstore plan`: a profile and budgets -> what goes where, what to expect,
and the placement that a store opens warm with.

Input: a store, a profile of it, budgets. Output: a table of the plan, and a new epoch in the store. The work is done by
`tierstore.plan` and `tierstore.place`. Errors: theirs, before anything is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

import engram_adapter
import tierstore
from tierstore.errors import BudgetError
from tierstore.offline.place import PlacePreflight, PlaceReport, place_plan
from tierstore.process.progress import PHASE_UNITS
from tierstore.tiers.memory import available_memory
from tierstore.units import format_bytes, parse_bytes

from .cli import console
from .phases import Phases
from .report.tables import exact_bytes

STEP_TOKENS = 2048  # of a training step
OF_TRAINING = {"optimizer", "commit_steps", "no_probe"}
OF_PLACEMENT = {"hbm", "nvme_entries", "dry_run", "for_machine", "untested"}
OPTIMIZERS = ("SGD", "RowWiseAdagrad", "LazyAdam", "DenseAdam")


@click.command("plan")
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PROFILE|TRACE...")
@click.option("--hbm", default="0", show_default=True, metavar="SIZE", help="GPU memory to plan for.")
@click.option("--dram", metavar="SIZE", help="DRAM to plan for.  [default: what the profile recommends]")
@click.option(
    "--nvme-entries", default="0", show_default=True, metavar="SIZE", help="Packed entries on NVMe, one read each."
)
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    help=f"Tokens looked up at once, or of a training step.  [default: 1; --training: {STEP_TOKENS}]",
)
@click.option("--training", is_flag=True, help="Say what training STORE on TRACE... needs; writes nothing.")
@click.option(
    "--optimizer",
    type=click.Choice(OPTIMIZERS),
    default=OPTIMIZERS[1],
    show_default=True,
    help="Of --training: its state is part of every record.",
)
@click.option(
    "--commit-steps", type=click.IntRange(min=1), default=100, show_default=True, help="Of --training: between commits."
)
@click.option("--no-probe", is_flag=True, help="Of --training: do not measure the disk of STORE, which takes seconds.")
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
    inputs: tuple[Path, ...],
    hbm: str,
    dram: str | None,
    nvme_entries: str,
    batch_tokens: int | None,
    training: bool,
    optimizer: str,
    commit_steps: int,
    no_probe: bool,
    dry_run: bool,
    for_machine: str | None,
    untested: bool,
    as_json: bool,
) -> None:
    """Choose what of STORE goes where, by the PROFILE of its use, and make the placement that it opens warm with.

    \b
    Example: tierstore plan v41.tier chats.profile --dram 8GiB --nvme-entries 50GiB
    Example: tierstore plan v41.tier books.trace --training --dram 64GiB --batch-tokens 65536
    """
    _check_kind(training)
    if training:
        from . import plan_training

        if dram is None:
            raise click.UsageError("--training needs --dram: the memory that open_training would get")
        tokens = batch_tokens or STEP_TOKENS
        plan_training.run(store, inputs, optimizer, dram, tokens, commit_steps, not no_probe, as_json)
        return
    if len(inputs) != 1:
        raise click.UsageError(f"{len(inputs)} profiles: a plan is made from one; for traces add --training")
    (profile,) = inputs
    machine_bytes = None if for_machine is None else parse_bytes(for_machine, "--for-machine")
    opened = engram_adapter.open_profile(store, profile)
    dram_bytes = None if dram is None else parse_bytes(dram, "--dram")
    beyond = "" if dram_bytes is None else _check_memory(dram_bytes, machine_bytes, dry_run)
    budgets = dram_bytes, parse_bytes(hbm, "--hbm"), parse_bytes(nvme_entries, "--nvme-entries")
    with Phases(PHASE_UNITS) as phases:
        plan = tierstore.plan(
            store,
            opened,
            *budgets,
            batch_tokens=batch_tokens or 1,
            memory_bytes=machine_bytes,
            untested=untested,
            on_progress=phases,
        )
    record = plan.to_dict()
    if not as_json:
        print_plan(record)
        if dry_run and beyond:
            click.echo(beyond)
    if not dry_run:
        with Phases(PHASE_UNITS) as phases:
            report = place_plan(store, plan, on_preflight=print_preflight, on_progress=phases)
        record["epoch"] = report.placement.epoch if report else None
        if not as_json:
            click.echo(_made(store, report))
    if as_json:
        click.echo(json.dumps(record, indent=2))


def _check_kind(training: bool) -> None:
    """Refuses options of the other kind of plan, which would change nothing."""
    context = click.get_current_context()
    given = {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    of_other = (OF_PLACEMENT if training else OF_TRAINING) & given
    if of_other:
        names = ", ".join(sorted(f"--{name.replace('_', '-')}" for name in of_other))
        what = "a plan of --training, which writes nothing, takes no" if training else "only a plan of --training takes"
        raise click.UsageError(f"{what} {names}")


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


def _made(store: Path, report: PlaceReport | None) -> str:
    if report is None:
        return f"{store} opens without a placement from now on: the plan leaves DRAM to whole tables and recency"
    placement = report.placement
    return (
        f"{store} opens with epoch {placement.epoch} from now on: {format_bytes(placement.num_bytes)}, "
        f"{report.pages_read:,} pages read, {report.seconds:.1f} s"
    )


def print_preflight(preflight: PlacePreflight) -> None:
    """Prints what the placement takes on disk."""
    click.echo(
        f"disk: {format_bytes(preflight.bytes_needed)} needed, {format_bytes(preflight.placement.num_bytes)} of it to "
        f"stay; {format_bytes(preflight.bytes_free)} free",
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
