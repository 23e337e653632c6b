"""`tierstore delta`: packs versions of a store into a file, or publishes those of such a file.

Input: a store and a range of versions, or a delta. Output: a file, or new versions. Errors: those of
`tierstore.offline.delta`.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import click

from tierstore.units import format_bytes

from .cli import Progress

_RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)")


@click.command("delta")
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("versions", metavar="[A..B]", required=False)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The file to write.")
@click.option(
    "--apply", "delta", type=click.Path(path_type=Path, exists=True), help="Publish the versions of this file."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; sizes are in bytes.")
def command(store: Path, versions: str | None, out: Path | None, delta: Path | None, as_json: bool) -> None:
    """Pack versions A+1 to B of STORE into a file; or publish those of one (--apply) where the store is the same.

    Both stores must have the same base, and the same versions up to A. Versions that are there already are passed by.

    \b
    Example: tierstore delta v41.tier 3..5 -o v41.3-5.delta
             tierstore delta /host2/v41.tier --apply v41.3-5.delta
    """
    from tierstore.offline.delta import apply_delta, write_delta

    if (delta is None) == (versions is None) or (out is None) != (versions is None):
        raise click.UsageError("give A..B and -o FILE to make a delta, or --apply FILE to publish one")
    if delta is not None:
        with Progress("applying") as on_progress:
            report = apply_delta(store, delta, on_progress)
        if as_json:
            click.echo(json.dumps({"store": str(store), "delta": str(delta)} | asdict(report), indent=2))
            return
        if report.first_version > report.last_version:
            click.echo(f"{store} has version {report.last_version} already: nothing was published")
            return
        click.echo(f"published versions {report.first_version} to {report.last_version} of {store}")
        return
    found = _RANGE.fullmatch(versions or "")
    if found is None or out is None:
        raise click.UsageError(f"{versions!r} is no range of versions: give A..B, such as 0..3")
    if os.path.lexists(out):
        raise click.UsageError(f"{out} exists already; give a new name, or remove it")
    with Progress("packing") as on_progress:
        report = write_delta(store, int(found[1]), int(found[2]), out, on_progress)
    if as_json:
        click.echo(json.dumps({"store": str(store), "delta": str(out)} | asdict(report), indent=2))
        return
    click.echo(
        f"{out}: versions {report.first_version} to {report.last_version} of {store}, {format_bytes(report.num_bytes)}"
    )
