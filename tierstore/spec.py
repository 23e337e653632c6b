"""What a table is: its codec, its address map, and the frozen `TableSpec` that carries both.

Input: numbers from a checkpoint's configuration or from the catalog. Output: keys to row ids (the address map), row ids
of consistent tokens back to keys (Chinese remainder theorem), and the sizes that pages, tiers and callers compute with.
Errors: `FormatError` for numbers that contradict each other.

Shapes: N tokens, O orders, H rows per key (heads of an order).
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import kernels
from .codec import parse_codec
from .errors import FormatError
from .lazy import lazy

KEY_MAX = 2**63 - 1
NAME_BYTES_MAX = 200
ROW_BYTES_MAX = 64 * 4096 - 16  # one row must fit in the largest page, trailer included


def codec_row_bytes(codec: str, dim: int) -> int | None:
    """Returns the bytes of a row of `dim` values under `codec`, or None if the codec fixes none ("raw").

    Raises `FormatError` for a codec that this version does not know (FORMAT.md lists those it does), and for values
    that are not whole blocks of it.
    """
    parsed = parse_codec(codec)
    try:
        return parsed.row_bytes(dim)
    except FormatError as error:
        raise FormatError(f"codec {codec!r}: {error}") from None


def codec_scale(codec: str) -> float:
    """Returns the factor in a codec's name ("fp8_e4m3*0x1.8p-7" -> 0.01171875), 1.0 without one."""
    return parse_codec(codec).factor


