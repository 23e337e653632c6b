"""`tierstore versions`: which versions a store has.

Input: a store. Output: a table, or JSON. Errors: those of reading the catalog.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from tierstore.formats.catalog import CatalogImage, read_catalog
from tierstore.units import format_bytes

from .cli import console


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
                "created_at": version.created_at, "tables": tables,
                "num_bytes": sum(table.num_bytes for table in version.tables.values()),
            }
        )  # fmt: skip
    return records


@click.command("versions")
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON; sizes are in bytes.")
def command(store: Path, as_json: bool) -> None:
    """List the versions of STORE: its base, 0, and what was published since.

    \b
    Example: tierstore versions v41.tier
    """
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
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["created_at"]))
        num_rows = sum(part["rows"] for part in record["tables"].values())
        commit = "" if record["commit"] is None else str(record["commit"])
        size = format_bytes(record["num_bytes"])
        table.add_row(str(record["version"]), when, commit, f"{num_rows:,}", size, record["digest"][:12])
    console().print(table)
    total = sum(record["num_bytes"] for record in records)
    click.echo(
        f"{sum(image.touched.values()):,} rows have a newer version than the base's, {format_bytes(total)} in all; "
        f"one store of them: tierstore compact {image.path} NEW_STORE"
    )
