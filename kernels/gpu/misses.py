"""Keys that no source of the device holds: they are listed in host memory, and the host is asked for their entries.

Input: keys and their places, as `find_entries` gave them. Output: a list of misses at addresses of host memory that the
device can write, then one request a step in the mailbox (mailbox.py). If nothing was missed there is no request: the
step is ready as it is, and nobody waits for the host. Misses past the list's end are counted and never stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import launching
from .launching import check
from .mailbox import INVALID_TOKEN_POSITION, NUM_MISSES, REQUESTED

_PAIRS_A_PROGRAM = 256  # native; not tuned yet: waits for a GPU
_ROW_IDS = tl.constexpr(-2)  # in place of a key, as kernels/cpu/mailbox.h has it


@dataclass(frozen=True)
class MissList:
    """Where the misses of a step are listed: miss i's key and pair are the i-th of two arrays in host memory.

    count: int64 [1] on the device, how many there are so far; keys_address: of int64 [pairs_max], at a multiple of 8;
    pairs_address: of int32 [pairs_max], at a multiple of 4; a pair is n * O + o, its place in keys [N, O].
    """

    count: torch.Tensor
    keys_address: int
    pairs_address: int
    pairs_max: int

    def __post_init__(self) -> None:
        check("the number of misses", self.count, torch.int64, (1,), self.count.device)
        if self.pairs_max < 0 or self.keys_address % 8 or self.pairs_address % 4:
            raise ValueError(
                f"a list of {self.pairs_max} misses with keys at {self.keys_address:#x}, pairs at "
                f"{self.pairs_address:#x}: the addresses must be multiples of 8 and 4, and the number not below 0"
            )


@dataclass(frozen=True)
class StepState:
    """What a device knows of its steps; every tensor lies on the device, is zero at first,
    and written by kernels alone.

    count: int64 [1], misses of the step at hand (the MissList's own tensor); step: int64 [1], its number, from 1 on;
    ready: int64 [1], the last step that waits for nothing any more; posted: int64 [1], misses of the step that were
    asked for; failed: int64 [1], the last step whose entries did not come; batch_counts: int64 [2], steps, and
    those without misses.
    """

    count: torch.Tensor
    step: torch.Tensor
    ready: torch.Tensor
    posted: torch.Tensor
    failed: torch.Tensor
    batch_counts: torch.Tensor

    def __post_init__(self) -> None:
        for name in ("count", "step", "ready", "posted", "failed"):
            check(name, getattr(self, name), torch.int64, (1,), self.count.device)
        check("batch_counts", self.batch_counts, torch.int64, (2,), self.count.device)


def collect_misses(keys: torch.Tensor, places: torch.Tensor, misses: MissList, num_places: int) -> None:
    """Appends the pairs whose key is 0 or more and whose place is not one of 0 .. num_places - 1 to the list, in no
    order.

    keys: int64 [N, O]; places: int32 [N, O]; num_places: entries that the device's sources hold, as `gather_entries`
    sees them, so that a place that it does not read is a miss here. `misses.count` grows by all misses, also by those
    that find no room. Asynchronous. Reads 12 bytes a pair, writes 12 a miss over the bus;
    one atomic a program of 256 pairs.
    """
    device = misses.count.device
    check("keys", keys, torch.int64, (None, None), device)
    check("places", places, torch.int32, tuple(keys.shape), device)
    num_pairs = keys.numel()
    if num_pairs >= 2**31:
        raise ValueError(
            f"{num_pairs} pairs in one batch, at most {2**31 - 1} have a number: look up fewer tokens at once"
        )
    if num_pairs == 0:
        return
    block = launching.block_of(num_pairs, _PAIRS_A_PROGRAM)
    with launching.on_device(device):
        _collect_misses[(triton.cdiv(num_pairs, block),)](
            keys, places, misses.count, misses.keys_address, misses.pairs_address, misses.pairs_max,
            num_places, num_pairs, BLOCK=block,
        )  # fmt: skip


def list_row_ids(
    row_ids: torch.Tensor, within: tuple[int, int], keys: torch.Tensor, misses: MissList, row_ids_address: int
) -> None:
    """Appends the pairs whose key is -2, because their row ids are those of no key, with these ids, to the list.

    row_ids: int64 [N, O * H] of any strides; within: (start, end), ids outside of which are listed as -1; keys: int64
    [N, O]; row_ids_address: of int64 [misses.pairs_max, H] in host memory, at a multiple of 8. Asynchronous. Reads 8
    bytes a pair; such a pair reads 8 bytes a row, and writes 12 and 8 a row over the bus.
    """
    device = misses.count.device
    check("keys", keys, torch.int64, (None, None), device)
    num_orders, num_pairs = keys.shape[1], keys.numel()
    if row_ids.dtype != torch.int64 or row_ids.ndim != 2 or len(row_ids) != len(keys) or row_ids.device != device:
        raise ValueError(f"row_ids is {row_ids.dtype} {list(row_ids.shape)}, expected torch.int64 [{len(keys)}, any]")
    if row_ids.shape[1] % max(num_orders, 1) or row_ids_address <= 0 or row_ids_address % 8:
        raise ValueError(
            f"{row_ids.shape[1]} row ids of {num_orders} orders, listed at {row_ids_address:#x}: there must be as many "
            f"for each order, and the address be a multiple of 8"
        )
    if not num_pairs:
        return
    block = launching.block_of(num_pairs, _PAIRS_A_PROGRAM)
    with launching.on_device(device):
        _list_row_ids[(triton.cdiv(num_pairs, block),)](
            row_ids, keys, misses.count, misses.keys_address, misses.pairs_address, misses.pairs_max, row_ids_address,
            num_pairs, row_ids.stride(0), row_ids.stride(1), *within, NUM_ORDERS=num_orders,
            ROWS_A_KEY=row_ids.shape[1] // num_orders, BLOCK=block,
        )  # fmt: skip


def post_misses(
    state: StepState, mailbox_address: int, pairs_max: int, invalid_token_position: torch.Tensor | None = None
) -> None:
    """Begins the next step and asks the host for its misses; a step without misses is ready, and the host is not asked.

    mailbox_address: of the block that mailbox.py describes, at a multiple of 64; pairs_max: of the list in it;
    invalid_token_position: int64 [1], as `keys_of_tokens` leaves it; if it is not 0, the host gets it, and it is 0
    afterwards. `state.count` is 0 afterwards, for the next step's misses. More misses than pairs_max are requested as
    they are: the host answers with a status other than 0, and the step fails, for some of its rows are nowhere.
    Asynchronous; one program, which writes two words over the bus, or none.
    """
    check_mailbox(mailbox_address)
    if invalid_token_position is not None:
        launching.check("invalid_token_position", invalid_token_position, torch.int64, (1,), state.count.device)
    with launching.on_device(state.count.device):
        _post_misses[(1,)](
            state.count,
            state.step,
            state.ready,
            state.posted,
            state.batch_counts,
            state.count if invalid_token_position is None else invalid_token_position,
            mailbox_address,
            pairs_max,
            HAS_INVALID_TOKEN=invalid_token_position is not None,
            num_warps=1,
        )


def check_mailbox(address: int) -> None:
    """Raises `ValueError` unless a mailbox can lie at this address."""
    if address <= 0 or address % 64:
        raise ValueError(f"a mailbox at {address:#x}: it must lie at a multiple of 64 bytes in host memory")


@triton.jit
def append_misses(
    count: tl.tensor,
    keys_address: tl.tensor,
    pairs_address: tl.tensor,
    pairs_max: tl.tensor,
    keys: tl.tensor,
    pairs: tl.tensor,
    missed: tl.tensor,
) -> tl.tensor:
    """Appends those of a block's pairs that are `missed`: keys int64, pairs of any integer type, missed bool,
    one dimension. Returns their numbers in the list, -1 of those that are not in it.

    A block's misses get consecutive numbers from one atomic addition, in the order of its lanes.
    """
    numbers_within = tl.cumsum(missed.to(tl.int32), 0)
    num_missed = tl.sum(missed.to(tl.int32), 0).to(tl.int64)
    start = tl.atomic_add(count, num_missed, mask=num_missed > 0, sem="relaxed")
    numbers = start + numbers_within - 1
    stored = missed & (numbers < pairs_max)
    tl.store(keys_address.to(tl.pointer_type(tl.int64)) + numbers, keys, mask=stored)
    tl.store(pairs_address.to(tl.pointer_type(tl.int32)) + numbers, pairs.to(tl.int32), mask=stored)
    return tl.where(stored, numbers, -1)


@triton.jit(do_not_specialize=["keys_address", "pairs_address", "pairs_max", "num_places", "num_pairs"])
def _collect_misses(
    keys: tl.tensor,
    places: tl.tensor,
    count: tl.tensor,
    keys_address: tl.int64,
    pairs_address: tl.int64,
    pairs_max: tl.int64,
    num_places: tl.int64,
    num_pairs: tl.int64,
    BLOCK: tl.constexpr,
) -> None:
    pairs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = pairs < num_pairs
    key = tl.load(keys + pairs, mask=there, other=-1)
    place = tl.load(places + pairs, mask=there, other=0)
    missed = there & (key >= 0) & ((place < 0) | (place >= num_places))
    append_misses(count, keys_address, pairs_address, pairs_max, key, pairs, missed)


@triton.jit(
    do_not_specialize=[
        "keys_address",
        "pairs_address",
        "pairs_max",
        "row_ids_address",
        "num_pairs",
        "token_stride",
        "head_stride",
        "start",
        "end",
    ]
)
def _list_row_ids(
    row_ids: tl.tensor,
    keys: tl.tensor,
    count: tl.tensor,
    keys_address: tl.int64,
    pairs_address: tl.int64,
    pairs_max: tl.int64,
    row_ids_address: tl.int64,
    num_pairs: tl.int64,
    token_stride: tl.int64,
    head_stride: tl.int64,
    start: tl.int64,
    end: tl.int64,
    NUM_ORDERS: tl.constexpr,
    ROWS_A_KEY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    pairs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + pairs, mask=pairs < num_pairs, other=-1)
    numbers = append_misses(count, keys_address, pairs_address, pairs_max, key, pairs, key == _ROW_IDS)
    listed = numbers >= 0
    ids = row_ids + pairs // NUM_ORDERS * token_stride + pairs % NUM_ORDERS * ROWS_A_KEY * head_stride
    targets = row_ids_address.to(tl.pointer_type(tl.int64)) + numbers * ROWS_A_KEY
    for head in tl.static_range(ROWS_A_KEY):
        row_id = tl.load(ids + head * head_stride, mask=listed, other=-1)
        tl.store(targets + head, tl.where((row_id >= start) & (row_id < end), row_id, -1), mask=listed)


@triton.jit(do_not_specialize=["mailbox", "pairs_max"])
def _post_misses(
    count: tl.tensor,
    step: tl.tensor,
    ready: tl.tensor,
    posted: tl.tensor,
    batch_counts: tl.tensor,
    invalid_token_position: tl.tensor,
    mailbox: tl.int64,
    pairs_max: tl.int64,
    HAS_INVALID_TOKEN: tl.constexpr,
) -> None:
    if HAS_INVALID_TOKEN:
        place = tl.load(invalid_token_position)
        if place != 0:
            tl.store((mailbox + INVALID_TOKEN_POSITION).to(tl.pointer_type(tl.int64)), place)
            tl.store(invalid_token_position, place * 0)
    number = tl.load(step) + 1
    num_misses = tl.load(count)
    tl.store(step, number)
    tl.store(count, num_misses * 0)
    tl.store(posted, tl.minimum(num_misses, pairs_max))
    tl.store(batch_counts, tl.load(batch_counts) + 1)
    if num_misses == 0:
        tl.store(ready, number)
        tl.store(batch_counts + 1, tl.load(batch_counts + 1) + 1)
    else:
        # Keys and pairs were written by launches before this one; release makes them visible to the host before
        # `requested` is.
        tl.store((mailbox + NUM_MISSES).to(tl.pointer_type(tl.int64)), num_misses)
        tl.atomic_xchg((mailbox + REQUESTED).to(tl.pointer_type(tl.int64)), number, sem="release", scope="sys")
