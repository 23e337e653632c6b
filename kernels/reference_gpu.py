"""What kernels/gpu does, in NumPy: the oracle of its lookups, and what a bfloat16 of a row is, bit by bit.

Same data as the launchers take, as NumPy arrays; bfloat16 values are their uint16 patterns, all NaNs 0x7fc0 or, for
entries that did not come, 0xffff. Slow by design of being plain.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from . import reference_placed
from .reference_block_codecs import decode_block_rows

BYTES, FP8_SCALED, FP8, BLOCKS = "bytes", "fp8_e4m3_e8m0x32", "fp8_e4m3", "blocks"
_NAN = 0x7FC0


def find_entries(epoch: int, heads: np.ndarray, buckets: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Returns places, int32 [N, O], of keys, int64 [N, O]; heads: int64 [2, O, 2], buckets: uint8 [both areas, 64]."""
    places = np.full(keys.shape, -1, dtype=np.int64)
    for order, (bucket_start, num_buckets) in enumerate(heads[epoch % 2]):
        run = np.ascontiguousarray(buckets[bucket_start : bucket_start + num_buckets])
        places[:, order] = reference_placed.find_entries(run, np.ascontiguousarray(keys[:, order]))
    places[places >= 2**31] = -1
    return places.astype(np.int32)


class Codec(Protocol):
    """What `kernels.gpu.codecs.RowCodec` knows about rows."""

    @property
    def kind(self) -> str: ...

    @property
    def rows_per_entry(self) -> int: ...

    @property
    def row_bytes(self) -> int: ...

    @property
    def dim(self) -> int: ...

    @property
    def scale(self) -> float: ...

    @property
    def blocks(self) -> Any: ...  # a kernels.gpu.block_codecs.BlockFormat, or None


def _fp8_values() -> np.ndarray:
    """The values of the 256 e4m3 bytes, float64: sign, four bits of exponent with bias 7, three of mantissa,
    no infinities."""
    codes = np.arange(128)
    exponents, mantissas = codes >> 3, codes & 7
    values = np.where(
        exponents == 0, mantissas * 2.0**-9, (8 + mantissas) * np.exp2(np.maximum(exponents, 1).astype(np.float64) - 10)
    )
    values[127] = np.nan
    return np.concatenate([values, -values])


_FP8_VALUES = _fp8_values()


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Returns float64 values as bfloat16 patterns, uint16, rounded to float32 first, as the products of float32 are."""
    with np.errstate(over="ignore", under="ignore"):
        bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    low, kept = bits & np.uint64(0xFFFF), bits >> np.uint64(16)
    up = (low > 0x8000) | ((low == 0x8000) & (kept & np.uint64(1) == 1))
    return np.where(np.isnan(values), _NAN, kept + up).astype(np.uint16)


def decode_rows(rows: np.ndarray, codec: Codec) -> np.ndarray:
    """Returns rows, uint8 [n, row_bytes], as outputs hold them: uint8, or uint16 [n, dim]."""
    if codec.kind == BYTES:
        return rows.copy()
    if codec.kind == BLOCKS:
        out, form = np.empty((len(rows), codec.dim), dtype=np.uint16), codec.blocks
        decode_block_rows(rows, codec.dim, form.values, form.scale, form.block, codec.scale, form.divides, out)
        return out
    values = _FP8_VALUES[rows[:, : codec.dim]]
    if codec.kind == FP8_SCALED:
        exponents = rows[:, codec.dim :].astype(np.float64)
        factors = np.where(exponents == 255, np.nan, np.exp2(exponents - 127))
        return bfloat16_bits(values * np.repeat(factors, 32, axis=1))
    return bfloat16_bits(values * np.float64(np.float32(codec.scale)))


def decode_entries(entries: np.ndarray, codec: Codec) -> np.ndarray:
    """Returns entries, uint8 [n, entry_bytes], as outputs hold them: uint8, or uint16 [n, rows_per_entry, dim]."""
    values = decode_rows(entries.reshape(-1, codec.row_bytes), codec)
    shape = (codec.rows_per_entry * codec.row_bytes,) if codec.kind == BYTES else (codec.rows_per_entry, codec.dim)
    return values.reshape(len(entries), *shape)


def gather_entries(
    places: np.ndarray, keys: np.ndarray, slots: np.ndarray, records: np.ndarray, codec: Codec, out: np.ndarray
) -> np.ndarray:
    """Fills out's pairs whose place, int32 [N, O], is in slots, uint8 [n, stride], or records behind them;
    returns which are."""
    flat = places.reshape(-1)
    held = (keys.reshape(-1) >= 0) & (flat >= 0) & (flat < len(slots) + len(records))
    entry_bytes = codec.rows_per_entry * codec.row_bytes
    entries = np.concatenate([slots[:, :entry_bytes], records[:, :entry_bytes]])
    out[held] = decode_entries(entries[flat[held]], codec)
    out[keys.reshape(-1) == -1] = 0
    out[keys.reshape(-1) < -1] = np.array(-1).astype(out.dtype)
    return held


def lookup_entries(
    keys: np.ndarray,
    places: np.ndarray,
    slots: np.ndarray,
    records: np.ndarray,
    codec: Codec,
    out: np.ndarray,
    counts: np.ndarray,
) -> np.ndarray:
    """Fills out's hits and sentinels, adds to counts, int64 [3 * O + 1], and returns the missed pairs, ascending."""
    held = gather_entries(places, keys, slots, records, codec, out).reshape(keys.shape)
    in_slots = held & (places < len(slots))
    missed = (keys >= 0) & ~held
    counts[:-1] += np.concatenate([group.sum(axis=0) for group in (in_slots, held & ~in_slots, missed)])
    counts[-1] += (keys == -1).sum()
    return np.flatnonzero(missed)


def scatter_entries(pairs: np.ndarray, entries: np.ndarray, failed: bool, codec: Codec, out: np.ndarray) -> None:
    """Writes entries, uint8 [n, entry_bytes], to out's pairs, int32 [n], where there are such;
    all bits set where failed."""
    fits = (pairs >= 0) & (pairs < len(out))
    out[pairs[fits]] = np.array(-1).astype(out.dtype) if failed else decode_entries(entries[fits], codec)


def gather_rows(
    row_ids: np.ndarray,
    rows: np.ndarray,
    codec: Codec,
    out: np.ndarray,
    places: np.ndarray | None = None,
    num_places: int = 2**31,
) -> None:
    """Fills out, [R, row_bytes] or [R, dim], with rows, uint8 [num_rows, row_bytes], of row ids, int64 [R]; zeros for
    -1, all bits set for other ids of no row.

    Rows of pairs whose place is one of 0 .. num_places - 1 stay as they are.
    """
    asked = np.ones(len(row_ids), dtype=bool)
    if places is not None:
        there = (places.reshape(-1) >= 0) & (places.reshape(-1) < num_places)
        asked = np.repeat(~there, codec.rows_per_entry)
    held = asked & (row_ids >= 0) & (row_ids < len(rows))
    out[asked] = np.array(-1).astype(out.dtype)
    out[asked & (row_ids == -1)] = 0
    out[held] = decode_rows(rows[row_ids[held]], codec)
