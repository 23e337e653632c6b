"""`tierstore commits`: the durable points of a store's training, and which of them are pinned.

Input: a store; commits to pin or unpin. Output: a table, or JSON. Errors: `ConfigError` for a commit that is not there.
Safe beside a training that goes on.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from tierstore.formats.training_records import TrainingRecords
from tierstore.training.commits import pin, read_training, unpin
from tierstore.units import format_bytes

from .cli import console


def commits_record(store: Path, records: TrainingRecords | None) -> list[dict[str, Any]]:
    """Returns the commits for JSON, oldest first; sizes are in bytes, `own_bytes` those that no other commit needs."""
    if records is None:
        return []
    found = []
    for number, commit in records.commits.items():
        others = frozenset().union(*(other.files for other in records.commits.values() if other is not commit))
        sizes = {run.file: run.num_bytes for runs in commit.runs.values() for run in runs}
        found.append(
            {
                "commit": number,
                "step": commit.step,
                "time_s": commit.time_s,
                "current": number == records.current,
                "pinned": number in records.pins,
                "records": {table: sum(run.num_records for run in runs) for table, runs in commit.runs.items()},
                "runs": {table: len(runs) for table, runs in commit.runs.items()},
                "num_bytes": commit.num_bytes,
                "own_bytes": sum(size for file, size in sizes.items() if file not in others),
                "payload_bytes": len(commit.payload),
                "digest": commit.digest,
                "missing": sorted(file for file in commit.files if not (store / file).is_file()),
            }
        )
    return found


@click.command("commits")
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--pin", "pins", metavar="N", multiple=True, type=click.IntRange(min=1), help="Keep commit N.")
@click.option("--unpin", "unpins", metavar="N", multiple=True, type=click.IntRange(min=1), help="End a pin.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; sizes are in bytes.")
def command(store: Path, pins: tuple[int, ...], unpins: tuple[int, ...], as_json: bool) -> None:
    """List the commits of the training in STORE, and pin those that must stay.

    The newest two stay by themselves. A commit that a model's checkpoint refers to must be pinned.

    \b
    Example: tierstore commits v41.tier --pin 12
    """
    for number in pins:
        pin(store, number)
    for number in unpins:
        if not unpin(store, number):
            click.echo(f"commit {number} was not pinned", err=True)
    found = commits_record(store, read_training(store))
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    _print(store, found)


def _print(store: Path, found: list[dict[str, Any]]) -> None:
    from rich.table import Column, Table

    if not found:
        click.echo(f"{store} has no commits; a training makes them: training.commit(step)")
        return
    plain = [
        Column(name, no_wrap=True) for name in ("commit", "step", "when", "", "records", "on disk", "own", "digest")
    ]
    table = Table(*plain, box=None, pad_edge=False)
    for of in found:
        marks = [name for name in ("current", "pinned") if of[name]]
        table.add_row(
            str(of["commit"]),
            f"{of['step']:,}",
            datetime.fromtimestamp(of["time_s"], UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            " ".join(marks),
            f"{sum(of['records'].values()):,}",
            format_bytes(of["num_bytes"]),
            format_bytes(of["own_bytes"]),
            of["digest"][:8],  # 80 columns hold no more
        )
    console().print(table)
    for of in found:
        if of["missing"]:
            names = ", ".join(of["missing"][:3])
            click.echo(f"commit {of['commit']}: {len(of['missing'])} files are missing: {names}")
