"""`tierstore build`: a checkpoint's tables into a store.

Input: the path of a checkpoint. Output: a store, the preflight before it and progress on the way. The work is
`engram_adapter.build_checkpoint`'s. Errors: its own.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from engram_adapter.checkpoints import build_checkpoint
from engram_adapter.families import FAMILIES
from tierstore.offline.build import BuildPlan, BuildReport
from tierstore.slices import parse_slice
from tierstore.units import count_text, format_bytes, parse_bytes

from .cli import Progress, console


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
@click.option("--in-place", is_flag=True, help="Leave the rows in CHECKPOINT's files; write only what checks them.")
@click.option("--slice", "slice_text", metavar="I/N", help="Only slice I of N of every table, from 0/N on.")
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
    in_place: bool,
    slice_text: str | None,
) -> None:
    """Build the store STORE from CHECKPOINT: a folder with config.json and *.safetensors, or one file of tensors
    (safetensors, PyTorch, GGUF).

    OWNER/NAME (or OWNER/NAME@REVISION) is a model that the Hugging Face cache has.

    Says first what it will write. Killed or out of disk, it goes on when the same command runs again.

    With --in-place there is no second copy: lookups read CHECKPOINT's own files, which must stay as they are. If they
    were moved or copied, the same command with their new place compares them and goes on. Given a store in place as
    CHECKPOINT, it makes one with shards of it.

    With --slice the store has a contiguous range of each table's rows, on borders of heads if there are enough heads:
    each of several hosts holds one. Only bytes of those rows are read. tierstore reslice joins or divides slices.

    \b
    Example: tierstore build DeepSeek-V4.1-Flash v41.tier --jobs 4
    Example: tierstore build model-q8_0.gguf embed.tier --tensor token_embd.weight
    Example: tierstore build DeepSeek-V4.1-Flash v41.tier --in-place
    Example: tierstore build DeepSeek-V4.1-Flash v41-0.tier --slice 0/4
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
            in_place=in_place,
            slice=None if slice_text is None else parse_slice(slice_text),
            on_plan=plans.append if as_json else print_plan,
            on_progress=on_progress,
        )
    if as_json:
        click.echo(json.dumps(build_record(store, plans[0], report), indent=2))
        return
    done = "nothing was left to write"
    if report.bytes_written:
        rate = format_bytes(report.bytes_written / max(report.seconds, 1e-9))
        done = f"{format_bytes(report.bytes_written)} written in {report.seconds:.1f} s ({rate}/s)"
    click.echo(f"{store} is ready: {done}, {count_text(report.shards_built, 'shard')} built, {report.shards_kept} kept")


def build_record(store: Path, plan: BuildPlan, report: BuildReport) -> dict[str, Any]:
    """Returns a finished build for JSON: what the preflight found of each table, and what was done."""
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
        for layout in plan.paged
    ]
    sizes = {"table_bytes": plan.table_bytes, "store_bytes": plan.store_bytes, "in_place": plan.in_place}
    return {"store": str(store), "tables": tables} | sizes | asdict(report)


def print_plan(plan: BuildPlan) -> None:
    """Prints the preflight: what each table takes, and what the disk has."""
    from rich.table import Table
    from rich.text import Text

    table = Table("table", "rows", "row bytes", "page bytes", "rows a page", "pages", "shards")
    for column in table.columns[1:]:
        column.justify = "right"
    for layout in plan.paged:
        numbers = (layout.spec.num_rows, layout.spec.row_bytes, layout.page_bytes, layout.rows_per_page)
        table.add_row(Text(layout.spec.name), *(f"{n:,}" for n in (*numbers, layout.num_pages, layout.num_shards)))
    console().print(table)
    rows = format_bytes(plan.table_bytes)
    where = f"{rows} of rows stay in place, beside them" if plan.in_place else f"rows {rows}, in pages"
    click.echo(
        f"{where} {format_bytes(plan.store_bytes)}, "
        f"already built {format_bytes(plan.bytes_done)}; "
        f"disk: {format_bytes(plan.bytes_needed)} needed, {format_bytes(plan.bytes_free)} free"
    )
