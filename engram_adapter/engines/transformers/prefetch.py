"""Reads that start with a model's forward, so that the layers before an n-gram table hide them.

Input: the arguments of a text model's forward: token ids, mask, cache. Output: lookups under way, which the tables'
embeddings take when the model asks for the very same row ids; if it asks for others, they are dropped. So what is
guessed here, how transformers masks and continues sequences, decides about time and never about rows.
Errors: none of its own; ids outside the vocabulary are left to the model, and a closed store raises as in the lookup.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ...hash_spec import HashSpec
from ...lookup_call import as_int64
from ...lookup_operators import is_traced
from ...row_id_embedding import ExpectedRows, RowIdEmbedding

AHEAD_BYTES_MAX = 1 << 30  # of rows that one forward has read ahead; the rest is read when it is asked for
_PARAMETERS = ("input_ids", "attention_mask", "position_ids", "cache")  # of a text model's forward, in this order
_CONTEXT_STATE = 2  # which state of a layer's cache holds the tokens before, in transformers 5


class _Tokens(NamedTuple):
    """What row ids of a forward depend on."""

    token_ids: np.ndarray  # int64 [B, T]
    history: np.ndarray | None  # int64 [B, P], the tokens before


class ReadAhead:
    """A forward pre-hook of a text model: starts the lookups of all its tables as one request of their store."""

    def __init__(self, names: Sequence[str], spec: HashSpec) -> None:
        """names: of the modules that hash, below the hooked one; spec: their hash."""
        self._paths, self._spec = tuple(tuple(name.split(".")) for name in names), spec

    def __call__(self, module: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if is_traced():  # a traced program has its lookups, and nothing that starts before them
            return
        hashes = [each for each in (_below(module, path) for path in self._paths) if each is not None]
        if not hashes:
            return
        tokens = _tokens_of(dict(zip(_PARAMETERS, arguments, strict=False)) | options, hashes[0])
        if tokens is None:
            return
        try:
            self._start([each.ngram_embedding for each in hashes], tokens)
        except ValueError:  # ids outside the vocabulary, which the model's own embedding refuses in its words
            return

    def _start(self, embeddings: Sequence[Any], tokens: _Tokens) -> None:
        requests, expected, num_bytes = {}, [], 0
        for embedding in embeddings:
            if not isinstance(embedding, RowIdEmbedding):  # somebody took it out again
                continue
            table = embedding.table_spec
            num_bytes += tokens.token_ids.size * table.num_heads * table.row_bytes
            if num_bytes > AHEAD_BYTES_MAX:
                break
            keys = self._spec.keys(tokens.token_ids, table.name, history=tokens.history)
            rows = np.empty((*tokens.token_ids.shape, table.num_heads, table.row_bytes), dtype=np.uint8)
            flat = rows.reshape(-1, table.num_heads, table.row_bytes)
            requests[table.name] = (keys.reshape(-1, len(table.orders)), flat)
            expected.append((embedding, keys, rows))
        if not requests:
            return
        ticket = expected[0][0].store.submit(requests)
        for embedding, keys, rows in expected:  # while the disk reads
            row_ids = embedding.table_spec.row_ids(keys.reshape(-1, keys.shape[-1]))
            embedding.expect(ExpectedRows(row_ids.reshape(rows.shape[:-1]), ticket, rows))


def _below(module: torch.nn.Module, path: Sequence[str]) -> Any:
    """Returns a module below another; None if somebody has put a wrapper between, and with it another path.

    `get_submodule` takes ten times as long, and raises.
    """
    below: torch.nn.Module | None = module
    for name in path:
        below = None if below is None else below._modules.get(name)
    return below


def _tokens_of(arguments: dict[str, Any], hashing: Any) -> _Tokens | None:
    """Returns the ids that a forward will hash, as far as that is known at its start; hashing: a module that does."""
    ids = arguments.get("ple_input_ids")
    ids = arguments.get("input_ids") if ids is None else ids
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_meta or not ids.numel():
        return None
    mask = arguments.get("attention_mask")
    mask = mask.get("linear_attention") if isinstance(mask, dict) else mask
    num_tokens = ids.shape[1]
    # As create_recurrent_attention_mask: one token is never padding, and of a longer mask the last tokens count.
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and num_tokens > 1 and mask.shape[1] >= num_tokens:
        ids = torch.where(mask[:, -num_tokens:].to(ids.device).bool(), ids, hashing.eos_token_id)
    cache: Any = arguments.get("cache")
    cache = arguments.get("past_key_values") if cache is None else cache
    before = None
    if hasattr(cache, "get_conv_state"):
        before = cache.get_conv_state(hashing.layer_idx, state_idx=_CONTEXT_STATE)
    return _Tokens(as_int64(ids), None if before is None else as_int64(before))
