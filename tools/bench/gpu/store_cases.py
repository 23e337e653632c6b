"""Lookups through a small real store with an hbm tier: decoding in a replayed graph, misses by mailbox, a prompt of
known keys.

Input: a device, a clock, sizes, a folder. Output: figures, each with its bound where it has one. Values are compared
with what was built before anything is timed, and after misses: a wrong one raises `CheckError`.
"""

from __future__ import annotations

import gc
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tierstore
from engram_adapter import HashSpec
from tierstore.kernels import reference_gpu
from tierstore.kernels.gpu import keys as token_keys
from tierstore.offline.place import place_entries
from tierstore.offline.placement_file import Chosen

from .. import page_cache
from ..pairs import Figure
from ..stores import (
    BLOCK_ROWS,
    DIM,
    LAYER,
    ORDERS,
    ROW_BYTES,
    ROWS_PER_TOKEN,
    TABLE,
    V41_COMPRESSED_VOCAB,
    V41_VOCAB,
    MadeStore,
    fresh_keys,
    temporary_store,
    v41_hash,
)
from .cases import VALUES, Scale
from .clock import Clock, Launch
from .tables import NUM_ORDERS, CheckError, check_same, patterns, wait_for

DECODE_BOUND_US = 10.0  # a layer's keys, lookup, post, wait and scatter
ALLOCATED_UNIT = 512  # torch gives out memory in multiples of it
PREFILL_MISSED = 10  # one key in so many, where a prompt misses some
RECENT_SETS = 8  # of keys that are in the recency cache, by turns
HISTORY = ORDERS[-1] - 1


