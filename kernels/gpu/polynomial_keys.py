"""Token ids to the keys of heads that share none, on the device: the numbers of `kernels.polynomial_keys_of_tokens`.

Input: token ids, the tokens before them, which positions are not text, and a layer's weights and moduli. Output: for
each head the remainder of a weighted sum of the ids that end at each token. Ids outside the vocabulary are met as in
`keys.py`: n-grams that touch one get the key -2, and the position of such an id is noted in a word on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .. import ORDER_MAX, ORDERS_MAX
from . import launching
from .launching import check

_TOKENS_A_PROGRAM = 32  # native; not tuned yet: waits for a GPU


@dataclass(frozen=True)
class DeviceSums:
    """A layer's hash with its arrays on the device; the words are those of `kernels.polynomial_keys_of_tokens`.

    weights: int64 [H, largest order], the token itself first, 0 beyond a head's order; moduli: int64 [H]; orders: the
    n-gram length of each head; barrier_id: -1 for none. Sums of ids below vocab_size stay below 2^63.
    Raises `ValueError` if they do not fit.
    """

    vocab_size: int
    weights: torch.Tensor
    moduli: torch.Tensor
    orders: torch.Tensor
    barrier_id: int

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size is {self.vocab_size}, must be positive")
        device, heads = self.moduli.device, len(self.moduli)
        check("moduli", self.moduli, torch.int64, (None,), device)
        check("orders", self.orders, torch.int64, (heads,), device)
        check("weights", self.weights, torch.int64, (heads, None), device)
        if not 1 <= heads <= ORDERS_MAX or not 1 <= self.weights.shape[1] <= ORDER_MAX:
            raise ValueError(
                f"weights are {list(self.weights.shape)}, expected up to {ORDERS_MAX} heads and n-grams of {ORDER_MAX}"
            )


def polynomial_keys_of_tokens(
    token_ids: torch.Tensor,
    history: torch.Tensor | None,
    dead: torch.Tensor | None,
    spec: DeviceSums,
    out: torch.Tensor,
    invalid_token_position: torch.Tensor,
) -> None:
    """Writes the key of each head at each token; arguments as of `keys.keys_of_tokens`, out: int64 [B, T, H].

    Asynchronous, one launch. Reads, for each token of the largest order n, n ids; divides 63 bits once a head.
    """
    device, past = spec.moduli.device, 0 if history is None else history.shape[-1]
    heads, order_max = spec.weights.shape
    check("token_ids", token_ids, torch.int64, (None, None), device)
    num_sequences, num_tokens = token_ids.shape
    if history is not None:
        check("history", history, torch.int64, (num_sequences, None), device)
    if past >= order_max:
        raise ValueError(f"history of {past} tokens: no n-gram is longer than {order_max}, give fewer than that")
    if dead is not None:
        check("dead", dead, torch.bool, (num_sequences, num_tokens), device)
    check("out", out, torch.int64, (num_sequences, num_tokens, heads), device)
    check("invalid_token_position", invalid_token_position, torch.int64, (1,), device)
    num_places = num_sequences * (past + num_tokens)
    if num_places == 0:
        return
    block = launching.block_of(num_places, _TOKENS_A_PROGRAM)
    with launching.on_device(device):
        _sums_of_tokens[(triton.cdiv(num_places, block),)](
            token_ids,
            token_ids if history is None else history,  # not read if past is 0
            token_ids if dead is None else dead.view(torch.uint8),
            spec.weights, spec.moduli, spec.orders, out, invalid_token_position, num_places, num_tokens, past,
            spec.vocab_size, spec.barrier_id, WITH_DEAD=dead is not None, ORDER_MAX=order_max, HEADS=heads,
            HEADS_BLOCK=triton.next_power_of_2(heads), BLOCK=block,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_places", "num_tokens", "past", "vocab_size", "barrier_id"])
def _sums_of_tokens(
    token_ids: tl.tensor,
    history: tl.tensor,
    dead: tl.tensor,
    weights: tl.tensor,
    moduli: tl.tensor,
    orders: tl.tensor,
    out: tl.tensor,
    invalid_token_position: tl.tensor,
    num_places: tl.int64,
    num_tokens: tl.int64,
    past: tl.int64,
    vocab_size: tl.int64,
    barrier_id: tl.int64,
    WITH_DEAD: tl.constexpr,
    ORDER_MAX: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # A row of lanes has a place in [B, P + T]: history too, so that each id is checked against the vocabulary once.
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = places < num_places
    sequences = places // (past + num_tokens)
    columns = places % (past + num_tokens)
    tokens = sequences * num_tokens + columns - past  # flat, in token_ids
    head = tl.arange(0, HEADS_BLOCK)
    of_head = head < HEADS
    order = tl.load(orders + head, mask=of_head, other=0)
    sums = tl.zeros((BLOCK, HEADS_BLOCK), tl.int64)
    touched = tl.zeros((BLOCK, HEADS_BLOCK), tl.int1)  # an id outside the vocabulary
    stop = tl.zeros((BLOCK,), tl.int1)  # look-back has ended at or before the predecessor at hand
    for back in tl.static_range(ORDER_MAX):
        behind = columns - back
        in_history = there & (behind >= 0) & (behind < past)
        in_tokens = there & (behind >= past)
        ids = tl.load(history + sequences * past + behind, mask=in_history, other=-1)
        ids = tl.where(in_tokens, tl.load(token_ids + tokens - back, mask=in_tokens, other=-1), ids)
        ended = ~(in_tokens | (in_history & (ids != -1)))
        if WITH_DEAD:
            ended |= tl.load(dead + tokens - back, mask=in_tokens, other=0) != 0
        is_invalid = ~ended & ((ids < 0) | (ids >= vocab_size))
        touched |= (is_invalid & ~stop)[:, None] & (back < order)[None, :]
        if back == 0:
            worst = tl.max(tl.where(is_invalid, places + 1, 0), 0)
            tl.atomic_max(invalid_token_position, worst, mask=worst > 0, sem="relaxed")
            stop |= ended
        else:
            stop |= ended | (ids == barrier_id)
        weight = tl.load(weights + head * ORDER_MAX + back, mask=of_head, other=0)
        sums += tl.where(stop | is_invalid, 0, ids)[:, None] * weight[None, :]
    keys = sums % tl.load(moduli + head, mask=of_head, other=1)[None, :]
    written = (there & (columns >= past))[:, None] & of_head[None, :]
    tl.store(out + tokens[:, None] * HEADS + head[None, :], tl.where(touched, -2, keys), mask=written)
