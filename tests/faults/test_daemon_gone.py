"""The daemon dies, ends, comes back with more, less, or another store: no lookup fails meanwhile, and none is wrong."""

from __future__ import annotations

import contextlib
import queue
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.daemon_peers import noted_warnings
from support.served import KIB, MIB, ServeProcess, Traffic, other_model, request, serving
from support.stores import Model, place_some, random_keys
from support.waiting import eventually

import tierstore
from tierstore.attached.engine import AttachedEngine

BACK_S = 30.0  # clients look for a daemon once a second; on a busy machine it takes longer until they are attached
NAME = "layers.1"
KEYS = random_keys(np.random.default_rng(0), 120, distinct=60)
OPTIONS = ("--dram", "900KiB", "--replan", "off")


@pytest.fixture(scope="module")
def expected(model: Model) -> np.ndarray:
    return model.expected(NAME, KEYS)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return other_model(tmp_path_factory.mktemp("other"))


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "socket"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "ended"])
def test_lookups_go_on_while_the_daemon_is_gone_and_it_is_found_again(
    placed: Path, socket: Path, expected: np.ndarray, number: signal.Signals
) -> None:
    with ServeProcess(placed, socket, *OPTIONS) as daemon, tierstore.connect(socket) as store:
        with Traffic(store, NAME, KEYS, expected) as traffic:
            for _ in range(2):
                traffic.go_on()
                assert daemon.end(number) == (0 if number == signal.SIGTERM else -number), daemon.text
                eventually(lambda: not store.stats()["attached"]["now"])
                before = store.stats()
                traffic.go_on()
                without = store.stats()
                assert without["hits"]["dram"] > before["hits"]["dram"]  # what is mapped still answers
                daemon.__exit__()
                daemon = ServeProcess(placed, socket, *OPTIONS)
                eventually(lambda: store.stats()["attached"]["now"], BACK_S)
                traffic.go_on()
                least = without["keys"] - before["keys"]
                assert store.stats()["keys"] > without["keys"]  # counted on, over all engines
                eventually(
                    lambda least=least: request(socket, "stat")["counters"]["keys"] > least
                )  # what no daemon was told of, it is now
        asked = store.stats()
        assert asked["keys"] == sum(asked["hits"].values()) == sum(sum(o.values()) for o in orders_of(asked))
        assert daemon.end() == 0


def orders_of(stats: dict[str, Any]) -> list[dict[str, int]]:
    return [hits for table in stats["tables"].values() for hits in table["orders"].values()]


@pytest.mark.parametrize(
    "again",
    [
        {"dram_bytes": 600 * KIB},
        {"dram_bytes": 16 * MIB},
        {"dram_bytes": 900 * KIB, "placement": "none"},
        {"dram_bytes": 900 * KIB, "placement": 1},
    ],
    ids=["less", "all resident", "no placement", "older placement"],
)
def test_a_daemon_that_comes_back_otherwise_is_used_as_it_is(
    own_store: Path, socket: Path, model: Model, expected: np.ndarray, again: dict[str, Any]
) -> None:
    place_some(own_store, part=0.9)
    place_some(own_store, part=0.3)
    with contextlib.ExitStack() as stack:
        with serving(own_store, socket, 900 * KIB):
            store = stack.enter_context(tierstore.connect(socket))
            traffic = stack.enter_context(Traffic(store, NAME, KEYS, expected))
            traffic.go_on()
            assert store.stats()["placement"] == {"epoch": 2}
        traffic.go_on()
        with serving(own_store, socket, **again):
            eventually(lambda: store.stats()["attached"]["now"], BACK_S)
            traffic.go_on()
            stats = store.stats()
            assert stats["placement"]["epoch"] == {"none": None}.get(
                again.get("placement", 2), again.get("placement", 2)
            )
            assert stats["memory"]["budget_bytes"] == again["dram_bytes"]
            keys = random_keys(np.random.default_rng(5), 300)
            np.testing.assert_array_equal(store["layers.14"].lookup(keys), model.expected("layers.14", keys))
            if again["dram_bytes"] > MIB:
                assert set(store[NAME].explain(KEYS).flat) <= {"none", "resident"}
            traffic.go_on()


def test_a_daemon_that_comes_back_with_another_version_serves_that(
    built: Path, socket: Path, tmp_path: Path, expected: np.ndarray, other: Model
) -> None:
    other.build(tmp_path / "newer")
    newer = other.expected(NAME, KEYS)
    with contextlib.ExitStack() as stack:
        with serving(built, socket, 900 * KIB):
            store = stack.enter_context(tierstore.connect(socket))
            traffic = stack.enter_context(Traffic(store, NAME, KEYS, expected, newer))
            traffic.go_on()
        traffic.go_on()
        assert set(traffic.seen) == {0}
        with serving(tmp_path / "newer", socket, 900 * KIB):
            eventually(lambda: store.stats()["attached"]["now"], BACK_S)
            traffic.go_on()
            np.testing.assert_array_equal(store[NAME].lookup(KEYS), newer)


