"""`make demo`: the whole job on real text: checkpoint -> store -> profile -> plan -> Engram layers -> daemon, all rows
checked.

Input: Python's own library as text, a tokenizer trained on it on the spot, a checkpoint of random values in
DeepSeek-V4.1's layout. Output: what a tenth of the tables in DRAM was predicted to bring for text that nobody has seen,
beside what it brought, and whether every row was the checkpoint's, bit for bit, in process and through a daemon. It
works in a new folder inside `.demo`, of which it leaves only the report.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.table import Table

import tierstore
from tierstore.extras import missing

try:
    import torch
except ImportError as error:
    raise ImportError(str(missing("the demo", "torch", error))) from error

from engram_adapter import EngramLayer, HashSpec, TieredEmbedding, build_checkpoint, token_profile
from engram_adapter.checkpoints import sources_of_store
from engram_adapter.embedding import prefetch_layers
from tierstore.errors import ConfigError
from tierstore.formats.catalog import read_catalog
from tierstore.formats.checkpoint import Checkpoint
from tierstore.formats.trace import TokenTraceWriter
from tierstore.offline.place import place_plan
from tierstore.offline.verify import verify_store
from tierstore.process.progress import PHASE_UNITS
from tierstore.units import format_bytes

from ..cli import Progress, console
from ..corpus import python_text_files, split_held_out, token_documents, train_tokenizer
from ..phases import Phases
from ..report.page import check_report, profile_tables, write_report
from ..stat.command import fetch_record
from ..stat.tables import page_of
from ..synth import write_checkpoint
from .checks import WINDOW_TOKENS, check_rows, windows
from .daemon import NUM_CLIENTS, check_clients, served

TABLE_BYTES = 512 << 20
DRAM_FRACTION = 1 / 10  # of the tables
VOCAB_SIZE = 4096
HIDDEN_SIZE = 64  # of the layers: their arithmetic is not what the demo shows
HELD_OUT_TOKENS = 20_000
SERVED_TOKENS = 8_000  # for each of the processes
SHOWN_TABLES = ("Recommended budgets", "Hit rate by order, mixed")
REPORT = "tierstore-demo-report.html"
MARKER = "made-by-tierstore-demo"
WORK_PREFIX = "tierstore-demo-"
WORK_FOLDERS = ("checkpoint", "store", "profile", "text", "frozen", "undisturbed", "killed")  # the last four: train.py


def demo(folder: Path) -> bool:
    """Does the whole job in `folder`, the report beside it; returns whether every row was right."""
    started = time.monotonic()
    say = console().print
    say("[bold]1. Text and tokenizer[/]: Python's own library, and a tokenizer trained on it")
    files = python_text_files(documentation=())
    tokenizer = train_tokenizer(files, VOCAB_SIZE)
    training, held_out = split_held_out(token_documents(tokenizer, files))
    random.Random(0).shuffle(held_out)  # in the order of their names, the first are all of one corner of the library
    say(
        f"   {len(files)} files: {sum(map(len, training)):,} tokens to profile, {sum(map(len, held_out)):,} never shown"
    )

    say("[bold]2. Checkpoint[/]: DeepSeek-V4.1's layout, random values")
    write_checkpoint(
        folder / "checkpoint", "deepseek_v41", table_bytes=TABLE_BYTES, hidden=HIDDEN_SIZE, tokenizer=tokenizer
    )
    checkpoint = Checkpoint.open(folder / "checkpoint")

    say("[bold]3. Build and verify[/]")
    report = build_checkpoint(folder / "checkpoint", folder / "store")
    say(f"   {format_bytes(report.bytes_written)} in {report.seconds:.1f} s, {report.shards_built} shards")
    image = read_catalog(folder / "store")
    verified = verify_store(folder / "store", sources=sources_of_store(image, checkpoint), origin=checkpoint.to_dict())
    say(f"   {verified.pages_checked:,} pages, {verified.rows_compared:,} rows compared, {len(verified.faults)} faults")

    say("[bold]4. Profile[/]: count every n-gram of the text, and say what memory would buy")
    profile = profile_text(folder / "store", training, folder)

    dram_bytes = int(TABLE_BYTES * DRAM_FRACTION)
    say(f"[bold]5. Plan[/] for {format_bytes(dram_bytes)} of DRAM, a tenth of the tables")
    planned = plan_text(folder / "store", profile, dram_bytes)

    say(f"[bold]6. Open warm[/], and run Engram layers over {HELD_OUT_TOKENS:,} tokens that were never shown")
    say(
        f"   {WINDOW_TOKENS:,} at once, as in prefill: what repeats within them is read once, "
        "and counts as missed each time"
    )
    with (
        Progress("loading the hottest entries") as on_progress,
        tierstore.open(folder / "store", dram=dram_bytes, on_progress=on_progress) as store,
    ):
        spec = HashSpec.from_store(store)
        embeddings = [TieredEmbedding(store, layer, spec) for layer in spec.layers]
        layers = [
            EngramLayer.from_checkpoint(folder / "checkpoint", layer, embedding).float()
            for layer, embedding in zip(spec.layers, embeddings, strict=True)
        ]
        tokens, seconds = run_layers(layers, embeddings, held_out, HELD_OUT_TOKENS)
        measured = store.stats()
        rows = tokens * sum(store[spec.table_name(n)].spec.num_heads for n in spec.layers)
        say(compared_table(planned, measured))
        reads = (measured["pages_read"] + measured["entries_read"]) / tokens
        say(f"   NVMe reads a token: {planned['reads_per_token']:.1f} predicted, {reads:.1f} measured")
        say(f"   {rows:,} rows in {seconds:.1f} s: {rows / seconds:,.0f} rows/s, layers' arithmetic included")
        say("[bold]7. Every row checked[/] against the checkpoint, bytes and values")
        checks = {"with the placement": check_rows(store, spec, checkpoint, held_out, HELD_OUT_TOKENS)}
    with tierstore.open(folder / "store", dram=dram_bytes, placement="none") as store:
        checks["without any"] = check_rows(store, spec, checkpoint, held_out, HELD_OUT_TOKENS)
    for how, (compared, different) in checks.items():
        say(f"   {how}: {compared:,} rows, {different} differ")
    good = serve_text(folder, dram_bytes, held_out)
    say(f"   {time.monotonic() - started:.0f} s in all")
    return good and not verified.faults and all(found == (rows, 0) for found in checks.values())


def serve_text(folder: Path, dram_bytes: int, documents: list[np.ndarray]) -> bool:
    """Serves the store to processes that check every row, and prints how the daemon fared;
    returns whether all were right."""
    say = console().print
    say(f"[bold]8. Serve[/] the store by a daemon, to {NUM_CLIENTS} processes that share its memory")
    with served(folder / "store", dram_bytes) as socket:
        found = check_clients(socket, folder / "checkpoint", documents, SERVED_TOKENS, folder / "profile")
        for number, checked in enumerate(found, start=1):
            say(
                f"   process {number}: {checked.compared:,} rows, {checked.different} differ; "
                f"{100 * checked.hit_rate:.1f} % of its keys were in the daemon's memory"
            )
        say("   [bold]tierstore stat[/]")
        say(page_of(fetch_record(socket), None, time.time()))
    return all(checked.compared and not checked.different for checked in found)


def profile_text(store: Path, documents: list[np.ndarray], folder: Path) -> tierstore.Profile:
    """Traces and profiles text, prints the most telling tables, and writes the report."""
    say = console().print
    work = folder / "profile"
    work.mkdir()
    with TokenTraceWriter(work / "text.trace", vocab_size=None, source="Python's own library") as writer:
        for document in documents:
            writer.add_document(document)
        writer.finish()
    started = time.monotonic()
    with Phases(PHASE_UNITS) as on_progress:
        profile = token_profile(store, work / "text.trace", output=work / "text.profile", on_progress=on_progress)
    counts, (group,) = profile.counts, profile.to_dict()["analysis"]["groups"]
    for table in profile_tables(group):
        if table.title in SHOWN_TABLES:
            say(table)
    say(
        f"   {counts.tokens:,} tokens counted and {counts.held_out_tokens:,} of them replayed through simulated caches "
        f"in {time.monotonic() - started:.1f} s"
    )
    report = folder.parent / REPORT
    check_report(report)
    write_report([group], report)
    say(f"   all curves: {report}")
    return profile


def plan_text(store: Path, profile: tierstore.Profile, dram_bytes: int) -> dict[str, Any]:
    """Plans and places; returns what is to be expected of as many tokens as will be run."""
    plan = tierstore.plan(store, profile, dram_bytes, batch_tokens=WINDOW_TOKENS, interval_tokens=HELD_OUT_TOKENS)
    (group,) = plan.groups
    console().print(
        f"   of each table {group.static_entries:,} entries are static, "
        f"and {group.recency_sets * 8:,} are left to recency"
    )
    placed = place_plan(store, plan)
    if placed:
        size = format_bytes(placed.placement.num_bytes)
        console().print(f"   epoch {placed.placement.epoch}: {size}, hottest first, made in {placed.seconds:.1f} s")
    return group.to_dict(HELD_OUT_TOKENS)


def compared_table(planned: dict[str, Any], measured: dict[str, Any]) -> Table:
    """Returns hits by order, predicted beside measured, and the tiers that answered; keys of all tables together."""
    table = Table("order", title="Keys found in memory, and where")
    for column in ("predicted", "95 % interval", "measured", "static set", "recency", "nvme"):
        table.add_column(column, justify="right")
    counts = {order: np.zeros(3, dtype=np.int64) for order in planned["hit_rate"]}  # static, recency, nvme
    for part in measured["tables"].values():
        for order, tiers in part["orders"].items():
            in_static = part["static_hits"][order]
            found = np.array([in_static, tiers["dram"] - in_static, tiers["nvme"]])
            counts[str(order)] += found
            counts["all"] += found
    for name, found in counts.items():
        low, predicted, high = (100 * planned[rate][name] for rate in ("low", "hit_rate", "high"))
        static, recency, nvme = 100 * found / max(found.sum(), 1)
        shown = [f"{predicted:.1f} %", f"{low:.1f} to {high:.1f} %", f"[bold]{static + recency:.1f} %[/]"]
        table.add_row(name, *shown, *(f"{share:.1f} %" for share in (static, recency, nvme)))
    return table


def run_layers(
    layers: list[EngramLayer], embeddings: list[TieredEmbedding], documents: list[np.ndarray], num_tokens: int
) -> tuple[int, float]:
    """Runs Engram layers over text; returns tokens and the seconds that they took, lookups and arithmetic.

    The layers compute in float32: without AVX-512, a processor multiplies bfloat16 eight times more slowly.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = 0
    started = time.monotonic()
    with torch.no_grad():
        for token_ids, history in windows(documents, num_tokens, look_back=3):
            prefetch_layers(embeddings, token_ids, history)
            hidden = torch.randn(1, token_ids.shape[1], layers[0].hc_mult, layers[0].hidden_size, generator=generator)
            for layer in layers:
                hidden = hidden + layer(hidden, token_ids, history)
            tokens += token_ids.shape[1]
    if not torch.isfinite(hidden).all():
        raise ArithmeticError("the layers gave values that are no numbers: rows or weights are damaged")
    return tokens, time.monotonic() - started


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[Path]:
    """Yields a new folder inside `folder` to work in, and removes what the demo made there; all else stays.

    Its name is drawn, so that nobody's own `store` can be in its place. What a killed demo left is removed first.
    Raises `ConfigError` if `folder` is a file, or holds something that no demo made.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a new or an empty folder")
    held = [entry for entry in folder.iterdir() if entry.name != REPORT] if folder.exists() else []
    left_over = [entry for entry in held if (entry / MARKER).is_file() and entry.name.startswith(WORK_PREFIX)]
    if len(left_over) < len(held):
        other = next(entry.name for entry in held if entry not in left_over)
        raise ConfigError(
            f"{folder} holds {len(held) - len(left_over)} files that no demo made ({other}, ...); "
            f"give a new or an empty folder"
        )
    is_new = not folder.exists() or bool(left_over)
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in left_over:
        _remove_work(earlier)
    work = Path(tempfile.mkdtemp(prefix=WORK_PREFIX, dir=folder))
    try:
        (work / MARKER).touch()
        yield work
    finally:
        _remove_work(work)
        if is_new:
            with contextlib.suppress(OSError):  # the report, or what somebody put there meanwhile: it stays
                folder.rmdir()


def _remove_work(work: Path) -> None:
    """Removes the parts of a demo's folder by their names, and the folder if nothing else is in it."""
    for name in WORK_FOLDERS:
        if (work / name).exists():
            shutil.rmtree(work / name)
    (work / MARKER).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody else's file is in it
        work.rmdir()


@click.command("demo")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path(".demo"),
    show_default=True,
    help="Where to work, in about 1.2 GiB: a new or an empty folder, left as it was but for a report.",
)
def command(folder: Path) -> None:
    """Build, profile, plan, look up and serve half a gigabyte of tables with real text;
    exit status 1 if any row is wrong."""
    try:
        with own_folder(folder) as work:
            good = demo(work)
    except (tierstore.TierStoreError, OSError) as error:
        raise click.ClickException(str(error)) from error
    console().print("[green]all rows are the checkpoint's[/]" if good else "[red]ROWS DIFFER[/]")
    sys.exit(0 if good else 1)
