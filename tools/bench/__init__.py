"""`tierstore bench`: tierstore beside other ways of doing the same work, in the same run, on the same data.

One file a benchmark; each has `run(folder, **options) -> Result`, where every figure is a median and every ratio the median
of pairs that ran one after the other, because shared machines drift. Figures worth keeping are in BENCHMARKS.md.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import click

from tierstore.units import parse_bytes

from ..cli import console

BENCHMARKS = {"build": "Building a store, beside copying the checkpoint's files with cp and syncing them."}


@click.command("bench", epilog="Benchmarks: " + "; ".join(f"{name}: {line}" for name, line in BENCHMARKS.items()))
@click.argument("names", nargs=-1, required=True, type=click.Choice(list(BENCHMARKS)), metavar="NAME...")
@click.option(
    "--folder", type=click.Path(path_type=Path), default=Path(), help="Where to work.  [default: this folder]"
)
@click.option("--size", default="2GiB", show_default=True, help="Bytes of the tables that are made for it.")
@click.option("--pairs", type=click.IntRange(min=1), default=7, show_default=True, help="How often each pair is run.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Also write the figures here."
)
def command(names: tuple[str, ...], folder: Path, size: str, pairs: int, json_file: Path | None) -> None:
    """Measure NAME... on this machine, beside the hardware's own limit.

    \b
    tierstore bench build --size 2GiB --json build.json
    """
    results = {}
    for name in names:
        result = importlib.import_module(f".{name}", __name__).run(folder, parse_bytes(size, "--size"), pairs)
        console().print(result.table())
        results[name] = result.as_record()
    if json_file:
        json_file.write_text(json.dumps(results, indent=2) + "\n")
