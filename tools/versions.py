"""`tierstore versions`: which versions a store has, and how many of them stay.

Input: a store. Output: a table, or JSON; with --keep, older versions folded into one. Errors: those of reading the
catalog, and of `tierstore.offline.fold`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from tierstore.formats.catalog import CatalogImage, read_catalog
from tierstore.offline.fold import fold_versions
from tierstore.units import format_bytes

from .cli import Progress, console


def versions_record(image: CatalogImage) -> list[dict[str, Any]]:
    """Returns the versions for JSON, the base first."""
    records: list[dict[str, Any]] = [{"version": 0, "digest": image.base_identity, "tables": {}, "num_bytes": 0}]
    for number, version in image.versions.items():
        tables = {
            name: {"rows": table.num_rows, "rows_of_all_versions": table.num_touched, "file": table.file}
            for name, table in version.tables.items()
        }
        records.append(
            {
                "version": number, "digest": image.at_version(number).identity, "commit": version.commit,
                "created_at": version.created_at, "tables": tables, "folded": version.folded is not None,
                "num_bytes": sum(table.num_bytes for table in version.tables.values()),
            }
        )  # fmt: skip
    return records


@click.command("versions")
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    metavar="N",
    help="Keep the newest N versions, and fold all before them into the oldest of these.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; sizes are in bytes.")
def command(store: Path, keep: int | None, as_json: bool) -> None:
    """List the versions of STORE: its base, 0, and what was published since.

    With --keep N, the oldest versions become one with the newest row of each, which frees their disk. The base and the
    newest N stay what they are; the others are gone. A daemon without --follow must open the store again: 'tierstore
    swap SOCKET STORE'.

    \b
    Example: tierstore versions v41.tier --keep 5
    """
    if keep is not None:
        with Progress("folding", "rows") as on_progress:
            report = fold_versions(store, keep, on_progress)
        if report.num_folded:
            click.echo(
                f"{report.num_folded} versions were folded into {report.version}: {format_bytes(report.freed_bytes)} "
                f"made way for {format_bytes(report.num_bytes)}",
                err=True,
            )
        else:
            click.echo(f"{store} has no more versions than that: nothing was folded", err=True)
    image = read_catalog(store)
    records = versions_record(image)
    if as_json:
        click.echo(json.dumps(records, indent=2))
    elif len(records) == 1:
        click.echo(f"{store} has only its base, version 0; publish a commit of its training: tierstore publish {store}")
    else:
        _print(image, records)


def _print(image: CatalogImage, records: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table("version", "published", "commit", "rows", "on disk", "digest")
    for record in records:
        if not record["version"]:
            table.add_row("0", "the base", "", "", "", record["digest"][:12])
            continue
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record["created_at"]))
        num_rows = sum(part["rows"] for part in record["tables"].values())
        commit = "" if record["commit"] is None else str(record["commit"])
        size = format_bytes(record["num_bytes"])
        name = f"{record['version']} (folded)" if record["folded"] else str(record["version"])
        table.add_row(name, when, commit, f"{num_rows:,}", size, record["digest"][:12])
    console().print(table)
    total = sum(record["num_bytes"] for record in records)
    click.echo(
        f"{sum(image.touched.values()):,} rows have a newer version than the base's, {format_bytes(total)} in all; "
        f"fewer versions: --keep N; one store of them: tierstore compact {image.path} NEW_STORE"
    )
