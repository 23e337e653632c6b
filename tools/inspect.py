"""`tierstore inspect`: what is in a store, as its catalog says it, or in a trace or a profile.

Input: a path; of a store's files only the catalog is read. Output: tables for people, or JSON with stable keys;
unfinished builds are shown as such. Errors: a path that is none of these.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tierstore.formats.catalog import CatalogImage, paged_layouts, read_catalog
from tierstore.formats.in_place import InPlaceLayout
from tierstore.layout import TableLayout
from tierstore.units import count_text, format_bytes

from .cli import console
from .history import training_record, training_words, versions_record, versions_words
from .inspect_files import file_record, kind_of_file, lines_of

FILES_SHOWN_MAX = 5


def store_record(image: CatalogImage) -> dict[str, Any]:
    """Returns what a catalog says as a JSON-able dict; the keys are stable, sizes are ints of bytes."""
    layouts = list(image.tables.values())
    return {
        "path": str(image.path),
        "format_version": image.format_version,
        "ready": image.ready,
        "slice": image.origin.get("slice"),
        "num_rows": sum(layout.spec.num_rows for layout in layouts),
        "table_bytes": sum(layout.spec.table_bytes for layout in layouts),
        "store_bytes": sum(layout.store_bytes for layout in layouts),
        "tables": [_table_record(image, layout) for layout in layouts],
        "placements": {
            "current": image.epoch,
            "epochs": {str(epoch): record.num_bytes for epoch, record in sorted(image.placements.items())},
        },
        "versions": versions_record(image),
        "training": training_record(image),
        "origin": image.origin,
        "from_scratch": image.is_initial,
        "files_in_place": [file.to_dict() for file in image.files],
        "attachments": {name: len(value) for name, value in sorted(image.attachments.items())},
    }


def _table_record(image: CatalogImage, layout: TableLayout) -> dict[str, Any]:
    sides = paged_layouts({layout.spec.name: layout})
    shards = [(index, shard) for name in sides for index, shard in sorted(image.shards[name].items())]
    spec = layout.public_spec
    return spec.to_dict() | {
        "row_start": spec.row_start,
        "row_end": spec.row_end,
        "orders": list(spec.orders),
        "rows_per_key": spec.rows_per_key,
        "moduli": list(spec.moduli),
        "offsets": list(spec.offsets),
        "entry_bytes": layout.spec.entry_bytes,
        "table_bytes": layout.spec.table_bytes,
        "page_bytes": layout.page_bytes,
        "rows_per_page": layout.rows_per_page,
        "num_pages": layout.num_pages,
        "pages_per_shard": layout.pages_per_shard,
        "store_bytes": layout.store_bytes,
        "num_shards": sum(side.num_shards for side in sides.values()),
        "in_place": isinstance(layout, InPlaceLayout),
        "shards": [
            {"index": index, "file": shard.file, "num_bytes": shard.num_bytes, "sha256": shard.sha256}
            for index, shard in shards
        ],
    }


@click.command("inspect")
@click.argument("store", type=click.Path(path_type=Path), metavar="STORE|TRACE|PROFILE")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; the keys are stable, sizes are in bytes.")
def command(store: Path, as_json: bool) -> None:
    """Say what a store holds: tables, rows, pages, shards, versions, a training, and the checkpoint of its rows.

    Of a trace or a profile: tokens, documents, vocabulary, tables.

    \b
    Example: tierstore inspect v41.tier --json
    Example: tierstore inspect corpus.trace
    """
    if kind := kind_of_file(store):
        found = file_record(store, kind)
        click.echo(json.dumps(found, indent=2) if as_json else "\n".join(lines_of(found)))
        return
    record = store_record(read_catalog(store, must_be_ready=False, may_be_initial=True))
    if as_json:
        click.echo(json.dumps(record, indent=2))
    else:
        _print_tables(record)


def _print_tables(record: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    state = "ready" if record["ready"] else "UNFINISHED: run the same tierstore build command again"
    click.echo(f"{record['path']}: store format {record['format_version']}, {state}")
    tables = Table("table", "rows", "codec", "row bytes", "orders", "rows a key", "page bytes", "shards", "on disk")
    tables.columns[2].overflow = "fold"  # a codec's scale is a long hexadecimal float
    for column in (1, 3, 5, 6, 7, 8):
        tables.columns[column].justify = "right"
    for table in record["tables"]:
        tables.add_row(
            Text(table["name"]),  # names may hold brackets, which are markup otherwise
            _rows_text(table),
            f"{table['codec']} x {table['dim']}",
            f"{table['row_bytes']:,}",
            ", ".join(map(str, table["orders"])),
            str(table["rows_per_key"]),
            f"{table['page_bytes']:,}",
            f"{len(table['shards'])} of {table['num_shards']}",
            format_bytes(table["store_bytes"]),
        )
    console().print(tables)
    click.echo(
        f"{record['num_rows']:,} rows, {format_bytes(record['table_bytes'])}; in pages "
        f"{format_bytes(record['store_bytes'])}"
    )
    for file in record["files_in_place"]:
        click.echo(f"rows in place: {file['path']}, {format_bytes(file['bytes'])}")
    for table in record["tables"]:
        click.echo(f"fingerprint of {table['name']}: {table['fingerprint']}")
    placements = record["placements"]
    for epoch, num_bytes in placements["epochs"].items():
        opened = ", opened with" if int(epoch) == placements["current"] else ""
        click.echo(f"placement {epoch}: {format_bytes(num_bytes)}{opened}")
    if record["versions"]["newest"]:
        click.echo(f"versions: {versions_words(record['versions'])}")
    if record["training"]:
        click.echo(f"training: {training_words(record['training'])}")
    if record["from_scratch"]:
        click.echo("made by tierstore init: rows that no training touched are drawn, and stand nowhere")
    _print_origin(record["origin"])
    for name, num_bytes in record["attachments"].items():
        click.echo(f"attachment {name}: {format_bytes(num_bytes)}")


def _rows_text(table: dict[str, Any]) -> str:
    start, end, num_rows = table["row_start"], table["row_end"], table["num_rows"]
    return f"{num_rows:,}" if end - start == num_rows else f"{start:,} to {end:,} of {num_rows:,}"


def _print_origin(origin: dict[str, Any]) -> None:
    files, compacted = origin.get("files", []), origin.get("compacted")
    if isinstance(compacted, dict):
        click.echo(f"compacted from version {compacted.get('version')} of {compacted.get('store')}")
    if not files:
        click.echo(f"digest {origin.get('digest')}")
        return
    click.echo(f"built from {count_text(len(files), 'file')}, digest {origin.get('digest')}")
    for file in files[:FILES_SHOWN_MAX]:
        click.echo(f"  {file['name']}: {format_bytes(file['bytes'])}")
    if len(files) > FILES_SHOWN_MAX:
        click.echo(f"  and {len(files) - FILES_SHOWN_MAX} more")
