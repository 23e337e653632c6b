"""The arguments of a hash of token ids: checked, and named in errors.

Input: arrays as the caller gave them. Output: int64 and bool arrays of shapes that belong together.
Errors: `TypeError` and `ValueError` that say what was found and what is expected.

Shapes: B sequences, P tokens before.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_INT64 = np.dtype(np.int64)


def last_tokens(history: Any, count: int) -> Any:
    """Returns the last `count` tokens of each sequence, or all if there are fewer. history: array or tensor [B, P]."""
    num_tokens = history.shape[1]
    return history if num_tokens <= count else history[:, num_tokens - count :]  # a view of a tensor takes microseconds


def integers(ids: np.ndarray, what: str) -> np.ndarray:
    """Returns ids as int64 [sequences, tokens]; raises `TypeError` or `ValueError`, naming `what`, if they are not."""
    array = np.asarray(ids)
    if array.dtype != _INT64:
        if array.dtype.kind not in "iu" or array.dtype == np.uint64:
            raise TypeError(f"{what} are {array.dtype}, expected integers up to int64")
        array = array.astype(np.int64)
    if array.ndim != 2:
        raise ValueError(f"{what} are {list(array.shape)}, expected [sequences, tokens]")
    return array


def checked_history(history: np.ndarray, num_sequences: int, history_tokens: int) -> np.ndarray:
    """Returns the tokens before that the hash looks at, int64 [B, at most history_tokens]."""
    past = integers(history, "history")
    if len(past) != num_sequences:
        raise ValueError(
            f"history is {list(past.shape)}, token_ids have {num_sequences} sequences: expected [{num_sequences}, the "
            f"tokens before]"
        )
    return np.ascontiguousarray(last_tokens(past, history_tokens))


def outside_vocabulary(ids: np.ndarray, past: np.ndarray | None, index: int, vocab_size: int) -> ValueError:
    """Returns the error for a wrong token id; index: of it, in the sequences with their history before them."""
    joined = ids if past is None else np.concatenate([past, ids], axis=1)
    row, column = divmod(index, joined.shape[1])
    return ValueError(
        f"token id {joined[row, column]} of sequence {row}, position {column - joined.shape[1] + ids.shape[1]} is "
        f"outside the vocabulary of {vocab_size}"
    )


def checked_dead(dead: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns which positions are no text, bool of `shape`; raises `TypeError` or `ValueError` if they are not."""
    no_text = np.asarray(dead)
    if no_text.dtype != bool:
        raise TypeError(f"dead is {no_text.dtype}, expected bool")
    if no_text.shape != shape:
        raise ValueError(f"dead is {list(no_text.shape)}, token_ids are {list(shape)}; they must agree")
    return no_text
