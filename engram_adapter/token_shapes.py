"""What every embedding asks of the token ids and the history that it is given;
and the one warning about a history that is not.

Flows in: tensors as the caller gave them. Flows out: nothing, or an error that names what is wrong and what to pass.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

logger = logging.getLogger("tierstore")

_warned = False  # once a process: a decoding loop would say it at every token


def check_token_shapes(token_ids: Any, history: Any, history_tokens: int) -> None:
    """Raises `TypeError` or `ValueError` unless token_ids are integers [B, T],
    and history None or integers [B, any number].

    Warns, once a process, of one token without a history: it is looked up as the start of a document.
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
    elif token_ids.shape[1] == 1 and history_tokens > 0:
        _warn_of_missing_history(history_tokens)


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
        "history, token_ids[:, :0]. This is said once.",
        history_tokens,
    )