class _PlacedText:
    """What the cases look up: a text whose n-grams a store has placed first; and checks of values that come back."""

    made: MadeStore
    hash_spec: HashSpec
    store: tierstore.Store

    def __init__(
        self,
        device: torch.device,
        clock: Clock,
        scale: Scale,
        random: np.random.Generator,
        rounds: int,
        facts: dict[str, Any],
    ) -> None:
        """facts: what is added to as cases are measured."""
        self.device, self.clock, self.scale, self.random, self.rounds = device, clock, scale, random, rounds
        self.facts = facts

    def _place(self) -> None:
        """Places every n-gram of a random text, then random keys; the text's come first, and so into HBM."""
        num_tokens = self.scale.tokens + HISTORY
        self.text = self.random.integers(0, V41_VOCAB, (1, num_tokens))
        self.text_keys = self.hash_spec.keys(self.text, LAYER)[0, HISTORY:]  # those of whole n-grams
        more = fresh_keys(self.random, -(-self.scale.placed // NUM_ORDERS))
        keys = np.concatenate([self.text_keys, more])
        pairs = np.stack([np.tile(np.arange(NUM_ORDERS), len(keys)), keys.reshape(-1)], axis=1)
        _, first = np.unique(pairs, axis=0, return_index=True)
        chosen = pairs[np.sort(first)][: self.scale.placed]
        place_entries(self.made.path, {TABLE: Chosen(chosen[:, 0].astype(np.uint8), chosen[:, 1].copy(), 0.5)})

    def _batch(self, num_tokens: int, num_missed: int) -> np.ndarray:
        """Returns keys of the text, int64 [N, O], but for the first `num_missed` pairs, which nobody has asked for."""
        keys = self.text_keys[self.random.integers(len(self.text_keys), size=num_tokens)]
        keys.reshape(-1)[:num_missed] = fresh_keys(self.random, num_tokens).reshape(-1)[:num_missed]
        return keys

    def _prompt(self) -> np.ndarray:
        """Returns the text's keys, some of them replaced by such as nobody has asked for."""
        missed = self.random.random(self.text_keys.shape) < 1 / PREFILL_MISSED
        return np.where(missed, fresh_keys(self.random, len(missed)), self.text_keys)

    def _device_hash(self) -> token_keys.DeviceHash:
        spec, token_map = self.hash_spec, self.hash_spec.kernel_token_map
        assert token_map is not None
        assert spec.pad_id is not None
        multipliers = torch.tensor(spec.multipliers(LAYER), dtype=torch.int64, device=self.device)
        barrier_id = -1 if spec.barrier_id is None else spec.barrier_id
        map_there = torch.from_numpy(token_map.copy()).to(self.device)
        return token_keys.DeviceHash(map_there, spec.vocab_size, multipliers, spec.orders, spec.pad_id, barrier_id)

    def _values(self, num_tokens: int) -> torch.Tensor:
        """Returns a poisoned output, bfloat16 [N, O * H, DIM]."""
        shape = (num_tokens, ROWS_PER_TOKEN, DIM)
        return torch.full(shape, 0x5A5A, dtype=torch.int16, device=self.device).view(torch.bfloat16)

    def _check_values(self, what: str, out: torch.Tensor, keys: np.ndarray) -> None:
        """Compares values on the device with what was built, bit by bit."""
        wait_for(self.device)
        row_ids = self.made.spec.row_ids(keys).reshape(-1)
        expected = reference_gpu.decode_rows(self.made.block[row_ids % BLOCK_ROWS], VALUES)
        check_same(f"{what}: values", patterns(out).reshape(expected.shape), expected)

    def _check_steps(self, lookup: Any) -> None:
        """Raises what went wrong in a step; none must have met an id outside the vocabulary."""
        wait_for(self.device)
        lookup.check()
        check_same("the place of an id outside the vocabulary", [lookup.take_invalid_token_position()], [0])


class StoreCases(_PlacedText):
    """The cases that need a store: half of what is placed is text, so that decoding meets it."""

    def figures(self, folder: Path) -> Generator[tuple[str, list[Figure]], None, None]:
        """Yields what was measured, and its figures. Makes the store in a folder under `folder`, and removes it."""
        token_map = self.random.permutation(np.arange(V41_VOCAB) % V41_COMPRESSED_VOCAB).astype(np.int32)
        with temporary_store(folder, self.scale.table_bytes // ROW_BYTES, token_map) as self.made:
            self.hash_spec = v41_hash(max(16, self.scale.table_bytes // ROW_BYTES // ROWS_PER_TOKEN), token_map)
            self._place()
            gc.collect()
            before = self.clock.allocated_bytes()
            dram, hbm, device = self.scale.dram, self.scale.hbm, str(self.device)
            with tierstore.open(self.made.path, dram=dram, hbm=hbm, device=device) as self.store:
                wait_for(self.device)
                yield "bytes of HBM", self._bytes(self.clock.allocated_bytes() - before)
                yield "decoding in a replayed graph", self._decode()
                yield "misses by mailbox", self._misses()
                yield "prompts whose keys the host knows", self._prefill()
                self.facts["pages are read by"] = self.store.stats()["io"]
                self.facts["share of the shards in the page cache"] = page_cache.residency(self.made.files)

    def _bytes(self, allocated_bytes: int) -> list[Figure]:
        """What opening the store took of the device, beside what the store says and what it was allowed."""
        memory = self.store.stats()["memory"]
        budget_bytes = memory["hbm_budget_bytes"]
        counted_bytes = -(-memory["hbm_bytes"] // ALLOCATED_UNIT) * ALLOCATED_UNIT
        return [
            Figure("bytes of HBM that opening took, beside the budget", "bytes", [allocated_bytes], budget_bytes),
            Figure("the same, beyond or short of what stats says", "bytes", [abs(allocated_bytes - counted_bytes)], 0),
        ]

    def _decode(self) -> list[Figure]:
        """Keys, lookup, post, wait and scatter of one token a sequence, many layers in a graph, nothing missed."""
        lookup, device_hash = self.store.open_lookup(TABLE, max(self.scale.decode_tokens)), self._device_hash()
        figures = []
        for num_tokens in self.scale.decode_tokens:
            launches = [self._layer(lookup, device_hash, num_tokens) for _ in range(self.scale.layers)]
            timed = self.clock.in_graph(launches, self.clock.flush)
            values = [timed() * 1e6 for _ in range(self.rounds)]
            case = f"decoding, {num_tokens} tokens, all in HBM, replayed graph of {len(launches)} layers"
            figures.append(Figure(case, "us a layer", values, DECODE_BOUND_US))
        self._check_steps(lookup)
        return [*figures, Figure("requests to the host meanwhile", "requests", [lookup.num_requests()], 0)]

    def _layer(self, lookup: Any, device_hash: token_keys.DeviceHash, num_tokens: int) -> Launch:
        """A layer's lookup of the text's n-grams that end at random places, after it was compared once."""
        ends = self.random.integers(HISTORY, self.text.shape[1], num_tokens)
        ids = torch.from_numpy(self.text[0, ends][:, None].copy()).to(self.device)
        history = torch.from_numpy(self.text[0, ends[:, None] + np.arange(-HISTORY, 0)].copy()).to(self.device)
        keys = torch.full((num_tokens, 1, NUM_ORDERS), -77, dtype=torch.int64, device=self.device)
        out = self._values(num_tokens)

        def launch() -> None:
            token_keys.keys_of_tokens(ids, history, None, device_hash, keys, lookup.invalid_token_position)
            lookup.start(keys.view(-1, NUM_ORDERS), out)
            lookup.finish()

        launch()
        self._check_values("decoding", out, self.text_keys[ends - HISTORY])
        return launch

    def _misses(self) -> list[Figure]:
        """Steps in which some keys are not on the device, from the first launch to the last value."""
        tokens_max = -(-max(self.scale.misses) // NUM_ORDERS)
        lookup = self.store.open_lookup(TABLE, tokens_max)
        figures = []
        page_cache.drop(self.made.files)
        for count in self.scale.misses:
            recent = [self._batch(-(-count // NUM_ORDERS), count) for _ in range(RECENT_SETS)]
            for keys in recent * 2:
                self.store[TABLE].lookup(keys)
            found = np.stack([self.store[TABLE].explain(keys) for keys in recent]).reshape(RECENT_SETS, -1)[:, :count]
            self.facts[f"of {count} misses, in the recency cache"] = float((found == "recency").mean())
            for where in ("DRAM's recency cache", "NVMe"):
                values = self._step(lookup, count, recent if where != "NVMe" else None)
                figures.append(Figure(f"a step with {count} misses, answered from {where}", "us", values))
        return figures

    def _step(self, lookup: Any, count: int, recent: list[np.ndarray] | None) -> list[float]:
        """Microseconds of steps with `count` misses: of recent batches by turns, else of keys never asked for."""
        num_tokens = -(-count // NUM_ORDERS)
        out, number = self._values(num_tokens), 0
        keys = torch.full((num_tokens, NUM_ORDERS), -1, dtype=torch.int64, device=self.device)
        given = np.full(keys.shape, -1)

        def next_keys() -> None:
            nonlocal given, number
            given = self._batch(num_tokens, count) if recent is None else recent[number % len(recent)]
            number += 1
            keys.copy_(torch.from_numpy(given))

        def launch() -> None:
            lookup.start(keys, out)
            lookup.finish()

        asked = lookup.num_requests()
        timed = self.clock.in_graph([launch], next_keys)
        values = [timed() * 1e6 for _ in range(self.rounds)]
        self._check_steps(lookup)
        self._check_values(f"a step with {count} misses", out, given)
        if lookup.num_requests() - asked < number:
            raise CheckError(f"{number} steps with {count} misses asked the host {lookup.num_requests() - asked} times")
        return values

    def _prefill(self) -> list[Figure]:
        """A whole prompt's lookup, from the host's call to the last value on the device."""
        lookup = self.store.open_lookup(TABLE, self.scale.tokens)
        out = self._values(self.scale.tokens)
        recent, fresh = self._prompt(), self._prompt()
        for _ in range(2):
            self.store[TABLE].lookup(recent)
        figures = []
        for what, given in (
            ("all in HBM", self.text_keys),
            ("one key in ten from DRAM's recency cache", recent),
            ("one key in ten from NVMe", fresh),
        ):
            keys = np.ascontiguousarray(given)

            def next_keys(keys: np.ndarray = keys, *, is_fresh: bool = given is fresh) -> None:
                if is_fresh:
                    keys[:] = self._prompt()

            def work(keys: np.ndarray = keys) -> None:
                for start in range(0, len(keys), lookup.tokens_max):
                    part = slice(start, start + lookup.tokens_max)
                    lookup.start_known(keys[part], out[part])
                    lookup.finish()

            timed = self.clock.on_host(work, next_keys)
            values = [timed() * 1e3 for _ in range(self.rounds)]
            self._check_values(f"a prompt, {what}", out, keys)
            figures.append(Figure(f"a prompt of {self.scale.tokens:,} tokens, keys known, {what}", "ms", values))
        self.facts["tokens of a prompt's parts"] = lookup.tokens_max
        return figures
