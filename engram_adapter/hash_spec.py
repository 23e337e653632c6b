"""The hash of a model's n-grams: token ids -> keys -> row ids, the same numbers as the model's own code gives.

Input: a checkpoint's configuration and token map, or what a build kept of them in the catalog. Output: keys and row ids
of batches of tokens. Most families share one form: mapped ids times odd multipliers, XORed over the n-gram, one key for
all heads of an order. LongCat's is a polynomial, with a key for each head. The family's pad rule says what ends
look-back, and which id stands before.
Errors: `ConfigError` for configurations that contradict themselves, `FormatError` for a damaged record in the catalog.

Shapes: B sequences, T tokens, O orders, H heads, P tokens before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tierstore import ConfigError, FormatError, Store, TableSpec, kernels
from tierstore.formats.catalog import CatalogImage
from tierstore.lazy import lazy

from .family import Family, family_named, family_of_config
from .hash_arguments import checked_dead, checked_history, integers, outside_vocabulary
from .hash_config import MIXED, POLYNOMIAL, HashParts, LayerHash
from .token_map import checked_token_map

if TYPE_CHECKING:
    from tierstore import Training

RECORD_NAME = "hash_spec"
TOKEN_MAP_NAME = "token_map"


@dataclass(frozen=True, eq=False)
class HashSpec:
    """The hash of one model. Immutable; any thread may use it. Make it with `from_config` or `from_store`.

    Attributes:
        family: The name of the model family.
        orders: The n-gram length of each key of a token, ascending. Of a polynomial hash a head is an order of its own:
            (2, 2, 3, 3) are two heads for bigrams and two for trigrams.
        heads: Rows per key.
        vocab_size: Token ids are below it.
        pad_id: The (mapped) id that counts beyond the end of look-back; None in a spec that lacks its token map.
        barrier_id: The token id that ends look-back behind it; None if only the sequence's start does.
        layer_hashes: By layer, 0-based.
        token_map: int32 [vocab_size]; None if ids hash as they are.
        needs_token_map: Whether they do not.
        kind: MIXED or POLYNOMIAL, as of `HashParts`.
    """

    family: str
    orders: tuple[int, ...]
    heads: int
    vocab_size: int
    pad_id: int | None
    barrier_id: int | None
    layer_hashes: dict[int, LayerHash]
    token_map: np.ndarray | None
    needs_token_map: bool
    kind: str = MIXED

    @classmethod
    def from_config(
        cls, config: dict[str, Any], token_map: np.ndarray | None = None, family: str | None = None
    ) -> HashSpec:
        """Makes the hash from a checkpoint's config.json.

        Without its token map a spec still gives moduli, multipliers and row counts; keys then raise.

        Args:
            config: The whole config.json.
            token_map: From `build_token_map`, int32 [tokens], if the family has one.
            family: The family's name; by default it is found from the keys.

        Raises:
            ConfigError: The configuration is of no known family, lacks a value or contradicts the token map.
            TypeError, ValueError: The token map is not one.
        """
        token_map = None if token_map is None else checked_token_map(token_map)
        found = family_named(family) if family else family_of_config(config)
        return spec_of_parts(found, found.hash_of(config, token_map), token_map)

    @classmethod
    def from_store(cls, store: Store | Training) -> HashSpec:
        """Makes the hash that a store, or a training's store, was built with, from its catalog.

        Raises `ConfigError` if the store has plain tables only, `FormatError` if the record is damaged.
        """
        return _from_catalog(store.attachment, [table.spec for table in store.tables.values()])

    @classmethod
    def from_catalog(cls, image: CatalogImage) -> HashSpec:
        """Makes the hash of a store that is not open, as `from_store` does."""
        return _from_catalog(image.attachments.__getitem__, [layout.public_spec for layout in image.tables.values()])

    def attachments(self) -> dict[str, bytes]:
        """Returns what a build keeps in the catalog, for `from_store`."""
        attachments = {RECORD_NAME: json.dumps(_record_of(self)).encode()}  # unsorted: the order of layers is kept
        if self.needs_token_map:
            attachments[TOKEN_MAP_NAME] = self._token_map().astype("<i4").tobytes()
        return attachments

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers with a table: 0-based module indices, as in the tables' names."""
        return tuple(self.layer_hashes)

    @property
    def history_tokens(self) -> int:
        """How many tokens before its first one a batch's keys depend on: one fewer than the longest n-gram has."""
        return self.orders[-1] - 1

    @property
    def kernel_token_map(self) -> np.ndarray | None:
        """The token map, None if ids hash as they are; raises `ConfigError` if the spec was made without its own."""
        return self._token_map() if self.needs_token_map else None

    def table_name(self, layer: int | str) -> str:
        """Returns the table of a layer, given as its number or already as the table's name: 1 -> "layers.1"."""
        return f"layers.{self._number(layer)}"

    def multipliers(self, layer: int | str) -> tuple[int, ...]:
        """Returns the multiplier of each position of an n-gram, the token itself first; of each head if there are."""
        return self._layer(layer).multipliers

    def moduli(self, layer: int | str) -> tuple[int, ...]:
        """Returns the modulus of each (order, head), orders outermost."""
        return self._layer(layer).moduli

    def offsets(self, layer: int | str) -> tuple[int, ...]:
        """Returns the first row of each (order, head), orders outermost."""
        return self._layer(layer).offsets

    def num_rows(self, layer: int | str) -> int:
        """Returns the rows of the layer's table, padding included."""
        return self._layer(layer).num_rows

    def fingerprint(self, layer: int | str) -> str:
        """Returns the SHA-256 (hex) of all that a layer's keys and row ids depend on."""
        parts = self._layer(layer)
        identity = {
            "family": self.family,
            "token_map": hashlib.sha256(self._token_map().astype("<i4").tobytes()).hexdigest()
            if self.needs_token_map
            else None,
            "orders": self.orders,
            "multipliers": parts.multipliers,
            "moduli": parts.moduli,
            "offsets": parts.offsets,
            "pad_id": self.pad_id,
            "barrier_id": self.barrier_id,
        }
        if self.kind != MIXED:
            identity["kind"] = self.kind
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def keys(
        self, token_ids: np.ndarray, layer: int | str, history: np.ndarray | None = None, dead: np.ndarray | None = None
    ) -> np.ndarray:
        """Returns the keys of the n-grams that end at each token, int64 [B, T, O]. Any threads may call; only computes.

        Look-back ends at a dead position, before the sequence's start and, in families with a barrier, at the barrier
        token: that predecessor and every older one count as the pad id. So does a dead position itself. A sequence fed
        in any split with its history gives the keys of the whole.

        Args:
            token_ids: Integers [B, T].
            layer: Its 0-based number, or its table's name.
            history: The tokens before, integers [B, P], oldest first, -1 for none (before the sequence's start, or a
                dead position). Only the last `history_tokens` count; after fewer, or None, the document starts.
            dead: bool [B, T], positions that are not text, such as image spans; their ids are not read.

        Raises:
            TypeError: Not integers.
            ValueError: Shapes that disagree, or ids outside the vocabulary.
            ConfigError: The spec lacks its token map.
        """
        if self.pad_id is None:
            raise self._no_token_map()
        parts, ids = self._layer(layer), integers(token_ids, "token_ids")
        past = None if history is None else checked_history(history, len(ids), self.history_tokens)
        no_text = None if dead is None else checked_dead(dead, ids.shape)
        keys = np.empty((*ids.shape, len(self.orders)), dtype=np.int64)
        outside = _write_keys(self, parts, ids, past, no_text, keys)
        if outside >= 0:
            raise outside_vocabulary(ids, past, outside, self.vocab_size)
        return keys

    def row_ids(
        self, token_ids: np.ndarray, layer: int | str, history: np.ndarray | None = None, dead: np.ndarray | None = None
    ) -> np.ndarray:
        """Returns the rows of each token: int64 [B, T] -> int64 [B, T, O * H]. Arguments and errors as for `keys`."""
        keys = self.keys(token_ids, layer, history, dead)
        row_ids = np.empty((*keys.shape[:2], len(self.orders) * self.heads), dtype=np.int64)
        kernels.row_ids_of_keys(
            keys.reshape(-1), None, *self._layer(layer).address_map, row_ids.reshape(-1, self.heads)
        )
        return row_ids

    @lazy
    def order_array(self) -> np.ndarray:
        """The orders as the kernels take them, int64."""
        return np.array(self.orders, dtype=np.int64)

    def _token_map(self) -> np.ndarray:
        if self.token_map is None:
            raise self._no_token_map()
        return self.token_map

    def _no_token_map(self) -> ConfigError:
        return ConfigError(
            f"the hash of family {self.family} needs its token map: pass token_map=build_token_map(tokenizer.json)"
        )

    def _layer(self, layer: int | str) -> LayerHash:
        return self.layer_hashes[self._number(layer)]

    def _number(self, layer: int | str) -> int:
        digits = layer.removeprefix("layers.") if isinstance(layer, str) else ""
        number = int(digits) if digits.isdecimal() else layer
        if number not in self.layer_hashes:
            raise KeyError(
                f"there is no table for layer {layer!r}; there are {', '.join(f'layers.{n}' for n in self.layers)}"
            )
        return int(number)


