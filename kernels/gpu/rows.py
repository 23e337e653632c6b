"""Row ids to values, for tables that lie whole in memory that the device reads: without keys and index.

Input: row ids, and rows in device memory or in host memory that the device reads. Output: the rows, decoded; zeros for
the sentinel -1, NaN for ids that the table does not have, which are never read. Pairs that another tier answered can be
left alone.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import triton
import triton.language as tl

from . import launching
from .codecs import BYTES, RowCodec, move_entries

ROWS_NATIVE = 8  # a program, natively. Not tuned yet: waits for a GPU
WARPS_NATIVE = 4
ROWS_INTERPRETED = 1024


@triton.jit(do_not_specialize=["rows_address", "num_rows", "num_ids", "num_places"])
def _gather_rows_kernel(
    row_ids: tl.tensor,
    places: tl.tensor,
    out: tl.tensor,
    rows_address: tl.int64,
    num_rows: tl.int64,
    num_ids: tl.int64,
    num_places: tl.int64,
    scale: tl.float32,
    ONLY_MISSING: tl.constexpr,
    ROWS_PER_ENTRY: tl.constexpr,
    ROWS_A_PROGRAM: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    DIM: tl.constexpr,
    WORD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * ROWS_A_PROGRAM + tl.arange(0, ROWS_A_PROGRAM)
    active = at < num_ids
    if ONLY_MISSING:
        place = tl.load(places + at // ROWS_PER_ENTRY, mask=active, other=0)
        active = active & ((place < 0) | (place >= num_places))
    row_id = tl.load(row_ids + at, mask=active, other=-1)
    found = active & (row_id >= 0) & (row_id < num_rows)
    address = rows_address + row_id * ROW_BYTES
    blank = tl.where(row_id == -1, 0, -1)
    move_entries(address, found, active, out, at, scale, blank, KIND, ROWS, ROW_BYTES, DIM, WORD, ALIGNMENT, CHUNK)


def gather_rows(
    row_ids: torch.Tensor,
    rows: torch.Tensor | int,
    num_rows: int,
    codec: RowCodec,
    out: torch.Tensor,
    only_missing: torch.Tensor | None = None,
    num_places: int = 2**31,
) -> None:
    """Writes the rows of `row_ids`, int64 [R], into `out`, decoded: uint8 [R, row_bytes] of "bytes",
    else bfloat16 [R, dim].

    rows: uint8 [num_rows, row_bytes] on the device, or the address of such in host memory. Id -1 becomes zeros, others
    of no row NaN (0xff of "bytes"). only_missing: int32 [N, O] with N * O * rows_per_entry = R, the places of pairs;
    rows of pairs at a place of 0 .. num_places - 1 stay as they are. Asynchronous. An id reads 8 bytes and a row, over
    the bus where it lies in host memory, and writes the row, fp8 as twice the bytes; 4 bytes more for a place. Raises
    `ValueError` for tensors that do not fit.
    """
    device = row_ids.device
    launching.check("row_ids", row_ids, torch.int64, (None,), device)
    num_ids = len(row_ids)
    if isinstance(rows, torch.Tensor):
        launching.check("rows", rows, torch.uint8, (num_rows, codec.row_bytes), device)
    address = rows.data_ptr() if isinstance(rows, torch.Tensor) else rows
    if num_rows < 0 or (num_rows and address <= 0):
        raise ValueError(f"{num_rows} rows at address {address}: there must be such memory")
    if only_missing is not None:
        launching.check("only_missing", only_missing, torch.int32, (None, None), device)
        if only_missing.numel() * codec.rows_per_entry != num_ids:
            raise ValueError(
                f"{num_ids} row ids and {only_missing.numel()} places of pairs, "
                f"which have {codec.rows_per_entry} rows each"
            )
    row = dataclasses.replace(codec, rows_per_entry=1)
    width = codec.row_bytes if codec.kind == BYTES else codec.dim
    launching.check("out", out, torch.uint8 if codec.kind == BYTES else torch.bfloat16, (num_ids, width), device)
    if not num_ids:
        return
    target = out if codec.kind == BYTES else out.view(torch.int16)
    block = launching.block_of(num_ids, ROWS_NATIVE, ROWS_INTERPRETED)
    with launching.on_device(device):
        _gather_rows_kernel[(triton.cdiv(num_ids, block),)](
            row_ids,
            row_ids if only_missing is None else only_missing,
            target,
            address,
            num_rows,
            num_ids,
            num_places,
            codec.scale,
            ONLY_MISSING=only_missing is not None,
            ROWS_PER_ENTRY=codec.rows_per_entry,
            ROWS_A_PROGRAM=block,
            **row.constants(math.gcd(address, codec.row_bytes), out),
            num_warps=WARPS_NATIVE,
        )
