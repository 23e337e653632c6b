"""Row ids of tokens back to keys on the device, as an inference engine has them: the Chinese remainder theorem.

Input: row ids of any strides and a table's address map. Output: keys: -1 if none of an order's rows is wanted, -2
(NO_KEY) if its ids are not those of one key; perhaps the wanted ids themselves. Errors: `ValueError` for tensors of
other shapes, dtypes or devices. The same numbers as `kernels.keys_of_row_ids` gives on the host, order by order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import launching
from .launching import check

NO_KEY = -2

_PAIRS_A_PROGRAM = 32  # native; not tuned yet: waits for a GPU
_NO_KEY = tl.constexpr(NO_KEY)


@dataclass(frozen=True)
class DeviceAddressMap:
    """A table's address map on the device, and how its residues give keys.

    moduli, offsets: int64 [O * H], orders outermost. num_residues: int64 [O], the first heads of the order, whose
    residues give the key. inverses: int64 [O, F], of the product of the moduli before, modulo this one, each modulus of
    them below 2^31.
    """

    moduli: torch.Tensor
    offsets: torch.Tensor
    num_residues: torch.Tensor
    inverses: torch.Tensor

    def __post_init__(self) -> None:
        device, orders = self.moduli.device, len(self.num_residues)
        check("moduli", self.moduli, torch.int64, (None,), device)
        check("num_residues", self.num_residues, torch.int64, (None,), device)
        if not orders or not len(self.moduli) or len(self.moduli) % orders:
            raise ValueError(f"{len(self.moduli)} moduli for {orders} orders: there must be as many for each order")
        check("offsets", self.offsets, torch.int64, (len(self.moduli),), device)
        check("inverses", self.inverses, torch.int64, (orders, None), device)


def keys_of_row_ids(
    row_ids: torch.Tensor,
    address_map: DeviceAddressMap,
    within: tuple[int, int],
    keys: torch.Tensor,
    wanted: torch.Tensor | None = None,
) -> None:
    """Writes the key of each order of each token.

    row_ids: int64 [N, O * H] of any strides, any values; keys: int64 [N, O], overwritten whole; within: (start, end),
    the range of wanted ids, 0 or more: others, and -1, are not looked at if no id of their order is in it, but belong
    to its key if one is; wanted: int64 [N, O * H], overwritten whole with the ids that are in the range, and -1 for the
    others. Asynchronous, one launch. A pair reads 8 bytes a row, and divides 63 bits once a row and twice a residue.
    Raises `ValueError` for tensors that do not fit.
    """
    device = row_ids.device
    num_orders, num_heads = len(address_map.num_residues), len(address_map.moduli)
    if row_ids.dtype != torch.int64 or row_ids.ndim != 2 or row_ids.shape[1] != num_heads:
        raise ValueError(
            f"row_ids is {row_ids.dtype} {list(row_ids.shape)}, expected torch.int64 [any, {num_heads}] on {device}"
        )
    check("moduli", address_map.moduli, torch.int64, (num_heads,), device)
    check("keys", keys, torch.int64, (len(row_ids), num_orders), device)
    if wanted is not None:
        check("wanted", wanted, torch.int64, (len(row_ids), num_heads), device)
    if not 0 <= within[0] <= within[1]:
        raise ValueError(f"within is {within[0]} to {within[1]}, expected a range of row ids")
    num_pairs = keys.numel()
    if not num_pairs:
        return
    block = launching.block_of(num_pairs, _PAIRS_A_PROGRAM)
    with launching.on_device(device):
        _keys_of_row_ids[(triton.cdiv(num_pairs, block),)](
            row_ids, address_map.moduli, address_map.offsets, address_map.num_residues, address_map.inverses, keys,
            keys if wanted is None else wanted, num_pairs, row_ids.stride(0), row_ids.stride(1), *within,
            WANTED=wanted is not None, NUM_ORDERS=num_orders, ROWS_A_KEY=num_heads // num_orders,
            RESIDUES_MAX=address_map.inverses.shape[1], BLOCK=block, num_warps=1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_pairs", "token_stride", "head_stride", "start", "end"])
def _keys_of_row_ids(
    row_ids: tl.tensor,
    moduli: tl.tensor,
    offsets: tl.tensor,
    num_residues: tl.tensor,
    inverses: tl.tensor,
    keys: tl.tensor,
    wanted: tl.tensor,
    num_pairs: tl.int64,
    token_stride: tl.int64,
    head_stride: tl.int64,
    start: tl.int64,
    end: tl.int64,
    WANTED: tl.constexpr,
    NUM_ORDERS: tl.constexpr,
    ROWS_A_KEY: tl.constexpr,
    RESIDUES_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = pair < num_pairs
    order = pair % NUM_ORDERS
    first_head = order * ROWS_A_KEY
    ids = row_ids + pair // NUM_ORDERS * token_stride + first_head * head_stride
    # `key` is right for the residues so far, `product` is of their moduli: see the host's, kernels/cpu/address_map.cpp.
    # The last sum may wrap; whatever comes out, it is the key only if it is not below 0 and gives every head's row.
    count = tl.load(num_residues + order, mask=there, other=0)
    key = tl.zeros((BLOCK,), tl.int64)
    product = tl.full((BLOCK,), 1, tl.int64)
    for i in tl.static_range(RESIDUES_MAX):
        used = there & (i < count)
        row_id = tl.load(ids + i * head_stride, mask=used, other=0)
        modulus = tl.load(moduli + first_head + i, mask=used, other=1)
        residue = row_id - tl.load(offsets + first_head + i, mask=used, other=0)
        residue = tl.where((residue >= 0) & (residue < modulus), residue, 0)  # of no head: refused below
        if i == 0:
            key = residue
        else:
            inverse = tl.load(inverses + order * RESIDUES_MAX + i, mask=used, other=0)
            digit = (residue + modulus - key % modulus) * inverse % modulus
            key += tl.where(used, digit * product, 0)
        product *= tl.where(used, modulus, 1)
    whole = key >= 0
    any_wanted = tl.zeros((BLOCK,), tl.int1)
    for head in tl.static_range(ROWS_A_KEY):
        row_id = tl.load(ids + head * head_stride, mask=there, other=-1)
        modulus = tl.load(moduli + first_head + head, mask=there, other=1)
        whole &= key % modulus + tl.load(offsets + first_head + head, mask=there, other=0) == row_id
        is_wanted = (row_id >= start) & (row_id < end)
        any_wanted |= is_wanted
        if WANTED:
            at = wanted + pair * ROWS_A_KEY + head
            tl.store(at, tl.where(is_wanted, row_id, -1), mask=there)
    tl.store(keys + pair, tl.where(any_wanted, tl.where(whole, key, _NO_KEY), -1), mask=there)
