"""Where each family keeps its tables in a checkpoint: which tensors, of which dtypes, side by side in which order.

Input: a `Checkpoint`. Output: a `Model`, its hash and the `TableSource`s that a build streams. Errors: `ConfigError`
for checkpoints whose tensors, scales or hash buffers disagree with their configuration: their rows would be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tierstore import ConfigError, TableSpec
from tierstore.formats.checkpoint import Checkpoint, Plane, TableSource
from tierstore.formats.tensor_files import StoredTensor

from .hash_config import find_family, text_values
from .hash_spec import HashSpec
from .scales import SCALE_BLOCK, SCALE_NAMES, VALUE_CODECS, StoredRows, refuse_packed_name, rows_of_weight
from .token_map import build_token_map

# Names of the tensors that hold tables, as patterns and in words; any prefix may stand before.
_TABLE_NAMES = {
    "deepseek_v41": r"layers\.{layer}\.engram\.embed\.weight",
    "engram": r"layers\.{layer}\.(?:.*\.)?multi_head_embedding\.embedding\.weight",
    "qwen4_exp": r"layers\.{layer}\.ple\.ple_embedding\.ngram_embedding\.(?:weight|shards?[._]0\.weight)",
}
_TABLE_WORDS = {
    "deepseek_v41": "layers.{layer}.engram.embed.weight",
    "engram": "layers.{layer}.[...].multi_head_embedding.embedding.weight",
    "qwen4_exp": "layers.{layer}.ple.ple_embedding.ngram_embedding.weight or .shard_0.weight",
}


@dataclass(frozen=True)
class Model:
    """A checkpoint's n-gram tables: family, hash, and the table of each layer."""

    family: str
    hash_spec: HashSpec
    sources: tuple[TableSource, ...]


def read_model(checkpoint: Checkpoint, family: str | None = None) -> Model:
    """Finds the tables of a checkpoint; the family comes from its tensors' names and its
    config.json unless it is named.

    Reads tokenizer.json where the family's hash has a token map. Raises `ConfigError` where something is missing or
    contradicts itself, with both numbers.
    """
    if not checkpoint.config:
        raise ConfigError(
            f"{checkpoint.path} has no config.json, which says how rows are hashed; give the checkpoint's whole "
            f"folder, or take one tensor as a plain table with --tensor"
        )
    family = family or _family_of(checkpoint)
    if family not in _READERS:
        raise ConfigError(f"family {family!r} is not known; there are {', '.join(_READERS)}")
    tokenizer = checkpoint.path / "tokenizer.json"
    token_map = None if family == "qwen4_exp" else build_token_map(tokenizer)
    spec = HashSpec.from_config(checkpoint.config, token_map, family)
    sources = tuple(_READERS[family](checkpoint, spec, layer) for layer in spec.layers)
    return Model(family, spec, sources)


def plain_source(checkpoint: Checkpoint, tensor_name: str) -> TableSource:
    """Returns any 2-D tensor of a checkpoint as a plain table of its name: row id = key.

    Scales that belong to the tensor (`scales.py`) become part of the rows or of the codec. Raises `ConfigError` for a
    tensor that is not there, is not 2-D, or whose bytes are not its values one row after another.
    """
    name = checkpoint.full_name(tensor_name)
    tensor = checkpoint.tensors.get(name)
    if tensor is None and name in checkpoint.unusable:
        raise ConfigError(f"{checkpoint.path}: tensor {tensor_name!r} {checkpoint.unusable[name]}")
    if tensor is None or len(tensor.shape) != 2:
        if tensor is None and checkpoint.absent_files:
            raise ConfigError(f"{checkpoint.path}: tensor {tensor_name!r} is missing; {checkpoint.why_missing()}")
        found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
        names = [name for name, other in checkpoint.tensors.items() if len(other.shape) == 2]
        raise ConfigError(
            f"{checkpoint.path}: tensor {tensor_name!r} is {found}; 2-D tensors are: "
            f"{', '.join(sorted(names)[:10]) or 'none'}"
        )
    num_rows, dim = tensor.shape
    if not num_rows or not dim:
        raise ConfigError(
            f"{checkpoint.path}: tensor {tensor_name!r} is empty, {num_rows} x {dim}; there is no row to store"
        )
    rows = rows_of_weight(checkpoint, tensor)
    planes = _planes([tensor], [rows])
    row_bytes = sum(plane.width_bytes for plane in planes)
    return TableSource(TableSpec.plain(tensor_name, num_rows, row_bytes, rows.codec, dim), planes)


