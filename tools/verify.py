"""`tierstore verify`: a store against its own checksums and its checkpoint; with `--repair`,
mended from that checkpoint.

Input: a store's path, and perhaps a checkpoint's. Output: what was checked, every fault, what was repaired, the command
that repairs the rest, and exit status 1 if anything is still wrong. Errors: as `tierstore.verify`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import tierstore
from engram_adapter.checkpoints import open_checkpoint
from tierstore.formats.catalog import read_catalog
from tierstore.offline.verify_report import VerifyReport
from tierstore.units import count_text

from .cli import Progress

FAULTS_PRINTED_MAX = 50


@click.command("verify")
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    metavar="CHECKPOINT",
    help="Compare rows with this checkpoint's; with --repair, rebuild damaged shards from it.",
)
@click.option("--repair", is_flag=True, help="Rebuild damaged or missing shards and placements, and check them again.")
@click.option(
    "--sample", type=click.IntRange(min=1), metavar="N", help="Check the pages of N random rows of each table, not all."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="S", help="Draws the sample.")
@click.option(
    "--jobs",
    type=click.IntRange(1, 64),
    metavar="N",
    help="Shards checked at once. Default: one a processor, at most 4.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    store: Path, source: Path | None, repair: bool, sample: int | None, seed: int, jobs: int | None, as_json: bool
) -> None:
    """Check the store STORE: its catalog, every shard's digest, page and placed entry; with --source, every row.

    With --repair, exactly the shards that are damaged or missing are rebuilt from --source, to the bytes that the
    catalog's SHA-256 names, and damaged placements are remade from what is left of them. Lookups go on meanwhile; a
    store that is open reads the new files when it is opened again. Killed or out of disk, run the same command again.

    With --sample, only the pages that the drawn rows lie in are read, and all their rows compared; shards' digests are
    not. Exit status 1, and a list, if anything is wrong.

    \b
    Example: tierstore verify v41.tier --source DeepSeek-V4.1-Flash --sample 100000
    Example: tierstore verify v41.tier --repair --source DeepSeek-V4.1-Flash
    """
    if repair and sample is not None:
        raise click.UsageError("--repair checks everything; leave --sample out")
    opened = None if source is None else open_checkpoint(source)
    with Progress("verifying", "shards") as on_progress:
        report = tierstore.verify(
            store, opened, repair, sample_rows=sample, seed=seed, jobs=jobs, on_progress=on_progress
        )
    if as_json:
        click.echo(json.dumps(report_record(store, source, report), indent=2))
    else:
        print_report(store, source, report)
    if report.faults:
        click.get_current_context().exit(1)


def report_record(store: Path, source: Path | None, report: VerifyReport) -> dict[str, Any]:
    """Returns a report for JSON: counts, faults, which shards (by table, index, file) and placements are damaged."""
    shards = read_catalog(store).shards
    record = asdict(report) | {"store": str(store), "source": None if source is None else str(source)}
    record["sound"] = not report.faults
    record["damaged_shards"] = [
        {"table": name, "shard": index, "file": shards[name][index].file, "faults": faults}
        for (name, index), faults in sorted(report.damaged_shards.items())
    ]
    record["damaged_placements"] = [
        {"epoch": epoch, "faults": faults} for epoch, faults in sorted(report.damaged_placements.items())
    ]
    return record


def print_report(store: Path, source: Path | None, report: VerifyReport) -> None:
    """Prints a report for people: what was checked and mended, then faults, then what to do."""
    compared = f", {count_text(report.rows_compared, 'row')} compared with {source}" if report.rows_compared else ""
    placed = f", {count_text(report.entries_checked, 'placed entry')}" if report.entries_checked else ""
    blocks = f", {count_text(report.blocks_checked, 'block')} of the checkpoint" if report.blocks_checked else ""
    click.echo(
        f"{store}: {count_text(report.shards_checked, 'shard')}, {count_text(report.pages_checked, 'page')}"
        f"{blocks}{placed} checked{compared}"
    )
    for part in report.repaired:
        click.echo(f"repaired: {part}")
    for fault in report.faults[:FAULTS_PRINTED_MAX]:
        click.echo(f"fault: {fault}")
    if len(report.faults) > FAULTS_PRINTED_MAX:
        click.echo(f"and {len(report.faults) - FAULTS_PRINTED_MAX} more faults")
    if report.remedy:
        click.echo(f"repair it: {report.remedy}")
    click.echo("nothing is wrong" if not report.faults else f"{len(report.faults)} faults in {store}")
