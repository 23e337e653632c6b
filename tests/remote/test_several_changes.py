"""A store over several servers while they are killed, swapped, replanned and forked around: no wrong or mixed row."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.remote_servers import serving, serving_process
from support.repository import SUPPORT
from support.served import Traffic, request
from support.shapes import HEADS, POISON, ROW_BYTES
from support.sliced import build_slices, place_keys, serving_all
from support.stores import Model, make_model, random_keys
from support.trainable import make_trainable
from support.waiting import eventually

import tierstore
from tierstore.daemon.daemon import Daemon
from tierstore.daemon.remote_lookups import Remote
from tierstore.remote import cluster as remote_cluster
from tierstore.remote import member as remote_member
from tierstore.remote import set_keeper
from tierstore.remote.server import RemoteServer

KEYS = random_keys(np.random.default_rng(50), 120)
BUDGET = 2 * 120 * 3 * 400
NAME = "layers.1"


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Other rows of the same tables and hashes."""
    return make_model(tmp_path_factory.mktemp("newer"), seed=5)


@pytest.fixture(scope="module")
def paths(model: Model, newer: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Path]]:
    """Two slices of `model` and of `newer`, whose placements have half of KEYS. Tests must not change them."""
    folder = tmp_path_factory.mktemp("slices")
    return build_slices(model, folder / "a", 2, KEYS[:60]), build_slices(newer, folder / "b", 2, KEYS[:60])


class Changing:
    """Servers in this process, one a slice, whose stores can be changed for those of another version."""

    def __init__(self, versions: tuple[list[Path], ...], stack: contextlib.ExitStack) -> None:
        self._opened = [[stack.enter_context(tierstore.open(path, dram="600KiB")) for path in of] for of in versions]
        self.served = [of_slice[0] for of_slice in zip(*self._opened, strict=True)]
        self.urls = []
        for index in range(len(self.served)):
            server = RemoteServer(self._now(index), "127.0.0.1:0")
            stack.callback(server.close, 5)
            self.urls.append(f"grpc://{server.address}")

    def _now(self, index: int) -> Callable[[], tierstore.Store]:
        return lambda: self.served[index]

    def change(self, index: int, version: int) -> None:
        self.served[index] = self._opened[version][index]


@pytest.fixture
def changing(paths: tuple[list[Path], list[Path]]) -> Iterator[Changing]:
    with contextlib.ExitStack() as stack:
        yield Changing(paths, stack)


