"""`tierstore synth`: a checkpoint in a real model's layout, at any scale, filled with random values.

Flows in: a family, a size, a seed. Flows out: a folder with config.json, tokenizer.json and safetensors files of the
published names and dtypes, written block by block, so that memory does not grow with it. Values are finite, so that
they compare; the same options, seed and tokenizer give the same bytes. Refuses folders that hold something,
and full disks.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from tokenizers import Tokenizer

from engram_adapter import HashSpec, build_token_map
from tierstore.causes import named
from tierstore.errors import BudgetError, ConfigError
from tierstore.formats.tensor_files import DTYPE_BYTES
from tierstore.process.workers import aside
from tierstore.spec import ROW_BYTES_MAX, codec_row_bytes
from tierstore.units import format_bytes, parse_bytes

from .cli import Progress
from .corpus import PAD_ID, python_text_files, train_tokenizer

BLOCK_BYTES = 4 << 20
FILE_BYTES_MAX = 4 << 30
FILES_WANTED = 4  # small checkpoints are split too, as real ones are
SPARE_DISK_BYTES = 64 << 20
TRAINED_VOCAB_SIZE = 4096
ROWS_PER_HEAD_MIN = 16
HEADS, HC_MULT = 8, 4
SCALE_COLUMNS, WKV_BLOCK = 32, 128  # values that share a scale: of a row; of wkv, on either axis
HIDDEN_SMALL = 256  # the default of --hidden below --full: wkv stays small beside the tables
QWEN_VOCAB_SIZE, QWEN_EOS_ID = 248_320, 248_044
_EOS_TOKENS = ("<eos>", "<|endoftext|>", "<｜end▁of▁sentence｜>", "</s>")
# Each float dtype: an integer of its width, bits of its mantissa, and the first of the 8 exponents that values get.
_FLOATS = {"F32": ("<u4", 23, 112), "BF16": ("<u2", 7, 112), "F16": ("<u2", 10, 4)}
_DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "fp8": "F8_E4M3"}


@dataclass(frozen=True)
class Shape:
    """The sizes of a checkpoint: 0-based layers, n-gram lengths up to order_max, where moduli start, values a row."""

    layers: tuple[int, ...]
    order_max: int
    rows_per_head: int
    dim: int
    hidden: int
    dtype: str
    parts: int = 1

    @property
    def num_heads(self) -> int:
        """Rows that a token reads in one layer."""
        return (self.order_max - 1) * HEADS


# The published sizes (of the demonstration, for "engram"), and the dtypes that each family's tables come in.
PUBLISHED = {
    "deepseek_v41": (Shape((1, 14), 4, 16_000_000, 256, 5120, "fp8"), ("fp8",)),
    "engram": (Shape((1, 15), 3, 646_400, 64, 1024, "fp32"), ("fp32", "fp16", "bf16")),
    "qwen4_exp": (Shape((1,), 3, 20_000_000, 160, 2048, "bf16", parts=128), ("bf16", "fp8")),
}


@dataclass(frozen=True)
class Planned:
    """A tensor to write: `values` as they are, or random finite ones whose exponents
    (e8m0 bytes) start at `exponent`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    exponent: int = 0
    values: bytes | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def blocks(self, seed: int) -> Iterator[bytes | memoryview]:
        """Yields the tensor's bytes block by block; its name and the seed fix them, whatever else is written."""
        if self.values is not None:
            yield self.values
            return
        generator = np.random.SFC64(list(hashlib.sha256(f"{seed}/{self.name}".encode()).digest()))
        for start in range(0, self.num_bytes, BLOCK_BYTES):
            num_bytes = min(BLOCK_BYTES, self.num_bytes - start)
            raw = generator.random_raw(-(-num_bytes // 8)).astype("<u8", copy=False).view(np.uint8)[:num_bytes]
            _make_finite(raw, self.dtype, self.exponent)
            yield raw.data


@dataclass(frozen=True)
class Plan:
    """What a checkpoint will hold: its config.json, its tensors, and the rows and bytes of its tables."""

    config: dict[str, Any]
    tensors: list[Planned]
    num_rows: int
    table_bytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)


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
    on_progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Writes a checkpoint of `family` into the folder `path` and returns its plan. Blocks; memory stays below 300 MiB.

    Give one of table_bytes (of all tables; they come out a little larger, because moduli are primes), rows_per_head, or
    full (all sizes as published). layers: 0-based. dim: values a row. dtype: of the tables ("bf16", "fp8", ...). parts:
    tensors that a qwen4_exp table is split into. tokenizer: a tokenizer.json, its folder or the object; by default one
    is trained on this machine's text. file_bytes: the largest file, a single larger tensor apart.

    Raises `ConfigError` (`path` holds something or cannot be written), `BudgetError` (disk), `ValueError` (sizes).
    Where it fails, the files written so far are removed.
    """
    if family not in PUBLISHED:
        raise ValueError(f"family {family!r} is not known; there are {', '.join(PUBLISHED)}")
    if file_bytes is not None and file_bytes < 1:
        raise ValueError(f"file_bytes {file_bytes} is below 1")
    sizes = {"hidden": hidden, "dim": dim, "dtype": dtype, "parts": parts, "layers": layers}
    given = {name: value for name, value in sizes.items() if value is not None}
    shape = _shape(family, full, table_bytes, rows_per_head, given)
    folder = Path(path)
    try:
        _check_empty(folder)
    except OSError as error:
        raise named(error, folder, writing=True) from error
    tokenizer = aside(_tokenizer, tokenizer)  # training takes seconds
    plan = _PLANS[family](shape, tokenizer, full)
    _check_room(folder, plan.total_bytes)
    files = _split(plan.tensors, file_bytes or min(FILE_BYTES_MAX, -(-plan.total_bytes // FILES_WANTED)))
    try:
        _write_files(folder, plan, files, tokenizer, seed, on_progress)
    except OSError as error:
        raise named(error, error.filename or folder, folder, writing=True, needed_bytes=plan.total_bytes) from error
    return plan


def _shape(family: str, full: bool, table_bytes: int | None, rows_per_head: int | None, given: dict[str, Any]) -> Shape:
    """Returns the published shape with what was given put over it, and as many rows a head as was asked."""
    published, dtypes = PUBLISHED[family]
    if full + (table_bytes is not None) + (rows_per_head is not None) != 1:
        raise ValueError("give exactly one of a size, rows per head, and the full published sizes")
    shape = replace(published, **({} if full else {"hidden": HIDDEN_SMALL}) | given)
    shape = replace(shape, layers=tuple(shape.layers))
    if shape.dtype not in dtypes:
        raise ValueError(f"dtype {shape.dtype!r}: tables of {family} come in {', '.join(dtypes)}")
    if shape.parts != published.parts and family != "qwen4_exp":
        raise ValueError(f"parts {shape.parts}: only tables of qwen4_exp are split into tensors")
    if family == "deepseek_v41" and shape.dim % SCALE_COLUMNS:
        raise ValueError(f"dim {shape.dim} is not a multiple of {SCALE_COLUMNS}, the values that share a scale")
    if min(shape.dim, shape.hidden, shape.parts, len(shape.layers)) < 1 or min(shape.layers) < 0:
        raise ValueError(
            f"layers {', '.join(map(str, shape.layers)) or 'none'}, dim {shape.dim}, hidden {shape.hidden}, parts "
            f"{shape.parts}: there must be a layer, layers be 0 or more, and the sizes 1 or more"
        )
    if _row_bytes(family, shape) > ROW_BYTES_MAX:
        raise ValueError(
            f"dim {shape.dim}: rows of {_row_bytes(family, shape)} bytes, a page holds up to {ROW_BYTES_MAX}; "
            "give a smaller dim"
        )
    if table_bytes is not None:
        heads = shape.num_heads * len(shape.layers)
        rows_per_head = table_bytes // (heads * _row_bytes(family, shape))
    if rows_per_head is not None and rows_per_head < ROWS_PER_HEAD_MIN:
        raise ValueError(f"{rows_per_head} rows per head; give a size that makes at least {ROWS_PER_HEAD_MIN}")
    return shape if rows_per_head is None else replace(shape, rows_per_head=rows_per_head)


def _row_bytes(family: str, shape: Shape) -> int:
    codec = {"deepseek_v41": "fp8_e4m3_e8m0x32"}.get(family, "fp8_e4m3" if shape.dtype == "fp8" else shape.dtype)
    row_bytes = codec_row_bytes(codec, shape.dim)
    assert row_bytes is not None
    return row_bytes


def _deepseek_v41(shape: Shape, tokenizer: Tokenizer, _full: bool) -> Plan:
    token_map = build_token_map(tokenizer)
    text: dict[str, Any] = {
        "model_type": "deepseek_v41",
        "vocab_size": len(token_map),
        "hidden_size": shape.hidden,
        "num_hidden_layers": max(shape.layers) + 1,
        "hc_mult": HC_MULT,
        "engram_layer_ids": list(shape.layers),
        "engram_vocab_size": shape.rows_per_head,
        "engram_max_ngram_size": shape.order_max,
        "engram_n_heads": HEADS,
        "engram_head_dim": shape.dim,
        "engram_compressed_vocab_size": len(np.unique(token_map)),
        "engram_pad_token_id": PAD_ID,
    }
    spec = HashSpec.from_config(text, token_map, "deepseek_v41")
    text["engram_num_embeddings"] = [spec.num_rows(layer) for layer in shape.layers]
    tensors = []
    outputs, inputs = (HC_MULT + 1) * shape.hidden, shape.num_heads * shape.dim
    scale = (-(-outputs // WKV_BLOCK), -(-inputs // WKV_BLOCK))
    for layer in shape.layers:
        num_rows, prefix = spec.num_rows(layer), f"layers.{layer}.engram."
        tensors += [
            Planned(f"{prefix}embed.weight", "F8_E4M3", (num_rows, shape.dim)),
            Planned(f"{prefix}embed.scale", "F8_E8M0", (num_rows, shape.dim // SCALE_COLUMNS), exponent=110),
            Planned(f"{prefix}wkv.weight", "F8_E4M3", (outputs, inputs)),
            Planned(f"{prefix}wkv.scale", "F8_E8M0", scale, exponent=110),
            Planned(f"{prefix}q_weight", "BF16", (HC_MULT, shape.hidden), exponent=120),
            Planned(f"{prefix}k_weight", "BF16", (HC_MULT, shape.hidden), exponent=120),
        ]
    return _plan("deepseek_v41", shape, spec, {"model_type": "deepseek_v41", "text_config": text}, tensors)


def _engram(shape: Shape, tokenizer: Tokenizer, _full: bool) -> Plan:
    token_map = build_token_map(tokenizer)
    config = {
        "model_type": "engram",
        "vocab_size": len(token_map),
        "hidden_size": shape.hidden,
        "hc_mult": HC_MULT,
        "layer_ids": list(shape.layers),
        "engram_vocab_size": [shape.rows_per_head] * (shape.order_max - 1),
        "max_ngram_size": shape.order_max,
        "n_embed_per_ngram": shape.dim * HEADS,
        "n_head_per_ngram": HEADS,
        "pad_id": PAD_ID,
        "seed": 0,
        "kernel_size": 4,
    }
    spec = HashSpec.from_config(config, token_map, "engram")
    dtype, tensors = _DTYPES[shape.dtype], []
    for layer in shape.layers:
        prefix = f"layers.{layer}.engram.multi_head_embedding."
        tensors.append(_random(f"{prefix}embedding.weight", dtype, (spec.num_rows(layer), shape.dim)))
        tensors.append(_int64(f"{prefix}offsets", spec.offsets(layer)))
    return _plan("engram", shape, spec, config, tensors)


def _qwen4_exp(shape: Shape, tokenizer: Tokenizer, full: bool) -> Plan:
    vocab_size = QWEN_VOCAB_SIZE if full else tokenizer.get_vocab_size(with_added_tokens=True)
    found = [tokenizer.token_to_id(token) for token in _EOS_TOKENS if tokenizer.token_to_id(token) is not None]
    text: dict[str, Any] = {
        "model_type": "qwen4_exp_text",
        "vocab_size": vocab_size,
        "eos_token_id": QWEN_EOS_ID if full else [*found, vocab_size - 1][0],
        "hidden_size": shape.hidden,
        "num_hidden_layers": max(shape.layers) + 1,
        "ple_layer_ids": [layer + 1 for layer in shape.layers],  # counted from 1
        "ple_embed_dim": shape.dim * shape.num_heads,
        "ple_conv_kernel_size": 4,
        "ngram_size": shape.order_max,
        "heads_per_ngram": HEADS,
        "ngram_vocab_size_base": shape.rows_per_head,
        "make_ngram_vocab_size_divisible_by": math.lcm(128, shape.parts),
        "split_ngram_parts": shape.parts,
        "seed": 1234,
    }
    if shape.dtype == "fp8":
        text["ple_embedding_dtype"] = "float8_e4m3fn"
    spec = HashSpec.from_config(text, None, "qwen4_exp")
    dtype, tensors = _DTYPES[shape.dtype], []
    for layer in shape.layers:
        prefix = f"model.language_model.layers.{layer}.ple.ple_embedding."
        names = [f"shard_{part}.weight" for part in range(shape.parts)] if shape.parts > 1 else ["weight"]
        part_shape = (spec.num_rows(layer) // shape.parts, shape.dim)
        tensors += [_random(f"{prefix}ngram_embedding.{name}", dtype, part_shape) for name in names]
        if shape.dtype == "fp8":
            tensors.append(
                Planned(f"{prefix}ngram_embedding.weight_scale", "F32", (), values=struct.pack("<f", 0.0123))
            )
        tensors += [
            _int64(f"{prefix}layer_multipliers", spec.multipliers(layer)),
            _int64(f"{prefix}ngram_heads_vocab_sizes", spec.moduli(layer)),
            _int64(f"{prefix}ngram_heads_offsets", spec.offsets(layer)),
        ]
    return _plan("qwen4_exp", shape, spec, {"model_type": "qwen4_exp", "text_config": text}, tensors)


_PLANS = {"deepseek_v41": _deepseek_v41, "engram": _engram, "qwen4_exp": _qwen4_exp}


def _plan(family: str, shape: Shape, spec: HashSpec, config: dict[str, Any], tensors: list[Planned]) -> Plan:
    num_rows = sum(spec.num_rows(layer) for layer in spec.layers)
    return Plan(config, tensors, num_rows, num_rows * _row_bytes(family, shape))


def _random(name: str, dtype: str, shape: tuple[int, ...]) -> Planned:
    return Planned(name, dtype, shape, exponent=_FLOATS[dtype][2] if dtype in _FLOATS else 0)


def _int64(name: str, numbers: Sequence[int]) -> Planned:
    return Planned(name, "I64", (len(numbers),), values=np.array(numbers, dtype="<i8").tobytes())


def _make_finite(raw: np.ndarray, dtype: str, exponent: int) -> None:
    """Turns random bytes, uint8 [n], in place into values of `dtype` that are neither NaN nor infinite."""
    if dtype == "F8_E4M3":
        raw -= (raw & 0x7F) == 0x7F  # NaN to the largest finite value: 0x7f to 0x7e, 0xff to 0xfe
    elif dtype == "F8_E8M0":
        raw &= 7
        raw += exponent
    else:
        integer, mantissa_bits, _ = _FLOATS[dtype]
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
    held = len(list(folder.iterdir())) if folder.exists() else 0
    if held:
        raise ConfigError(
            f"{folder} holds {held} files, a checkpoint wants an empty folder; give another, or remove it"
        )


def _check_room(folder: Path, total_bytes: int) -> None:
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    needed_bytes, free_bytes = total_bytes + SPARE_DISK_BYTES, shutil.disk_usage(existing).free
    if needed_bytes > free_bytes:
        raise BudgetError(
            f"{folder}: the checkpoint needs {format_bytes(needed_bytes)} ({needed_bytes} bytes), the disk has "
            f"{format_bytes(free_bytes)} free ({free_bytes} bytes); ask for a smaller one, "
            "or give a path on another disk"
        )


def _split(tensors: Sequence[Planned], file_bytes: int) -> dict[str, list[Planned]]:
    """Puts tensors into files of up to file_bytes in their order; returns file names and what each holds."""
    groups: list[list[Planned]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(other.num_bytes for other in groups[-1]) + tensor.num_bytes > file_bytes:
            groups.append([])
        groups[-1].append(tensor)
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _write_files(
    folder: Path,
    plan: Plan,
    files: dict[str, list[Planned]],
    tokenizer: Tokenizer,
    seed: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Writes tensors, tokenizer, configuration and index; where it fails or is interrupted, removes what it wrote."""
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


def _write_safetensors(path: Path, tensors: Sequence[Planned], seed: int) -> Iterator[int]:
    """Writes one file: u64 header length, JSON header padded to 8 bytes, data. Yields the bytes of each block written.

    Wide elements come first, so that each tensor starts at a multiple of its element's bytes:
    readers map them in place.
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
            for block in tensor.blocks(seed):
                file.write(block)
                yield len(block)


def _layer_list(_context: click.Context, _parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of layers such as 1,14") from None


@click.command("synth")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--family", required=True, type=click.Choice(list(PUBLISHED)), help="Whose layout.")
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
@click.option(
    "--dtype", type=click.Choice(list(_DTYPES)), help="Of the rows: qwen4_exp bf16, fp8; engram fp32, fp16, bf16."
)
@click.option(
    "--parts", type=int, metavar="N", help="Tensors that a qwen4_exp table is split into; 1 for a single `weight`."
)
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), help="A tokenizer.json.  [default: trained on this machine's text]"
)
@click.option("--file-bytes", metavar="SIZE", help="Largest file.  [default: a quarter of all, at most 4GiB]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Draws the values.")
def command(
    out: Path,
    family: str,
    size: str | None,
    rows_per_head: int | None,
    full: bool,
    file_bytes: str | None,
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
    click.echo(
        f"{out}: {plan.num_rows:,} rows of {family}, {format_bytes(plan.table_bytes)} of tables, "
        f"{format_bytes(plan.total_bytes)} in all"
    )
