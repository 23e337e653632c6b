"""What the demo checks every row against: the checkpoint's own bytes, found by the published formula.

Input: documents of token ids, a store, its checkpoint. Output: how many rows were compared, and how many differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

import tierstore
from engram_adapter import HashSpec, TieredEmbedding
from engram_adapter.codecs import decode_rows
from tierstore.formats.checkpoint import Checkpoint
from tierstore.formats.tensor_files import StoredTensor

WINDOW_TOKENS = 1024


def check_rows(
    store: tierstore.Store, spec: HashSpec, checkpoint: Checkpoint, documents: list[np.ndarray], num_tokens: int
) -> tuple[int, int]:
    """Looks the same text up again, each layer in a thread of its own.

    Returns how many rows were compared with the checkpoint, bytes and decoded values, and how many differ.
    """
    with ThreadPoolExecutor(len(spec.layers)) as threads:
        check = partial(_check_layer, store, spec, checkpoint, documents, num_tokens)
        compared, different = zip(*threads.map(check, spec.layers), strict=True)
    return sum(compared), sum(different)


def _check_layer(
    store: tierstore.Store,
    spec: HashSpec,
    checkpoint: Checkpoint,
    documents: list[np.ndarray],
    num_tokens: int,
    layer: int,
) -> tuple[int, int]:
    oracle = CheckpointRows(checkpoint, layer)
    table = store[spec.table_name(layer)]
    embedding = TieredEmbedding(store, layer, spec)
    row_ids = np.concatenate([plain_row_ids(part, spec, layer) for part in first_tokens(documents, num_tokens)])
    start = compared = different = 0
    for token_ids, history in windows(documents, num_tokens, look_back=3):
        expected = oracle[row_ids[start : start + token_ids.shape[1]]]
        start += token_ids.shape[1]
        rows = table.lookup(spec.keys(token_ids.numpy(), layer, history.numpy())[0])
        values = embedding(token_ids, history)[0]
        decoded = decode_rows(torch.from_numpy(expected), table.spec.codec, table.spec.dim)
        compared += rows.shape[0] * rows.shape[1]
        different += num_different(torch.from_numpy(rows), torch.from_numpy(expected), values, decoded)
    return compared, different


def num_different(rows: torch.Tensor, expected: torch.Tensor, values: torch.Tensor, decoded: torch.Tensor) -> int:
    """Returns how many rows, [N, R, ...] each, differ in their bytes or, bit by bit, in their decoded values."""
    bits, expected_bits = values.view(torch.int16), decoded.view(torch.int16)
    if torch.equal(rows, expected) and torch.equal(bits, expected_bits):
        return 0  # the fast way
    return int(((rows != expected).any(-1) | (bits != expected_bits).any(-1)).sum())


class CheckpointRows:
    """The oracle: a layer's rows straight from the checkpoint's mapped tensors.

    What it shares with the store is where each tensor begins (`Checkpoint` reads that from the header). Which rows a
    token has comes from `plain_row_ids`, which shares the hash's published numbers with it, and none of its code.
    """

    def __init__(self, checkpoint: Checkpoint, layer: int) -> None:
        self._planes = [
            _mapped(checkpoint.tensors[f"layers.{layer}.engram.embed.{part}"]) for part in ("weight", "scale")
        ]

    def __getitem__(self, row_ids: np.ndarray) -> np.ndarray:
        return np.concatenate([plane[row_ids] for plane in self._planes], axis=-1)


def _mapped(tensor: StoredTensor) -> np.ndarray:
    return np.memmap(tensor.path, dtype=np.uint8, mode="r", offset=tensor.byte_start, shape=tensor.shape)


def plain_row_ids(document: np.ndarray, spec: HashSpec, layer: int) -> np.ndarray:
    """Returns the rows of each token of a whole document, int64 [T, heads], by the formula of arXiv 2601.07372.

    The key of the n-gram that ends at token t is the XOR of mapped[t - i] * multipliers[i] over i < n, with the pad id
    before the document's start; each head of order n reads row key % modulus + offset.
    """
    assert spec.token_map is not None
    look_back, num_tokens = spec.orders[-1] - 1, len(document)
    mapped = np.concatenate([np.full(look_back, spec.pad_id), spec.token_map[document]]).astype(np.int64)
    heads = list(zip(spec.moduli(layer), spec.offsets(layer), strict=True))
    key, columns = np.zeros(num_tokens, dtype=np.int64), []
    for back, multiplier in enumerate(spec.multipliers(layer)):
        key = key ^ mapped[look_back - back : look_back - back + num_tokens] * multiplier
        if back:
            of_order = heads[(back - 1) * spec.heads : back * spec.heads]
            columns += [key % modulus + offset for modulus, offset in of_order]
    return np.stack(columns, axis=1)


def windows(
    documents: list[np.ndarray], tokens_max: int, look_back: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (token ids [1, T], the tokens before [1, P]) through the documents,
    as prefill in parts would feed them."""
    left = tokens_max
    for document in documents:
        for start in range(0, len(document), WINDOW_TOKENS):
            part = document[start : start + min(WINDOW_TOKENS, left)]
            yield (
                torch.from_numpy(part[None]),
                torch.from_numpy(document[max(0, start - look_back) : start][None].copy()),
            )
            left -= len(part)
            if left <= 0:
                return


def first_tokens(documents: list[np.ndarray], tokens_max: int) -> Iterator[np.ndarray]:
    """Yields the documents up to `tokens_max` tokens in all, the last one cut there."""
    for document in documents:
        if tokens_max <= 0:
            return
        yield document[:tokens_max]
        tokens_max -= len(document)
