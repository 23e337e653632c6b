"""`tierstore reslice`: other slices out of slices.

Input: stores with slices, where new ones go, how many. Output: the new stores. The work is `tierstore.reslice`'s.
Errors: its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from tierstore.units import format_bytes, parse_bytes

from .cli import Progress


@click.command("reslice")
@click.argument("stores", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="SLICE...")
@click.option("-o", "--into", required=True, metavar="FOLDER", help="Where they go; {} stands for a slice's number.")
@click.option("--slices", "num_slices", required=True, type=click.IntRange(min=1), metavar="M", help="1: whole tables.")
@click.option("--step", type=click.IntRange(min=0), metavar="N", help="Of training.  [default: newest that all hold]")
@click.option("--version", type=click.IntRange(min=0), metavar="N", help="Published rows.  [default: newest all hold]")
@click.option("--shard-bytes", metavar="SIZE", help="The largest shard.  [default: as SLICEs have it]")
@click.option("--jobs", type=click.IntRange(min=1), help="Shards written at once.  [default: one a core, at most 4]")
@click.option("--allow-network-fs", is_flag=True, help="Make them on a network file system that only this host uses.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; sizes are in bytes.")
def command(
    stores: tuple[Path, ...],
    into: str,
    num_slices: int,
    step: int | None,
    version: int | None,
    shard_bytes: str | None,
    jobs: int | None,
    allow_network_fs: bool,
    as_json: bool,
) -> None:
    """Make M new slices of the stores SLICE, which together hold every row once. M = 1 joins them into one store.

    Rows, training records and the optimizer's state are copied bit for bit, of the newest step of which every slice has
    a commit: so a training goes on with another number of ranks. The old stores stay as they are. If it was
    interrupted, the same command goes on.

    \b
    Example: tierstore reslice rank-0.tier rank-1.tier -o 'rank-{}-of-4.tier' --slices 4
    Example: tierstore reslice rank-?.tier -o whole.tier --slices 1
    """
    from tierstore.training.reslice import reslice

    with Progress("reslicing") as on_progress:
        report = reslice(
            stores,
            into,
            num_slices,
            step=step,
            version=version,
            shard_bytes=None if shard_bytes is None else parse_bytes(shard_bytes, "--shard-bytes"),
            jobs=jobs,
            allow_network_fs=allow_network_fs,
            on_progress=on_progress,
        )
    names = [str(path) for path in report.stores]
    if as_json:
        found = {"stores": names, "step": report.step, "version": report.version, "bytes_written": report.bytes_written}
        click.echo(json.dumps(found, indent=2))
        return
    of = f"version {report.version}" if report.step is None else f"the commit of step {report.step}"
    click.echo(f"{', '.join(names)}: {of}; {format_bytes(report.bytes_written)} of shards written")
