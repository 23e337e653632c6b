"""What a table is: its codec, its address map, and the frozen `TableSpec` that carries both.

Input: numbers from a checkpoint's configuration or from the catalog. Output: keys to row ids (the address map), row ids
of consistent tokens back to keys (Chinese remainder theorem), and the sizes that pages, tiers and callers compute with.
Errors: `FormatError` for numbers that contradict each other.

Shapes: N tokens, O orders, H rows per key (heads of an order).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import kernels
from .address_map import KEY_MAX as KEY_MAX
from .address_map import is_outside_of, residues_of
from .codec import parse_codec
from .errors import ConfigError, FormatError
from .lazy import lazy
from .slices import held_heads, slice_range

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

    A slice holds rows [row_start, row_end) of the table. Row ids stay the table's own, `num_rows` the table's, and
    `whole` is the table's spec. The other numbers are of the heads that the slice holds whole, in groups of
    `rows_per_key` (see `columns`); a slice that begins or ends inside a head has `orders` (): rows can be read by row
    id, and not by key. Of a plain embedding, keys are row ids of the table.
    Instances are validated when made; `cut` makes slices.
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
    row_start: int = 0
    row_end: int = 0  # 0: num_rows
    whole: TableSpec | None = None
    public: TableSpec | None = None  # of `local`: what it is the engine's form of

    def __post_init__(self) -> None:
        if self.whole is None:
            object.__setattr__(self, "row_end", self.num_rows)
        _check(self)

    @classmethod
    def plain(cls, name: str, num_rows: int, row_bytes: int, codec: str, dim: int) -> TableSpec:
        """Returns the spec of a plain embedding: one row per key, row id = key."""
        identity = json.dumps({"family": "plain", "name": name, "num_rows": num_rows}, sort_keys=True)
        digest = hashlib.sha256(identity.encode()).hexdigest()
        return cls(name, num_rows, row_bytes, (1,), 1, (num_rows,), (0,), codec, dim, digest)

    def cut(self, row_start: int, row_end: int) -> TableSpec:
        """Returns the spec of the slice with rows [row_start, row_end); the table's own for all rows.

        Raises `FormatError` for a range that is empty or not the table's.
        """
        if self.whole is not None:
            return self.whole.cut(row_start, row_end)
        if (row_start, row_end) == (0, self.num_rows):
            return self
        return _cut(self, row_start, row_end)

    def cut_slice(self, index: int, num_slices: int) -> TableSpec:
        """Returns the spec of slice `index` of `num_slices`: see `slices.slice_bounds`, whose errors it raises."""
        return self.cut(*slice_range(self, index, num_slices))

    @property
    def is_slice(self) -> bool:
        """Whether it holds a part of its table's rows."""
        return self.whole is not None

    @property
    def own_rows(self) -> int:
        """How many rows it holds: `num_rows`, but of a slice."""
        return self.row_end - self.row_start

    def columns(self, orders: Sequence[int]) -> np.ndarray:
        """Returns which columns of the whole table's keys, int64 [N, O], this slice's keys are: int64 [own orders].

        orders: the whole table's; raises `ConfigError` for others. `keys[:, spec.columns(orders)]` can be looked up.
        """
        whole = self.whole or self
        if tuple(orders) != whole.orders:
            raise ConfigError(f"table {self.name}: keys of orders {list(orders)}, the table has {list(whole.orders)}")
        held = held_heads(
            whole.orders, whole.rows_per_key, whole.moduli, whole.offsets, self.row_start, self.row_end
        ).columns
        return np.array((0,) if self.is_plain else held, dtype=np.int64)

    @lazy
    def local(self) -> TableSpec:
        """The engine's form: row ids count from the slice's first row. Itself, but of a slice.

        A plain embedding's keys are local row ids, too; so are those of a slice without heads.
        """
        return self if self.whole is None else _local(self)

    @property
    def is_plain(self) -> bool:
        """Whether keys are row ids, and so must lie below `num_rows`."""
        if self.public is not None:
            return self.public.is_plain or not self.public.orders
        return (self.whole or self).orders == (1,)

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
        """Bytes of all rows that it holds, without page padding."""
        return self.own_rows * self.row_bytes

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
        return residues_of(len(self.orders), self.rows_per_key, self.moduli)

    def to_dict(self) -> dict[str, Any]:
        """Returns the spec as a JSON-able dict, which `from_dict` reads back.

        Of a slice: the whole table's, and the range of rows.
        """
        if self.public is not None:
            return self.public.to_dict()
        if self.whole is not None:
            return self.whole.to_dict() | {"row_start": self.row_start, "row_end": self.row_end}
        record = {name: getattr(self, name) for name in RECORDED}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in record.items()}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> TableSpec:
        """Reads what `to_dict` wrote; raises `FormatError` if a field is missing or of another type."""
        whole = cls(**_fields_of(record))
        row_start, row_end = _rows_of(record)
        return whole.cut(row_start, row_end) if row_end else whole


