"""`tierstore publish`: the newest commit of a training as a version of the store, for its readers.

Input: a store. Output: the version's number, and what did not fit the codec, or JSON. Errors: those of
`tierstore.training.publish`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from tierstore.units import count_text

from .cli import Progress


@click.command("publish")
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--commit", type=click.IntRange(min=1), metavar="N", help="Which kept commit.  [default: the current one]"
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(store: Path, commit: int | None, as_json: bool) -> None:
    """Publish the rows that training of STORE has committed, in the tables' codecs.

    Whoever opens the store then gets them, and so do clients of 'tierstore serve --follow', within seconds. Training
    and readers go on meanwhile.

    \b
    Example: tierstore publish v41.tier
    """
    from tierstore.training.publish import publish

    with Progress("publishing", "rows") as on_progress:
        report = publish(store, commit, on_progress)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report), indent=2))
        return
    if not report.is_new:
        click.echo(f"version {report.version} has all rows of commit {report.commit}: nothing was published")
        return
    click.echo(
        f"published version {report.version}: {count_text(sum(report.rows.values()), 'row')} of commit {report.commit}"
    )
    for name, num_rows in report.rows.items():
        click.echo(f"  {name}: {count_text(num_rows, 'row')}")
        if report.saturated[name]:
            click.echo(f"  {name}: {report.saturated[name]:,} values were beyond the codec's largest, and became it")
        if report.not_numbers[name]:
            click.echo(f"  {name}: {report.not_numbers[name]:,} values are not a number")
