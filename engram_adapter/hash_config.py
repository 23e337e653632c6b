"""What a family's hash consists of, and the checked values of config.json that give it.

Input: the part of config.json that describes the text model, as a dict; the token map, if the family has one.
Output: `HashParts`: orders, heads, moduli, multipliers, pad rule. Each file of `families/` fills one in.
Errors: `ConfigError`, naming the key, for values that are missing, of another type, out of range, or contradicted by
others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tierstore import ConfigError
from tierstore.lazy import lazy

from .primes import generator_multipliers, primes_from

HEADS_MAX = 256
LAYER_MAX = 10_000
LAYERS_MAX = 256
MODEL_HEADS_MAX = 16_384  # of all layers and orders together: to find their primes takes seconds, not hours
LAYER_SEED_STEP = 10007
BASE_MAX = 2**31 - 1  # of a head's prime range
SEED_MAX = 2**63 - 1
VOCABULARY_MAX = 2**31 - 1
MIXED, POLYNOMIAL = "mixed", "polynomial"  # kinds of hashes; see `HashParts`
PADDING_MAX = 4096  # rows that embeddings have beyond the tokenizer's tokens, for kernels and ranks; seen up to 1,069


@dataclass(frozen=True)
class LayerHash:
    """One layer's own numbers: multipliers of an n-gram's positions, a modulus for each head, rows in all.

    A mixed hash has one multiplier for each position, a polynomial one as many for each head, head after head.
    """

    multipliers: tuple[int, ...]
    moduli: tuple[int, ...]
    num_rows: int

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each head's rows begin: running sums of the moduli."""
        sums = [0]
        for modulus in self.moduli[:-1]:
            sums.append(sums[-1] + modulus)
        return tuple(sums)

    @lazy
    def multiplier_array(self) -> np.ndarray:
        """The multipliers as the kernels take them, int64."""
        return np.array(self.multipliers, dtype=np.int64)

    @lazy
    def address_map(self) -> tuple[np.ndarray, np.ndarray]:
        """Moduli and offsets as the kernels take them, int64 [O * H] each."""
        return np.array(self.moduli, dtype=np.int64), np.array(self.offsets, dtype=np.int64)


@dataclass(frozen=True)
class HashParts:
    """A model's hash as its configuration gives it. Fields as of `HashSpec`.

    pad_id is None if it depends on a token map that was not given. kind: MIXED if the heads of an order share a key,
    ids times multipliers, XORed; POLYNOMIAL if they do not: each head's key is the remainder of a sum of its own.
    """

    orders: tuple[int, ...]
    heads: int
    vocab_size: int
    pad_id: int | None
    barrier_id: int | None
    layers: dict[int, LayerHash]
    kind: str = MIXED


