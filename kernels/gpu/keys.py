"""Token ids to keys on the device: the same numbers as `kernels.keys_of_tokens` gives on the host.

Input: token ids, the tokens before them, which positions are not text, and a layer's hash. Output: the mixed hash of
the n-gram of each order that ends at each token. Nothing is read at an id outside the vocabulary: n-grams that touch
one get the key -2, whose rows are NaN, and the position of such an id is noted in a word on the device, for the host to
look at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .. import ORDER_MAX
from . import launching
from .launching import check

_TOKENS_A_PROGRAM = 128  # native; not tuned yet: waits for a GPU


@dataclass(frozen=True)
class DeviceHash:
    """A layer's hash with its arrays on the device; the words are those of `kernels.keys_of_tokens`.

    token_map: int32 [vocab_size], None if ids hash as they are; multipliers: int64 [largest order], the token itself
    first; orders: n-gram lengths, ascending, 1 to ORDER_MAX; barrier_id: -1 for none.
    Raises `ValueError` if they do not fit.
    """

    token_map: torch.Tensor | None
    vocab_size: int
    multipliers: torch.Tensor
    orders: tuple[int, ...]
    pad_id: int
    barrier_id: int

    def __post_init__(self) -> None:
        ascending = all(low < high for low, high in zip((0, *self.orders), self.orders, strict=False))
        if not self.orders or not ascending or self.orders[-1] > ORDER_MAX:
            raise ValueError(f"orders are {self.orders}: they must ascend from 1 to {ORDER_MAX}, at least one of them")
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size is {self.vocab_size}, must be positive")
        device = self.multipliers.device
        check("multipliers", self.multipliers, torch.int64, (self.orders[-1],), device)
        if self.token_map is not None:
            check("token_map", self.token_map, torch.int32, (self.vocab_size,), device)


def keys_of_tokens(
    token_ids: torch.Tensor,
    history: torch.Tensor | None,
    dead: torch.Tensor | None,
    spec: DeviceHash,
    out: torch.Tensor,
    invalid_token_position: torch.Tensor,
) -> None:
    """Writes the keys of the n-grams that end at each token, -2 for those that touch an id outside the vocabulary.

    token_ids: int64 [B, T]; history: int64 [B, P], the tokens before, -1 if there is not one, P below the largest
    order; dead: bool [B, T], positions that are no text, whose ids are not looked at; out: int64 [B, T, O], overwritten
    whole; invalid_token_position: int64 [1], raised to the largest 1 + position in [B, P + T], flat, of an id outside
    the vocabulary; if all are valid, it stays as it is. It is never reset here. All contiguous, on the device of
    `spec`. Asynchronous. Reads, for each token of the largest order n, n ids (8 bytes each, neighbours share them) and
    n words of the map; writes 8 bytes an order.
    """
    device, past = spec.multipliers.device, 0 if history is None else history.shape[-1]
    check("token_ids", token_ids, torch.int64, (None, None), device)
    num_sequences, num_tokens = token_ids.shape
    if history is not None:
        check("history", history, torch.int64, (num_sequences, None), device)
    if past >= spec.orders[-1]:
        raise ValueError(f"history of {past} tokens: no n-gram is longer than {spec.orders[-1]}, give fewer than that")
    if dead is not None:
        check("dead", dead, torch.bool, (num_sequences, num_tokens), device)
    check("out", out, torch.int64, (num_sequences, num_tokens, len(spec.orders)), device)
    check("invalid_token_position", invalid_token_position, torch.int64, (1,), device)
    num_places = num_sequences * (past + num_tokens)
    if num_places == 0:
        return
    block = launching.block_of(num_places, _TOKENS_A_PROGRAM)
    with launching.on_device(device):
        _keys_of_tokens[(triton.cdiv(num_places, block),)](
            token_ids,
            token_ids if history is None else history,  # not read if past is 0
            token_ids if dead is None else dead.view(torch.uint8),
            token_ids if spec.token_map is None else spec.token_map,
            spec.multipliers, out, invalid_token_position, num_places, num_tokens, past,
            spec.vocab_size, spec.pad_id, spec.barrier_id,
            WITH_DEAD=dead is not None, WITH_MAP=spec.token_map is not None,
            ORDER_BITS=sum(1 << (order - 1) for order in spec.orders), ORDERS=len(spec.orders),
            ORDER_LAST=spec.orders[-1], BLOCK=block,
        )  # fmt: skip


_NOT_SPECIALIZED = ["num_places", "num_tokens", "past", "vocab_size", "pad_id", "barrier_id"]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _keys_of_tokens(
    token_ids: tl.tensor,
    history: tl.tensor,
    dead: tl.tensor,
    token_map: tl.tensor,
    multipliers: tl.tensor,
    out: tl.tensor,
    invalid_token_position: tl.tensor,
    num_places: tl.int64,
    num_tokens: tl.int64,
    past: tl.int64,
    vocab_size: tl.int64,
    pad_id: tl.int64,
    barrier_id: tl.int64,
    WITH_DEAD: tl.constexpr,
    WITH_MAP: tl.constexpr,
    ORDER_BITS: tl.constexpr,
    ORDERS: tl.constexpr,
    ORDER_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # A lane has a place in [B, P + T]: history too, so that each id is checked against the vocabulary once.
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = places < num_places
    sequences = places // (past + num_tokens)
    columns = places % (past + num_tokens)
    tokens = sequences * num_tokens + columns - past  # flat, in token_ids
    written = there & (columns >= past)
    mixed = tl.zeros((BLOCK,), tl.int64)
    stop = tl.zeros((BLOCK,), tl.int1)  # look-back has ended at or before the predecessor at hand
    touched = tl.zeros((BLOCK,), tl.int1)  # an id outside the vocabulary
    column_out = 0
    for back in tl.static_range(ORDER_LAST):
        behind = columns - back
        in_history = there & (behind >= 0) & (behind < past)
        in_tokens = there & (behind >= past)
        ids = tl.load(history + sequences * past + behind, mask=in_history, other=-1)
        ids = tl.where(in_tokens, tl.load(token_ids + tokens - back, mask=in_tokens, other=-1), ids)
        ended = ~(in_tokens | (in_history & (ids != -1)))
        if WITH_DEAD:
            ended |= tl.load(dead + tokens - back, mask=in_tokens, other=0) != 0
        is_invalid = ~ended & ((ids < 0) | (ids >= vocab_size))
        touched |= is_invalid & ~stop
        if back == 0:
            worst = tl.max(tl.where(is_invalid, places + 1, 0), 0)
            tl.atomic_max(invalid_token_position, worst, mask=worst > 0, sem="relaxed")
            stop |= ended
        else:
            stop |= ended | (ids == barrier_id)
        mapped = ids
        if WITH_MAP:
            mapped = tl.load(token_map + ids, mask=~stop & ~is_invalid, other=0).to(tl.int64)
        mixed ^= tl.where(stop, pad_id, mapped) * tl.load(multipliers + back)
        if (ORDER_BITS >> back) & 1:
            tl.store(out + tokens * ORDERS + column_out, tl.where(touched, -2, mixed), mask=written)
            column_out += 1
