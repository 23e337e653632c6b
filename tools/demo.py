"""`make demo`: the whole job on real text: checkpoint -> store -> Engram layers, with every row checked.

Flows in: Python's own library as text, a tokenizer trained on it on the spot, a checkpoint of random values in
DeepSeek-V4.1's layout. Flows out: what was built, how fast held-out text was looked up with a tenth of the tables in DRAM, and
whether every row was the checkpoint's, bit for bit. It works in the folder `.demo`, which it removes again.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.table import Table

import tierstore
from engram_adapter import EngramLayer, HashSpec, TieredEmbedding
from engram_adapter.codecs import decode_rows
from engram_adapter.embedding import prefetch_layers
from tierstore.errors import ConfigError
from tierstore.formats.catalog import read_catalog
from tierstore.formats.checkpoint import Checkpoint
from tierstore.formats.tensor_files import StoredTensor
from tierstore.units import format_bytes
from tierstore.verify import verify_store

from .build import build_checkpoint
from .cli import console
from .corpus import python_text_files, split_held_out, token_documents, train_tokenizer
from .synth import write_checkpoint
from .verify import sources_of_store

TABLE_BYTES = 512 << 20
VOCAB_SIZE = 4096
WINDOW_TOKENS = 1024
WARM_TOKENS = 120_000
HELD_OUT_TOKENS = 60_000
MARKER = "made-by-tierstore-demo"
WORK_FOLDERS = ("checkpoint", "store")


class CheckpointRows:
    """The oracle: a layer's rows straight from the checkpoint's mapped tensors.

    What it shares with the store is where each tensor begins (`Checkpoint` reads that from the header). Which rows a token
    has comes from `plain_row_ids`, which shares the hash's published numbers with it, and none of its code.
    """

    def __init__(self, checkpoint: Checkpoint, layer: int) -> None:
        self._planes = [
            _mapped(checkpoint.tensors[f"layers.{layer}.engram.embed.{part}"]) for part in ("weight", "scale")
        ]

    def __getitem__(self, row_ids: np.ndarray) -> np.ndarray:
        return np.concatenate([plane[row_ids] for plane in self._planes], axis=-1)


def _mapped(tensor: StoredTensor) -> np.ndarray:
    return np.memmap(tensor.path, dtype=np.uint8, mode="r", offset=tensor.byte_start, shape=tensor.shape)


def plain_row_ids(document: np.ndarray, spec: HashSpec, layer: int) -> np.ndarray:
    """Returns the rows of each token of a whole document, int64 [T, heads], by the formula of arXiv 2601.07372.

    The key of the n-gram that ends at token t is the XOR of mapped[t - i] * multipliers[i] over i < n, with the pad id
    before the document's start; each head of order n reads row key % modulus + offset.
    """
    assert spec.token_map is not None
    look_back, num_tokens = spec.orders[-1] - 1, len(document)
    mapped = np.concatenate([np.full(look_back, spec.pad_id), spec.token_map[document]]).astype(np.int64)
    heads = list(zip(spec.moduli(layer), spec.offsets(layer), strict=True))
    key, columns = np.zeros(num_tokens, dtype=np.int64), []
    for back, multiplier in enumerate(spec.multipliers(layer)):
        key = key ^ mapped[look_back - back : look_back - back + num_tokens] * multiplier
        if back:
            of_order = heads[(back - 1) * spec.heads : back * spec.heads]
            columns += [key % modulus + offset for modulus, offset in of_order]
    return np.stack(columns, axis=1)


def windows(
    documents: list[np.ndarray], tokens_max: int, look_back: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (token ids [1, T], the tokens before [1, P]) through the documents, as prefill in parts would feed them."""
    left = tokens_max
    for document in documents:
        for start in range(0, len(document), WINDOW_TOKENS):
            part = document[start : start + min(WINDOW_TOKENS, left)]
            yield (
                torch.from_numpy(part[None]),
                torch.from_numpy(document[max(0, start - look_back) : start][None].copy()),
            )
            left -= len(part)
            if left <= 0:
                return


