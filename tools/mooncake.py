"""`tierstore mooncake put`: a store's shards into Mooncake.

Input: a store, the address of a Mooncake's master. Output: how many objects it holds now. The work is done by
`offline.mooncake.put_shards`. Errors: its own.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from tierstore.offline.mooncake import put_shards
from tierstore.units import format_bytes

from .cli import Progress


@click.group("mooncake")
def command() -> None:
    """Keep a store's shards in Mooncake, the memory of a cluster.

    Example: tierstore mooncake put v41.tier mooncake://10.0.0.1:50051
    """


@command.command("put")
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("address", metavar="mooncake://HOST:PORT")
@click.option("--replace", is_flag=True, help="Put also the objects that are there already.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; sizes are in bytes.")
def put(store: Path, address: str, replace: bool, as_json: bool) -> None:
    """Put the shards of STORE into a Mooncake, by its master's address: an object for each 4 MiB, pinned.

    Readers then need only the catalog, placements and versions of STORE on their own disk. Needs the extra mooncake.

    \b
    Example: tierstore mooncake put v41.tier mooncake://10.0.0.1:50051
    Then:    tierstore.open("v41.tier", pages="mooncake://10.0.0.1:50051")
    """
    with Progress("putting") as progress:
        report = put_shards(store, address, replace=replace, on_progress=progress)
    if as_json:
        click.echo(json.dumps(asdict(report), indent=2))
    else:
        kept = f", {report.num_kept:,} of them were there before" if report.num_kept else ""
        click.echo(f"{address}: {report.num_objects:,} objects, {format_bytes(report.num_bytes)}{kept}")