class ConfigValues:
    """The values of one part of config.json, checked as they are read. Errors name the key and the family."""

    def __init__(self, config: dict[str, Any], family: str) -> None:
        self._config, self._family = config, family

    def refusal(self, key: str, what: str) -> ConfigError:
        """Returns the error for a value that cannot be a model's."""
        return ConfigError(f"config.json ({self._family}): {key} {what}; config.json is damaged or another model's")

    def tokenizer_mismatch(self, key: str, configured: str, counted: str) -> ConfigError:
        """Returns the error for a value that tokenizer.json contradicts."""
        return ConfigError(
            f"config.json ({self._family}): {key} is {configured}, tokenizer.json gives {counted}; one of the two is "
            f"another model's, and every row would be a wrong one: download both from where the tensors came from"
        )

    def integer(self, key: str, low: int, high: int, *others: str, default: int | None = None) -> int:
        """Returns the integer under `key`, else under the first of `others` that is there, else `default`."""
        found = next((name for name in (key, *others) if self._config.get(name) is not None), None)
        value = default if found is None else self._config[found]
        if key == "eos_token_id" and isinstance(value, list) and value:
            value = value[0]  # several are listed for generation; the hash takes the first
        if value is None:
            without_map = " and no token map is given to count" if key == "engram_compressed_vocab_size" else ""
            raise self.refusal(key, f"is missing{without_map}")
        if type(value) is not int or not low <= value <= high:
            raise self.refusal(key, f"is {value!r}, expected an integer from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, *others: str) -> float:
        """Returns the number under `key`, else under the first of `others` that is there."""
        value = next((self._config[name] for name in (key, *others) if self._config.get(name) is not None), None)
        if value is None:
            raise self.refusal(key, "is missing")
        if type(value) not in (int, float) or not low <= value <= high:
            raise self.refusal(key, f"is {value!r}, expected a number from {low:g} to {high:g}")
        return float(value) if type(value) is float else value

    def has(self, key: str) -> bool:
        """Whether `key` has a value."""
        return self._config.get(key) is not None

    def integers(self, key: str, low: int, high: int, *, optional: bool = False) -> list[int]:
        """Returns the list of integers under `key`; an empty one only if it is optional and missing."""
        values = self._config.get(key)
        if values is None and optional:
            return []
        if not isinstance(values, list) or not values:
            raise self.refusal(key, "is missing" if values is None else f"is {values!r}, expected a list of integers")
        if len(values) > LAYERS_MAX:
            raise self.refusal(key, f"has {len(values)} values, expected at most {LAYERS_MAX}")
        if not all(type(value) is int and low <= value <= high for value in values):
            raise self.refusal(key, f"is {values!r}, expected integers from {low} to {high}")
        return values

    def layers(self, key: str) -> list[int]:
        """Returns the 0-based layers listed under `key`, each once, in the order of the list."""
        layers = self.integers(key, 0, LAYER_MAX)
        if len(set(layers)) != len(layers):
            raise self.refusal(key, f"is {layers}, with a layer twice")
        return layers

    def check_heads(self, heads: int) -> None:
        """Refuses more heads, of all layers and orders together, than a model has."""
        if heads > MODEL_HEADS_MAX:
            raise ConfigError(
                f"config.json ({self._family}): layers, orders and heads make {heads} heads in all, expected at most "
                f"{MODEL_HEADS_MAX}; config.json is damaged"
            )


def paper_hash(
    values: ConfigValues,
    token_map: np.ndarray | None,
    layers: list[int],
    bases: list[int],
    heads: int,
    seed_key: str,
    *pad_keys: str,
) -> HashParts:
    """Returns the hash of arXiv 2601.07372: each layer and order takes the next primes that no other head has.

    Args:
        values: The configuration, for the keys that both users of this hash share.
        token_map: int32 [tokens], or None: then pad_id is unknown.
        layers: 0-based, in the configuration's order, which decides who gets which primes.
        bases: Where the primes of each order start; the orders are 2, 3, ...
        heads: Of each order.
        seed_key: The key of the seed; 0 if it is missing.
        pad_keys: Keys of the token that stands before a sequence, the first that is there.
    """
    orders = tuple(range(2, len(bases) + 2))
    count = None if token_map is None else len(np.unique(token_map))
    compressed = values.integer("engram_compressed_vocab_size", 1, VOCABULARY_MAX, default=count)
    if count not in (None, compressed):
        raise values.tokenizer_mismatch("engram_compressed_vocab_size", f"{compressed}", f"{count} distinct ids")
    num_tokens = compressed if token_map is None else len(token_map)
    vocab_size = values.integer("vocab_size", 1, VOCABULARY_MAX, default=num_tokens)
    if token_map is not None:
        if not len(token_map) <= vocab_size <= len(token_map) + PADDING_MAX:
            raise values.tokenizer_mismatch("vocab_size", f"{vocab_size}", f"{len(token_map)} tokens")
        vocab_size = len(token_map)  # an embedding may be padded; the ids beyond are not tokens, and have no hash
    pad_token = values.integer(pad_keys[0], 0, vocab_size - 1, *pad_keys[1:])
    seed = values.integer(seed_key, 0, SEED_MAX, default=0)
    values.check_heads(len(layers) * len(bases) * heads)
    moduli = _distinct_primes(layers, bases, heads)
    return HashParts(
        orders=orders,
        heads=heads,
        vocab_size=vocab_size,
        pad_id=None if token_map is None else int(token_map[pad_token]),
        barrier_id=None,
        layers={
            layer: LayerHash(
                generator_multipliers(compressed, seed + LAYER_SEED_STEP * layer, orders[-1]), chosen, sum(chosen)
            )
            for layer, chosen in moduli.items()
        },
    )


def _distinct_primes(layers: list[int], bases: list[int], heads: int) -> dict[int, tuple[int, ...]]:
    """Returns the moduli of each layer, orders outermost: the smallest primes from each base that are still free."""
    taken: set[int] = set()
    resume: dict[int, int] = {}  # base -> from here on; every prime from the base to here is taken
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
    return moduli