def first_tokens(documents: list[np.ndarray], tokens_max: int) -> Iterator[np.ndarray]:
    """Yields the documents up to `tokens_max` tokens in all, the last one cut there."""
    for document in documents:
        if tokens_max <= 0:
            return
        yield document[:tokens_max]
        tokens_max -= len(document)


def run_layers(
    layers: list[EngramLayer], embeddings: list[TieredEmbedding], documents: list[np.ndarray], num_tokens: int
) -> tuple[int, float]:
    """Runs Engram layers over text; returns tokens and the seconds that they took, lookups and arithmetic."""
    generator = torch.Generator().manual_seed(0)
    tokens = 0
    started = time.monotonic()
    with torch.no_grad():
        for token_ids, history in windows(documents, num_tokens, look_back=3):
            prefetch_layers(embeddings, token_ids, history)
            hidden = torch.randn(1, token_ids.shape[1], layers[0].hc_mult, layers[0].hidden_size, generator=generator)
            hidden = hidden.to(torch.bfloat16)
            for layer in layers:
                hidden = hidden + layer(hidden, token_ids, history)
            tokens += token_ids.shape[1]
    if not torch.isfinite(hidden).all():
        raise ArithmeticError("the layers gave values that are no numbers: rows or weights are damaged")
    return tokens, time.monotonic() - started


def check_rows(
    store: tierstore.Store, spec: HashSpec, checkpoint: Checkpoint, documents: list[np.ndarray]
) -> tuple[int, int]:
    """Looks the same text up again; returns rows compared with the checkpoint, bytes and decoded values, and how many differ."""
    compared = different = 0
    for layer in spec.layers:
        oracle = CheckpointRows(checkpoint, layer)
        table = store[spec.table_name(layer)]
        embedding = TieredEmbedding(store, layer, spec)
        row_ids = np.concatenate(
            [plain_row_ids(part, spec, layer) for part in first_tokens(documents, HELD_OUT_TOKENS)]
        )
        start = 0
        for token_ids, history in windows(documents, HELD_OUT_TOKENS, look_back=3):
            expected = oracle[row_ids[start : start + token_ids.shape[1]]]
            start += token_ids.shape[1]
            rows = table.lookup(spec.keys(token_ids.numpy(), layer, history.numpy())[0])
            values = embedding(token_ids, history)[0]
            decoded = decode_rows(torch.from_numpy(expected), table.spec.codec, table.spec.dim)
            wrong = (rows != expected).any(axis=-1) | (values.view(torch.int16) != decoded.view(torch.int16)).any(
                -1
            ).numpy()
            compared += wrong.size
            different += int(wrong.sum())
    return compared, different


def hit_table(before: dict[str, Any], after: dict[str, Any]) -> Table:
    """Returns hits by table, order and tier between two readings of a store's counters."""
    table = Table("table", "order", "keys", "hbm", "dram", "nvme", title="where the keys of held-out text were found")
    for name, counts in after["tables"].items():
        for order, tiers in counts["orders"].items():
            found = {tier: count - before["tables"][name]["orders"][order][tier] for tier, count in tiers.items()}
            keys = sum(found.values())
            shares = [f"{100 * found[tier] / max(keys, 1):.1f} %" for tier in ("hbm", "dram", "nvme")]
            table.add_row(name, str(order), f"{keys:,}", *shares)
    return table