@dataclass(frozen=True)
class TableSpec:
    """One table: all rows of one Engram layer, or a plain embedding.

    `moduli` and `offsets` hold one int for each (order, head), orders outermost: `row_id = key % modulus + offset`. A
    plain embedding has orders (1,), one row per key, modulus `num_rows`, offset 0, so that row id = key. `fingerprint`
    is the SHA-256 (hex) of the hash that makes the keys; `dim` counts values in a row.
    Instances are validated when made.
    """

    name: str
    num_rows: int
    row_bytes: int
    orders: tuple[int, ...]
    rows_per_key: int
    moduli: tuple[int, ...]
    offsets: tuple[int, ...]
    codec: str
    dim: int
    fingerprint: str

    def __post_init__(self) -> None:
        def refuse(what: str) -> None:
            raise FormatError(f"table {self.name!r}: {what}; the checkpoint's config or the catalog is damaged")

        if not 0 < len(self.name.encode()) <= NAME_BYTES_MAX:
            refuse(f"a name of {len(self.name.encode())} bytes, must be 1 to {NAME_BYTES_MAX}")
        if not 0 < self.num_rows <= KEY_MAX // ROW_BYTES_MAX:
            refuse(f"{self.num_rows} rows, must be 1 to {KEY_MAX // ROW_BYTES_MAX}")
        if not 0 < self.row_bytes <= ROW_BYTES_MAX:
            refuse(f"{self.row_bytes} bytes a row, must be 1 to {ROW_BYTES_MAX}")
        if not self.orders or self.rows_per_key < 1:
            refuse(f"orders {self.orders} with {self.rows_per_key} rows a key, both must be at least one")
        if not len(self.moduli) == len(self.offsets) == self.num_heads:
            refuse(
                f"{len(self.moduli)} moduli and {len(self.offsets)} offsets for {self.num_heads} (order, head) pairs"
            )
        for modulus, offset in zip(self.moduli, self.offsets, strict=True):
            if modulus < 1 or offset < 0 or modulus + offset > self.num_rows:
                refuse(f"rows {offset} to {offset + modulus} of a head lie outside its {self.num_rows} rows")
        expected = codec_row_bytes(self.codec, self.dim)
        if expected is not None and expected != self.row_bytes:
            refuse(f"{self.row_bytes} bytes a row, but {self.dim} values as {self.codec} take {expected}")
        if len(self.fingerprint) != 64 or not set(self.fingerprint) <= set("0123456789abcdef"):
            refuse(f"fingerprint {self.fingerprint!r} is not 64 hexadecimal digits")

    @classmethod
    def plain(cls, name: str, num_rows: int, row_bytes: int, codec: str, dim: int) -> TableSpec:
        """Returns the spec of a plain embedding: one row per key, row id = key."""
        identity = json.dumps({"family": "plain", "name": name, "num_rows": num_rows}, sort_keys=True)
        digest = hashlib.sha256(identity.encode()).hexdigest()
        return cls(name, num_rows, row_bytes, (1,), 1, (num_rows,), (0,), codec, dim, digest)

    @property
    def is_plain(self) -> bool:
        """Whether keys are row ids, and so must lie below `num_rows`."""
        return self.orders == (1,)

    @property
    def num_heads(self) -> int:
        """Rows that one token reads: (order, head) pairs."""
        return len(self.orders) * self.rows_per_key

    @property
    def entry_bytes(self) -> int:
        """Bytes of one Entry: the rows of one key, back to back."""
        return self.rows_per_key * self.row_bytes

    @property
    def table_bytes(self) -> int:
        """Bytes of all rows, without page padding."""
        return self.num_rows * self.row_bytes

    def row_ids(self, keys: np.ndarray) -> np.ndarray:
        """Turns keys, int64 [N, O], into row ids, int64 [N, O * H]; key -1 gives row ids of -1."""
        assert keys.dtype == np.int64
        assert keys.shape[1:] == (len(self.orders),)
        row_ids = np.empty((len(keys), self.num_heads), dtype=np.int64)
        kernels.row_ids_of_keys(keys.reshape(-1), None, *self._address_map, row_ids.reshape(-1, self.rows_per_key))
        return row_ids

    def row_ids_of_order(self, order_index: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Turns (order index, key) pairs, each int64 [M], into row ids, int64 [M, H]; key -1 gives row ids of -1."""
        row_ids = np.empty((len(keys), self.rows_per_key), dtype=np.int64)
        kernels.row_ids_of_keys(keys, order_index, *self._address_map, row_ids)
        return row_ids

    def keys_of_row_ids(
        self, row_ids: np.ndarray, within: tuple[int, int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Turns row ids, int64 [N, O * H], back into keys.

        The residues of the first heads whose moduli multiply to more than 2^63 give the key (Chinese remainder
        theorem). A token is consistent if every head of every order agrees with its keys.

        Args:
            row_ids: Any int64s.
            within: The key of an order is -1, whatever its ids are, if all of them are outside of this range.

        Returns:
            Keys, int64 [N, O], -1 for tokens that are not consistent; and which are, bool [N]. If several heads' moduli
            multiply to less than 2^63, or share factors, none is: callers then read rows one by one. With one row per
            key, the key is the smallest that gives the row.
        """
        assert row_ids.dtype == np.int64
        assert row_ids.shape[1:] == (self.num_heads,)
        if within is not None:
            by_order = row_ids.reshape(-1, len(self.orders), self.rows_per_key)
            is_outside = is_outside_of(by_order, within).all(axis=2, keepdims=True)
            row_ids = np.where(is_outside, -1, by_order).reshape(row_ids.shape)
        if self.residues is None:
            return np.full((len(row_ids), len(self.orders)), -1, dtype=np.int64), np.zeros(len(row_ids), dtype=bool)
        keys = np.empty((len(row_ids), len(self.orders)), dtype=np.int64)
        is_consistent = np.empty(len(row_ids), dtype=bool)
        kernels.keys_of_row_ids(row_ids, *self._address_map, *self.residues, keys, is_consistent)
        return keys, is_consistent

    @lazy
    def _address_map(self) -> tuple[np.ndarray, np.ndarray]:
        """Moduli and offsets, int64 [O * H] each, as the kernels take them."""
        return np.array(self.moduli, dtype=np.int64), np.array(self.offsets, dtype=np.int64)

    @lazy
    def residues(self) -> tuple[np.ndarray, np.ndarray] | None:
        """How many residues of each order give its key (`num_residues`), int64 [O], and their inverses, int64 [O, F].

        As the kernel takes them; None if the heads of some order do not determine its keys.
        """
        if self.rows_per_key == 1:  # a row's place in its head is the key that its cache knows
            return np.ones(len(self.orders), dtype=np.int64), np.zeros((len(self.orders), 1), dtype=np.int64)
        inverses: list[list[int]] = []
        for order_index in range(len(self.orders)):
            product = 1
            of_order = []
            for modulus in self.moduli[order_index * self.rows_per_key : (order_index + 1) * self.rows_per_key]:
                if modulus >= 2**31 or math.gcd(product, modulus) != 1:  # 2^31: a product of residues is below 2^62
                    return None
                of_order.append(pow(product, -1, modulus))
                product *= modulus
                if product > KEY_MAX:
                    break
            if product <= KEY_MAX:
                return None
            inverses.append(of_order)
        heads_max = max(map(len, inverses))
        padded = [of_order + [0] * (heads_max - len(of_order)) for of_order in inverses]
        return np.array(list(map(len, inverses)), dtype=np.int64), np.array(padded, dtype=np.int64)

    def to_dict(self) -> dict[str, Any]:
        """Returns the spec as a JSON-able dict, which `from_dict` reads back."""
        record = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in record.items()}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> TableSpec:
        """Reads what `to_dict` wrote; raises `FormatError` if a field is missing or of another type."""
        try:
            fields = {name: record[name] for name in cls.__dataclass_fields__}
            for name in ("orders", "moduli", "offsets"):
                fields[name] = tuple(int(value) for value in fields[name])
            for name in ("num_rows", "row_bytes", "rows_per_key", "dim"):
                fields[name] = int(fields[name])
            if not all(isinstance(fields[name], str) for name in ("name", "codec", "fingerprint")):
                raise TypeError("name, codec and fingerprint must be texts")
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"a table record of the catalog is damaged: {error!r}; restore the catalog or rebuild"
            ) from error
        return cls(**fields)


def is_outside_of(row_ids: np.ndarray, within: tuple[int, int]) -> np.ndarray:
    """Returns which row ids, int64 [...], are not in a range, bool [...]."""
    start, end = within
    return (row_ids < start) | (row_ids >= end)
