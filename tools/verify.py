"""`tierstore verify`: a store against its own checksums, and against the checkpoint that it was built from.

Flows in: a store's path, and perhaps a checkpoint's. Flows out: what was checked, every fault, and exit status 1 where
there are any. Refuses, like `tierstore.verify`, what is no finished store.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from engram_adapter.families import plain_source, read_model
from engram_adapter.hash_spec import RECORD_NAME
from tierstore.errors import FormatError
from tierstore.formats.catalog import CatalogImage, read_catalog
from tierstore.formats.checkpoint import Checkpoint, TableSource
from tierstore.verify import verify_store

from .cli import Progress

FAULTS_PRINTED_MAX = 50


def sources_of_store(image: CatalogImage, checkpoint: Checkpoint) -> tuple[TableSource, ...]:
    """Returns the checkpoint's tables as the store was built from them: by its family, or its plain tables by name.

    Raises `ConfigError` where the checkpoint lacks them, `FormatError` where the store's record of its hash is damaged.
    """
    if all(layout.spec.is_plain for layout in image.tables.values()):
        return tuple(plain_source(checkpoint, name) for name in image.tables)
    try:
        family = json.loads(image.attachments[RECORD_NAME])["family"]
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{image.path}: the catalog does not say which family its tables are of ({error!r}); restore it or rebuild"
        ) from error
    return read_model(checkpoint, family).sources


@click.command("verify")
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--source", type=click.Path(path_type=Path), metavar="CHECKPOINT", help="Compare rows with this checkpoint's."
)
@click.option(
    "--sample", type=click.IntRange(min=1), metavar="N", help="Check the pages of N random rows of each table, not all."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="S", help="Draws the sample.")
@click.option(
    "--jobs",
    type=click.IntRange(1, 64),
    metavar="N",
    help="Shards checked at once. Default: one a processor, at most 4.",
)
def command(store: Path, source: Path | None, sample: int | None, seed: int, jobs: int | None) -> None:
    """Check the store STORE: its catalog, every shard's digest, page and placed entry; with --source, every row.

    With --sample, only the pages that the drawn rows lie in are read, and all their rows compared; shards' digests are not.
    Exit status 1, and a list, where anything is wrong.

    \b
    Example: tierstore verify v41.tier --source DeepSeek-V4.1-Flash --sample 100000
    """
    sources, origin = None, None
    if source is not None:
        checkpoint = Checkpoint.open(source)
        sources, origin = sources_of_store(read_catalog(store), checkpoint), checkpoint.as_record()
    with Progress("verifying", "shards") as on_progress:
        report = verify_store(
            store, sources=sources, origin=origin, sample_rows=sample, seed=seed, jobs=jobs, on_progress=on_progress
        )
    compared = f", {report.rows_compared} rows compared with {source}" if source is not None else ""
    placed = f", {report.entries_checked} placed entries" if report.entries_checked else ""
    click.echo(f"{store}: {report.shards_checked} shards, {report.pages_checked} pages{placed} checked{compared}")
    for fault in report.faults[:FAULTS_PRINTED_MAX]:
        click.echo(f"fault: {fault}")
    if len(report.faults) > FAULTS_PRINTED_MAX:
        click.echo(f"and {len(report.faults) - FAULTS_PRINTED_MAX} more faults")
    click.echo("nothing is wrong" if not report.faults else f"{len(report.faults)} faults in {store}")
    if report.faults:
        click.get_current_context().exit(1)
