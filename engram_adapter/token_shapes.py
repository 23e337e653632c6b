"""The arguments of a lookup by token ids, checked once for all embeddings; and the one warning about a missing history.

Input: tensors as the caller gave them. Output: the same tensors, the history cut to what the hash looks at.
Errors: `TypeError` and `ValueError` that name what is wrong and what to pass.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch

from .hash_arguments import last_tokens

logger = logging.getLogger("tierstore")

_warned = False  # once a process: a decoding loop would repeat it at every token


class TokenArguments(NamedTuple):
    """What a lookup takes: integers [B, T]; integers [B, 1 to history_tokens] or None; bool [B, T] or None."""

    token_ids: torch.Tensor
    history: torch.Tensor | None
    dead: torch.Tensor | None


def checked_arguments(token_ids: Any, history: Any, dead: Any, history_tokens: int) -> TokenArguments:
    """Returns the arguments of one call, so that equal calls have equal ones: an empty history is None.

    Warns, once a process, of one token without a history: it is looked up as the start of a document.

    Args:
        token_ids: Integers [B, T].
        history: The tokens before, integers [B, any number], or None.
        dead: Positions that are not text, bool [B, T], or None. `HashSpec.keys` compares its shape.
        history_tokens: How many of the tokens before count.

    Raises:
        TypeError: Not tensors, or of another dtype.
        ValueError: Shapes that disagree.
    """
    check_integers(token_ids, "token_ids")
    if token_ids.ndim != 2:
        raise ValueError(f"token_ids of shape {list(token_ids.shape)}: they must be [sequences, tokens]")
    if history is not None:
        check_integers(history, "history")
        if history.ndim != 2 or len(history) != len(token_ids):
            raise ValueError(
                f"history of shape {list(history.shape)}: it must be [{len(token_ids)}, the tokens before], as "
                f"token_ids of shape {list(token_ids.shape)} have {len(token_ids)} sequences"
            )
        history = last_tokens(history, history_tokens)
        if history.shape[1] == 0:
            history = None  # the same call as one without
    elif token_ids.shape[1] == 1 and history_tokens > 0:
        _warn_of_missing_history(history_tokens)
    if dead is not None and (not isinstance(dead, torch.Tensor) or dead.dtype != torch.bool):
        found = dead.dtype if isinstance(dead, torch.Tensor) else type(dead).__name__
        raise TypeError(f"dead is {found}, must be a tensor of torch.bool")
    return TokenArguments(token_ids, history, dead)


def check_integers(ids: Any, what: str) -> None:
    """Raises `TypeError` unless ids are a tensor of integers."""
    is_tensor = isinstance(ids, torch.Tensor)
    if not is_tensor or ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"{what} are {ids.dtype if is_tensor else type(ids).__name__}, must be a tensor of integers")


def _warn_of_missing_history(history_tokens: int) -> None:
    global _warned
    if _warned:
        return
    _warned = True
    logger.warning(
        "one token was looked up without history, as the start of a document; to decode, pass the tokens before it: "
        "embedding(token_ids, history=seen), of which the last %d count. Of a document's first token, pass an empty "
        "history, token_ids[:, :0]. This warning comes once.",
        history_tokens,
    )
