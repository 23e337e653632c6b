"""`make demo-train`: fine-tunes a small transformer and its n-gram tables on real text, is killed once, and resumes.

Input: Python's own library as text, a tokenizer trained on it, a checkpoint of random tables in DeepSeek-V4.1's layout.
Output: the loss on text that was never shown, before and after, beside the same model with frozen tables, and whether
the run that was killed ended with the bits of one that was not. It works in a new folder inside `.demo`, of which it
leaves nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.table import Table

import tierstore
from engram_adapter import build_checkpoint
from tierstore.formats.catalog import CATALOG_FILE
from tierstore.units import format_bytes

from ..cli import console
from ..corpus import python_text_files, split_held_out, token_documents, train_tokenizer
from ..synth import write_checkpoint
from .run import own_folder
from .training_run import NUM_STEPS, STEPS_A_COMMIT

TABLE_BYTES = 48 << 20
DIM, HIDDEN_SIZE, VOCAB_SIZE = 32, 96, 2048
RUNS = ("frozen", "undisturbed", "killed")
KILLED_AT = NUM_STEPS // 2 + STEPS_A_COMMIT // 2 - 3  # between two commits
RUN_TIMEOUT_S = 1800


def demo(folder: Path) -> bool:
    """Does it all in `folder`; returns whether the killed run ended as the undisturbed one."""
    started, say = time.monotonic(), console().print
    say("[bold]1. Text[/]: Python's own library, and a tokenizer trained on it")
    training, held_out = write_text(folder)
    say(f"   {training:,} tokens to train on, {held_out:,} never shown")
    say("[bold]2. Checkpoint and store[/]: two tables of random values in DeepSeek-V4.1's layout, fp8")
    report = build_checkpoint(folder / "checkpoint", folder / "store")
    say(f"   {format_bytes(report.bytes_written)}; training never changes these files")
    for name in RUNS:
        copy_store(folder / "store", folder / name / "store")

    say(f"[bold]3. Train[/] {NUM_STEPS} steps, three times from the same start")
    results = {}
    say("   frozen: dense weights alone, tables as they were built")
    results["frozen"] = run(folder, "frozen")
    say(f"   undisturbed: tables too, a commit every {STEPS_A_COMMIT} steps")
    results["undisturbed"] = run(folder, "undisturbed")
    say(f"   killed: the same, and SIGKILL after step {KILLED_AT}")
    run(folder, "killed", kill_at=KILLED_AT)
    say("   resumed: from the last checkpoint and its commit")
    results["killed"] = run(folder, "killed")

    say("[bold]4. What came of it[/]")
    say(losses(results))
    touched, version = results["undisturbed"]["touched"], results["undisturbed"]["version"]
    say(f"   {touched:,} rows were trained, and published as version {version} of the store, rounded to fp8")
    same = all(results["killed"][name] == results["undisturbed"][name] for name in ("dense", "rows", "after", "served"))
    say(f"   every row and weight of the resumed run is that of the undisturbed one, bit for bit: {same}")
    say(f"   {time.monotonic() - started:.0f} s in all")
    return same


def write_text(folder: Path) -> tuple[int, int]:
    """Writes token ids to train on and to hold out, and the checkpoint of their vocabulary; returns how many tokens."""
    files = python_text_files(documentation=())
    tokenizer = train_tokenizer(files, VOCAB_SIZE)
    parts = split_held_out(token_documents(tokenizer, files))
    (folder / "text").mkdir()
    lengths = []
    for name, documents in zip(("training", "held_out"), parts, strict=True):
        ids = np.concatenate(documents)
        np.save(folder / "text" / f"{name}.npy", ids)
        lengths.append(len(ids))
    write_checkpoint(
        folder / "checkpoint", "deepseek_v41", table_bytes=TABLE_BYTES, layers=(0, 1), dim=DIM, hidden=HIDDEN_SIZE,
        tokenizer=tokenizer,
    )  # fmt: skip
    return lengths[0], lengths[1]


def copy_store(store: Path, copy: Path) -> None:
    """Makes a store of the same shards, which never change, with a catalog of its own."""
    shutil.copytree(store, copy, copy_function=os.link)
    (copy / CATALOG_FILE).unlink()
    shutil.copyfile(store / CATALOG_FILE, copy / CATALOG_FILE)


def run(folder: Path, name: str, kill_at: int | None = None) -> dict[str, Any]:
    """Runs a training in a process of its own, and kills it after a step; returns what it printed last."""
    command = [sys.executable, "-P", "-m", "tierstore.tools.demo.training_run", str(folder), name]
    result: dict[str, Any] = {}
    started, first = time.monotonic(), None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if not line.startswith("step "):
                    result = json.loads(line)
                    continue
                step = int(line.split()[1])
                first = step if first is None else first
                if step == kill_at:
                    process.send_signal(signal.SIGKILL)
                    break
                if time.monotonic() - started > RUN_TIMEOUT_S:
                    raise TimeoutError(f"run {name} took more than {RUN_TIMEOUT_S} s; it was at step {step}")
        finally:
            process.kill()
    if kill_at is None and not result:
        raise ChildProcessError(f"run {name} ended with status {process.returncode}; it says why above")
    console().print(f"      steps {first} to {step} in {time.monotonic() - started:.0f} s")
    return result


def losses(results: dict[str, dict[str, Any]]) -> Table:
    """Returns the losses on text that was never shown."""
    table = Table("run", title="Loss of the next token on held-out text, nats")
    for column in ("before", "after", "after, as served"):
        table.add_column(column, justify="right")
    words = {"frozen": "frozen tables", "undisturbed": "trained tables", "killed": "trained tables, killed and resumed"}
    for name, result in results.items():
        shown = (result[column] for column in ("before", "after", "served"))
        table.add_row(words[name], *("" if loss is None else f"{loss:.4f}" for loss in shown))
    return table


@click.command("demo-train")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path(".demo"),
    show_default=True,
    help="Where to work, in about 1 GiB: a new or an empty folder, left as it was.",
)
def command(folder: Path) -> None:
    """Fine-tune n-gram tables on real text, killed once and resumed; exit status 1 if the bits differ."""
    try:
        with own_folder(folder) as work:
            good = demo(work)
    except (tierstore.TierStoreError, OSError) as error:
        raise click.ClickException(str(error)) from error
    console().print("[green]resumed bit for bit[/]" if good else "[red]THE RESUMED RUN DIFFERS[/]")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    command()
