"""Processes that fork or are spawned beside a daemon: each is a client of its own, whatever becomes of its parent."""

from __future__ import annotations

import json
import multiprocessing
import os
import select
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.daemon_peers import in_child
from support.repository import REPOSITORY, TESTS
from support.served import ServeProcess, Traffic, request
from support.stores import Model, random_keys
from support.waiting import WAIT_S, eventually

import tierstore

KEYS = random_keys(np.random.default_rng(0), 120, distinct=40)
NAME = "layers.1"


@pytest.fixture(scope="module")
def expected(model: Model) -> np.ndarray:
    return model.expected(NAME, KEYS)


@pytest.fixture(scope="module")
def socket(placed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("forks") / "socket"
    with ServeProcess(placed, path, "--dram", "900KiB", "--replan", "off"):
        yield path


@pytest.fixture
def store(socket: Path) -> Iterator[tierstore.Store]:
    with tierstore.connect(socket) as opened:
        yield opened
    eventually(lambda: clients(socket) == [])


def clients(socket: Path) -> list[int]:
    """Process ids of the attached clients."""
    return [client["pid"] for client in request(socket, "stat")["clients"]["list"]]


def is_right(store: tierstore.Store, expected: np.ndarray) -> bool:
    return all(np.array_equal(store[NAME].lookup(KEYS), expected) for _ in range(3))


def test_a_forked_child_is_a_client_of_its_own(store: tierstore.Store, socket: Path, expected: np.ndarray) -> None:
    assert is_right(store, expected)

    def act() -> str:
        right = is_right(store, expected)
        stats = store.stats()
        return json.dumps([right, stats["keys"], stats["attached"]["now"], os.getpid() in clients(socket)])

    before = store.stats()["keys"]
    num_keys = int((KEYS >= 0).sum())
    assert json.loads(in_child(act)) == [True, 3 * num_keys, True, True]  # it counts its own, not its parent's
    assert store.stats()["keys"] == before
    eventually(lambda: clients(socket) == [os.getpid()])
    assert is_right(store, expected)


def test_a_client_that_cannot_be_made_ready_for_a_fork_holds_no_lock(
    store: tierstore.Store, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise MemoryError

    engine: Any = store._engine
    with monkeypatch.context() as failing:
        failing.setattr(engine._link.engine, "before_fork", fail)
        with pytest.raises(MemoryError):
            engine.before_fork()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(engine._lock.acquire, blocking=False).result(WAIT_S)
        pool.submit(engine._lock.release).result(WAIT_S)
    assert is_right(store, expected)


def test_children_of_a_busy_parent_are_right_and_so_is_it(
    store: tierstore.Store, socket: Path, expected: np.ndarray
) -> None:
    with Traffic(store, NAME, KEYS, expected) as traffic:
        for _ in range(8):
            assert in_child(lambda: str(is_right(store, expected))) == "True"
            traffic.go_on(2)
    assert clients(socket) == [os.getpid()]


def test_a_child_lives_on_attached_when_its_parent_is_gone(socket: Path, expected: np.ndarray) -> None:
    read, write = os.pipe()

    def act() -> str:
        store = tierstore.connect(socket)
        store[NAME].lookup(KEYS)
        parent = os.getpid()
        if os.fork():
            os._exit(0)  # with its threads, and without a word
        eventually(lambda: os.getppid() != parent)
        right = is_right(store, expected)
        eventually(lambda: parent not in clients(socket))
        os.write(write, json.dumps([right, os.getpid() in clients(socket), is_right(store, expected)]).encode())
        os._exit(0)

    in_child(act)
    os.close(write)
    with open(read) as pipe:
        assert json.loads(pipe.read()) == [True, True, True]


def test_a_child_that_only_closes_leaves_its_parent_attached(
    store: tierstore.Store, socket: Path, expected: np.ndarray
) -> None:
    assert is_right(store, expected)
    attached_s = request(socket, "stat")["clients"]["list"][0]["attached_s"]

    def act() -> str:
        store.close()
        with pytest.raises(tierstore.StoreNotReadyError):
            store[NAME].lookup(KEYS)
        return "closed"

    assert in_child(act) == "closed"
    assert is_right(store, expected)
    (client,) = request(socket, "stat")["clients"]["list"]
    assert client["pid"] == os.getpid()
    assert client["attached_s"] > attached_s  # the same connection
    assert store.stats()["attached"]["now"]


def test_a_child_forked_without_a_daemon_answers_and_attaches_when_it_is_back(
    placed: Path, tmp_path: Path, expected: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "socket"
    daemon = ServeProcess(placed, path, "--dram", "900KiB")
    with daemon, tierstore.connect(path) as store:
        assert is_right(store, expected)
        daemon.process.kill()
        daemon.process.wait(WAIT_S)
        eventually(
            lambda: "not attached yet" in caplog.text
        )  # a fork in the middle of a thread's log leaves its stream locked
        alone, wait_alone = os.pipe()
        back, say_back = os.pipe()

        def act() -> str:
            right = is_right(store, expected)
            sources = set(store[NAME].explain(KEYS).flat)
            detached = not store.stats()["attached"]["now"]
            os.write(wait_alone, b".")
            os.read(back, 1)
            eventually(lambda: store.stats()["attached"]["now"])
            told = json.dumps(
                [right, detached, "static" in sources, is_right(store, expected), os.getpid() in clients(path)]
            )
            store.close()
            return told

        with ThreadPoolExecutor(1) as pool:
            said = pool.submit(in_child, act)
            eventually(lambda: said.done() or select.select([alone], [], [], 0)[0])
            with ServeProcess(placed, path, "--dram", "900KiB"):
                os.write(say_back, b".")
                assert json.loads(said.result(WAIT_S)) == [True, True, True, True, True]
                eventually(lambda: store.stats()["attached"]["now"])
                assert is_right(store, expected)
        for fd in (alone, wait_alone, back, say_back):
            os.close(fd)


def look_up_and_tell(socket: str, expected: np.ndarray, told: multiprocessing.Queue) -> None:
    with tierstore.connect(socket) as store:
        told.put((is_right(store, expected), os.getpid() in clients(Path(socket))))


def test_spawned_processes_attach_by_themselves(
    socket: Path, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(REPOSITORY)  # where the processes find this file, as tests.attached.test_forks
    monkeypatch.syspath_prepend(TESTS)
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    processes = [context.Process(target=look_up_and_tell, args=(str(socket), expected, told)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [told.get(timeout=WAIT_S) for _ in processes] == [(True, True)] * 2
    for process in processes:
        process.join(WAIT_S)
        assert process.exitcode == 0


def test_more_clients_than_are_allowed_are_refused_by_name(placed: Path, tmp_path: Path, expected: np.ndarray) -> None:
    with (
        ServeProcess(placed, tmp_path / "s", "--dram", "900KiB", "--clients", "1"),
        tierstore.connect(tmp_path / "s") as store,
    ):
        with pytest.raises(tierstore.DaemonError, match="1 "):
            tierstore.connect(tmp_path / "s")
        assert in_child(lambda: str(is_right(store, expected))) == "True"  # refused too, and so by itself
        assert is_right(store, expected)
