"""`tierstore export`: a store's rows as a checkpoint, in the layout of the one that it was built from.

Input: a store, the checkpoint that it was built from, a new folder. Output: the folder, and each file's SHA-256. The
work is `engram_adapter.export_checkpoint`'s. Errors: its own.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from engram_adapter.exporting import ExportReport, export_checkpoint
from tierstore.units import count_text, format_bytes

from .cli import Progress


@click.command("export")
@click.argument("stores", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="STORE...")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    metavar="CHECKPOINT",
    help="The checkpoint that STORE was built from.  [default: of a store in place, its own]",
)
@click.option(
    "--version", type=click.IntRange(min=0), metavar="N", help="The rows of a published version; 0: as built."
)
@click.option(
    "--commit", type=click.IntRange(min=1), metavar="N", help="The rows of a commit.  [default: the newest, if any]"
)
@click.option("--states", is_flag=True, help="Also write the optimizer's state of touched rows, in OUT/states.")
@click.option(
    "--tables-only", is_flag=True, help="Only the tables, by their published names; CHECKPOINT may lack tensors."
)
@click.option("--dram", default="256MiB", show_default=True, metavar="SIZE", help="What sorting touched rows may take.")
@click.option("--jobs", type=int, metavar="N", help="Files written at once. Default: one a processor, at most 4.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; sizes are in bytes.")
def command(
    stores: tuple[Path, ...],
    out: Path,
    source: Path | None,
    version: int | None,
    commit: int | None,
    states: bool,
    tables_only: bool,
    dram: str,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Write the tables of STORE as a checkpoint into the new folder OUT.

    OUT has CHECKPOINT's files, tensor names and headers. Rows that training touched are new; all other bytes are the
    same. It appears when everything is on disk; killed, nothing is at OUT.

    Of slices, name every one: their tables are written whole.

    \b
    Example: tierstore export v41.tier v41-tuned --source DeepSeek-V4.1-Flash
    Example: tierstore export rank-0.tier rank-1.tier v41-tuned --source DeepSeek-V4.1-Flash
    """
    with Progress("exporting") as on_progress:
        report = export_checkpoint(
            stores,
            out,
            source=source,
            version=version,
            commit=commit,
            states=states,
            tables_only=tables_only,
            dram=dram,
            jobs=jobs,
            on_progress=on_progress,
        )
    if as_json:
        click.echo(json.dumps(asdict(report) | {"store": ", ".join(map(str, stores)), "out": str(out)}, indent=2))
    else:
        print_report(out, report)


def print_report(out: Path, report: ExportReport) -> None:
    """Prints every file with its SHA-256 as sha256sum does, then what was left out, then the sum."""
    for file in report.files:
        click.echo(f"{file.sha256}  {file.name}")
    for name, reason in report.left_out.items():
        click.echo(f"left out: {name}: {reason}", err=True)
    if report.from_store:
        click.echo(
            f"rows of the store's own: {', '.join(report.from_store)}: these files are copies, or none", err=True
        )
    for name, count in report.saturated_values.items():
        if count:
            click.echo(
                f"table {name}: {count:,} trained values were beyond the codec's largest, and became it", err=True
            )
    rate = format_bytes(report.num_bytes / max(report.seconds, 1e-9))
    trained = "rows as they were before any training"
    if report.commit is not None or report.version:
        of = f"commit {report.commit}" if report.commit is not None else f"version {report.version}"
        trained = f"{count_text(sum(report.touched_rows.values()), 'row')} of {of}"
    click.echo(
        f"{out}: {trained}; {count_text(len(report.files), 'file')}, {format_bytes(report.num_bytes)} written in "
        f"{report.seconds:.1f} s ({rate}/s)"
    )
