"""A million lookups by eight threads while entries are admitted and evicted: every row checked against the oracle."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from support.shapes import HEADS, POISON, ROW_BYTES
from support.stores import Model, random_keys

import tierstore

THREADS = 8
TOKENS_A_LOOKUP = 100
LOOKUPS = 1250  # of each thread: 8 * 1,250 * 100 tokens are a million
POOL_TOKENS = 3000


@pytest.mark.slow
def test_a_million_lookups_by_eight_threads_are_all_right(built: Path, model: Model) -> None:
    pool = random_keys(np.random.default_rng(0), POOL_TOKENS)
    expected = {name: model.expected(name, pool) for name in ("layers.1", "layers.14")}
    wrong: list[tuple[int, int]] = []

    def work(store: tierstore.Store, seed: int) -> None:
        rng = np.random.default_rng(seed)
        out = np.empty((TOKENS_A_LOOKUP, HEADS, ROW_BYTES), dtype=np.uint8)
        for number in range(LOOKUPS):
            name = ("layers.1", "layers.14")[int(rng.integers(2))]
            which = np.minimum(rng.zipf(1.2, TOKENS_A_LOOKUP) - 1, POOL_TOKENS - 1)
            which[:3] = rng.integers(0, POOL_TOKENS, 3)
            out[:] = POISON
            if number % 2:
                store[name].lookup(pool[which], out)
            else:
                store.submit({name: (pool[which], out)}).wait(timeout_s=60)
            if not np.array_equal(out, expected[name][which]):
                wrong.append((seed, number))

    with tierstore.open(built, dram="700KiB", io="mmap") as store:
        threads = [threading.Thread(target=work, args=(store, seed)) for seed in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=600)
            assert not thread.is_alive()
        hits = store.stats()["hits"]
    assert not wrong
    assert min(hits["dram"], hits["nvme"]) > 100_000  # both ways were walked, so entries came and went
