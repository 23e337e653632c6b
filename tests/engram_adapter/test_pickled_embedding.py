"""An embedding that is pickled takes the way to its store along: where it arrives, the store is opened or attached."""

from __future__ import annotations

import gc
import io
import multiprocessing
import operator
import pickle
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from support.served import least_budget, request, serving
from support.tiny_store import build_tiny, tiny_hash

import tierstore
from engram_adapter import RowIdEmbedding, TieredEmbedding
from tests.engram_adapter.test_embedding import tokens
from tierstore.errors import ConfigError, FingerprintMismatchError, StoreNotReadyError

WORKER_S = 120


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return build_tiny(tmp_path, tiny_hash(), "bf16", seed=3)[0]


@pytest.fixture(scope="module")
def spawned() -> Iterator[ProcessPoolExecutor]:
    """A worker that shares nothing with this process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def modules_over(store: tierstore.Store) -> torch.nn.ModuleList:
    modules = torch.nn.ModuleList([TieredEmbedding(store, 1, tiny_hash()), RowIdEmbedding(store, 1, head_offsets=True)])
    modules[1].stands_for_weight = True
    return modules.eval()


def check_in(worker: ProcessPoolExecutor, modules: torch.nn.ModuleList) -> None:
    """Calls each module here and in a worker, which gets it pickled, and compares."""
    for module, ids in zip(modules, (tokens(2, 9, seed=1), torch.arange(8)), strict=True):
        got = worker.submit(operator.call, module, ids).result(WORKER_S)
        assert torch.equal(got, module(ids))


def test_a_worker_that_is_spawned_opens_the_store(path: Path, spawned: ProcessPoolExecutor) -> None:
    with tierstore.open(path, dram="192KiB") as store:
        check_in(spawned, modules_over(store))


def test_a_worker_attaches_to_the_daemon(path: Path, tmp_path: Path, spawned: ProcessPoolExecutor) -> None:
    socket = tmp_path / "s"
    with serving(path, socket, least_budget(path)), tierstore.connect(socket) as store:
        check_in(spawned, modules_over(store))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_in_its_own_process_an_unpickled_embedding_has_the_same_store(path: Path, protocol: int) -> None:
    with tierstore.open(path, dram="192KiB") as store:
        again = pickle.loads(pickle.dumps(modules_over(store), protocol))
        assert again[0]._store is store
        assert not again.training
        assert again[1].stands_for_weight
        file = io.BytesIO()
        torch.save(again, file)
        file.seek(0)
        assert torch.load(file, weights_only=False)[1]._store is store


def test_a_pickle_holds_no_row_and_carries_the_options(path: Path) -> None:
    with tierstore.open(path, dram="192KiB", io="pread") as store:
        sent = pickle.dumps(modules_over(store))
    assert len(sent) < 20_000
    del store
    gc.collect()
    again = pickle.loads(sent)
    assert again[0]._store is again[1]._store is pickle.loads(sent)[0]._store
    stats = again[0]._store.stats()
    assert (stats["io"], stats["memory"]["budget_bytes"]) == ("pread", 192 << 10)


def removed(path: Path) -> None:
    shutil.rmtree(path)


def of_another_hash(path: Path) -> None:
    shutil.rmtree(path)
    build_tiny(path.parent, tiny_hash(compressed=41), "bf16", seed=3)


def of_other_weights(path: Path) -> None:
    shutil.rmtree(path)
    build_tiny(path.parent, tiny_hash(), "bf16", seed=4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (removed, StoreNotReadyError, "was pickled with the store at .*which this process cannot open: "),
        (of_another_hash, FingerprintMismatchError, r"table layers\.1 of the store at .* is not the one"),
        (
            of_other_weights,
            ConfigError,
            r"the store at .* has other rows than .* is [0-9a-f]{16}\.\.\., and was [0-9a-f]{16}\.\.\. then; put",
        ),
    ],
)
def test_a_store_that_is_gone_or_another_is_named_where_it_is_unpickled(
    path: Path, change: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    with tierstore.open(path) as store:
        sent = pickle.dumps(modules_over(store))
    change(path)
    with pytest.raises(error, match=message):
        pickle.loads(sent)


def test_a_store_that_was_built_again_from_the_same_weights_is_opened(path: Path) -> None:
    with tierstore.open(path) as store:
        sent, expected = pickle.dumps(modules_over(store)), modules_over(store)[1](torch.arange(8))
    shutil.rmtree(path)
    build_tiny(path.parent, tiny_hash(), "bf16", seed=3)
    again = pickle.loads(sent)
    assert again[1]._store is not store
    assert torch.equal(again[1](torch.arange(8)), expected)


def test_what_a_daemon_swapped_since_is_followed_where_an_embedding_is_unpickled(path: Path, tmp_path: Path) -> None:
    (tmp_path / "newer").mkdir()
    newer, _ = build_tiny(tmp_path / "newer", tiny_hash(), "bf16", seed=4)
    socket, ids = tmp_path / "s", torch.arange(8)
    with serving(path, socket, 4 * least_budget(path)):
        with tierstore.connect(socket) as store:
            sent, before = pickle.dumps(modules_over(store)), modules_over(store)[1](ids)
        request(socket, "swap", store=str(newer))
        again = pickle.loads(sent)
        got = again[1](ids)
        again[0]._store.close()
    with tierstore.open(newer) as store:
        assert torch.equal(got, modules_over(store)[1](ids))
    assert not torch.equal(got, before)
