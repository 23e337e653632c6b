"""`tierstore build`: a checkpoint's tables into a store.

Flows in: the path of a checkpoint. Flows out: a store, the preflight before it and progress on the way. The work is
`tierstore.offline.build`'s and the layouts are `engram_adapter.families`'; here they meet. Refuses what those refuse.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from engram_adapter.families import FAMILIES, plain_source, read_model
from tierstore.errors import ConfigError
from tierstore.formats.checkpoint import Checkpoint, TableSource
from tierstore.formats.table_source import find_hole
from tierstore.offline.build import BuildPlan, BuildReport, build_store
from tierstore.process.progress import OnProgress
from tierstore.units import format_bytes, parse_bytes

from .cli import Progress, console

SHARD_BYTES = 1 << 30


def build_checkpoint(
    checkpoint_path: str | os.PathLike[str],
    store_path: str | os.PathLike[str],
    *,
    family: str | None = None,
    tensor: str | None = None,
    jobs: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    allow_network_fs: bool = False,
    allow_holes: bool = False,
    on_plan: Callable[[BuildPlan], None] | None = None,
    on_progress: OnProgress | None = None,
) -> BuildReport:
    """Builds the store of a checkpoint, or resumes it. Blocks until the store is ready.

    family: which layout to read, None to find it from config.json. tensor: the name of one 2-D tensor to take as a
    plain table (row id = key) instead. allow_holes: take parts of the files that were never written for zeros. The
    others as for `tierstore.offline.build.build_store`, whose errors come through;
    `ValueError` if both family and tensor are given.
    """
    if family is not None and tensor is not None:
        raise ValueError(f"--family {family} and --tensor {tensor}: a plain tensor has no family; give one of them")
    checkpoint = Checkpoint.open(checkpoint_path)
    sources: tuple[TableSource, ...]
    attachments: dict[str, bytes] = {}
    if tensor is not None:
        sources = (plain_source(checkpoint, tensor),)
    else:
        model = read_model(checkpoint, family)
        sources, attachments = model.sources, model.hash_spec.attachments()
    hole = None if allow_holes else find_hole(sources)
    if hole is not None:
        raise ConfigError(
            f"{hole}; finish or repeat it, or, if these rows are zeros in truth (a sparse copy, a file system that "
            f"leaves zeros out), pass --allow-holes"
        )
    return build_store(
        store_path,
        sources,
        origin=checkpoint.as_record(),
        attachments=attachments,
        shard_bytes=shard_bytes,
        jobs=jobs,
        allow_network_fs=allow_network_fs,
        on_plan=on_plan,
        on_progress=on_progress,
    )


@click.command("build")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--family",
    metavar="NAME",
    help=f"Layout to read: {', '.join(sorted(FAMILIES))}. Default: found from config.json.",
)
@click.option("--tensor", metavar="NAME", help="Take this one 2-D tensor as a plain table: row id = key.")
@click.option("--jobs", type=int, metavar="N", help="Shards built at once. Default: one a processor, at most 4.")
@click.option("--shard-bytes", default="1GiB", show_default=True, metavar="SIZE", help="Largest shard.")
@click.option("--allow-network-fs", is_flag=True, help="Build on a network file system that only this host uses.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, when all is done; sizes are in bytes.")
@click.option("--allow-holes", is_flag=True, help="Take parts of the checkpoint that were never written for zeros.")
def command(
    checkpoint: Path,
    store: Path,
    family: str | None,
    tensor: str | None,
    jobs: int | None,
    shard_bytes: str,
    allow_network_fs: bool,
    as_json: bool,
    allow_holes: bool,
) -> None:
    """Build the store STORE from CHECKPOINT: a folder with config.json and *.safetensors, or one file of tensors.

    Says first what it will write. Killed or out of disk, it goes on when the same command runs again.

    \b
    Example: tierstore build DeepSeek-V4.1-Flash v41.tier --jobs 4
    """
    plans: list[BuildPlan] = []
    with Progress("building") as on_progress:
        report = build_checkpoint(
            checkpoint,
            store,
            family=family,
            tensor=tensor,
            jobs=jobs,
            shard_bytes=parse_bytes(shard_bytes, "--shard-bytes"),
            allow_network_fs=allow_network_fs,
            allow_holes=allow_holes,
            on_plan=plans.append if as_json else print_plan,
            on_progress=on_progress,
        )
    if as_json:
        click.echo(json.dumps(build_record(store, plans[0], report), indent=2))
        return
    rate = format_bytes(report.bytes_written / max(report.seconds, 1e-9))
    click.echo(
        f"{store} is ready: {format_bytes(report.bytes_written)} written in {report.seconds:.1f} s ({rate}/s), "
        f"{report.shards_built} shards built, {report.shards_kept} kept"
    )


def build_record(store: Path, plan: BuildPlan, report: BuildReport) -> dict[str, Any]:
    """Returns a finished build for JSON: what the preflight said of each table, and what was done."""
    tables = [
        {
            "name": layout.spec.name,
            "num_rows": layout.spec.num_rows,
            "row_bytes": layout.spec.row_bytes,
            "page_bytes": layout.page_bytes,
            "rows_per_page": layout.rows_per_page,
            "num_pages": layout.num_pages,
            "num_shards": layout.num_shards,
        }
        for layout in plan.tables
    ]
    sizes = {"table_bytes": plan.table_bytes, "store_bytes": plan.store_bytes}
    return {"store": str(store), "tables": tables} | sizes | asdict(report)


def print_plan(plan: BuildPlan) -> None:
    """Prints the preflight: what each table takes, and what the disk has."""
    from rich.table import Table
    from rich.text import Text

    table = Table("table", "rows", "row bytes", "page bytes", "rows a page", "pages", "shards")
    for column in table.columns[1:]:
        column.justify = "right"
    for layout in plan.tables:
        numbers = (layout.spec.num_rows, layout.spec.row_bytes, layout.page_bytes, layout.rows_per_page)
        table.add_row(Text(layout.spec.name), *(f"{n:,}" for n in (*numbers, layout.num_pages, layout.num_shards)))
    console().print(table)
    click.echo(
        f"rows {format_bytes(plan.table_bytes)}, in pages {format_bytes(plan.store_bytes)}, "
        f"already built {format_bytes(plan.bytes_done)}; "
        f"disk: {format_bytes(plan.bytes_needed)} needed, {format_bytes(plan.bytes_free)} free"
    )
