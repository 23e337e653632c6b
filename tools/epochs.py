"""`tierstore epochs`: the placements of a store; which one it opens with; pruning.

Input: a store. Output: a table, or JSON; with --use or --prune, a changed catalog.
Open stores keep what they have.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tierstore.errors import ConfigError
from tierstore.formats.catalog import CatalogImage, read_catalog, set_epoch
from tierstore.offline.place import prune_placements
from tierstore.offline.store_lock import locked_store
from tierstore.tiers.placed import PlacementFile
from tierstore.units import format_bytes

from .cli import console


def epochs_record(image: CatalogImage) -> list[dict[str, Any]]:
    """Returns the placements for JSON, oldest first; `problem` says why one cannot be opened."""
    records = []
    for epoch, placement in sorted(image.placements.items()):
        record: dict[str, Any] = {"epoch": epoch, "current": epoch == image.epoch, "num_bytes": placement.num_bytes}
        try:
            file = PlacementFile(image, epoch, direct=False)
        except Exception as error:  # a damaged placement is listed, so that it can be pruned
            record["problem"] = str(error)
        else:
            record["entries"] = {name: table.num_entries for name, table in file.placement.tables.items()}
            record["details"] = file.placement.details
            file.close()
        records.append(record)
    return records


@click.command("epochs")
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--use", metavar="N", help="Open with placement N from now on; 'none': without any.")
@click.option("--prune", is_flag=True, help="Remove old placements.")
@click.option(
    "--keep",
    default=1,
    show_default=True,
    type=click.IntRange(min=0),
    help="With --prune: keep so many besides the current one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; sizes are in bytes.")
def command(store: Path, use: str | None, prune: bool, keep: int, as_json: bool) -> None:
    """List the placements of STORE, choose the one it opens with, or remove old ones.

    \b
    Example: tierstore epochs v41.tier --prune
    """
    image = read_catalog(store)
    if use is not None:
        with locked_store(store):
            _use(read_catalog(store), use)
    if prune:
        for record in prune_placements(store, keep):
            click.echo(f"removed epoch {record.epoch}, {format_bytes(record.num_bytes)}", err=True)
    image = read_catalog(store)
    records = epochs_record(image)
    if as_json:
        click.echo(json.dumps(records, indent=2))
        return
    _print(store, records)


def _use(image: CatalogImage, use: str) -> None:
    if use != "none" and not (use.isdecimal() and int(use) in image.placements):
        there = ", ".join(map(str, sorted(image.placements))) or "no placement at all"
        raise ConfigError(f"--use {use}: there is {there}; give one of them, or none")
    set_epoch(image.path, None if use == "none" else int(use))


def _print(store: Path, records: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    if not records:
        click.echo(f"{store} has no placements; make one: tierstore plan {store} PROFILE")
        return
    table = Table("epoch", "opened with", "on disk", "entries", "planned for")
    for record in records:
        plan = record.get("details", {}).get("plan", {})
        entries = record.get("problem") or ", ".join(f"{name}: {count:,}" for name, count in record["entries"].items())
        planned = f"{format_bytes(plan['dram_bytes'])} of DRAM" if "dram_bytes" in plan else ""
        table.add_row(
            str(record["epoch"]),
            "yes" if record["current"] else "",
            format_bytes(record["num_bytes"]),
            Text(entries),
            planned,
        )
    console().print(table)
