"""The sides of `tierstore bench overlap`, open, and the comparison of one model on all of them.

Input: tables, budgets, a model, text. Output: comparisons and figures. Every side has the same weights, rows and text;
what differs is where its rows are. Errors: `ConfigError` if the logits of two sides differ by a bit; that is checked
before anything is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

import tierstore
from engram_adapter import TieredEmbedding
from tierstore.errors import ConfigError
from tierstore.store.store import Store

from .. import page_cache
from ..pairs import SUBJECT, Comparison, Figure, Options, Result, interleave
from .model import Cache, Feed, Model, Piece, look_up
from .tables import Tables

SEQUENCES = 64
CONTEXT_TOKENS = 128  # in the cache of each sequence that decodes
STEPS = 5  # decode steps of a side in a round
CASES_MAX = 8  # each begins elsewhere in the text
PROMPT_TOKENS, CHUNK_TOKENS = 2048, 512  # prefill goes in chunks, as in serving engines
HISTORY = 3  # tokens before, one less than the largest order
LEAST_RATIO = 0.97
# A budget that keeps whole tables: staging takes 16 MiB at most, and what a GPU asks of the host a sixteenth,
# 256 MiB at most.
WHOLE_FACTOR, WHOLE_SPARE_BYTES = 1.15, 64 << 20
RESIDENT, HELD, ALONE = "tables on the device, bf16", "a store, all of it in DRAM", "lookup alone"


def hbm_for(device: str, dram_bytes: int) -> int | None:
    """Returns the bytes of the device's memory that tiered sides take: as much as the store has of DRAM;
    None on the CPU."""
    return None if device == "cpu" else dram_bytes


def open_store(path: Path, dram_bytes: int, device: str, hbm_bytes: int | None, placement: str | None = None) -> Store:
    """Opens a side's store, on a GPU with an hbm tier above it; placement "none": without one."""
    return tierstore.open(
        path, dram=dram_bytes, placement=placement, hbm=hbm_bytes, device=None if hbm_bytes is None else device
    )


