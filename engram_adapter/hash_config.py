"""What each family's config.json says about its hash: orders, heads, moduli, multipliers, pad rule.

Flows in: config.json as a dict, and how many compressed ids the token map has. Flows out: `HashParts`. Refuses, with
`ConfigError` naming the key, values that are missing, of another type, out of range or contradicted by others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tierstore import ConfigError
from tierstore.kernels import ORDER_MAX

from .primes import generator_multipliers, primes_from, splitmix_multipliers

HEADS_MAX = 256
LAYER_MAX = 10_000
LAYERS_MAX = 256
TABLE_HEADS_MAX = 16_384  # of all layers and orders together: finding their primes takes seconds, not hours
LAYER_SEED_STEP = 10007
VOCABULARY_MAX = 2**31 - 1
PADDING_MAX = 4096  # rows that embeddings have beyond the tokenizer's tokens, for kernels and ranks; seen up to 1,069
CONFIG_DEPTH_MAX = 4  # of parts in parts


@dataclass(frozen=True)
class HashParts:
    """A family's hash as its configuration gives it; dicts are by layer.
    pad_id is None where it needs the token map."""

    family: str
    orders: tuple[int, ...]
    heads: int
    vocab_size: int
    pad_id: int | None
    barrier_id: int | None
    needs_token_map: bool
    multipliers: dict[int, tuple[int, ...]]
    moduli: dict[int, tuple[int, ...]]
    num_rows: dict[int, int]


def find_family(config: dict[str, Any]) -> str:
    """Returns the family that a config.json is of; raises `ConfigError` where it has the keys of none."""
    text = text_values(config)
    for family, (_, key) in FAMILIES.items():
        if text.get(key):
            return family
    marks = ", ".join(f"{key} ({family})" for family, (_, key) in FAMILIES.items())
    raise ConfigError(
        f"config.json is of no known family: it has none of {marks}; pass --family, or --tensor for a plain table"
    )


def read(config: dict[str, Any], token_map: np.ndarray | None, family: str | None) -> HashParts:
    """Reads the hash of a family (found from the keys if None)."""
    family = family or find_family(config)
    if family not in FAMILIES:
        raise ConfigError(f"family {family!r} is not known; there are {', '.join(FAMILIES)}")
    return FAMILIES[family][0](_Values(text_values(config), family), token_map)


class _Values:
    """A configuration whose values are checked as they are read."""

    def __init__(self, config: dict[str, Any], family: str) -> None:
        self._config, self.family = config, family

    def refuse(self, key: str, what: str) -> ConfigError:
        return ConfigError(f"config.json ({self.family}): {key} {what}; config.json is damaged or another model's")

    def not_of_tokenizer(self, key: str, said: str, counted: str) -> ConfigError:
        return ConfigError(
            f"config.json ({self.family}): {key} is {said}, tokenizer.json gives {counted}; one of the two is another "
            f"model's, and every row would be a wrong one: download both from where the tensors came from"
        )

    def integer(self, key: str, low: int, high: int, *others: str, default: int | None = None) -> int:
        found = next((name for name in (key, *others) if self._config.get(name) is not None), None)
        value = default if found is None else self._config[found]
        if key == "eos_token_id" and isinstance(value, list) and value:
            value = value[0]  # several are listed for generation; the hash takes the first
        if value is None:
            without_map = " and no token map is given to count" if key == "engram_compressed_vocab_size" else ""
            raise self.refuse(key, f"is missing{without_map}")
        if type(value) is not int or not low <= value <= high:
            raise self.refuse(key, f"is {value!r}, expected an integer from {low} to {high}")
        return value

    def integers(self, key: str, low: int, high: int, *, optional: bool = False) -> list[int]:
        values = self._config.get(key)
        if values is None and optional:
            return []
        if not isinstance(values, list) or not values:
            raise self.refuse(key, "is missing" if values is None else f"is {values!r}, expected a list of integers")
        if len(values) > LAYERS_MAX:
            raise self.refuse(key, f"has {len(values)} values, expected at most {LAYERS_MAX}")
        if not all(type(value) is int and low <= value <= high for value in values):
            raise self.refuse(key, f"is {values!r}, expected integers from {low} to {high}")
        return values


def text_values(config: dict[str, Any]) -> dict[str, Any]:
    """Returns what a config.json says of its text model: the part that has a family's key, over the values around it.

    The part is text_config if it has such a key, else the top level, else the one part within parts that has: models of
    speech or vision keep a text_config inside another one. A seed is never taken from around the part: there it may be
    anything's. Raises `ConfigError` if several parts have a family's key.
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
    """Returns a part of a config.json if it has a key that marks a family."""
    if not isinstance(part, dict):
        return None
    return part if any(part.get(key) for _, key in FAMILIES.values()) else None


