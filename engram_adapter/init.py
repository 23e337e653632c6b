"""init: the tables of a model that was not trained yet, from its config.json alone.

Input: a folder with config.json, and tokenizer.json if the family's hash has a token map. Output: a store whose rows
are drawn when training first touches them. Errors: `ConfigError` for configurations of no known family, or without
what says how many values a row has.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tierstore.causes import Fault, naming
from tierstore.errors import ConfigError
from tierstore.formats.checkpoint_files import read_json
from tierstore.formats.initial import InitialLayout
from tierstore.offline.init import CODECS, init_store
from tierstore.spec import TableSpec, codec_row_bytes

from .family import Family, family_named, family_of_config, text_values
from .hash_config import ConfigValues
from .hash_spec import HashSpec, spec_of_parts
from .token_map import build_token_map

CONFIG_NAME = "config.json"
DEVIATION = 0.02  # of models whose config.json gives no initializer_range
DTYPES = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "fp8": "fp8_e4m3_e8m0x32"}  # codecs, as users name them


def init_checkpoint(
    config_folder: str | os.PathLike[str],
    store_path: str | os.PathLike[str],
    *,
    family: str | None = None,
    seed: int = 0,
    deviation: float | None = None,
    layers: Sequence[int] | None = None,
    dtype: str | None = None,
    allow_network_fs: bool = False,
    slice: tuple[int, int] | None = None,
) -> tuple[InitialLayout, ...]:
    """Makes a store for a model that was not trained yet; also `engram_adapter.init_checkpoint`. Blocks shortly.

    Args:
        config_folder: With config.json, and tokenizer.json if the family's hash has a token map.
        store_path: A new or empty folder.
        family: The name of a family; by default found from config.json.
        seed: Of all values.
        deviation: The standard deviation of the normal distribution that values are drawn from; by default
            `initializer_range` of config.json, else 0.02.
        layers: Which layers get a table; by default all that config.json names.
        dtype: What versions and exports hold: "fp32", "fp16", "bf16" or "fp8"; by default as the family publishes.
        allow_network_fs: Make it on a network file system that only this host uses.
        slice: (I, N): only slice I of N of every table, from 0 on.

    Returns:
        The tables.

    Raises:
        ConfigError: The configuration is of no known family or lacks a value; or the path holds something.
    """
    folder = Path(config_folder)
    file = folder / CONFIG_NAME
    with naming(file, file, fault=Fault(ConfigError, "give a folder with the model's config.json")):
        config_bytes = file.read_bytes()
    config = read_json(file)
    found = family_named(family) if family else family_of_config(config)
    token_map = build_token_map(folder / "tokenizer.json") if found.needs_token_map else None
    parts = found.hash_of(config, token_map)
    if layers is not None:
        unknown = sorted(set(layers) - parts.layers.keys())
        if unknown or not layers:
            raise ConfigError(
                f"layers {', '.join(map(str, unknown)) or 'none'}: config.json has tables for "
                f"{', '.join(map(str, parts.layers))}"
            )
        parts = replace(parts, layers={layer: of for layer, of in parts.layers.items() if layer in layers})
    if found.read_dim is None:
        raise ConfigError(f"family {found.name} does not say how long a row is: no table can be made from scratch")
    values = ConfigValues(text_values(config), found.name)
    hash_spec, codec = spec_of_parts(found, parts, token_map), _codec(found, dtype)
    specs = [_spec(hash_spec, layer, codec, found.read_dim(values, parts)) for layer in hash_spec.layers]
    initializer = {"seed": seed, "deviation": _deviation(config, deviation)}
    digest = hashlib.sha256(config_bytes + json.dumps([initializer, codec, list(parts.layers)]).encode()).hexdigest()
    return init_store(
        store_path,
        specs,
        seed=seed,
        deviation=initializer["deviation"],
        origin={"digest": digest, "files": []},
        attachments=hash_spec.attachments() | {CONFIG_NAME: config_bytes},
        allow_network_fs=allow_network_fs,
        slice=slice,
    )


def _codec(family: Family, dtype: str | None) -> str:
    chosen = family.synthetic.published.dtype if dtype is None else dtype
    codec = DTYPES.get(chosen)
    published = {each for each in family.synthetic.codecs if DTYPES.get(each) == family.synthetic.codecs[each]}
    allowed = published | {"bf16", "fp16", "fp32"}
    if codec not in CODECS or chosen not in allowed:
        raise ConfigError(f"dtype {chosen!r}: a table of {family.name} from scratch is {', '.join(sorted(allowed))}")
    return codec


def _spec(hash_spec: HashSpec, layer: int, codec: str, dim: int) -> TableSpec:
    row_bytes = codec_row_bytes(codec, dim)
    assert row_bytes is not None
    return TableSpec(
        name=hash_spec.table_name(layer),
        num_rows=hash_spec.num_rows(layer),
        row_bytes=row_bytes,
        orders=hash_spec.orders,
        rows_per_key=hash_spec.heads,
        moduli=hash_spec.moduli(layer),
        offsets=hash_spec.offsets(layer),
        codec=codec,
        dim=dim,
        fingerprint=hash_spec.fingerprint(layer),
    )


def _deviation(config: dict[str, Any], given: float | None) -> float:
    if given is not None:
        return float(given)
    value = text_values(config).get("initializer_range", DEVIATION)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"config.json: initializer_range is {value!r}, expected a number from 0 up; or pass --std")
    return float(value)