def test_versions_of_two_daemons_are_never_the_same_and_rows_by_id_never_of_both(
    built: Path, socket: Path, tmp_path: Path, model: Model, other: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    other.build(tmp_path / "newer")
    ids = model.row_ids(NAME, KEYS)
    ids[::2, 3] = 7  # no token's: read one by one, after the tokens
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(contextlib.ExitStack())
        first.enter_context(serving(built, socket, 900 * KIB))
        store = stack.enter_context(tierstore.connect(socket))
        engine, number = store._engine, store.version

        def after_a_restart(*arguments: Any) -> None:
            if store.version == number:
                first.close()
                stack.enter_context(serving(tmp_path / "newer", socket, 900 * KIB))
                eventually(lambda: store.version not in (number, -1))
            AttachedEngine.rows(engine, *arguments)

        monkeypatch.setattr(engine, "rows", after_a_restart)
        expected = np.where((ids >= 0)[..., None], other.rows[NAME][ids], 0)
        np.testing.assert_array_equal(store[NAME].rows(ids), expected)


def test_a_daemon_that_comes_back_with_another_hash_is_refused_and_the_old_rows_go_on(
    built: Path, socket: Path, tmp_path: Path, expected: np.ndarray
) -> None:
    stranger = other_model(tmp_path / "stranger", fingerprint="e" * 64)
    stranger.build(tmp_path / "store")
    with contextlib.ExitStack() as stack:
        warnings = stack.enter_context(noted_warnings())
        with serving(built, socket, 900 * KIB):
            store = stack.enter_context(tierstore.connect(socket))
            traffic = stack.enter_context(Traffic(store, NAME, KEYS, expected))
            traffic.go_on()
        with serving(tmp_path / "store", socket, 900 * KIB):
            said = eventually(lambda: next((line for line in read_all(warnings) if "not attached yet" in line), None))
            assert f"fingerprint is {1:064x}" in said
            assert "e" * 64 in said
            assert "connect again" in said
            traffic.go_on()
            assert not store.stats()["attached"]["now"]
            with tierstore.connect(socket) as fresh:  # who comes new has the new tables
                assert fresh[NAME].spec.fingerprint == "e" * 64
        with serving(built, socket, 900 * KIB):
            eventually(lambda: store.stats()["attached"]["now"], BACK_S)
            traffic.go_on()


def read_all(lines: queue.Queue[str]) -> Iterator[str]:
    with contextlib.suppress(queue.Empty):
        while True:
            yield lines.get_nowait()


def test_a_store_that_was_built_anew_in_place_is_never_mixed_with_the_old(
    own_store: Path, socket: Path, expected: np.ndarray, other: Model
) -> None:
    newer = other.expected(NAME, KEYS)
    with contextlib.ExitStack() as stack:
        with serving(own_store, socket, 900 * KIB):
            store = stack.enter_context(tierstore.connect(socket))
            traffic = stack.enter_context(Traffic(store, NAME, KEYS, expected, newer))
            traffic.go_on()
            shutil.rmtree(own_store)
            other.build(own_store, shard_bytes=65536)
            traffic.go_on()
            assert set(traffic.seen) == {0}  # what is open is the old
            with pytest.raises(tierstore.DaemonError, match="is not the store that the daemon opened"):
                tierstore.connect(socket)
        with serving(own_store, socket, 900 * KIB):
            eventually(lambda: store.stats()["attached"]["now"], BACK_S)
            traffic.go_on(3)
            np.testing.assert_array_equal(store[NAME].lookup(KEYS), newer)


def test_a_client_that_is_dropped_attaches_again_and_is_not_counted_twice(
    built: Path, socket: Path, expected: np.ndarray
) -> None:
    with serving(built, socket, 900 * KIB) as daemon:
        store = tierstore.connect(socket)
        for _ in range(3):
            np.testing.assert_array_equal(store[NAME].lookup(KEYS), expected)
            asked = store.stats()["keys"]
            eventually(lambda asked=asked: daemon.stat().counters.keys == asked)
            (peer,) = daemon._host.attachments.clients()
            peer.drop("this is a test")
            eventually(lambda peer=peer: daemon._host.attachments.clients() not in ([peer], []))
        np.testing.assert_array_equal(store[NAME].lookup(KEYS), expected)
        asked = store.stats()["keys"]
        eventually(lambda: store.stats()["attached"]["now"])
        store.close()
        eventually(lambda: daemon.stat().clients.attached == 0)
        assert daemon.stat().counters.keys == asked == 4 * int((KEYS >= 0).sum())


def test_a_store_that_is_closed_while_its_daemon_is_gone_ends_soon(built: Path, socket: Path) -> None:
    with serving(built, socket, 900 * KIB):
        store = tierstore.connect(socket)
    eventually(lambda: not store.stats()["attached"]["now"])
    started = time.monotonic()
    store.close()
    assert time.monotonic() - started < BACK_S
    with pytest.raises(tierstore.StoreNotReadyError):
        store[NAME].lookup(KEYS)