def demo(folder: Path) -> bool:
    """Does the whole job in `folder`; returns whether every row was right."""
    started = time.monotonic()
    say = console().print
    say("[bold]1. Text and tokenizer[/]: Python's own library, and a tokenizer trained on it")
    files = python_text_files(documentation=())
    tokenizer = train_tokenizer(files, VOCAB_SIZE)
    training, held_out = split_held_out(token_documents(tokenizer, files))
    say(f"   {len(files)} files; {sum(map(len, training)):,} tokens, and {sum(map(len, held_out)):,} held out")

    say("[bold]2. Checkpoint[/]: DeepSeek-V4.1's layout, random values")
    write_checkpoint(folder / "checkpoint", "deepseek_v41", table_bytes=TABLE_BYTES, tokenizer=tokenizer)
    checkpoint = Checkpoint.open(folder / "checkpoint")

    say("[bold]3. Build and verify[/]")
    report = build_checkpoint(folder / "checkpoint", folder / "store")
    say(f"   {format_bytes(report.bytes_written)} in {report.seconds:.1f} s, {report.shards_built} shards")
    sources = sources_of_store(read_catalog(folder / "store"), checkpoint)
    verified = verify_store(folder / "store", sources=sources, origin=checkpoint.as_record())
    say(f"   {verified.pages_checked:,} pages, {verified.rows_compared:,} rows compared, {len(verified.faults)} faults")

    budget = TABLE_BYTES // 10
    say(f"[bold]4. Engram layers over real text[/], {format_bytes(budget)} of DRAM, a tenth of the tables")
    with tierstore.open(folder / "store", dram=budget) as store:
        spec = HashSpec.from_store(store)
        embeddings = [TieredEmbedding(store, layer, spec) for layer in spec.layers]
        layers = [
            EngramLayer.from_checkpoint(folder / "checkpoint", layer, embedding)
            for layer, embedding in zip(spec.layers, embeddings, strict=True)
        ]
        run_layers(layers, embeddings, training, WARM_TOKENS)
        before = store.stats()
        tokens, seconds = run_layers(layers, embeddings, held_out, HELD_OUT_TOKENS)
        after = store.stats()
        rows = tokens * sum(store[spec.table_name(n)].spec.num_heads for n in spec.layers)
        say(hit_table(before, after))
        say(
            f"   {tokens:,} tokens, {rows:,} rows in {seconds:.1f} s: {rows / seconds:,.0f} rows/s, layers' arithmetic included"
        )
        compared, different = check_rows(store, spec, checkpoint, held_out)
    say(
        f"[bold]5. Every row checked[/]: {compared:,} rows against the checkpoint, bytes and values: {different} differ"
    )
    say(f"   {time.monotonic() - started:.0f} s in all")
    return different == 0 and compared == rows and not verified.faults


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Empties `folder` of what an earlier demo left, and of what this one makes; whatever else is there stays.

    Raises `ConfigError` where it is a file, or holds something and not the mark that a demo works there.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a new or an empty folder")
    held = [entry.name for entry in folder.iterdir()] if folder.exists() else []
    if held and MARKER not in held:
        raise ConfigError(
            f"{folder} holds {len(held)} files that no demo made ({held[0]}, ...); give a new or an empty folder"
        )
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()  # first made and last removed, so that a killed demo's folder is known
    try:
        _remove_work(folder)
        yield
    finally:
        _remove_work(folder)
        (folder / MARKER).unlink()
        if is_new or held:
            with contextlib.suppress(OSError):  # somebody put a file there meanwhile: it stays
                folder.rmdir()


def _remove_work(folder: Path) -> None:
    for name in WORK_FOLDERS:
        if (folder / name).exists():
            shutil.rmtree(folder / name)


@click.command("demo")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path(".demo"),
    show_default=True,
    help="Where to work, in about 1.2 GiB: a new or an empty folder, left as it was.",
)
def command(folder: Path) -> None:
    """Build, verify and look up half a gigabyte of tables with real text; exit status 1 if any row is wrong."""
    try:
        with own_folder(folder):
            good = demo(folder)
    except (tierstore.TierStoreError, OSError) as error:
        raise click.ClickException(str(error)) from error
    console().print("[green]all rows are the checkpoint's[/]" if good else "[red]ROWS DIFFER[/]")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    command()
