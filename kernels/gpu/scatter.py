"""Missed entries: the host's answer is read from the mailbox over the bus, decoded, and put where it was missed.

Input: the list of missed pairs and their entries, both in host memory, and the words that count the requested ones.
Output: the rows of the caller's buffer that no tier of the device held. If the answer did not come, those rows become
NaN (bytes 0xff), so that a wrong row never passes for a right one; the host raises. No pair outside the buffer is
written.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import launching
from .codecs import RowCodec, move_entries
from .misses import StepState

PAIRS_NATIVE = 1  # a program at a time. Not tuned yet: waits for a GPU
WARPS_NATIVE = 4
PAIRS_INTERPRETED = 256
PROGRAMS_MAX = (
    256  # about two to each multiprocessor, enough reads in flight to fill the bus; the grid stays so large at most
)


@triton.jit(do_not_specialize=["pairs_address", "entries_address", "pairs_max", "num_pairs"])
def _scatter_entries_kernel(
    step: tl.tensor,
    posted: tl.tensor,
    failed: tl.tensor,
    out: tl.tensor,
    pairs_address: tl.int64,
    entries_address: tl.int64,
    pairs_max: tl.int64,
    num_pairs: tl.int64,
    scale: tl.float32,
    PROGRAMS: tl.constexpr,
    PAIRS: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    DIM: tl.constexpr,
    WORD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    num_missed = tl.minimum(tl.load(posted), pairs_max)
    pairs_end = tl.where(tl.load(failed) == tl.load(step), 0, num_pairs)  # none of a step that failed has an entry
    start = tl.program_id(0).to(tl.int64) * PAIRS
    while start < num_missed:
        miss = start + tl.arange(0, PAIRS)
        there = miss < num_missed
        pair = tl.load(pairs_address.to(tl.pointer_type(tl.int32)) + miss, mask=there, other=-1).to(tl.int64)
        written = (pair >= 0) & (pair < num_pairs)
        move_entries(
            entries_address + miss * (ROWS * ROW_BYTES),
            (pair >= 0) & (pair < pairs_end),
            written,
            out,
            pair,
            scale,
            tl.full((PAIRS,), -1, tl.int32),
            KIND,
            ROWS,
            ROW_BYTES,
            DIM,
            WORD,
            ALIGNMENT,
            CHUNK,
        )
        start += PROGRAMS * PAIRS


def scatter_entries(
    state: StepState, pairs_address: int, entries_address: int, codec: RowCodec, pairs_max: int, out: torch.Tensor
) -> None:
    """Writes the entries of the step's misses into `out`, decoded; after `await_answer`, on the same stream.

    pairs_address: of int32 [pairs_max] in host memory, entries_address: of uint8 [pairs_max, entry_bytes] there; of
    both the first `state.posted` are used. out: [num_pairs, ...] as `RowCodec` says; entry i is its pairs[i]-th. In a
    step that failed those rows become NaN, of codec "bytes" 0xff, without reading entries. Asynchronous; the grid does
    not depend on how many there are. A missed pair reads 4 bytes and an entry over the bus and writes the entry, fp8 as
    twice the bytes; a program without one reads three words.
    Raises `ValueError` for tensors or addresses that do not fit.
    """
    device = state.count.device
    target = codec.check(out, None, device)
    if pairs_max < 0 or pairs_address <= 0 or entries_address <= 0 or pairs_address % 4:
        raise ValueError(
            f"{pairs_max} pairs at address {pairs_address:#x}, entries at {entries_address:#x}: there must be such "
            f"memory, and the pairs' address be a multiple of 4"
        )
    if not pairs_max or not len(out):
        return
    pairs = launching.block_of(pairs_max, PAIRS_NATIVE, PAIRS_INTERPRETED)
    programs = min(triton.cdiv(pairs_max, pairs), PROGRAMS_MAX)
    with launching.on_device(device):
        _scatter_entries_kernel[(programs,)](
            state.step,
            state.posted,
            state.failed,
            target,
            pairs_address,
            entries_address,
            pairs_max,
            len(out),
            codec.scale,
            PROGRAMS=programs,
            PAIRS=pairs,
            **codec.constants(math.gcd(entries_address, codec.entry_bytes), out),
            num_warps=WARPS_NATIVE,
        )