class Sides:
    """The sides, open, and what they are measured with. The lookups of all sides are of the same tables and text."""

    def __init__(
        self, tables: Tables, dram_bytes: int, device: str, options: Options, result: Result, stack: ExitStack
    ) -> None:
        self.tables, self.device, self.options, self.result = tables, device, options, result
        hbm_bytes = hbm_for(device, dram_bytes)
        self.store = stack.enter_context(open_store(tables.path, dram_bytes, device, hbm_bytes))
        whole_bytes = int(tables.num_bytes * WHOLE_FACTOR) + WHOLE_SPARE_BYTES
        # On a GPU: a tenth in HBM, DRAM holding the rest; on the CPU a placement has nothing to add to whole tables.
        without = "none" if hbm_bytes is None else None
        whole = stack.enter_context(open_store(tables.path, whole_bytes, device, hbm_bytes, without))
        page_cache.drop(tables.files)
        layers = tables.spec.layers
        self._cases = 0
        self.sides: dict[str, Sequence[torch.nn.Module]] = {
            SUBJECT: [TieredEmbedding(self.store, layer, tables.spec) for layer in layers],
            RESIDENT: tables.resident(device),
            HELD: [TieredEmbedding(whole, layer, tables.spec) for layer in layers],
        }

    def warm_up(self, text: np.ndarray) -> None:
        """Looks text up in the store, so that its recency cache holds what it would hold in the long run."""
        look_up(self.sides[SUBJECT], Feed.of_prompts(text, len(text), CHUNK_TOKENS, HISTORY, self.device).next())

    def decode(self, name: str, model: Model, text: np.ndarray) -> None:
        """Adds what one token a step of many sequences costs; the sequences stand far apart in the text."""
        sequences = self.options.tokens or SEQUENCES
        text = self._fresh(text, sequences)
        cache = Cache(model.shape, sequences, CONTEXT_TOKENS, model.tokens.weight)
        feeds = [Feed.of_sequences(text, sequences, CONTEXT_TOKENS, HISTORY, self.device) for _ in range(2)]
        self._compare(f"{name}, decode, {sequences} sequences", model, cache, feeds, STEPS, sequences)

    def prefill(self, name: str, model: Model, text: np.ndarray) -> None:
        """Adds what a prompt costs."""
        tokens = min(PROMPT_TOKENS, len(text) // 2)
        text = self._fresh(text, 1)
        cache = Cache(model.shape, 1, tokens, model.tokens.weight)
        feeds = [Feed.of_prompts(text, tokens, CHUNK_TOKENS, HISTORY, self.device) for _ in range(2)]
        self._compare(f"{name}, prefill of {tokens:,} tokens", model, cache, feeds, 1, tokens)

    def _fresh(self, text: np.ndarray, sequences: int) -> np.ndarray:
        """Returns the text turned, so that `sequences` of it begin where those of no case before did: what those looked
        up lies in the store's cache. Long prompts still come by some tokens that steps of decode had."""
        self._cases += 1
        return np.roll(text, -(self._cases % CASES_MAX) * (len(text) // sequences // CASES_MAX))

    def _compare(self, case: str, model: Model, cache: Cache, feeds: list[Feed], steps: int, tokens: int) -> None:
        """Compares the sides' logits, then their times; the sides take turns at every step, and a round is `steps` of
        them.

        One feed is the store's, the other that of the sides that hold everything: the store goes through the text
        once, in order, and never finds in its cache what was read for another side.
        """
        own, others = feeds
        self._check(case, model, cache, own.next())

        def side(embeddings: Sequence[torch.nn.Module], feed: Feed) -> Callable[[], float]:
            return lambda: seconds_of(lambda pieces: model.run(embeddings, pieces, cache), feed.next())

        sides = {name: side(given, own if name == SUBJECT else others) for name, given in self.sides.items()}
        sides[ALONE] = lambda: seconds_of(lambda pieces: look_up(self.sides[SUBJECT], pieces), own.next())
        before = self.store.stats()
        turns = interleave(sides, self.options.pairs * steps)
        after = self.store.stats()
        seconds = {name: [sum(of[i : i + steps]) for i in range(0, len(of), steps)] for name, of in turns.items()}
        alone = seconds.pop(ALONE)
        self.result.comparisons.append(Comparison(case, "token", tokens * steps, seconds, {RESIDENT: LEAST_RATIO}))
        self._add_figures(case, seconds, alone, steps)
        keys, misses = after["keys"] - before["keys"], after["hits"]["nvme"] - before["hits"]["nvme"]
        self.result.facts[f"{case}: share of keys that hit"] = round(1 - misses / keys, 3)

    def _add_figures(self, case: str, seconds: dict[str, list[float]], alone: list[float], steps: int) -> None:
        def add(what: str, unit: str, values: list[float]) -> None:
            self.result.figures.append(Figure(f"{case}: {what}", unit, values))

        extra = [mine - other for mine, other in zip(seconds[SUBJECT], seconds[RESIDENT], strict=True)]
        add("a step, tables on the device", "ms", [1e3 * s / steps for s in seconds[RESIDENT]])
        add("a tiered lookup alone", "ms", [1e3 * s / steps for s in alone])
        add("what a step takes more with it", "ms", [1e3 * s / steps for s in extra])
        hidden = [100 * (1 - max(0.0, more) / whole) for more, whole in zip(extra, alone, strict=True)]
        add("part of the lookup that is hidden", "%", hidden)

    def _check(self, case: str, model: Model, cache: Cache, pieces: list[Piece]) -> None:
        """Raises `ConfigError` where a side's logits are not the others' bit for bit:
        a fast wrong answer is no figure."""
        logits = {}
        for name, embeddings in self.sides.items():
            cache.clear()
            logits[name] = model.run(embeddings, pieces, cache)
        for name, given in logits.items():
            if not torch.equal(given, logits[RESIDENT]) or not given.isfinite().all():
                raise ConfigError(
                    f"{case}: {name} gives {int((given != logits[RESIDENT]).sum())} of {given.numel()} logits other "
                    f"than {RESIDENT}; run tierstore verify {self.tables.path}"
                )


def seconds_of(work: Callable[[list[Piece]], torch.Tensor], pieces: list[Piece]) -> float:
    """Returns the seconds of work on pieces, until the largest value's place in each row
    of its outcome is known to the host."""
    started = time.perf_counter()
    work(pieces).argmax(dim=-1).cpu()
    return time.perf_counter() - started