def _marked_paths(part: dict[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yields the keys that lead to each part that has a family's key, outermost first, CONFIG_DEPTH_MAX deep."""
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


def _deepseek_v41(values: _Values, token_map: np.ndarray | None) -> HashParts:
    layers = _distinct(values, "engram_layer_ids", 0)
    max_order = values.integer("engram_max_ngram_size", 2, ORDER_MAX)
    heads = values.integer("engram_n_heads", 1, HEADS_MAX)
    base = values.integer("engram_vocab_size", 2, 2**31 - 1)
    parts = _engram(
        values,
        token_map,
        layers,
        [base] * (max_order - 1),
        heads,
        "engram_seed",
        "engram_pad_token_id",
        "engram_pad_id",
    )
    expected = values.integers("engram_num_embeddings", 1, 2**53, optional=True)
    if expected and expected != list(parts.num_rows.values()):
        raise values.refuse(
            "engram_num_embeddings", f"is {expected}, the moduli add up to {list(parts.num_rows.values())}"
        )
    return parts


def _published(values: _Values, token_map: np.ndarray | None) -> HashParts:
    layers = _distinct(values, "layer_ids", 0)
    max_order = values.integer("max_ngram_size", 2, ORDER_MAX)
    heads = values.integer("n_head_per_ngram", 1, HEADS_MAX)
    bases = values.integers("engram_vocab_size", 2, 2**31 - 1)
    if len(bases) != max_order - 1:
        raise values.refuse(
            "engram_vocab_size", f"has {len(bases)} bases, max_ngram_size {max_order} needs {max_order - 1}"
        )
    return _engram(values, token_map, layers, bases, heads, "seed", "pad_id")


def _engram(
    values: _Values,
    token_map: np.ndarray | None,
    layers: list[int],
    bases: list[int],
    heads: int,
    seed_key: str,
    *pad_keys: str,
) -> HashParts:
    """The hash of arXiv 2601.07372: per layer and order, the next primes that no other head has taken."""
    orders = tuple(range(2, len(bases) + 2))
    count = None if token_map is None else _count(token_map)
    compressed = values.integer("engram_compressed_vocab_size", 1, VOCABULARY_MAX, default=count)
    if count not in (None, compressed):
        raise values.not_of_tokenizer("engram_compressed_vocab_size", f"{compressed}", f"{count} distinct ids")
    vocab_size = values.integer(
        "vocab_size", 1, VOCABULARY_MAX, default=compressed if token_map is None else len(token_map)
    )
    if token_map is not None:
        if not len(token_map) <= vocab_size <= len(token_map) + PADDING_MAX:
            raise values.not_of_tokenizer("vocab_size", f"{vocab_size}", f"{len(token_map)} tokens")
        vocab_size = len(
            token_map
        )  # an embedding may be padded; no token has the ids behind, and the hash none of them
    pad_token = values.integer(pad_keys[0], 0, vocab_size - 1, *pad_keys[1:])
    seed = values.integer(seed_key, 0, 2**63 - 1, default=0)  # a plain "seed" of a V4.1 config is not the hash's
    _check_heads(values, len(layers) * len(bases) * heads)
    taken: set[int] = set()
    resume: dict[
        int, int
    ] = {}  # base -> every prime from it to here is taken, as each run takes the smallest free ones
    moduli: dict[int, tuple[int, ...]] = {}
    for layer in layers:
        chosen = []
        for base in bases:
            free = (prime for prime in primes_from(resume.get(base, base)) if prime not in taken)
            run = [next(free) for _ in range(heads)]
            resume[base] = run[-1] + 1
            taken.update(run)
            chosen += run
        moduli[layer] = tuple(chosen)
    return HashParts(
        family=values.family,
        orders=orders,
        heads=heads,
        vocab_size=vocab_size,
        pad_id=None if token_map is None else int(token_map[pad_token]),
        barrier_id=None,
        needs_token_map=True,
        multipliers={n: generator_multipliers(compressed, seed + LAYER_SEED_STEP * n, orders[-1]) for n in layers},
        moduli=moduli,
        num_rows={layer: sum(chosen) for layer, chosen in moduli.items()},
    )


def _qwen4_exp(values: _Values, token_map: np.ndarray | None) -> HashParts:
    del token_map  # ids hash as they are
    layers = sorted({layer - 1 for layer in values.integers("ple_layer_ids", 1, LAYER_MAX)})  # as transformers does
    max_order = values.integer("ngram_size", 2, ORDER_MAX, default=3)
    heads = values.integer("heads_per_ngram", 1, HEADS_MAX, default=8)
    base = values.integer("ngram_vocab_size_base", 2, 2**31 - 1, default=20_000_000)
    multiple = values.integer("make_ngram_vocab_size_divisible_by", 1, 2**31 - 1, default=128)
    vocab_size = values.integer("vocab_size", 1, VOCABULARY_MAX)
    seed = values.integer("seed", 0, 2**63 - 1, default=1234)
    eos_id = values.integer("eos_token_id", 0, vocab_size - 1)
    _check_heads(values, len(layers) * (max_order - 1) * heads)
    primes = primes_from(base)
    moduli = {layer: tuple(next(primes) for _ in range((max_order - 1) * heads)) for layer in layers}
    return HashParts(
        family=values.family,
        orders=tuple(range(2, max_order + 1)),
        heads=heads,
        vocab_size=vocab_size,
        pad_id=eos_id,
        barrier_id=eos_id,
        needs_token_map=False,
        multipliers={
            n: splitmix_multipliers(vocab_size, seed + LAYER_SEED_STEP * i, max_order) for i, n in enumerate(layers)
        },
        moduli=moduli,
        num_rows={layer: -(-sum(chosen) // multiple) * multiple for layer, chosen in moduli.items()},
    )


def _distinct(values: _Values, key: str, low: int) -> list[int]:
    layers = values.integers(key, low, LAYER_MAX)
    if len(set(layers)) != len(layers):
        raise values.refuse(key, f"is {layers}, with a layer twice")
    return layers


def _check_heads(values: _Values, heads: int) -> None:
    if heads > TABLE_HEADS_MAX:
        raise ConfigError(
            f"config.json ({values.family}): layers, orders and heads make {heads} heads in all, expected at most "
            f"{TABLE_HEADS_MAX}; config.json is damaged"
        )


def _count(token_map: np.ndarray) -> int:
    return len(np.unique(token_map))


# Each family's reader, and the key of config.json that marks it.
FAMILIES: dict[str, tuple[Callable[[_Values, np.ndarray | None], HashParts], str]] = {
    "deepseek_v41": (_deepseek_v41, "engram_layer_ids"),
    "qwen4_exp": (_qwen4_exp, "ple_layer_ids"),
    "engram": (_published, "max_ngram_size"),
}
