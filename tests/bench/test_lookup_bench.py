"""Microbenchmarks of one lookup, for `pytest --benchmark-only tests/bench`. In the suite each runs a few times:
it must work.

Figures to keep come from `tierstore bench`, where sides take turns.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import tierstore
from tierstore import Store
from tierstore.tools.bench import stores
from tierstore.tools.bench.stores import MadeStore

ROWS = 60_000
ROUNDS, WARM_UP_ROUNDS = 5, 1


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeStore:
    return stores.make_store(tmp_path_factory.mktemp("lookup"), ROWS)


@pytest.fixture(params=["cached", "resident", "pread"])
def store(made: MadeStore, request: pytest.FixtureRequest) -> Iterator[tuple[Store, str]]:
    """A store whose keys are in the entry cache, whose table is in memory whole, or whose keys are never cached."""
    budget = {"cached": "8MiB", "resident": "64MiB", "pread": "1MiB"}[request.param]
    with tierstore.open(made.path, dram=budget, io="pread") as opened:
        yield opened, request.param


@pytest.mark.parametrize("num_tokens", [1, 256])
def test_lookup(benchmark: BenchmarkFixture, made: MadeStore, store: tuple[Store, str], num_tokens: int) -> None:
    opened, kind = store
    generator = np.random.default_rng(0)
    table, out = opened[stores.TABLE], stores.rows_buffer(num_tokens)
    same = stores.fresh_keys(generator, num_tokens)

    def arguments() -> tuple[tuple[np.ndarray, np.ndarray], dict]:
        return (stores.fresh_keys(generator, num_tokens) if kind == "pread" else same, out), {}

    benchmark.pedantic(table.lookup, setup=arguments, rounds=ROUNDS, warmup_rounds=WARM_UP_ROUNDS)
    made.check(same, table.lookup(same))


def test_submit_and_wait(benchmark: BenchmarkFixture, made: MadeStore, store: tuple[Store, str]) -> None:
    opened, _ = store
    keys, out = stores.fresh_keys(np.random.default_rng(1), 64), stores.rows_buffer(64)
    benchmark.pedantic(lambda: opened.submit({stores.TABLE: (keys, out)}).wait(60), rounds=ROUNDS, warmup_rounds=1)
    made.check(keys, out)