RECORDED = tuple(TableSpec.__dataclass_fields__)[:10]  # fields of a record, up to `fingerprint`


def _cut(whole: TableSpec, row_start: int, row_end: int) -> TableSpec:
    address_map = whole.orders, whole.rows_per_key, whole.moduli, whole.offsets
    orders, rows_per_key, moduli, offsets = (
        address_map if whole.is_plain else held_heads(*address_map, row_start, row_end)[:4]
    )
    return replace(
        whole, orders=orders, rows_per_key=rows_per_key, moduli=moduli, offsets=offsets, row_start=row_start,
        row_end=row_end, whole=whole,
    )  # fmt: skip


def _local(spec: TableSpec) -> TableSpec:
    orders, moduli, offsets = spec.orders, spec.moduli, tuple(offset - spec.row_start for offset in spec.offsets)
    if spec.is_plain or not orders:
        orders, moduli, offsets = (1,), (spec.own_rows,), (0,)
    return replace(
        spec, num_rows=spec.own_rows, orders=orders, moduli=moduli, offsets=offsets, row_start=0, whole=None,
        public=spec,
    )  # fmt: skip


def _fields_of(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a whole table's record; raises `FormatError`."""
    try:
        fields = {name: record[name] for name in RECORDED}
        for name in ("orders", "moduli", "offsets"):
            fields[name] = tuple(int(value) for value in fields[name])
        for name in ("num_rows", "row_bytes", "rows_per_key", "dim"):
            fields[name] = int(fields[name])
        if not all(isinstance(fields[name], str) for name in ("name", "codec", "fingerprint")):
            raise TypeError("name, codec and fingerprint must be texts")
        return fields
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"a table record of the catalog is damaged: {error!r}; restore the catalog or rebuild"
        ) from error


def _rows_of(record: dict[str, Any]) -> tuple[int, int]:
    """Returns the range of rows of a slice's record, (0, 0) of a whole table's; raises `FormatError`."""
    rows = record.get("row_start", 0), record.get("row_end", 0)
    if not all(type(row) is int for row in rows) or (rows[1] == 0 and rows[0] != 0):
        raise FormatError(f"a table record of the catalog has rows {rows}; restore the catalog or rebuild")
    return rows


def _check(spec: TableSpec) -> None:
    """Raises `FormatError` for numbers that contradict each other."""

    def refuse(what: str) -> None:
        raise FormatError(f"table {spec.name!r}: {what}; the checkpoint's config or the catalog is damaged")

    if not 0 < len(spec.name.encode()) <= NAME_BYTES_MAX:
        refuse(f"a name of {len(spec.name.encode())} bytes, must be 1 to {NAME_BYTES_MAX}")
    if not 0 < spec.num_rows <= KEY_MAX // ROW_BYTES_MAX:
        refuse(f"{spec.num_rows} rows, must be 1 to {KEY_MAX // ROW_BYTES_MAX}")
    if not 0 <= spec.row_start < spec.row_end <= spec.num_rows:
        refuse(f"rows {spec.row_start} to {spec.row_end} of {spec.num_rows}")
    if not 0 < spec.row_bytes <= ROW_BYTES_MAX:
        refuse(f"{spec.row_bytes} bytes a row, must be 1 to {ROW_BYTES_MAX}")
    if (not spec.orders and spec.whole is None) or spec.rows_per_key < 1:
        refuse(f"orders {spec.orders} with {spec.rows_per_key} rows a key, both must be at least one")
    if not len(spec.moduli) == len(spec.offsets) == spec.num_heads:
        refuse(f"{len(spec.moduli)} moduli and {len(spec.offsets)} offsets for {spec.num_heads} (order, head) pairs")
    for modulus, offset in zip(spec.moduli, spec.offsets, strict=True):
        if modulus < 1 or offset < 0 or modulus + offset > spec.num_rows:
            refuse(f"rows {offset} to {offset + modulus} of a head lie outside its {spec.num_rows} rows")
    expected = codec_row_bytes(spec.codec, spec.dim)
    if expected is not None and expected != spec.row_bytes:
        refuse(f"{spec.row_bytes} bytes a row, but {spec.dim} values as {spec.codec} take {expected}")
    if len(spec.fingerprint) != 64 or not set(spec.fingerprint) <= set("0123456789abcdef"):
        refuse(f"fingerprint {spec.fingerprint!r} is not 64 hexadecimal digits")