@pytest.mark.parametrize("dram", [0, BUDGET])
def test_a_lookup_never_mixes_versions_and_goes_on_when_all_are_at_one(
    changing: Changing, model: Model, newer: Model, dram: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(set_keeper, "PAUSE_S", 0.05)
    versions = model.expected(NAME, KEYS), newer.expected(NAME, KEYS)
    with (
        tierstore.connect(changing.urls, timeout_s=60, dram=dram) as store,
        Traffic(store, NAME, KEYS, *versions) as traffic,
    ):
        for to in (1, 0, 1):
            traffic.go_on(30)
            before = store.version
            changing.change(0, to)
            changing.change(1, to)
            eventually(lambda to=to: traffic.seen[-1:] == [to], "rows of the other version")
            traffic.go_on(30)
            assert set(traffic.seen[-20:]) == {to}
            assert store.version > before
        if dram:
            eventually(lambda: store._engine._asked.keeper.current, "the set is filled again")
            np.testing.assert_array_equal(store[NAME].lookup(KEYS), versions[1])


def test_servers_that_stay_at_different_versions_are_a_named_error_in_time(changing: Changing, newer: Model) -> None:
    out = np.full((120, HEADS, ROW_BYTES), POISON, dtype=np.uint8)
    with tierstore.connect(changing.urls, timeout_s=1) as store:
        changing.change(1, 1)
        started = time.monotonic()
        with pytest.raises(tierstore.StoreNotReadyError, match=r"slices are at different versions: grpc.*bring all"):
            store[NAME].lookup(KEYS, out)
        assert time.monotonic() - started < 10
        changing.change(0, 1)
        np.testing.assert_array_equal(store[NAME].lookup(KEYS, out), newer.expected(NAME, KEYS))
        assert store.build == store.common_build != ""


def test_what_the_client_has_itself_is_of_the_servers_version_too(
    changing: Changing, model: Model, newer: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_cluster, "CONFIRMED_S", 0.0)
    hot = KEYS[:40]
    with tierstore.connect(changing.urls, dram=BUDGET) as store:
        own = store._engine._asked.keeper.current
        assert own.take(0, hot, None)[hot >= 0].all()
        before = store.stats()["bytes_read"]
        np.testing.assert_array_equal(store[NAME].lookup(hot), model.expected(NAME, hot))
        assert store.stats()["bytes_read"] == before
        changing.change(0, 1)
        changing.change(1, 1)
        np.testing.assert_array_equal(store[NAME].lookup(hot), newer.expected(NAME, hot))
        assert store._engine._asked.keeper.current is not own


def test_one_server_that_is_gone_is_named_in_time_and_the_rest_go_on_when_it_is_back(
    paths: tuple[list[Path], list[Path]], model: Model
) -> None:
    expected = model.expected(NAME, KEYS)
    with serving(paths[0][0]) as first, contextlib.ExitStack() as stack:
        second = stack.enter_context(serving_process(paths[0][1]))
        store = stack.enter_context(tierstore.connect([f"grpc://{first.address}", f"grpc://{second}"], timeout_s=1))
        np.testing.assert_array_equal(store[NAME].lookup(KEYS), expected)
        out = np.full_like(expected, POISON)
        os.kill(_pid_of(second), 9)
        started = time.monotonic()
        with pytest.raises(tierstore.DaemonError, match=rf"{second}.*(refused|in time|reached)"):
            store[NAME].lookup(KEYS, out)
        assert time.monotonic() - started < 10
        ticket = store.submit({NAME: (KEYS, out)})
        with pytest.raises(tierstore.DaemonError, match=second):
            ticket.wait(60)
        with serving_process(paths[0][1], second):
            eventually(lambda: _is_there(store, expected), "lookups go on")


def _pid_of(address: str) -> int:
    """Of who listens at an address of this host."""
    import psutil

    port = int(address.rpartition(":")[2])
    return next(
        child.pid for child in psutil.Process().children()
        if any(each.laddr.port == port for each in child.net_connections() if each.status == "LISTEN")
    )  # fmt: skip


def _is_there(store: tierstore.Store, expected: np.ndarray) -> bool:
    try:
        rows = store[NAME].lookup(KEYS)
    except tierstore.DaemonError:
        return False
    np.testing.assert_array_equal(rows, expected)
    return True


# Replicas.


def test_a_replica_answers_when_the_first_is_gone_and_the_first_again_when_it_is_back(
    paths: tuple[list[Path], list[Path]], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_member, "AWAY_S_MAX", 0.1)
    expected = model.expected(NAME, KEYS)
    low, high = paths[0]
    with serving(low) as one, serving(high) as spare, contextlib.ExitStack() as stack:
        main = stack.enter_context(serving(high))
        address = main.address
        urls = [f"grpc://{one.address}", f"grpc://{address}|grpc://{spare.address}"]
        store = stack.enter_context(tierstore.connect(urls, timeout_s=30))
        member = store._engine._asked.members[1]
        with Traffic(store, NAME, KEYS, expected) as traffic:
            traffic.go_on(10)
            assert member._current == 0
            main.close(1)
            traffic.go_on(30)
            assert member._current == 1
            with serving(high, address):
                eventually(lambda: member._current == 0, "the first is asked again")
                traffic.go_on(10)
        assert spare.record()["calls"] > 10


def test_a_replica_that_does_not_answer_is_passed_over_in_time(
    paths: tuple[list[Path], list[Path]], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    lookup = tierstore.Table.lookup
    stuck = threading.Event()

    def held(table: tierstore.Table, *arguments: Any, **named: Any) -> np.ndarray:
        if table.spec.row_start and not stuck.is_set():  # the first to come is the replica that hangs
            stuck.set()
            go_on.wait(60)
        return lookup(table, *arguments, **named)

    with (
        serving_all([paths[0][0], paths[0][1], paths[0][1]]) as (low, hanging, spare),
        tierstore.connect([low, f"{hanging}|{spare}"], timeout_s=4) as store,
    ):
        own = store[NAME].lookup
        monkeypatch.setattr(tierstore.Table, "lookup", held)
        started = time.monotonic()
        np.testing.assert_array_equal(own(KEYS), model.expected(NAME, KEYS))
        assert time.monotonic() - started < 4
        assert stuck.is_set()
        assert store._engine._asked.members[1]._current == 1
        go_on.set()


def test_a_stopped_replica_costs_no_more_than_its_part_of_the_time(
    paths: tuple[list[Path], list[Path]], model: Model
) -> None:
    """Finding out why it does not answer took four seconds, and so all that the other replica had."""
    expected = model.expected(NAME, KEYS)
    with (
        serving_all(paths[0]) as (low, spare),
        serving_process(paths[0][1]) as stopped,
        tierstore.connect([low, f"grpc://{stopped}|{spare}"], timeout_s=2) as store,
    ):
        np.testing.assert_array_equal(store[NAME].lookup(KEYS), expected)
        os.kill(_pid_of(stopped), signal.SIGSTOP)
        started = time.monotonic()
        np.testing.assert_array_equal(store[NAME].lookup(KEYS), expected)
        assert time.monotonic() - started < 2
        with tierstore.connect([low, f"grpc://{stopped}|{spare}"], timeout_s=2) as again:
            np.testing.assert_array_equal(again[NAME].lookup(KEYS), expected)


class Moving:
    """A store that goes on to another version while it is asked what its slices have in common."""

    version = 0

    def __init__(self, store: tierstore.Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    @property
    def common_build(self) -> str:
        self.version = 1
        return "of version 1"


def test_a_description_is_of_one_version(paths: tuple[list[Path], list[Path]]) -> None:
    """With the old number and the new digest, old rows of one server would agree with new ones of another."""
    with tierstore.open(paths[0][0], dram="600KiB") as opened:
        moving = Moving(opened)
        server = RemoteServer(lambda: moving, "127.0.0.1:0")
        try:
            with tierstore.connect(f"grpc://{server.address}", timeout_s=20) as store:
                assert (store.version, store.common_build) == (1, "of version 1")
        finally:
            server.close(5)


def test_replicas_of_which_one_is_away_can_be_connected_to(paths: tuple[list[Path], list[Path]], model: Model) -> None:
    with (
        serving_all(paths[0]) as (low, high),
        tierstore.connect([f"grpc://127.0.0.1:1|{high}", low], timeout_s=20) as store,
    ):
        assert set(store[NAME].explain(KEYS)[KEYS >= 0].tolist()) == {"resident"}
        np.testing.assert_array_equal(store[NAME].lookup(KEYS), model.expected(NAME, KEYS))


# Daemons, forks, closing.


def test_daemons_that_are_replanned_swapped_and_rolled_back_under_load_give_no_wrong_row(
    model: Model, newer: Model, paths: tuple[list[Path], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(set_keeper, "PAUSE_S", 0.05)
    own = build_slices(model, tmp_path / "own", 2, KEYS[:30])
    sockets = [tmp_path / "0.sock", tmp_path / "1.sock"]
    versions = model.expected(NAME, KEYS), newer.expected(NAME, KEYS)
    with contextlib.ExitStack() as stack:
        urls = []
        for path, socket in zip(own, sockets, strict=True):
            daemon = Daemon(path, socket, 4 << 20, replan_s=None)
            stack.callback(daemon.close)
            daemon.start(remote=Remote("127.0.0.1:0", None, None, None))
            urls.append(f"grpc://{daemon.remote_address}")
        store = stack.enter_context(tierstore.connect(urls, timeout_s=60, dram=BUDGET))
        traffic = stack.enter_context(Traffic(store, NAME, KEYS, *versions))
        traffic.go_on(20)
        for index, (path, socket) in enumerate(zip(own, sockets, strict=True)):
            place_keys(model, path, index, 2, KEYS[30:90])
            request(socket, "reload")
            request(socket, "replan")
        traffic.go_on(20)
        for socket, path in zip(sockets, paths[1], strict=True):
            request(socket, "swap", store=str(path))
        eventually(lambda: traffic.seen[-1:] == [1], "rows of the other version")
        traffic.go_on(20)
        for socket in sockets:
            request(socket, "rollback")
        eventually(lambda: traffic.seen[-1:] == [0], "rows of the first version again")
        traffic.go_on(20)


def test_a_store_works_on_both_sides_of_a_fork(paths: tuple[list[Path], list[Path]]) -> None:
    """In a process of its own: grpc's server, which other tests have in this one, does not survive forks."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    with serving_process(paths[0][0]) as low, serving_process(paths[0][1]) as high:
        command = [
            sys.executable,
            "-W",
            "ignore",
            str(SUPPORT / "forking_client.py"),
            f"grpc://{low},grpc://{high}",
            "5",
        ]
        subprocess.run(command, check=True, timeout=120, env=environment)


def test_slices_of_a_training_are_one_store_when_all_have_published(tmp_path: Path) -> None:
    whole, paths = tmp_path / "whole", [tmp_path / "0", tmp_path / "1"]
    made = make_trainable(tmp_path / "model", 60, codecs={"fp32": "fp32"})
    made.model.build(whole)
    for index, path in enumerate(paths):
        made.model.build(path, slice=(index, 2))
    gradients = np.random.default_rng(1).standard_normal((60, 32)).astype(np.float32)
    for path in (whole, paths[0], paths[1]):
        if path == paths[1]:
            with (
                serving_all(paths) as urls,
                pytest.raises(tierstore.StoreNotReadyError, match="are at different versions"),
            ):
                tierstore.connect(urls)
        with tierstore.open_training(path, tierstore.SGD(lr=0.1), dram="4MiB") as training:
            spec = training["fp32"].spec
            mine = np.arange(spec.row_start, spec.row_end)
            training["fp32"].apply(mine, gradients[mine])
            training.commit(1).wait()
            training.publish()
    keys = np.arange(60)[:, np.newaxis]
    with serving_all(paths) as urls, tierstore.connect(urls) as store, tierstore.open(whole, dram="4MiB") as expected:
        np.testing.assert_array_equal(store["fp32"].lookup(keys), expected["fp32"].lookup(keys))
        assert store["fp32"].rows(keys[:, 0]).tobytes() != made.model.rows["fp32"].tobytes()


def test_a_closed_store_leaves_no_thread(changing: Changing) -> None:
    store = tierstore.connect(changing.urls, dram=BUDGET)
    store.submit({NAME: (KEYS, np.empty((120, HEADS, ROW_BYTES), dtype=np.uint8))}).wait(60)
    store.close()
    with pytest.raises(tierstore.StoreNotReadyError, match="is closed"):
        store[NAME].lookup(KEYS)
    names = ("tierstore-client-set", "tierstore-replicas", "tierstore-remote-submit")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(names)]
