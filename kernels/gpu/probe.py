"""Keys to places: the index of the entries that lie in a tier's memory, probed on the device.

Input: keys and a `DeviceIndex` of buckets as kernels/cpu/entry_index.h lays them out. Output: the place of each key's
entry, -1 if the index does not have it. A word on the device selects which of two index areas is read, so that a
captured graph sees a new epoch. Errors: `ValueError` for tensors of other shapes, dtypes or devices; the content of the
buckets is the writer's responsibility.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import launching

BUCKET_BYTES = 64
PAIRS_NATIVE = 32  # a program, natively: a warp's lanes. Not tuned yet: waits for a GPU
WARPS_NATIVE = 1

_BUCKET_WORDS = tl.constexpr(8)  # int64: five keys, then five uint32 places and the displaced bits, two to a word
_SLOTS = tl.constexpr(5)


@dataclass(frozen=True)
class DeviceIndex:
    """Two areas of buckets, one of them current, each with a run of buckets an order.

    epoch: int64 [1], its parity selects the current area. heads: int64 [2, O, 2], by parity and order: first bucket,
    and number of buckets (below 2^32; 0: no entries of that order). buckets: uint8 [num_buckets of both areas, 64], at
    a multiple of 64.
    """

    epoch: torch.Tensor
    heads: torch.Tensor
    buckets: torch.Tensor

    def words(self, num_orders: int, device: torch.device) -> torch.Tensor:
        """Returns the buckets as int64 [num_buckets, 8].

        Raises `ValueError` unless this is an index of `num_orders` on `device`.
        """
        launching.check("epoch", self.epoch, torch.int64, (1,), device)
        launching.check("heads", self.heads, torch.int64, (2, num_orders, 2), device)
        launching.check("buckets", self.buckets, torch.uint8, (None, BUCKET_BYTES), device)
        if self.buckets.data_ptr() % BUCKET_BYTES:
            raise ValueError(
                f"buckets at address {self.buckets.data_ptr():#x}, which must be a multiple of {BUCKET_BYTES}"
            )
        return self.buckets.view(torch.int64)


@triton.jit
def _mix(keys: tl.tensor) -> tl.tensor:
    """The finalizer of MurmurHash3, as kernels/cpu/mix.h has it."""
    mixed = keys.to(tl.uint64)
    mixed = (mixed ^ (mixed >> 33)) * 0xFF51AFD7ED558CCD
    mixed = (mixed ^ (mixed >> 33)) * 0xC4CEB9FE1A85EC53
    return mixed ^ (mixed >> 33)


@triton.jit
def probe(
    keys: tl.tensor,
    order: tl.tensor,
    active: tl.tensor,
    epoch: tl.tensor,
    heads: tl.tensor,
    words: tl.tensor,
    NUM_ORDERS: tl.constexpr,
) -> tl.tensor:
    """Returns the places, int32 [P], of `keys`, int64 [P], of `order`, int64 [P]; -1 if not `active` or not there.

    A bucket is read whole, as one row of 64 bytes: what a slot's place is does not wait for a second load.
    """
    head = heads + ((tl.load(epoch) & 1) * NUM_ORDERS + order) * 2
    bucket_start = tl.load(head, mask=active, other=0)
    num_buckets = tl.load(head + 1, mask=active, other=0)
    mixed = _mix(keys)
    # The high 64 bits of mixed * num_buckets, from two halves: num_buckets is below 2^32, so neither sum overflows.
    low = (mixed & 0xFFFFFFFF) * num_buckets.to(tl.uint64)
    high = (mixed >> 32) * num_buckets.to(tl.uint64)
    at = ((high + (low >> 32)) >> 32).to(tl.int64)
    displaced_bit = (mixed & 31).to(tl.int64) + 32  # of the last word, whose low half is the fifth place
    column = tl.arange(0, _BUCKET_WORDS)[None, :]
    places = tl.full(keys.shape, -1, tl.int32)
    left = tl.where(active & (keys >= 0), num_buckets, 0)  # buckets that a search may still look at
    while tl.max(left, 0) > 0:
        looking = left > 0
        address = words + (bucket_start + at)[:, None] * _BUCKET_WORDS + column
        bucket = tl.load(address, mask=looking[:, None], other=-1)
        same = (bucket == keys[:, None]) & (column < _SLOTS)
        slot = tl.min(tl.where(same, column, _SLOTS), 1)
        found = looking & (slot < _SLOTS)
        pair_of_places = tl.sum(tl.where(column == (slot // 2 + _SLOTS)[:, None], bucket, 0), 1)
        place = (pair_of_places >> ((slot & 1) * 32).to(tl.int64)).to(tl.int32)
        # No device has memory for a place of 2^31 or more: it counts as not there.
        places = tl.where(found, tl.maximum(place, -1), places)
        last = tl.sum(tl.where(column == _BUCKET_WORDS - 1, bucket, 0), 1)
        goes_on = looking & (slot == _SLOTS) & (((last >> displaced_bit) & 1) != 0)
        left = tl.where(goes_on, left - 1, 0)
        at = tl.where(at + 1 == num_buckets, 0, at + 1)
    return places


@triton.jit(do_not_specialize=["num_pairs"])
def _find_entries_kernel(
    keys: tl.tensor,
    places: tl.tensor,
    num_pairs: tl.int64,
    epoch: tl.tensor,
    heads: tl.tensor,
    words: tl.tensor,
    NUM_ORDERS: tl.constexpr,
    PAIRS: tl.constexpr,
) -> None:
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    active = pair < num_pairs
    key = tl.load(keys + pair, mask=active, other=-1)
    place = probe(key, pair % NUM_ORDERS, active, epoch, heads, words, NUM_ORDERS)
    tl.store(places + pair, place, mask=active)


def find_entries(index: DeviceIndex, keys: torch.Tensor, places: torch.Tensor) -> None:
    """Fills `places`, int32 [N, O], with the places of the entries of `keys`, int64 [N, O]; -1 if there is not one.

    Asynchronous. A pair reads 8 bytes of key, 16 of heads and, but for displaced entries, one bucket of 64; it writes
    4. Raises `ValueError` for tensors that do not fit.
    """
    launching.check("keys", keys, torch.int64, (None, None), keys.device)
    launching.check("places", places, torch.int32, tuple(keys.shape), keys.device)
    words = index.words(keys.shape[1], keys.device)
    if not keys.numel():
        return
    pairs = launching.block_of(keys.numel(), PAIRS_NATIVE)
    with launching.on_device(keys.device):
        _find_entries_kernel[(triton.cdiv(keys.numel(), pairs),)](
            keys,
            places,
            keys.numel(),
            index.epoch,
            index.heads,
            words,
            NUM_ORDERS=keys.shape[1],
            PAIRS=pairs,
            num_warps=WARPS_NATIVE,
        )