def _planes(tensors: Sequence[StoredTensor], rows: Sequence[StoredRows]) -> tuple[Plane, ...]:
    """Returns the planes of a table whose tensors are stacked by rows: values, and scales if rows carry their own."""
    scales = [each.scales for each in rows if each.scales is not None]
    planes = [Plane(tensors[0].num_bytes // tensors[0].shape[0], tuple(tensors))]
    if scales:
        planes.append(Plane(scales[0].num_bytes // scales[0].shape[0], tuple(scales)))
    return tuple(planes)


def _family_of(checkpoint: Checkpoint) -> str:
    """Returns the one family whose tables the checkpoint holds; where names tell none or several, its config.json's."""
    held = [
        family
        for family, pattern in _TABLE_NAMES.items()
        if any(re.search(rf"(?:^|\.){pattern.format(layer='[0-9]+')}$", name) for name in checkpoint.names)
    ]
    return held[0] if len(held) == 1 else find_family(checkpoint.config)


def _deepseek_v41(checkpoint: Checkpoint, spec: HashSpec, layer: int) -> TableSource:
    prefix = _prefix(checkpoint, "deepseek_v41", layer, "weight")
    weight = _weight(checkpoint, f"{prefix}weight", ["F8_E4M3"])
    names = [f"{prefix}{name}" for name in SCALE_NAMES if f"{prefix}{name}" in checkpoint.names] or [f"{prefix}scale"]
    if len(names) > 1:
        raise ConfigError(f"{checkpoint.path}: {weight.name} has several scales ({', '.join(names)}), expected one")
    scale = checkpoint.tensor(names[0], ["F8_E8M0", "U8"], 2)
    num_rows, dim = weight.shape
    if dim % SCALE_BLOCK or scale.shape != (num_rows, dim // SCALE_BLOCK):
        raise ConfigError(
            f"{scale.name} is {list(scale.shape)}, {weight.name} of {list(weight.shape)} needs "
            f"{[num_rows, dim // SCALE_BLOCK]}: one scale for {SCALE_BLOCK} columns; the checkpoint is damaged"
        )
    _check_width(checkpoint, "engram_head_dim", dim)
    planes = (Plane(dim, (weight,)), Plane(dim // SCALE_BLOCK, (scale,)))
    return _source(spec, layer, planes, "fp8_e4m3_e8m0x32", dim)


def _published(checkpoint: Checkpoint, spec: HashSpec, layer: int) -> TableSource:
    prefix = _prefix(checkpoint, "engram", layer, "embedding.weight")
    weight = _weight(checkpoint, f"{prefix}embedding.weight", ["F32", "F16", "BF16"])
    _check_buffer(checkpoint, f"{prefix}offsets", spec.offsets(layer))
    codec, value_bytes = VALUE_CODECS[weight.dtype]
    dim = weight.shape[1]
    _check_width(checkpoint, "n_embed_per_ngram", dim * spec.heads)
    return _source(spec, layer, (Plane(dim * value_bytes, (weight,)),), codec, dim)


def _qwen4_exp(checkpoint: Checkpoint, spec: HashSpec, layer: int) -> TableSource:
    prefix = _prefix(checkpoint, "qwen4_exp", layer, None)
    _check_buffer(checkpoint, f"{prefix}layer_multipliers", spec.multipliers(layer))
    _check_buffer(checkpoint, f"{prefix}ngram_heads_vocab_sizes", spec.moduli(layer))
    _check_buffer(checkpoint, f"{prefix}ngram_heads_offsets", spec.offsets(layer))
    tensors = _parts(checkpoint, f"{prefix}ngram_embedding.")
    dtype, dim = tensors[0].dtype, tensors[0].shape[1]
    for tensor in tensors:
        if (tensor.dtype, tensor.shape[1]) != (dtype, dim):
            raise ConfigError(
                f"{tensor.name} is {tensor.dtype} of {tensor.shape[1]} columns, {tensors[0].name} is {dtype} of {dim}; "
                f"the parts of one table must agree: a file of another checkpoint is among them"
            )
    _check_width(checkpoint, "ple_embed_dim", dim * len(spec.moduli(layer)))
    rows = [rows_of_weight(checkpoint, tensor) for tensor in tensors]
    if rows[0].codec == "fp8_e4m3":
        raise ConfigError(
            f"{checkpoint.path}: {prefix}ngram_embedding.weight_scale is missing, and fp8 rows need it; "
            f"download the checkpoint again"
        )
    for tensor, each in zip(tensors, rows, strict=True):
        if each.codec != rows[0].codec:
            raise ConfigError(
                f"{checkpoint.path}: {tensor.name} is stored as {each.codec}, {tensors[0].name} as {rows[0].codec}: "
                f"parts with scales of their own, and a table can carry one; dequantize it to BF16 first"
            )
    return _source(spec, layer, _planes(tensors, rows), rows[0].codec, dim)


_READERS: dict[str, Callable[[Checkpoint, HashSpec, int], TableSource]] = {
    "deepseek_v41": _deepseek_v41,
    "engram": _published,
    "qwen4_exp": _qwen4_exp,
}


def _source(spec: HashSpec, layer: int, planes: tuple[Plane, ...], codec: str, dim: int) -> TableSource:
    """Puts table and planes together; `TableSource` refuses row counts that disagree."""
    table = TableSpec(
        name=spec.table_name(layer),
        num_rows=spec.num_rows(layer),
        row_bytes=sum(plane.width_bytes for plane in planes),
        orders=spec.orders,
        rows_per_key=spec.heads,
        moduli=spec.moduli(layer),
        offsets=spec.offsets(layer),
        codec=codec,
        dim=dim,
        fingerprint=spec.fingerprint(layer),
    )
    return TableSource(table, planes)


def _text_value(checkpoint: Checkpoint, key: str) -> int | None:
    """Returns a whole number of config.json, None where it gives none; what the hash needs `HashSpec` checks."""
    value = text_values(checkpoint.config).get(key)
    return value if type(value) is int else None


def _check_width(checkpoint: Checkpoint, key: str, found: int) -> None:
    expected = _text_value(checkpoint, key)
    if expected not in (None, found):
        raise ConfigError(
            f"{checkpoint.path}: config.json says {key} {expected}, its tensors' columns make {found}; "
            f"config.json does not belong to these tensors"
        )


def _weight(checkpoint: Checkpoint, name: str, dtypes: list[str]) -> StoredTensor:
    """Returns a table's tensor; raises `ConfigError` if it is missing, packed, or of another dtype or rank."""
    refuse_packed_name(checkpoint, name)
    return checkpoint.tensor(name, dtypes, 2)


def _prefix(checkpoint: Checkpoint, family: str, layer: int, ending: str | None) -> str:
    """Returns what stands before `ending` in the name of a layer's table; with None, before its last module."""
    pattern = _TABLE_NAMES[family].format(layer=layer)
    names = [name for name in checkpoint.names if re.search(rf"(?:^|\.){pattern}$", name)]
    if len(names) != 1:
        found = f"are several such tensors: {', '.join(names)}" if names else "is no such tensor"
        raise ConfigError(
            f"{checkpoint.path}: there {found} ({_TABLE_WORDS[family].format(layer=layer)}); {checkpoint.why_missing()}"
        )
    return names[0].removesuffix(ending) if ending else names[0].rpartition("ngram_embedding.")[0]


def _parts(checkpoint: Checkpoint, prefix: str) -> tuple[StoredTensor, ...]:
    """Returns a table's tensors in the order of their rows: one `weight`, or `shard_0.weight`, `shard_1.weight`, ...

    Conversions to MLX write `shards.0.weight` for `shard_0.weight`.
    """
    dtypes = list(VALUE_CODECS)
    if f"{prefix}weight" in checkpoint.names:
        return (_weight(checkpoint, f"{prefix}weight", dtypes),)
    matches = (re.fullmatch(rf"{re.escape(prefix)}(shards?[._])\d+\.weight", name) for name in checkpoint.names)
    spelled = [match[1] for match in matches if match]
    expected = _text_value(checkpoint, "split_ngram_parts")
    if expected not in (None, len(spelled)) or len(set(spelled)) != 1:
        raise ConfigError(
            f"{checkpoint.path}: {len(spelled)} tensors {prefix}{'* and '.join(sorted(set(spelled)))}*.weight, "
            f"config.json says split_ngram_parts {expected}; {checkpoint.why_missing()}"
        )
    names = (f"{prefix}{spelled[0]}{index}.weight" for index in range(len(spelled)))
    return tuple(_weight(checkpoint, name, dtypes) for name in names)


def _check_buffer(checkpoint: Checkpoint, name: str, expected: tuple[int, ...]) -> None:
    """Compares a hash buffer that the checkpoint carries with ours: where they differ,
    its rows are not where we look."""
    if name not in checkpoint.tensors:
        return
    tensor = checkpoint.tensors[name]
    if tensor.dtype != "I64":
        raise ConfigError(f"{name} is {tensor.dtype}, expected I64; the checkpoint is damaged")
    found = tuple(np.frombuffer(tensor.read_bytes(), "<i8").tolist())
    if found != expected:
        differ = next(
            (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected))
        )
        raise ConfigError(
            f"{name} has {len(found)} values, {found[differ : differ + 1]} at {differ}; config.json gives "
            f"{len(expected)}, {expected[differ : differ + 1]}: "
            "the model was trained with another hash than its config.json says"
        )
