"""What a model family is, and which one a checkpoint's config.json belongs to. `families/` has a file for each.

Input: a config.json as a dict, perhaps the name of a family. Output: the `Family`, and the part of the configuration
that describes its text model.
Errors: `ConfigError` for configurations of no known family, and for names of none.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tierstore import ConfigError
from tierstore.formats.checkpoint import Checkpoint, Plane

from .hash_config import ConfigValues, HashParts
from .synthetic import PlannedTensor, SyntheticPlan, SyntheticShape

CONFIG_DEPTH_MAX = 4  # of parts in parts


@dataclass(frozen=True)
class StoredTable:
    """One layer's table in a checkpoint: the planes side by side that make its rows, and how to read the rows."""

    planes: tuple[Plane, ...]
    codec: str
    dim: int


@dataclass(frozen=True)
class Synthetic:
    """How to make a checkpoint of the family without the model.

    Attributes:
        published: The sizes of the published model.
        codecs: The dtypes that its tables come in ("bf16"), and the codec of a store's rows for each.
        plan: The checkpoint of a shape: called with the shape, a tokenizer, and whether all is as published.
        dim_multiple: What divides the values of a row.
        splits_tables: Whether a table may be several tensors.
    """

    published: SyntheticShape
    codecs: Mapping[str, str]
    plan: Callable[[SyntheticShape, Tokenizer, bool], SyntheticPlan]
    dim_multiple: int = 1
    splits_tables: bool = False


@dataclass(frozen=True)
class Family:
    """All that tierstore knows of a model family.

    Attributes:
        name: As in `--family` and in a store's catalog.
        mark: The key of config.json that only this family has.
        other_marks: Keys that stand for it in some of the family's models.
        needs_token_map: Whether tokens are mapped to compressed ids before they are hashed.
        table_pattern: Regular expression of the tensor that holds a layer's table, `{layer}` for its number; any prefix
            may stand before.
        table_words: The same for people.
        read_hash: The hash, from the configuration and the token map (None without one).
        read_table: A layer's table, from a checkpoint, the hash and the layer's number. Raises `ConfigError` if
            tensors, scales or hash buffers disagree with the configuration: the rows would be wrong.
        synthetic: How to make a checkpoint.
        read_dim: How many values a row has, as the configuration says. None: no table can be made from scratch.
        table_tensors: What `read_table` reads, under its published names: of the hash, a layer's number, a codec and
            the values of a row. Tensors without `values` hold the rows, plane after plane, each plane's tensors
            stacked in the order of rows; the others are buffers beside them.
    """

    name: str
    mark: str
    needs_token_map: bool
    table_pattern: str
    table_words: str
    read_hash: Callable[[ConfigValues, np.ndarray | None], HashParts]
    read_table: Callable[[Checkpoint, HashParts, int], StoredTable]
    synthetic: Synthetic
    other_marks: tuple[str, ...] = ()
    read_dim: Callable[[ConfigValues, HashParts], int] | None = None
    table_tensors: Callable[[HashParts, int, str, int], list[PlannedTensor]] | None = None

    def marks(self, part: Mapping[str, Any]) -> bool:
        """Whether a part of a config.json has one of the family's marks."""
        return any(part.get(mark) for mark in (self.mark, *self.other_marks))

    def hash_of(self, config: dict[str, Any], token_map: np.ndarray | None) -> HashParts:
        """Returns the hash that a whole config.json gives. Raises `ConfigError`, naming the key that is wrong."""
        return self.read_hash(ConfigValues(text_values(config), self.name), token_map)


# Models with n-gram tables that this version cannot read, by their model_type, and why not.
UNREAD = {
    "hy_v4_flash": "how its tables' rows are laid out and hashed was not public when this version was made",
}
FAMILIES: dict[str, Family] = {}  # by name; of a config.json with several marks, the first family counts


def register(family: Family) -> None:
    """Makes a family known to `read_model`, `HashSpec.from_config`, `tierstore build` and `tierstore synth`."""
    FAMILIES[family.name] = family


def known_families() -> dict[str, Family]:
    """Returns the registered families by name. Those of `families/` are there whatever was imported before."""
    importlib.import_module(".families", __package__)  # by name, since its files import this one
    return FAMILIES


def family_named(name: str) -> Family:
    """Returns the family `name`; raises `ConfigError` that lists those there are."""
    refuse_unread({"model_type": name})
    families = known_families()
    if name not in families:
        raise ConfigError(f"family {name!r} is not known; there are {', '.join(sorted(families))}")
    return families[name]


def refuse_unread(config: dict[str, Any]) -> None:
    """Raises `ConfigError` for a model of which it is known that its tables would be read wrongly."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        kind = part.get("model_type")
        reason = next(
            (why for name, why in UNREAD.items() if isinstance(kind, str) and kind in (name, f"{name}_text")), ""
        )
        if reason:
            raise ConfigError(
                f"models of type {kind} have no family here: {reason}; use a newer tierstore, or take one tensor as a "
                f"plain table with --tensor"
            )


def family_of_config(config: dict[str, Any]) -> Family:
    """Returns the family that a config.json is of; raises `ConfigError` if it has the mark of none."""
    text = text_values(config)
    refuse_unread(config)
    for family in known_families().values():
        if family.marks(text):
            return family
    marks = ", ".join(f"{family.mark} ({family.name})" for family in known_families().values())
    raise ConfigError(
        f"config.json is of no known family: it has none of {marks}; pass --family, or --tensor for a plain table"
    )


def text_values(config: dict[str, Any]) -> dict[str, Any]:
    """Returns what a config.json says of its text model: the part that has a family's mark, over the values around it.

    The part is text_config if it has a mark, else the top level, else the one part within parts that has: models of
    speech or vision keep a text_config inside another one. A seed is never taken from around the part: there it may be
    anything's. Raises `ConfigError` if several parts have a mark.
    """
    if not isinstance(config, dict):
        raise TypeError(f"config is a {type(config).__name__}, expected config.json as a dict")
    found = _marked(config.get("text_config")) or _marked(config)
    if found is None:
        paths = list(_marked_paths(config, ()))
        if len(paths) > 1:
            names = ", ".join(".".join(path) for path in paths)
            raise ConfigError(f"config.json: {names} all have a family's keys, expected one; pass one part alone")
        if paths:
            return _laid_over(config, paths[0])
    if found is config or not isinstance(config.get("text_config"), dict):
        return config
    return _laid_over(config, ("text_config",))


def _marked(part: Any) -> dict[str, Any] | None:
    """Returns a part of a config.json if it has a family's mark."""
    if not isinstance(part, dict):
        return None
    return part if any(family.marks(part) for family in known_families().values()) else None


def _marked_paths(part: dict[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yields the keys that lead to each part that has a family's mark, outermost first, CONFIG_DEPTH_MAX deep."""
    for key, inner in part.items():
        if _marked(inner) is not None:
            yield (*path, key)
        elif isinstance(inner, dict) and len(path) + 1 < CONFIG_DEPTH_MAX:
            yield from _marked_paths(inner, (*path, key))


def _laid_over(config: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """Returns the values of the part that `path` leads to, each outer part's below those of the next inner one."""
    values: dict[str, Any] = {}
    part = config
    for key in path:
        values |= {key: value for key, value in part.items() if key != "seed" and value is not None}
        part = part[key]
    return values | {key: value for key, value in part.items() if value is not None}
