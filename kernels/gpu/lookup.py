"""Keys to values in one launch: probe, gather and the list of what is missed, as decoding a token a step wants it.

Input: keys, a `DeviceIndex` and `EntrySources`. Output: the entries that the sources hold, decoded, in the caller's
buffer; the other pairs in a `MissList`, for the host; and counts. What is missed stays as it was, until
`scatter_entries` brings it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launching
from .codecs import RowCodec, move_entries
from .gather import EntrySources, addresses_of
from .misses import MissList, append_misses
from .probe import DeviceIndex, probe

# Pairs a program and warps, natively: one token of three orders is three programs, each with an entry in flight, and
# 2,048 tokens are waves of small ones. Not tuned yet: waits for a GPU.
PAIRS_NATIVE = 1
WARPS_NATIVE = 4
PAIRS_INTERPRETED = 256


@triton.jit(
    do_not_specialize=[
        "num_pairs",
        "keys_address",
        "pairs_address",
        "pairs_max",
        "slots",
        "stride",
        "num_slots",
        "records",
        "record_bytes",
        "num_places",
    ]
)
def _lookup_entries_kernel(
    keys: tl.tensor,
    out: tl.tensor,
    counts: tl.tensor,
    num_pairs: tl.int64,
    epoch: tl.tensor,
    heads: tl.tensor,
    words: tl.tensor,
    num_missed: tl.tensor,
    keys_address: tl.int64,
    pairs_address: tl.int64,
    pairs_max: tl.int64,
    places: tl.tensor,
    scale: tl.float32,
    slots: tl.int64,
    stride: tl.int64,
    num_slots: tl.int64,
    records: tl.int64,
    record_bytes: tl.int64,
    num_places: tl.int64,
    LISTED: tl.constexpr,
    PLACED: tl.constexpr,
    NUM_ORDERS: tl.constexpr,
    COUNTERS: tl.constexpr,
    PAIRS: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    DIM: tl.constexpr,
    WORD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    active = pair < num_pairs
    order = pair % NUM_ORDERS
    key = tl.load(keys + pair, mask=active, other=0)
    place = probe(key, order, active, epoch, heads, words, NUM_ORDERS).to(tl.int64)
    sentinel, invalid = active & (key == -1), active & (key < 0)
    found = (place >= 0) & (place < num_places)
    missed = active & (key >= 0) & (found == 0)
    if LISTED:
        append_misses(num_missed, keys_address, pairs_address, pairs_max, key, pair, missed)
    if PLACED:
        tl.store(places + pair, tl.where(found, place, -1).to(tl.int32), mask=active)
    address = addresses_of(place, slots, stride, num_slots, records, record_bytes)
    blank = tl.where(key < -1, -1, 0)  # a key below -1 is invalid: nothing may pass for its rows
    move_entries(
        address, found, found | invalid, out, pair, scale, blank, KIND, ROWS, ROW_BYTES, DIM, WORD, ALIGNMENT, CHUNK
    )
    # Which counter a pair adds to: hits in slots by order, hits in records by order, misses by order, sentinels;
    # -1: none.
    kind = tl.where(missed, 2, tl.where(place < num_slots, 0, 1))
    counter = tl.where(sentinel, NUM_ORDERS * 3, tl.where(found | missed, kind * NUM_ORDERS + order, -1))
    counters = tl.arange(0, COUNTERS)
    added = tl.sum((counter[:, None] == counters[None, :]).to(tl.int64), 0)
    tl.atomic_add(counts + counters, added, mask=added > 0, sem="relaxed")


def lookup_entries(
    keys: torch.Tensor,
    index: DeviceIndex,
    sources: EntrySources,
    codec: RowCodec,
    out: torch.Tensor,
    misses: MissList | None,
    counts: torch.Tensor,
    places: torch.Tensor | None = None,
) -> None:
    """Writes the entries of `keys`, int64 [N, O], into `out`, decoded,
    and lists in `misses` the pairs that no source holds.

    out: [N * O, ...] as `RowCodec` says; pairs of key -1 become zeros, of keys below NaN, missed ones stay as they are.
    A pair is n * O + o; misses are in no order, and those past `misses.pairs_max` are counted only, which makes the
    step fail (see `post_misses`); misses None: they are not listed. places: int32 [N, O], overwritten with the places
    of pairs, -1 of those that no source holds. counts: int64 [3 * O + 1], added to: hits in slots by order, hits in
    records by order, misses by order, pairs of key -1. Asynchronous, one launch. A pair reads 8 bytes of key, 16 of
    heads, a bucket of 64 and an entry, over the bus where it lies in a record, and writes the entry, fp8 as twice the
    bytes; a miss writes 12 bytes over the bus. One atomic a program for the counts, one for its misses if any. Raises
    `ValueError` for tensors that do not fit.
    """
    launching.check("keys", keys, torch.int64, (None, None), keys.device)
    num_orders, num_pairs = keys.shape[1], keys.numel()
    if num_pairs >= 2**31:
        raise ValueError(
            f"{num_pairs} pairs in one batch, fewer than {2**31} have a number: look up fewer tokens at once"
        )
    words = index.words(num_orders, keys.device)
    sources.check(codec, keys.device)
    target = codec.check(out, num_pairs, keys.device)
    launching.check("counts", counts, torch.int64, (3 * num_orders + 1,), keys.device)
    if misses is not None:
        launching.check("the number of misses", misses.count, torch.int64, (1,), keys.device)
    if places is not None:
        launching.check("places", places, torch.int32, (keys.shape[0], num_orders), keys.device)
    if not num_pairs:
        return
    pairs = launching.block_of(num_pairs, PAIRS_NATIVE, PAIRS_INTERPRETED)
    with launching.on_device(keys.device):
        _lookup_entries_kernel[(triton.cdiv(num_pairs, pairs),)](
            keys,
            target,
            counts,
            num_pairs,
            index.epoch,
            index.heads,
            words,
            counts if misses is None else misses.count,
            0 if misses is None else misses.keys_address,
            0 if misses is None else misses.pairs_address,
            0 if misses is None else misses.pairs_max,
            counts if places is None else places,
            codec.scale,
            **sources.arguments(),
            LISTED=misses is not None,
            PLACED=places is not None,
            NUM_ORDERS=num_orders,
            COUNTERS=triton.next_power_of_2(3 * num_orders + 1),
            PAIRS=pairs,
            **codec.constants(sources.alignment(), out),
            num_warps=WARPS_NATIVE,
        )
