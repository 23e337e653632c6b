"""`tierstore compact`: a store and its versions into one new store of shards.

Input: a store, a new folder. Output: the new store. Errors: those of a build.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from tierstore.units import count_text, format_bytes, parse_bytes

from .cli import Progress


@click.command("compact")
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("new_store", type=click.Path(path_type=Path))
@click.option("--version", type=click.IntRange(min=0), metavar="N", help="Of which version.  [default: the newest]")
@click.option("--shard-bytes", default="1GiB", show_default=True, help="The largest shard.")
@click.option("--jobs", type=click.IntRange(min=1), help="Shards written at once.  [default: one a core, at most 4]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; sizes are in bytes.")
def command(
    store: Path, new_store: Path, version: int | None, shard_bytes: str, jobs: int | None, as_json: bool
) -> None:
    """Write the rows of STORE, at a version, into NEW_STORE, in shards, whose base they are.

    STORE stays as it is. Its own rows may lie in place. Placements stay behind: plan anew. If it was interrupted, the
    same command goes on.

    \b
    Example: tierstore compact v41.tier v41-2.tier
             tierstore swap /run/tierstore/v41.sock v41-2.tier
    """
    from tierstore.offline.compact import compact

    size = parse_bytes(shard_bytes, "--shard-bytes")
    with Progress("compacting") as on_progress:
        report = compact(store, new_store, version, shard_bytes=size, jobs=jobs, on_progress=on_progress)
    if as_json:
        click.echo(json.dumps({"store": str(store), "new_store": str(new_store)} | asdict(report), indent=2))
        return
    click.echo(
        f"{new_store}: {count_text(report.shards_built, 'shard')} written ({format_bytes(report.bytes_written)}), "
        f"{report.shards_kept} kept"
    )
