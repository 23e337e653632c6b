"""`tierstore bench`: tierstore beside other ways of doing the same work, in the same run, on the same data.

One file a benchmark; each has `run(folder, options) -> Result`, where every figure is a median and every ratio the
median of pairs that ran one after the other, because shared machines drift. Figures to keep are in BENCHMARKS.md.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from pathlib import Path
from typing import Any

import click

from tierstore.units import parse_bytes

from ..cli import console

BENCHMARKS = {
    "build": "Building a store, beside copying the checkpoint's files with cp and syncing them.",
    "inplace": "Stores in place, beside reading the checkpoint once, and beside stores with shards.",
    "export": "Exports, as built and of commits, beside copying the checkpoint's files with cp and syncing them.",
    "warm": "All hits, beside the bare probe and copy, torch and NumPy.",
    "cold": "No hits, beside the bare reads of the same number of pages, fio and np.memmap.",
    "decode": "One token at a time: latencies, submit and wait, many threads. Batches decoded to bf16, beside torch.",
    "codecs": "Quantized rows decoded to bf16, beside the libraries that make them.",
    "trace": "Real text: hit rates by budget, and a prefill of half hits, half misses.",
    "streams": "Writing traces of Parquet, Megatron and text, beside pyarrow, cp and one process.",
    "scale": "Cost of a row as the table grows.",
    "serve": "A daemon's clients, beside stores in process; its changes while they look up.",
    "overlap": "A small transformer over a tenth of its tables, beside the same with all of them on its device.",
    "train": "Steps of training, warm and cold, beside torch, FBGEMM and bare loops; prefetches.",
    "exchange": "Tables over two ranks, and over two daemons, beside bare exchanges, duplicates sent and TorchRec.",
    "gpu": "Kernels and hbm tier on a GPU: checked, then beside copies; without a GPU only checked.",
    "commit": "Commits of a training, beside cp and sync, LMDB and RocksDB; opening one of ten million rows.",
    "peers": "NumPy, torch, LMDB, RocksDB, Redis and Mooncake on the same keys.",
}
FOLDERS = {
    "commit",
    "serve",
    "overlap",
    "train",
    "exchange",
    "gpu",
    "peers",
}  # benchmarks with more than one file: theirs is `command.py` in a folder


def module_of(name: str) -> str:
    """Returns the module of a benchmark, whose `run(folder, options)` measures."""
    return f"{__name__}.{name}.command" if name in FOLDERS else f"{__name__}.{name}"


SIZE_HELP = "Bytes of the table.  [default: build, inplace, serve, overlap 2GiB, train, exchange 256MiB, others 8GiB]"
TRACE_HELP = "For trace: a .trace of tokens, .npy of int32 or int64, or .zst of int32.  [default: this machine's text]"


@click.command("bench", epilog="Benchmarks: " + "; ".join(f"{name}: {line}" for name, line in BENCHMARKS.items()))
@click.argument("names", nargs=-1, required=True, type=click.Choice(list(BENCHMARKS)), metavar="NAME...")
@click.option(
    "--folder", type=click.Path(path_type=Path), default=Path(), help="Where to work.  [default: this folder]"
)
@click.option("--size", help=SIZE_HELP)
@click.option(
    "--against",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="PATH",
    help="Compare with another build, in turn: a checkout with its extension built, or a virtual environment.",
)
@click.option("--pairs", type=click.IntRange(min=1), help="How often each pair is run.  [default: 7; --against: 15]")
@click.option("--threads", type=click.IntRange(1, 64), default=1, show_default=True, help="Threads on every side.")
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    help="Tokens of a batch.  [default: the benchmark's own]",
)
@click.option("--no-huge-pages", is_flag=True, help="Switch huge pages off for every side that runs in this process.")
@click.option("--dram", "budgets", multiple=True, help="DRAM of the store; repeat it for trace.")
@click.option(
    "--rows",
    multiple=True,
    type=click.IntRange(min=400),
    help="For scale: rows of a table; repeat it. For commit: rows of the table.",
)
@click.option("--trace", type=click.Path(path_type=Path, exists=True, dir_okay=False), help=TRACE_HELP)
@click.option("--trace-tokens", type=click.IntRange(min=64), help="For trace: how many tokens.  [default: 262144]")
@click.option("--device", help="For overlap: where the model runs.  [default: cuda where there is one, else cpu]")
@click.option(
    "--clean", is_flag=True, help="Afterwards remove the tables that were made under --folder for the next run."
)
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Also write the figures here."
)
def command(
    names: tuple[str, ...],
    folder: Path,
    size: str | None,
    against: Path | None,
    pairs: int | None,
    budgets: tuple[str, ...],
    no_huge_pages: bool,
    clean: bool,
    json_file: Path | None,
    **given: Any,
) -> None:
    """Measure NAME... on this machine, beside the hardware's own limit.

    \b
    tierstore bench warm cold decode --folder /mnt/nvme --json figures.json
    tierstore bench warm cold decode serve overlap build --against ../other-checkout
    """
    from . import stores
    from .against import command as other_build
    from .huge_pages_off import huge_pages_off
    from .pairs import PAIRS, Options

    if against is not None and (left := set(names) - set(other_build.NAMES)):
        raise click.UsageError(
            f"--against runs {', '.join(other_build.NAMES)}; {', '.join(sorted(left))} cannot be run of another build"
        )

    if against is not None and no_huge_pages:
        raise click.UsageError("--no-huge-pages and --against: give one; --against runs processes of their own")
    options = Options(
        size_bytes=None if size is None else parse_bytes(size, "--size"),
        pairs=pairs or (PAIRS if against is None else other_build.PAIRS),
        budgets=tuple(parse_bytes(budget, "--dram") for budget in budgets),
        **given,  # those that bear the names of `Options`
    )
    results = {}
    try:
        for name in names:
            if against is not None:
                result = other_build.run(name, folder, options, against)
            else:
                with huge_pages_off() if no_huge_pages else contextlib.nullcontext():
                    result = importlib.import_module(module_of(name)).run(folder, options)
                if no_huge_pages:
                    result.facts["huge pages"] = "switched off"
            console().print(result.table())
            results[name] = result.to_dict()
            if json_file:  # after each, so that what was measured is not lost with what fails
                json_file.write_text(json.dumps(results, indent=2) + "\n")
            if result.failed is not None:
                raise click.ClickException(f"bench {name}: {result.failed}")
    finally:
        if clean:
            stores.clean(folder)