def _write_keys(
    spec: HashSpec,
    parts: LayerHash,
    ids: np.ndarray,
    past: np.ndarray | None,
    no_text: np.ndarray | None,
    keys: np.ndarray,
) -> int:
    """Writes a layer's keys; returns -1, or the position of the first id outside the vocabulary, as kernels do."""
    barrier_id = -1 if spec.barrier_id is None else spec.barrier_id
    multipliers = parts.multiplier_array
    if spec.kind == POLYNOMIAL:
        weights, moduli = multipliers.reshape(len(spec.orders), -1), parts.address_map[0]
        return kernels.polynomial_keys_of_tokens(ids, past, no_text, spec.vocab_size, weights, moduli, barrier_id, keys)
    assert spec.pad_id is not None, "a spec that has its token map knows its pad id"
    return kernels.keys_of_tokens(
        ids, past, no_text, spec.kernel_token_map, spec.vocab_size, multipliers, spec.order_array, spec.pad_id,
        barrier_id, keys,
    )  # fmt: skip


def spec_of_parts(family: Family, parts: HashParts, token_map: np.ndarray | None) -> HashSpec:
    """Returns the hash that a family read from a configuration."""
    mapped = token_map if family.needs_token_map else None
    return HashSpec(
        family.name, parts.orders, parts.heads, parts.vocab_size, parts.pad_id, parts.barrier_id, parts.layers, mapped,
        family.needs_token_map, parts.kind,
    )  # fmt: skip


