"""One process of `tierstore bench overlap --against OTHER`: a build feeds a small transformer from its tiers.

Input: a JSON object as the only argument: a store, text, shapes of models. Output: a line of JSON as `side.py` gives
it: seconds a token of each case. The text of this file runs under either build (`python -c`), beside a copy of
`overlap/model.py`, and calls only what commit 8498e4b has, too.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import overlap_model  # type: ignore[import-not-found]  # a copy of model.py, beside which this runs
import torch

import tierstore
from engram_adapter import HashSpec, TieredEmbedding

CHECKED_TOKENS = 256
WARM_UP_STEPS = 3


def measure(ask: dict[str, Any]) -> dict[str, Any]:
    """Runs the cases of `bench overlap` with one store; returns what they took."""
    text = np.load(ask["text"])
    with torch.inference_mode(), tierstore.open(ask["store"], dram=ask["dram_bytes"]) as store:
        spec = HashSpec.from_store(store)
        embeddings = [TieredEmbedding(store, layer, spec) for layer in spec.layers]
        warm = np.load(ask["warm"])
        prompts = overlap_model.Feed.of_prompts(warm, len(warm), ask["chunk"], ask["history"], "cpu")
        overlap_model.look_up(embeddings, prompts.next())
        checked = embeddings[0](torch.from_numpy(warm[:CHECKED_TOKENS])[None])
        checksum = zlib.crc32(checked.view(torch.uint8).numpy().tobytes())
        seconds: dict[str, float] = {}
        for number, (name, shape) in enumerate(ask["shapes"].items()):
            model = overlap_model.Model(overlap_model.Shape(*shape), spec, torch.float32, "cpu")
            turned = np.roll(text, -number * (len(text) // ask["sequences"] // len(ask["shapes"])))
            seconds[f"{name}, decode, {ask['sequences']} sequences"] = _decode(ask, model, embeddings, turned)
            if name == ask["prefilled"]:
                tokens = min(ask["prompt"], len(text) // 2)
                seconds[f"{name}, prefill of {tokens:,} tokens"] = _prefill(ask, model, embeddings, turned, tokens)
    build = {"package": str(Path(tierstore.__file__).parent), "version": tierstore.__version__}
    return {"build": build, "checksum": checksum, "missed": 0, "seconds": seconds, "skipped": {}}


def _decode(ask: dict[str, Any], model: Any, embeddings: list[Any], text: np.ndarray) -> float:
    sequences, context = ask["sequences"], ask["context"]
    cache = overlap_model.Cache(model.shape, sequences, context, model.tokens.weight)
    feed = overlap_model.Feed.of_sequences(text, sequences, context, ask["history"], "cpu")
    return _median(lambda pieces: model.run(embeddings, pieces, cache), feed, ask["steps"]) / sequences


def _prefill(ask: dict[str, Any], model: Any, embeddings: list[Any], text: np.ndarray, tokens: int) -> float:
    cache = overlap_model.Cache(model.shape, 1, tokens, model.tokens.weight)
    feed = overlap_model.Feed.of_prompts(text, tokens, ask["chunk"], ask["history"], "cpu")
    return _median(lambda pieces: model.run(embeddings, pieces, cache), feed, ask["prompts"]) / tokens


def _median(run: Callable[[Any], torch.Tensor], feed: Any, count: int) -> float:
    """Median seconds of what comes next in a feed; the first few steps do not count."""
    seconds = []
    for _ in range(WARM_UP_STEPS + count):
        pieces = feed.next()
        started = time.perf_counter()
        run(pieces).argmax(dim=-1)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_UP_STEPS:])


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(measure(json.loads(sys.argv[1]))) + "\n")
