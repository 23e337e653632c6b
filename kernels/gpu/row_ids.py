"""Keys to row ids on the device: the same numbers as `kernels.row_ids_of_keys` gives on the host.

Input: keys of whole tokens and a table's address map. Output: the row of each head of each order. Errors: `ValueError`
for tensors of other shapes, dtypes or devices. The maker of the address map ensures positive moduli and row ids below
2^63.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launching
from .launching import check

_ROWS_A_PROGRAM = 256  # native; not tuned yet: waits for a GPU


def row_ids_of_keys(keys: torch.Tensor, moduli: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor) -> None:
    """Writes `key % modulus + offset` for each head of the key's order; keys below 0 stay themselves.

    keys: int64 [N, O]; moduli, offsets: int64 [O * H], orders outermost, moduli positive; out: int64 [N, O * H],
    overwritten whole. All contiguous, on one device. Asynchronous. Reads 8 bytes a key, writes 8 a row,
    and divides 63 bits once a row.
    """
    device = keys.device
    check("keys", keys, torch.int64, (None, None), device)
    num_tokens, orders = keys.shape
    check("moduli", moduli, torch.int64, (None,), device)
    rows_per_token = len(moduli)
    if orders < 1 or rows_per_token < 1 or rows_per_token % orders:
        raise ValueError(f"{rows_per_token} moduli for {orders} orders: there must be as many for each order")
    check("offsets", offsets, torch.int64, (rows_per_token,), device)
    check("out", out, torch.int64, (num_tokens, rows_per_token), device)
    num_rows = num_tokens * rows_per_token
    if num_rows == 0:
        return
    block = launching.block_of(num_rows, _ROWS_A_PROGRAM, 4096)
    with launching.on_device(device):
        _row_ids_of_keys[(triton.cdiv(num_rows, block),)](
            keys,
            moduli,
            offsets,
            out,
            num_rows,
            ROWS_A_TOKEN=rows_per_token,
            ROWS_A_KEY=rows_per_token // orders,
            BLOCK=block,
        )


@triton.jit(do_not_specialize=["num_rows"])
def _row_ids_of_keys(
    keys: tl.tensor,
    moduli: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    num_rows: tl.int64,
    ROWS_A_TOKEN: tl.constexpr,
    ROWS_A_KEY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = rows < num_rows
    head = rows % ROWS_A_TOKEN
    key = tl.load(keys + rows // ROWS_A_KEY, mask=there, other=-1)
    modulus = tl.load(moduli + head, mask=there, other=1)
    offset = tl.load(offsets + head, mask=there, other=0)
    tl.store(out + rows, tl.where(key < 0, key, key % modulus + offset), mask=there)