def _from_catalog(attachment: Callable[[str], bytes], tables: Iterable[TableSpec]) -> HashSpec:
    """Returns the hash of a catalog's record; attachment: the record's bytes by name, raises `KeyError`."""
    try:
        record_bytes = attachment(RECORD_NAME)
    except KeyError:
        raise ConfigError(
            "the store holds plain tables: it was built without a hash; look its rows up by row id"
        ) from None
    try:
        spec = _spec_of_record(json.loads(record_bytes), attachment)
        hashes = {spec.table_name(n): (spec.fingerprint(n), spec.num_rows(n), spec.heads) for n in spec.layers}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"the store's hash record is damaged ({error!r}); restore the catalog or rebuild") from error
    wholes = [table.whole or table for table in tables]
    built = {t.name: (t.fingerprint, t.num_rows, t.rows_per_key) for t in wholes if not t.is_plain}
    for name in sorted(hashes.keys() | built.keys()):
        if hashes.get(name) != built.get(name):
            raise FormatError(
                f"fingerprint, rows and rows per key of table {name}: the store's hash record gives "
                f"{hashes.get(name, 'none')}, the table has {built.get(name, 'none')}; restore the catalog or rebuild"
            )
    return spec


def _record_of(spec: HashSpec) -> dict[str, Any]:
    layers = {
        str(layer): {"multipliers": parts.multipliers, "moduli": parts.moduli, "num_rows": parts.num_rows}
        for layer, parts in spec.layer_hashes.items()
    }
    return {
        "family": spec.family,
        "orders": spec.orders,
        "heads": spec.heads,
        "vocab_size": spec.vocab_size,
        "pad_id": spec.pad_id,
        "barrier_id": spec.barrier_id,
        "needs_token_map": spec.needs_token_map,
        "layers": layers,
    } | ({} if spec.kind == MIXED else {"kind": spec.kind})


def _spec_of_record(record: dict[str, Any], attachment: Callable[[str], bytes]) -> HashSpec:
    """Returns the hash of a decoded record; raises `KeyError`, `TypeError` or `ValueError` if it is damaged."""
    layers = {
        int(layer): LayerHash(tuple(parts["multipliers"]), tuple(parts["moduli"]), int(parts["num_rows"]))
        for layer, parts in record["layers"].items()
    }
    token_map = None
    if record["needs_token_map"]:
        token_map = checked_token_map(np.frombuffer(attachment(TOKEN_MAP_NAME), dtype="<i4"))
    spec = HashSpec(
        record["family"], tuple(record["orders"]), record["heads"], record["vocab_size"], record["pad_id"],
        record["barrier_id"], layers, token_map, record["needs_token_map"], record.get("kind", MIXED),
    )  # fmt: skip
    if spec.kind not in (MIXED, POLYNOMIAL):
        raise ValueError(f"a hash of kind {spec.kind!r}")
    if type(spec.needs_token_map) is not bool:
        raise TypeError(f"needs_token_map is {spec.needs_token_map!r}")
    if token_map is not None and len(token_map) != spec.vocab_size:
        raise ValueError(f"a token map of {len(token_map)} tokens for a vocabulary of {spec.vocab_size}")
    return spec
