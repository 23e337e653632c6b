"""Places to values: entries are copied or decoded from where they lie, in device memory or over the bus from the
host's.

Input: places and keys, and the sources that hold entries. Output: the caller's buffer: zeros for the sentinel -1, NaN
for other invalid keys. Missed pairs are left as they are, for `scatter_entries`. A place that the sources do not have
is never read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from . import launching
from .codecs import RowCodec, move_entries

PAIRS_NATIVE = (
    1  # a program, natively: enough programs to fill the GPU also for few tokens. Not tuned yet: waits for a GPU
)
WARPS_NATIVE = 4
PAIRS_INTERPRETED = 256


@dataclass(frozen=True)
class EntrySources:
    """Where entries lie: places 0 .. num_slots - 1 in device memory,
    those behind them in host memory that the device reads.

    slots: uint8 [num_slots, stride], stride a multiple of 16, at least an entry's bytes; num_slots may be 0. Place p >=
    num_slots is record p - num_slots, at records_address + (p - num_slots) * record_bytes, record_bytes a multiple of
    8; records_address 0 with num_records 0: none. The memory at the address is the caller's to keep, and to page-lock.
    """

    slots: torch.Tensor
    records_address: int
    record_bytes: int
    num_records: int

    def check(self, codec: RowCodec, device: torch.device) -> None:
        """Raises `ValueError` unless entries of `codec` can lie here, for a kernel on `device`."""
        launching.check("slots", self.slots, torch.uint8, (None, None), device)
        num_slots, stride = self.slots.shape
        if num_slots and (stride % 16 or stride < codec.entry_bytes):
            raise ValueError(
                f"slots of {stride} bytes: must be a multiple of 16, and hold entries of {codec.entry_bytes}"
            )
        if self.num_records < 0 or self.records_address < 0:
            raise ValueError(f"{self.num_records} records at address {self.records_address}: neither may be below 0")
        if self.num_records and (
            not self.records_address or self.record_bytes % 8 or self.record_bytes < codec.entry_bytes
        ):
            raise ValueError(
                f"{self.num_records} records of {self.record_bytes} bytes at address {self.records_address:#x}: must "
                f"be a multiple of 8, and hold entries of {codec.entry_bytes}, somewhere"
            )

    def arguments(self) -> dict[str, int]:
        """Returns the arguments by which kernels know these sources."""
        return {
            "slots": self.slots.data_ptr(),
            "stride": self.slots.shape[1],
            "num_slots": self.slots.shape[0],
            "records": self.records_address,
            "record_bytes": self.record_bytes,
            "num_places": self.slots.shape[0] + self.num_records,
        }

    def alignment(self) -> int:
        """Returns a divisor of every entry's address."""
        slots = (self.slots.data_ptr(), self.slots.shape[1]) if len(self.slots) else ()
        records = (self.records_address, self.record_bytes) if self.num_records else ()
        return math.gcd(16, *slots, *records)


@triton.jit
def addresses_of(
    place: tl.tensor,
    slots: tl.tensor,
    stride: tl.tensor,
    num_slots: tl.tensor,
    records: tl.tensor,
    record_bytes: tl.tensor,
) -> tl.tensor:
    """Returns the addresses, int64 [P], of entries at `place`, int64 [P]; of places that there are."""
    return tl.where(place < num_slots, slots + place * stride, records + (place - num_slots) * record_bytes)


@triton.jit(do_not_specialize=["num_pairs", "slots", "stride", "num_slots", "records", "record_bytes", "num_places"])
def _gather_entries_kernel(
    places: tl.tensor,
    keys: tl.tensor,
    out: tl.tensor,
    num_pairs: tl.int64,
    scale: tl.float32,
    slots: tl.int64,
    stride: tl.int64,
    num_slots: tl.int64,
    records: tl.int64,
    record_bytes: tl.int64,
    num_places: tl.int64,
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
    key = tl.load(keys + pair, mask=active, other=0)
    place = tl.load(places + pair, mask=active, other=-1).to(tl.int64)
    invalid = active & (key < 0)
    found = (key >= 0) & (place >= 0) & (place < num_places)
    address = addresses_of(place, slots, stride, num_slots, records, record_bytes)
    blank = tl.where(key < -1, -1, 0)  # a key below -1 is invalid: nothing may pass for its rows
    move_entries(
        address, found, found | invalid, out, pair, scale, blank, KIND, ROWS, ROW_BYTES, DIM, WORD, ALIGNMENT, CHUNK
    )


def gather_entries(
    places: torch.Tensor, keys: torch.Tensor, sources: EntrySources, codec: RowCodec, out: torch.Tensor
) -> None:
    """Writes the entries at `places`, int32 [N, O], into `out`, decoded, pair n * O + o being the (n * O + o)-th.

    keys: int64 [N, O]; pairs of key -1 become zeros, of keys below NaN (0xff of "bytes"); pairs without a place that
    the sources have stay as they are. out: see `RowCodec`. Asynchronous. A pair reads 12 bytes and an entry, over the
    bus where it lies in a record, and writes the entry, fp8 as twice the bytes.
    Raises `ValueError` for tensors that do not fit.
    """
    launching.check("keys", keys, torch.int64, (None, None), keys.device)
    launching.check("places", places, torch.int32, tuple(keys.shape), keys.device)
    sources.check(codec, keys.device)
    target = codec.check(out, keys.numel(), keys.device)
    if not keys.numel():
        return
    pairs = launching.block_of(keys.numel(), PAIRS_NATIVE, PAIRS_INTERPRETED)
    constants: dict[str, Any] = codec.constants(sources.alignment(), out)
    with launching.on_device(keys.device):
        _gather_entries_kernel[(triton.cdiv(keys.numel(), pairs),)](
            places,
            keys,
            target,
            keys.numel(),
            codec.scale,
            **sources.arguments(),
            PAIRS=pairs,
            **constants,
            num_warps=WARPS_NATIVE,
        )
