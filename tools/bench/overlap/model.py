"""The model of `tierstore bench overlap`: a small transformer, two of whose layers take n-gram rows, and what it is
fed.

Input: token ids, the tokens before them, a key-value cache. Output: logits of each sequence's last token. Pre-norm
blocks of causal attention and a GELU feed-forward, the output tied to the input embedding, as GPT-2; the Engram layers
add their term to the stream before attention, as V4.1. Without positional encoding, which costs next to nothing. One
set of weights serves every side of the comparison: the embeddings are handed in. It imports nothing of `tools`, and of
`engram_adapter` what commit 8498e4b has: another build runs it too. Shapes: B sequences, T tokens, D hidden size, V
vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from engram_adapter import EngramLayer, HashSpec
from engram_adapter.embedding import TieredEmbedding, prefetch_layers

FEATURES = 24 * 256  # of a token: rows, and values of each, as in stores.py
WEIGHT_SCALE = 0.02  # GPT-2's


@dataclass(frozen=True)
class Piece:
    """What one forward takes: token ids [B, T], the tokens before [B, P], their place in the cache,
    places that count."""

    token_ids: torch.Tensor
    history: torch.Tensor | None
    start: int
    seen: int


class Feed:
    """Text in order, each part once: `next` gives the pieces of one step or one prompt, on the model's device."""

    def __init__(self, parts: Callable[[int], list[Piece]]) -> None:
        self._parts, self._given = parts, 0

    def next(self) -> list[Piece]:
        """Returns the pieces that come next; the text comes round again where it ends."""
        self._given += 1
        return self._parts(self._given - 1)

    @classmethod
    def of_sequences(cls, text: np.ndarray, sequences: int, places: int, history: int, device: str) -> Feed:
        """Decode: `sequences` places of the text, int64 [N], far apart, that go on by a token a step."""
        starts = np.arange(sequences) * (len(text) // sequences)

        def parts(number: int) -> list[Piece]:
            here = (starts + history + number) % len(text)
            before = (here[:, None] + np.arange(-history, 0)) % len(text)
            ids, past = (torch.from_numpy(text[at]).to(device) for at in (here[:, None], before))
            return [Piece(ids, past, number % places, places)]

        return cls(parts)

    @classmethod
    def of_prompts(cls, text: np.ndarray, tokens: int, chunk: int, history: int, device: str) -> Feed:
        """Prefill: prompts of `tokens` tokens, one after the other, in chunks of `chunk`."""

        def parts(number: int) -> list[Piece]:
            start = number * tokens % (len(text) - tokens + 1)
            prompt = torch.from_numpy(text[start : start + tokens]).to(device)[None]
            return [
                Piece(
                    prompt[:, at : at + chunk],
                    prompt[:, at - history : at] if at else None,
                    at,
                    min(at + chunk, tokens),
                )
                for at in range(0, tokens, chunk)
            ]

        return cls(parts)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: blocks, hidden size, attention heads; the feed-forward is 4 times as wide."""

    blocks: int
    hidden: int
    heads: int


class Cache:
    """Keys and values of every block, [B, heads, places, D / heads],
    of which a call writes as many places as it has tokens."""

    def __init__(self, shape: Shape, sequences: int, places: int, like: torch.Tensor) -> None:
        """Makes it on the device and in the dtype of `like`.
        Places that no call has written count as tokens of zeros."""
        size = (shape.blocks, sequences, shape.heads, places, shape.hidden // shape.heads)
        self.keys, self.values = like.new_zeros(size), like.new_zeros(size)

    def clear(self) -> None:
        """Forgets all tokens."""
        self.keys.zero_()
        self.values.zero_()


class Block(torch.nn.Module):
    """Attention and feed-forward of one layer."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = shape.heads
        self.attention_norm = torch.nn.LayerNorm(shape.hidden, dtype=dtype)
        self.qkv = torch.nn.Linear(shape.hidden, 3 * shape.hidden, dtype=dtype)
        self.out = torch.nn.Linear(shape.hidden, shape.hidden, dtype=dtype)
        self.feed_norm = torch.nn.LayerNorm(shape.hidden, dtype=dtype)
        self.up = torch.nn.Linear(shape.hidden, 4 * shape.hidden, dtype=dtype)
        self.down = torch.nn.Linear(4 * shape.hidden, shape.hidden, dtype=dtype)

    def forward(
        self, stream: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, seen: int
    ) -> torch.Tensor:
        """Returns the stream [B, T, D] after this block; writes places `start` on of the cache,
        looks at the first `seen`."""
        tokens = stream.shape[1]
        parts = self.qkv(self.attention_norm(stream)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, keys[:, :, start : start + tokens], values[:, :, start : start + tokens] = parts
        mask = None
        if tokens > 1:
            places = torch.arange(seen, device=stream.device)
            mask = places[None, :] <= places[start : start + tokens, None]
        mixed = F.scaled_dot_product_attention(query, keys[:, :, :seen], values[:, :, :seen], attn_mask=mask)
        stream = stream + self.out(mixed.transpose(1, 2).flatten(-2))
        return stream + self.down(F.gelu(self.up(self.feed_norm(stream)), approximate="tanh"))


class Model(torch.nn.Module):
    """The transformer, random weights. Before each block of `spec.layers` stands an Engram layer."""

    def __init__(self, shape: Shape, spec: HashSpec, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        with torch.device(device):
            torch.manual_seed(seed)
            self.tokens = torch.nn.Embedding(spec.vocab_size, shape.hidden, dtype=dtype)
            self.blocks = torch.nn.ModuleList(Block(shape, dtype) for _ in range(shape.blocks))
            self.engrams = torch.nn.ModuleDict(
                {str(n): EngramLayer(torch.nn.Identity(), FEATURES, shape.hidden, 1, dtype=dtype) for n in spec.layers}
            )
            self.norm = torch.nn.LayerNorm(shape.hidden, dtype=dtype)
        self.num_weights = sum(weight.numel() for weight in self.parameters())
        with torch.no_grad():
            for weight in self.parameters():
                if weight.ndim == 2 and len(weight) > 1:  # matrices; norms, of one branch, stay at 1
                    weight.normal_(std=WEIGHT_SCALE)

    def run(self, embeddings: Sequence[torch.nn.Module], pieces: Sequence[Piece], cache: Cache) -> torch.Tensor:
        """Returns the last token's logits, [B, V], of pieces that follow each other;
        lookups run ahead by one (`Queue`)."""
        queue = Queue(embeddings, pieces)
        for engram, embedding in zip(self.engrams.values(), embeddings, strict=True):
            engram.embedding = Queued(embedding, queue)
        queue.start_next()
        for piece in pieces:
            stream = self.tokens(piece.token_ids)
            for number, block in enumerate(self.blocks):
                if str(number) in self.engrams:
                    engram = self.engrams[str(number)]
                    stream = stream + engram(stream.unsqueeze(2), piece.token_ids, piece.history).squeeze(2)
                stream = block(stream, cache.keys[number], cache.values[number], piece.start, piece.seen)
        return F.linear(self.norm(stream[:, -1]), self.tokens.weight)


class Queue:
    """The lookups of some pieces in the order in which a model wants them,
    each started when the one before it was taken.

    So the disk works for the layer that comes next, and for that alone. As one request of both layers the first one's
    rows came after twice the time, and two requests at once wait for places in the disk's queue, on the model's thread.
    """

    def __init__(self, embeddings: Sequence[torch.nn.Module], pieces: Sequence[Piece]) -> None:
        wanted = [(embedding, piece) for piece in pieces for embedding in embeddings]
        self._left = iter([(e, piece) for e, piece in wanted if isinstance(e, TieredEmbedding)])

    def start_next(self) -> None:
        """Starts the next lookup, where there is one: embeddings that hold their rows have nothing to start."""
        for embedding, piece in itertools.islice(self._left, 1):
            embedding.prefetch(piece.token_ids, piece.history)


class Queued(torch.nn.Module):
    """An embedding that starts the queue's next lookup as soon as it has its own rows."""

    def __init__(self, embedding: torch.nn.Module, queue: Queue) -> None:
        super().__init__()
        self.embedding, self.queue = embedding, queue

    def forward(
        self, token_ids: torch.Tensor, history: torch.Tensor | None, dead: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns what the embedding returns."""
        rows: torch.Tensor = self.embedding(token_ids, history, dead)
        self.queue.start_next()
        return rows


def look_up(embeddings: Sequence[torch.nn.Module], pieces: Sequence[Piece]) -> torch.Tensor:
    """Does the lookups of `Model.run` and nothing else, in the fastest way: both layers' as one request, the next
    piece's meanwhile. Returns the last token's last row of each sequence, [B, dim]."""
    tiered = [embedding for embedding in embeddings if isinstance(embedding, TieredEmbedding)]
    prefetch_layers(tiered, pieces[0].token_ids, pieces[0].history)
    for number, piece in enumerate(pieces):
        for wanted in pieces[number + 1 : number + 2]:
            prefetch_layers(tiered, wanted.token_ids, wanted.history)
        for embedding in embeddings:
            rows: torch.Tensor = embedding(piece.token_ids, piece.history)
    return rows[:, -1, -1]
