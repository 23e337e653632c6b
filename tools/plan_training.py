"""`tierstore plan --training`: what training a store on a trace would need of this machine.

Input: a store, traces of tokens, an optimizer's name, budgets. Output: a table of the estimate, or JSON. The work is
`engram_adapter.plan_training`'s. Errors: its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from engram_adapter.training_plans import plan_training
from tierstore.decisions.training_estimate import TrainingEstimate
from tierstore.training.optimizers import RULES
from tierstore.units import format_bytes, parse_bytes

from .cli import Progress, console

NAMES = {rule.__name__: rule for rule in RULES.values()}


def run(
    store: Path,
    traces: Sequence[Path],
    optimizer: str,
    dram: str,
    batch_tokens: int,
    commit_steps: int,
    probe: bool,
    as_json: bool,
) -> None:
    """Plans, and prints what was found."""
    with Progress("reading the trace", "tokens") as on_progress:
        estimate = plan_training(
            store,
            list(traces),
            NAMES[optimizer](lr=0.0),
            parse_bytes(dram, "--dram"),
            batch_tokens,
            commit_steps=commit_steps,
            probe=probe,
            on_progress=on_progress,
        )
    if as_json:
        record = estimate.to_dict() | {"store": str(store), "optimizer": optimizer, "dram": dram}
        click.echo(json.dumps(record, indent=2))
    else:
        print_estimate(estimate)


def print_estimate(estimate: TrainingEstimate) -> None:
    """Prints an estimate for people."""
    from rich.table import Table

    title = f"training on {estimate.num_tokens:,} tokens, steps of {estimate.batch_tokens:,}"
    table = Table(
        "table", "rows touched", "of all", "new in 2nd half", "index", "rows cached", "base reads/step",
        "run reads/step", "rows written/step", "log/M tokens", title=title,
    )  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    for name, each in estimate.tables.items():
        about = "" if each.watched_one_in == 1 else "about "
        table.add_row(
            name,
            f"{about}{each.touched_rows:,}",
            f"{100 * each.touched_fraction:.1f} %",
            f"{100 * each.growth_fraction:.1f} %",
            format_bytes(each.index_bytes),
            f"{each.cached_rows:,}",
            f"{each.base_reads_per_step:,.0f}",
            f"{each.run_reads_per_step:,.0f}",
            f"{each.rows_written_per_step:,.0f}",
            format_bytes(each.log_bytes_per_million_tokens),
        )
    console().print(table)
    log_bytes = sum(each.log_bytes for each in estimate.tables.values())
    watched = max(each.watched_one_in for each in estimate.tables.values())
    exact = "exact counts" if watched == 1 else f"estimated from one row in {watched}"
    click.echo(f"{exact}; runs on disk: up to {format_bytes(log_bytes)}; a commit each {estimate.commit_steps} steps")
    if estimate.disk is None:
        return
    disk = estimate.disk
    click.echo(
        f"this disk: {disk.reads_per_s:,.0f} single records/s, {disk.neighbours_per_s:,.0f} times eight neighbours/s, "
        f"{format_bytes(disk.write_bytes_per_s)}/s written and synced"
    )
    if estimate.tokens_per_s is None or estimate.write_bytes_per_s is None:
        click.echo("nothing is read or written: the disk does not limit the training")
        return
    click.echo(
        f"it carries {estimate.tokens_per_s:,.0f} tokens/s: {estimate.reads_per_s:,.0f} reads/s and "
        f"{format_bytes(estimate.write_bytes_per_s)}/s written, one after the other"
    )
