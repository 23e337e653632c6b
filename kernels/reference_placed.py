"""Placed entries in NumPy: the oracle of kernels/cpu/entry_index.h.
As `kernels.__init__` documents."""

from __future__ import annotations

import numpy as np

from .records import INDEX_BUCKET, RECORD_TRAILER
from .reference import _crc32c_of_columns

BUCKET_SLOTS = 5

_MIX = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))


def _mix(keys: np.ndarray) -> np.ndarray:
    """The finalizer of MurmurHash3."""
    mixed = keys.astype(np.uint64)
    for factor in _MIX:
        mixed = (mixed ^ (mixed >> np.uint64(33))) * factor
    return mixed ^ (mixed >> np.uint64(33))


def _bucket_of(mixed: np.ndarray, num_buckets: int) -> np.ndarray:
    """The high half of mixed * num_buckets; from two halves, since NumPy has no 128 bits."""
    low = (mixed & np.uint64(0xFFFFFFFF)) * np.uint64(num_buckets)
    high = (mixed >> np.uint64(32)) * np.uint64(num_buckets)
    return ((high + (low >> np.uint64(32))) >> np.uint64(32)).astype(np.int64)


def _displaced_bit(mixed: np.ndarray) -> np.ndarray:
    return np.uint32(1) << (mixed & np.uint64(31)).astype(np.uint32)


def _view(buckets: np.ndarray) -> np.ndarray:
    if buckets.dtype != np.uint8:
        raise TypeError(f"buckets are {buckets.dtype}, must be uint8")
    if buckets.ndim != 2 or buckets.shape[1] != INDEX_BUCKET.itemsize or not buckets.flags.c_contiguous:
        raise ValueError("buckets must be [n, 64]")
    return buckets.reshape(-1).view(INDEX_BUCKET)


def index_entries(keys: np.ndarray, record_numbers: np.ndarray, buckets: np.ndarray) -> bool:
    index = _view(buckets)
    if keys.ndim != 1 or keys.shape != record_numbers.shape or (len(keys) and keys.min() < 0):
        raise ValueError("keys and record_numbers must be [n], keys not below 0")
    if len(keys) > len(index) * BUCKET_SLOTS:
        return False
    index["keys"], index["places"], index["displaced"] = -1, 2**32 - 1, 0
    mixed = _mix(keys)
    used = np.zeros(len(index), dtype=np.int64)
    for key, number, start, bit in zip(
        keys, record_numbers, _bucket_of(mixed, len(index)), _displaced_bit(mixed), strict=True
    ):
        at = start
        while used[at] == BUCKET_SLOTS:
            index["displaced"][at] |= bit
            at = (at + 1) % len(index)
        index["keys"][at, used[at]], index["places"][at, used[at]] = key, number
        used[at] += 1
    return True


def find_entries(buckets: np.ndarray, keys: np.ndarray) -> np.ndarray:
    index = _view(buckets)
    if keys.ndim != 1:
        raise ValueError("keys must be [n]")
    found = np.full(len(keys), -1, dtype=np.int64)
    looking = np.flatnonzero(keys >= 0) if len(index) else np.zeros(0, dtype=np.int64)
    mixed = _mix(keys)
    at = _bucket_of(mixed, len(index))
    for _ in range(len(index)):
        if not len(looking):
            break
        same = index["keys"][at[looking]] == keys[looking, None]
        there = same.any(axis=1)
        found[looking[there]] = index["places"][at[looking[there]], same[there].argmax(axis=1)]
        looking = looking[~there]
        looking = looking[(index["displaced"][at[looking]] & _displaced_bit(mixed[looking])) != 0]
        at[looking] = (at[looking] + 1) % len(index)
    return found


def _trailers(records: np.ndarray, entry_bytes: int) -> np.ndarray:
    if records.dtype != np.uint8:
        raise TypeError(f"records are {records.dtype}, must be uint8")
    if records.ndim != 2 or records.shape[1] != -(-entry_bytes // 8) * 8 + RECORD_TRAILER.itemsize or entry_bytes < 1:
        raise ValueError("a record is its entry up to a multiple of 8, and 16 bytes")
    return np.ndarray(
        (len(records),), RECORD_TRAILER, records, records.shape[1] - RECORD_TRAILER.itemsize, (records.shape[1],)
    )


def _checksums(records: np.ndarray, seed: int) -> np.ndarray:
    return _crc32c_of_columns(np.ascontiguousarray(records[:, :-4].T), seed)


def seal_records(records: np.ndarray, keys: np.ndarray, order_index: np.ndarray, entry_bytes: int, seed: int) -> None:
    trailers = _trailers(records, entry_bytes)
    if not keys.shape == order_index.shape == (len(records),):
        raise ValueError("keys and order_index must be [n]")
    records[:, entry_bytes : -RECORD_TRAILER.itemsize] = 0
    trailers["key"], trailers["order_index"] = keys, order_index
    trailers["checksum"] = _checksums(records, seed)


def invalidate_bad_records(records: np.ndarray, entry_bytes: int, seed: int) -> int:
    trailers = _trailers(records, entry_bytes)
    bad = trailers["checksum"] != _checksums(records, seed)
    trailers["key"][bad] = -1
    return int(bad.sum())


def drop_bad_entries(
    buckets: np.ndarray, order_index: int, records: np.ndarray, num_placed: int, entry_bytes: int, loaded_start: int = 0
) -> int:
    index, trailers = _view(buckets), _trailers(records, entry_bytes)
    keys, places = index["keys"], index["places"].astype(np.int64)
    loaded = (keys >= 0) & (places >= loaded_start) & (places < loaded_start + len(records))
    bad = (keys >= 0) & ~loaded & (places >= num_placed)
    at = places[loaded] - loaded_start
    bad[loaded] = (trailers["key"][at] != keys[loaded]) | (trailers["order_index"][at] != order_index)
    index["keys"][bad] = -1
    return int(bad.sum())
