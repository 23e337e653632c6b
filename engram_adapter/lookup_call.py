"""The arguments of one lookup by token ids, on the host, and what two equal calls share.

Input: tensors of token ids, history and dead positions. Output: arrays for the hash. Errors: `TypeError` and
`ValueError` for arguments that do not belong together.
"""

from __future__ import annotations

import numpy as np
import torch

from .token_shapes import checked_arguments

WAIT_S = 60.0  # the longest a forward waits for its rows; reads of a dying disk can take tens of seconds

# What identifies a call: shape and bytes of token ids, history and dead positions.
CallKey = tuple[tuple[tuple[int, ...], bytes] | None, ...]


class LookupCall:
    """The arguments of one call as int64 and bool arrays on the CPU, and a key that equal calls share."""

    def __init__(
        self,
        token_ids: torch.Tensor,
        history: torch.Tensor | None,
        dead: torch.Tensor | None,
        history_tokens: int,
    ) -> None:
        """history_tokens: how many of the tokens before count. Raises as `checked_arguments` does."""
        given = checked_arguments(token_ids, history, dead, history_tokens)
        self.token_ids = as_int64(given.token_ids)
        self.history = None if given.history is None else as_int64(given.history)
        self.dead = None if given.dead is None else given.dead.detach().cpu().contiguous().numpy()
        arrays = (self.token_ids, self.history, self.dead)
        self.key: CallKey = tuple(None if array is None else (array.shape, array.tobytes()) for array in arrays)


def as_int64(ids: torch.Tensor) -> np.ndarray:
    """Returns an integer tensor of any device and layout as a contiguous int64 array on the CPU."""
    array: np.ndarray = ids.detach().to("cpu", torch.int64).contiguous().numpy()
    return array
