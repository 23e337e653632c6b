"""`tierstore synth`: a checkpoint in a real model's layout, at any scale, filled with random values.

The layouts are `engram_adapter/families/`; this file fills and writes them.
Input: a family, a size, a seed. Output: a folder with config.json, tokenizer.json and safetensors files of the
published names and dtypes, written block by block, so that memory does not grow with it. Values are finite, so that
they compare. The same options, seed and tokenizer give the same bytes.
Errors: folders that are not empty, full disks, sizes that make no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from tokenizers import Tokenizer

from engram_adapter.families import FAMILIES, Family
from engram_adapter.synthetic import DTYPES, FLOATS, PlannedTensor, SyntheticPlan, SyntheticShape, row_bytes_of
from tierstore.causes import named
from tierstore.errors import BudgetError, ConfigError
from tierstore.formats.tensor_files import DTYPE_BYTES
from tierstore.process.progress import OnProgress
from tierstore.process.workers import aside
from tierstore.spec import ROW_BYTES_MAX
from tierstore.units import format_bytes, parse_bytes

from .cli import Progress
from .corpus import python_text_files, train_tokenizer

BLOCK_BYTES = 4 << 20
FILE_BYTES_MAX = 4 << 30
FILES_WANTED = 4  # small checkpoints are split too, as real ones are
SPARE_DISK_BYTES = 64 << 20
TRAINED_VOCAB_SIZE = 4096
ROWS_PER_HEAD_MIN = 16
HIDDEN_SMALL = 256  # the default of --hidden below --full: wkv stays small beside the tables


def write_checkpoint(
    path: str | os.PathLike[str],
    family: str,
    *,
    table_bytes: int | None = None,
    rows_per_head: int | None = None,
    full: bool = False,
    layers: Sequence[int] | None = None,
    hidden: int | None = None,
    dim: int | None = None,
    dtype: str | None = None,
    parts: int | None = None,
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    file_bytes: int | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> SyntheticPlan:
    """Writes a checkpoint of `family` into the folder `path`. Blocks; memory stays below 300 MiB.

    Give one of table_bytes, rows_per_head and full. If it fails, the files written so far are removed.

    Args:
        path: A new or empty folder.
        family: One of `FAMILIES`.
        table_bytes: Of all tables; they come out a little larger, because moduli are primes.
        rows_per_head: Where the moduli start.
        full: All sizes as published.
        layers: 0-based.
        hidden: The model's hidden size.
        dim: Values a row.
        dtype: Of the tables ("bf16", "fp8", ...).
        parts: Tensors that a table is split into, if its family splits tables.
        tokenizer: A tokenizer.json, its folder or the object; by default one is trained on this machine's text.
        file_bytes: The largest file, a single larger tensor apart.
        seed: Draws the values.
        on_progress: Called with bytes written and bytes in all.

    Returns:
        What was written.

    Raises:
        ConfigError: `path` is not empty or cannot be written.
        BudgetError: The disk has not enough room.
        ValueError: Sizes that make no checkpoint.
    """
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is not known; there are {', '.join(sorted(FAMILIES))}")
    if file_bytes is not None and file_bytes < 1:
        raise ValueError(f"file_bytes {file_bytes} is below 1")
    sizes = {"hidden": hidden, "dim": dim, "dtype": dtype, "parts": parts, "layers": layers}
    given = {name: value for name, value in sizes.items() if value is not None}
    shape = _shape(FAMILIES[family], full, table_bytes, rows_per_head, given)
    folder = Path(path)
    try:
        _check_empty(folder)
    except OSError as error:
        raise named(error, folder, writing=True) from error
    tokenizer = aside(_tokenizer, tokenizer)  # training takes seconds
    plan = FAMILIES[family].synthetic.plan(shape, tokenizer, full)
    _check_room(folder, plan.total_bytes)
    files = _split(plan.tensors, file_bytes or min(FILE_BYTES_MAX, -(-plan.total_bytes // FILES_WANTED)))
    try:
        _write_files(folder, plan, files, tokenizer, seed, on_progress)
    except OSError as error:
        raise named(error, error.filename or folder, folder, writing=True, needed_bytes=plan.total_bytes) from error
    return plan


def _shape(
    family: Family, full: bool, table_bytes: int | None, rows_per_head: int | None, given: dict[str, Any]
) -> SyntheticShape:
    """Returns the published shape with what was given put over it, and as many rows a head as was requested."""
    synthetic = family.synthetic
    if full + (table_bytes is not None) + (rows_per_head is not None) != 1:
        raise ValueError("give exactly one of a size, rows per head, and the full published sizes")
    shape = replace(synthetic.published, **({} if full else {"hidden": HIDDEN_SMALL}) | given)
    shape = replace(shape, layers=tuple(shape.layers))
    if shape.dtype not in synthetic.codecs:
        raise ValueError(f"dtype {shape.dtype!r}: tables of {family.name} come in {', '.join(synthetic.codecs)}")
    if shape.parts != synthetic.published.parts and not synthetic.splits_tables:
        raise ValueError(f"parts {shape.parts}: only tables of {', '.join(_SPLIT)} are split into tensors")
    if shape.dim % synthetic.dim_multiple:
        raise ValueError(
            f"dim {shape.dim} is not a multiple of {synthetic.dim_multiple}, the values that share a scale"
        )
    if min(shape.dim, shape.hidden, shape.parts, len(shape.layers)) < 1 or min(shape.layers) < 0:
        raise ValueError(
            f"layers {', '.join(map(str, shape.layers)) or 'none'}, dim {shape.dim}, hidden {shape.hidden}, parts "
            f"{shape.parts}: there must be a layer, layers be 0 or more, and the sizes 1 or more"
        )
    row_bytes = row_bytes_of(synthetic.codecs[shape.dtype], shape.dim)
    if row_bytes > ROW_BYTES_MAX:
        raise ValueError(
            f"dim {shape.dim}: rows of {row_bytes} bytes, a page holds up to {ROW_BYTES_MAX}; give a smaller dim"
        )
    heads = shape.num_heads * len(shape.layers)
    if table_bytes is not None:
        rows_per_head = table_bytes // (heads * row_bytes)
    if rows_per_head is not None and rows_per_head < ROWS_PER_HEAD_MIN:
        if table_bytes is None:
            raise ValueError(f"{rows_per_head} rows per head; give at least {ROWS_PER_HEAD_MIN}")
        least = ROWS_PER_HEAD_MIN * heads * row_bytes
        raise ValueError(
            f"{table_bytes} bytes are {rows_per_head} rows for each of {heads} heads; give at least {least} bytes, "
            f"which are {ROWS_PER_HEAD_MIN}"
        )
    return shape if rows_per_head is None else replace(shape, rows_per_head=rows_per_head)


def tensor_blocks(tensor: PlannedTensor, seed: int) -> Iterator[bytes | memoryview]:
    """Yields a tensor's bytes block by block; its name and the seed fix them, whatever else is written."""
    if tensor.values is not None:
        yield tensor.values
        return
    generator = np.random.SFC64(list(hashlib.sha256(f"{seed}/{tensor.name}".encode()).digest()))
    for start in range(0, tensor.num_bytes, BLOCK_BYTES):
        num_bytes = min(BLOCK_BYTES, tensor.num_bytes - start)
        raw = generator.random_raw(-(-num_bytes // 8)).astype("<u8", copy=False).view(np.uint8)[:num_bytes]
        _make_finite(raw, tensor.dtype, tensor.exponent)
        yield raw.data


def _make_finite(raw: np.ndarray, dtype: str, exponent: int) -> None:
    """Turns random bytes, uint8 [n], in place into values of `dtype` that are neither NaN nor infinite."""
    if dtype == "U8":
        return
    if dtype == "F8_E4M3" and not exponent:
        raw -= (raw & 0x7F) == 0x7F  # NaN to the largest finite value: 0x7f to 0x7e, 0xff to 0xfe
    elif dtype in ("F8_E8M0", "F8_E4M3"):
        raw &= 7
        raw += exponent
    else:
        integer, mantissa_bits, _ = FLOATS[dtype]
        bits = raw.view(integer)
        sign_bit = 8 * bits.itemsize - 1
        drawn = (bits >> mantissa_bits) & 7
        bits &= (1 << sign_bit) | ((1 << mantissa_bits) - 1)
        bits |= (drawn + exponent) << mantissa_bits


def _tokenizer(given: Tokenizer | str | os.PathLike[str] | None) -> Tokenizer:
    """Returns the tokenizer that was given, read from its file or folder; else one trained on this machine's text."""
    if given is None:
        return train_tokenizer(python_text_files(), TRAINED_VOCAB_SIZE)
    if isinstance(given, Tokenizer):
        return given
    file = Path(given) / "tokenizer.json" if Path(given).is_dir() else Path(given)
    try:
        return Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception for anything that it cannot read
        raise ConfigError(f"{file} cannot be read as a tokenizer ({error}); give a model's tokenizer.json") from error


def _check_empty(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a new folder")
    num_files = len(list(folder.iterdir())) if folder.exists() else 0
    if num_files:
        raise ConfigError(
            f"{folder} holds {num_files} files, a checkpoint needs an empty folder; give another, or remove it"
        )


def _check_room(folder: Path, total_bytes: int) -> None:
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    needed_bytes, free_bytes = total_bytes + SPARE_DISK_BYTES, shutil.disk_usage(existing).free
    if needed_bytes > free_bytes:
        raise BudgetError(
            f"{folder}: the checkpoint needs {format_bytes(needed_bytes)} ({needed_bytes} bytes), the disk has "
            f"{format_bytes(free_bytes)} free ({free_bytes} bytes); ask for a smaller one, or give a path on another "
            "disk"
        )


def _split(tensors: Sequence[PlannedTensor], file_bytes: int) -> dict[str, list[PlannedTensor]]:
    """Puts tensors into files of up to file_bytes in their order; returns file names and what each holds."""
    groups: list[list[PlannedTensor]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(other.num_bytes for other in groups[-1]) + tensor.num_bytes > file_bytes:
            groups.append([])
        groups[-1].append(tensor)
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _write_files(
    folder: Path,
    plan: SyntheticPlan,
    files: dict[str, list[PlannedTensor]],
    tokenizer: Tokenizer,
    seed: int,
    on_progress: OnProgress | None,
) -> None:
    """Writes tensors, tokenizer, configuration and index; if it fails or is interrupted, removes what it wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
    index = {"metadata": {"total_size": plan.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    texts = {
        "tokenizer.json": tokenizer.to_str(),
        "config.json": json.dumps(plan.config, indent=2),
        "model.safetensors.index.json": json.dumps(index, indent=2),
    }
    written_bytes = 0
    try:
        for name, tensors in files.items():
            for num_bytes in _write_safetensors(folder / name, tensors, seed):
                written_bytes += num_bytes
                if on_progress:
                    on_progress(written_bytes, plan.total_bytes)
        for name, text in texts.items():
            (folder / name).write_text(text + "\n", encoding="utf-8")
    except BaseException:
        for name in (*files, *texts):
            (folder / name).unlink(missing_ok=True)
        raise


def _write_safetensors(path: Path, tensors: Sequence[PlannedTensor], seed: int) -> Iterator[int]:
    """Writes one file: u64 header length, JSON header padded to 8 bytes, data. Yields the bytes of each block written.

    Wide elements come first, so that each tensor starts at a multiple of its element's bytes: readers map them in
    place.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(tensors, key=lambda tensor: -DTYPE_BYTES[tensor.dtype])
    byte_start = 0
    for tensor in ordered:
        byte_end = byte_start + tensor.num_bytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [byte_start, byte_end],
        }
        byte_start = byte_end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for tensor in ordered:
            for block in tensor_blocks(tensor, seed):
                file.write(block)
                yield len(block)


# For the help texts below.
_SPLIT = [family.name for family in FAMILIES.values() if family.synthetic.splits_tables]
_DTYPES_BY_FAMILY = "; ".join(f"{name} {', '.join(FAMILIES[name].synthetic.codecs)}" for name in sorted(FAMILIES))


def _layer_list(_context: click.Context, _parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of layers such as 1,14") from None


@click.command("synth")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--family", required=True, type=click.Choice(sorted(FAMILIES)), help="Whose layout.")
@click.option("--size", metavar="SIZE", help="Bytes of all tables, such as 512MiB.  [default: 64MiB]")
@click.option("--rows-per-head", type=int, metavar="N", help="Instead of a size: where the moduli (primes) start.")
@click.option("--full", is_flag=True, help="Instead of a size: everything as published. deepseek_v41 is 189 GiB.")
@click.option(
    "--layers", callback=_layer_list, metavar="L,L", help="Layers with a table, counted from 0, such as 1,14."
)
@click.option(
    "--hidden", type=int, metavar="N", help=f"Hidden size.  [default: {HIDDEN_SMALL}, with --full as published]"
)
@click.option("--dim", type=int, metavar="N", help="Values a row.  [default: as published]")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help=f"Of the rows: {_DTYPES_BY_FAMILY}.")
@click.option(
    "--parts",
    type=int,
    metavar="N",
    help=f"Tensors that a table of {', '.join(_SPLIT)} is split into; 1 for a single `weight`.",
)
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), help="A tokenizer.json.  [default: trained on this machine's text]"
)
@click.option("--file-bytes", metavar="SIZE", help="Largest file.  [default: a quarter of all, at most 4GiB]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Draws the values.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; sizes are in bytes.")
def command(
    out: Path,
    family: str,
    size: str | None,
    rows_per_head: int | None,
    full: bool,
    file_bytes: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Write a checkpoint of random values into the new folder OUT: names, dtypes, config and tokenizer as a real one's.

    \b
    Example: tierstore synth model --family qwen4_exp --dtype fp8 --size 512MiB
    """
    if size is None and rows_per_head is None and not full:
        size = "64MiB"
    with Progress("writing") as on_progress:
        plan = write_checkpoint(
            out,
            family,
            table_bytes=None if size is None else parse_bytes(size, "--size"),
            rows_per_head=rows_per_head,
            full=full,
            file_bytes=None if file_bytes is None else parse_bytes(file_bytes, "--file-bytes"),
            on_progress=on_progress,
            **options,
        )
    if as_json:
        sizes = {"num_rows": plan.num_rows, "table_bytes": plan.table_bytes, "total_bytes": plan.total_bytes}
        click.echo(json.dumps({"checkpoint": str(out), "family": family} | sizes, indent=2))
        return
    click.echo(
        f"{out}: {plan.num_rows:,} rows of {family}, {format_bytes(plan.table_bytes)} of tables, "
        f"{format_bytes(plan.total_bytes)} in all"
    )
