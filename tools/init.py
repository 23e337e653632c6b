"""`tierstore init`: a store for a model that was not trained yet.

Input: a folder with config.json, a seed. Output: a store that takes no disk until training touches rows. The work is
`engram_adapter.init_checkpoint`'s. Errors: its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from engram_adapter.init import init_checkpoint
from tierstore.slices import parse_slice
from tierstore.units import format_bytes


@click.command("init")
@click.argument("config_folder", type=click.Path(path_type=Path))
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--family", metavar="NAME", help="Layout of the model. Default: found from config.json.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, help="Of all values.")
@click.option(
    "--std", type=float, metavar="X", help="Standard deviation of values.  [default: initializer_range, else 0.02]"
)
@click.option("--layers", metavar="N,...", help="Layers that get a table.  [default: all that config.json names]")
@click.option("--dtype", metavar="TYPE", help="Of exports: fp32, fp16, bf16 or fp8.  [default: as published]")
@click.option("--allow-network-fs", is_flag=True, help="Make it on a network file system that only this host uses.")
@click.option("--slice", "slice_text", metavar="I/N", help="Only slice I of N of every table, from 0/N on.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; sizes are in bytes.")
def command(
    config_folder: Path,
    store: Path,
    family: str | None,
    seed: int,
    std: float | None,
    layers: str | None,
    dtype: str | None,
    allow_network_fs: bool,
    slice_text: str | None,
    as_json: bool,
) -> None:
    """Make the store STORE for a model that was not trained yet, from CONFIG_FOLDER's config.json.

    Values are a function of seed, table, row and column: a row takes disk only once training has touched it. Train it
    with tierstore.open_training; tierstore export writes all rows.

    \b
    Example: tierstore init my-model my-model.tier --seed 7 --std 0.01 --dtype bf16
    Example: tierstore init my-model rank-0.tier --seed 7 --slice 0/2
    """
    chosen = None if layers is None else _layers(layers)
    tables = init_checkpoint(
        config_folder,
        store,
        family=family,
        seed=seed,
        deviation=std,
        layers=chosen,
        dtype=dtype,
        allow_network_fs=allow_network_fs,
        slice=None if slice_text is None else parse_slice(slice_text),
    )
    if as_json:
        records = [
            {"name": t.spec.name, "num_rows": t.spec.num_rows, "dim": t.spec.dim, "codec": t.spec.codec} for t in tables
        ]
        initializer = {"seed": seed, "deviation": tables[0].initializer.deviation}
        click.echo(json.dumps({"store": str(store), "initializer": initializer, "tables": records}, indent=2))
        return
    for table in tables:
        click.echo(f"{table.spec.name}: {table.spec.num_rows:,} rows of {table.spec.dim} values, {table.spec.codec}")
    num_bytes = sum(table.spec.table_bytes for table in tables)
    click.echo(
        f"{store}: seed {seed}, standard deviation {tables[0].initializer.deviation:g}; an export takes "
        f"{format_bytes(num_bytes)}, the store nothing until it is trained"
    )


def _layers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise click.UsageError(f"--layers: {text!r}, expected numbers such as 1,14") from None
