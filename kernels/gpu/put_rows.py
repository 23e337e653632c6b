"""Rows to where a caller wants them: a buffer of any strides, zeros for rows outside of a range.

Input: rows, back to back, or already in their places; their ids. Output: the caller's buffer. Errors: `ValueError` for
tensors that do not fit.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import launching

ROWS_NATIVE = 4  # a program, natively. Not tuned yet: waits for a GPU
WARPS_NATIVE = 4
ROWS_INTERPRETED = 1024
_CHUNK_MAX = 512  # words of a row that a program holds at once
_WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


def put_rows(row_ids: torch.Tensor, within: tuple[int, int], rows: torch.Tensor | None, out: torch.Tensor) -> None:
    """Copies rows to their places, and writes zeros for those whose ids are outside of the range.

    row_ids: int64 [N, K] of any strides; within: (start, end); rows: uint8 [N, K, row_bytes], contiguous; None: they
    lie in out already, and only zeros are written; out: uint8 [N, K, row_bytes], the bytes of a row side by side, other
    strides of any kind. Asynchronous, one launch. A row reads 8 bytes of id and its bytes, and writes those. Raises
    `ValueError` for tensors that do not fit.
    """
    device = row_ids.device
    if row_ids.dtype != torch.int64 or row_ids.ndim != 2:
        raise ValueError(f"row_ids is {row_ids.dtype} {list(row_ids.shape)}, expected torch.int64 [any, any]")
    check_out(out, tuple(row_ids.shape), None, device)
    row_bytes = out.shape[2]
    if rows is not None:
        launching.check("rows", rows, torch.uint8, (*row_ids.shape, row_bytes), device)
    num_rows = row_ids.numel()
    if not num_rows or not row_bytes:
        return
    given = out if rows is None else rows
    word_bytes = math.gcd(8, row_bytes, out.stride(0), out.stride(1), out.data_ptr(), given.data_ptr())
    block = launching.block_of(num_rows, ROWS_NATIVE, ROWS_INTERPRETED)
    with launching.on_device(device):
        _put_rows_kernel[(triton.cdiv(num_rows, block),)](
            row_ids, given, out, num_rows, row_ids.shape[1], row_ids.stride(0), row_ids.stride(1),
            out.stride(0) // word_bytes, out.stride(1) // word_bytes, *within,
            IN_PLACE=rows is None, WORDS=row_bytes // word_bytes, WORD=_WORDS[word_bytes],
            CHUNK=min(triton.next_power_of_2(row_bytes // word_bytes), _CHUNK_MAX), BLOCK=block,
            num_warps=WARPS_NATIVE,
        )  # fmt: skip


def check_out(out: torch.Tensor, shape: tuple[int, ...], row_bytes: int | None, device: torch.device) -> None:
    """Raises `ValueError` unless out is uint8, of this shape and [row_bytes] (None: any), its rows not torn apart."""
    fits = (
        isinstance(out, torch.Tensor)
        and out.dtype == torch.uint8
        and out.device == device
        and tuple(out.shape[:-1]) == shape
        and row_bytes in (None, out.shape[-1])
        and (out.shape[-1] <= 1 or out.stride(-1) == 1)
    )
    if not fits:
        found = f"{out.dtype} {list(out.shape)}" if isinstance(out, torch.Tensor) else type(out)
        raise ValueError(
            f"out is {found}, expected torch.uint8 {[*shape, row_bytes or 'any']} on {device}, the bytes of a row side "
            f"by side"
        )


@triton.jit(do_not_specialize=["num_rows", "rows_a_token", "ids_outer", "ids_inner", "outer", "inner", "start", "end"])
def _put_rows_kernel(
    row_ids: tl.tensor,
    rows: tl.tensor,
    out: tl.tensor,
    num_rows: tl.int64,
    rows_a_token: tl.int64,
    ids_outer: tl.int64,
    ids_inner: tl.int64,
    outer: tl.int64,
    inner: tl.int64,
    start: tl.int64,
    end: tl.int64,
    IN_PLACE: tl.constexpr,
    WORDS: tl.constexpr,
    WORD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = row < num_rows
    token, within_token = row // rows_a_token, row % rows_a_token
    row_id = tl.load(row_ids + token * ids_outer + within_token * ids_inner, mask=there, other=-1)
    wanted = there & (row_id >= start) & (row_id < end)
    sources = rows.to(tl.pointer_type(WORD), bitcast=True) + (row * WORDS)[:, None]
    targets = out.to(tl.pointer_type(WORD), bitcast=True) + (token * outer + within_token * inner)[:, None]
    for first in range(0, WORDS, CHUNK):
        word = first + tl.arange(0, CHUNK)[None, :]
        written = there[:, None] & (word < WORDS)
        if IN_PLACE:
            tl.store(targets + word, tl.zeros((BLOCK, CHUNK), WORD), mask=written & ~wanted[:, None])
        else:
            words = tl.load(sources + word, mask=written & wanted[:, None], other=0)
            tl.store(targets + word, words, mask=written)
