"""One version after the other under running lookups: each is of one version whole,
and a bad version changes nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.served import KIB, MIB, ServeProcess, Traffic, killed, other_model, request, serving
from support.stores import Model, make_model, place_some, random_keys
from support.waiting import WAIT_S, eventually

import tierstore
from tierstore.daemon import attachments
from tierstore.daemon.daemon import Daemon
from tierstore.daemon.placements import placed_entries
from tierstore.daemon.remote_lookups import Remote
from tierstore.daemon.shared_tiers import SharedTiers
from tierstore.daemon.versions import TAGS
from tierstore.remote import answers as remote_answers
from tierstore.remote import requests as remote_requests
from tierstore.remote.answers import Answers
from tierstore.tiers.native import NativeEngine
from tierstore.tiers.slots import StaticSlots

NAME = "layers.1"
KEYS = random_keys(np.random.default_rng(0), 150, distinct=60)
CACHED, RESIDENT = 900 * KIB, 16 * MIB


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return other_model(tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def newer(other: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the same hash as `placed`, with other rows. Tests must not change it."""
    store = tmp_path_factory.mktemp("newer") / "store"
    other.build(store, shard_bytes=65536)
    place_some(store)
    return store


@pytest.fixture(scope="module")
def rows(model: Model, other: Model) -> tuple[np.ndarray, np.ndarray]:
    """What the keys give: in the old version, and in the newer."""
    return model.expected(NAME, KEYS), other.expected(NAME, KEYS)


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "socket"


@pytest.mark.parametrize("dram_bytes", [CACHED, RESIDENT], ids=["cached", "resident"])
@pytest.mark.parametrize("io", ["auto", "mmap"])
def test_every_lookup_is_of_one_version_whole_and_after_a_swap_of_the_new(
    placed: Path, newer: Path, socket: Path, rows: tuple[np.ndarray, np.ndarray], dram_bytes: int, io: str
) -> None:
    with (
        serving(placed, socket, dram_bytes, io=io) as daemon,
        tierstore.connect(socket, io=io) as store,
        Traffic(store, NAME, KEYS, *rows, threads=3) as traffic,
    ):
        for number, (path, current) in enumerate([(newer, 1), (placed, 0), (newer, 1), (placed, 0)], 2):
            traffic.go_on()
            done = request(socket, "swap", store=str(path))
            assert (done["ok"], done["version"], done["store"]) == (True, number, str(path))
            eventually(lambda number=number: store.stats()["attached"]["version"] == number)
            for _ in range(3):
                np.testing.assert_array_equal(store[NAME].lookup(KEYS), rows[current])
        stat = daemon.stat()
        assert (stat.store.version, stat.store.path, stat.store.previous) == (
            5,
            str(placed),
            str(newer),
        )
        assert stat.clients.list[0].version == 5
        assert stat.feed.errors == 0
        assert stat.memory.used_bytes <= dram_bytes


def test_rollback_goes_to_the_version_before_and_back(
    placed: Path, newer: Path, socket: Path, rows: tuple[np.ndarray, np.ndarray]
) -> None:
    with serving(placed, socket, CACHED), tierstore.connect(socket) as store:
        with pytest.raises(tierstore.ConfigError, match="nothing to roll back to"):
            request(socket, "rollback")
        request(socket, "swap", store=str(newer))
        for version, current in ((3, 0), (4, 1)):
            assert request(socket, "rollback")["version"] == version
            eventually(lambda version=version: store.stats()["attached"]["version"] == version)
            np.testing.assert_array_equal(store[NAME].lookup(KEYS), rows[current])


def test_a_client_that_cannot_be_told_of_a_swap_attaches_anew(
    placed: Path, newer: Path, socket: Path, rows: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_descriptor(_: object) -> None:
        raise tierstore.DaemonError("no block for it: too many open files")

    with serving(placed, socket, CACHED) as daemon, tierstore.connect(socket) as store:
        monkeypatch.setattr(daemon._host.clients, "move", no_descriptor)
        request(socket, "swap", store=str(newer))
        eventually(lambda: store.stats()["attached"] == {"socket": str(socket), "now": True, "version": 2})
        np.testing.assert_array_equal(store[NAME].lookup(KEYS), rows[1])


def test_places_that_are_free_after_a_swap_go_to_the_placement_of_the_new_store(
    placed: Path, newer: Path, socket: Path, rows: tuple[np.ndarray, np.ndarray]
) -> None:
    with serving(placed, socket, CACHED) as daemon, tierstore.connect(socket) as store:
        before = {name: slots.num_live for name, slots in daemon._host.tiers.slots.items()}
        done = request(socket, "swap", store=str(newer))
        host = daemon._host
        for name, (order_index, keys) in placed_entries(host.epochs.current, host.tiers.slots).items():
            slots = host.tiers.slots[name]
            assert slots.num_live >= before[name]
            are_static = host.tiers.are_static(host.epochs.current, name, order_index, keys)
            assert slots.num_live == slots.capacity or are_static.all()
        assert done["filled"] > 0
        np.testing.assert_array_equal(store[NAME].lookup(KEYS), rows[1])


def test_the_keys_in_most_demand_are_warm_when_clients_change_versions(
    placed: Path, newer: Path, socket: Path, rows: tuple[np.ndarray, np.ndarray]
) -> None:
    with serving(placed, socket, MIB), tierstore.connect(socket) as store:
        for _ in range(20):
            store[NAME].lookup(KEYS)
        wanted = KEYS >= 0

        def is_learned() -> (
            bool
        ):  # on a busy machine the daemon has not drained all reports when the first replan comes
            request(socket, "replan")
            return bool((store[NAME].explain(KEYS)[wanted] == "static").mean() > 0.9)

        eventually(is_learned)
        done = request(socket, "swap", store=str(newer))
        assert done["warmed"] > 0
        assert done["filled"] >= 0
        eventually(lambda: store.stats()["attached"]["version"] == 2)
        assert (store[NAME].explain(KEYS)[wanted] == "static").mean() > 0.9
        before = store.stats()["hits"]["dram"]
        np.testing.assert_array_equal(store[NAME].lookup(KEYS), rows[1])
        assert store.stats()["hits"]["dram"] - before > 0.9 * wanted.sum()


def damaged(folder: Path, model: Model) -> Path:
    model.build(folder / "damaged", shard_bytes=65536)
    catalog = next(path for path in (folder / "damaged").rglob("*.mdb") if "lock" not in path.name)
    catalog.write_bytes(b"no catalog")
    return folder / "damaged"


def missing(folder: Path, _: Model) -> Path:
    return folder / "missing"


def other_hash(folder: Path, _: Model) -> Path:
    other_model(folder / "checkpoint", fingerprint="e" * 64).build(folder / "stranger")
    return folder / "stranger"


def other_tables(folder: Path, _: Model) -> Path:
    make_model(folder / "fewer", plain=False).build(folder / "tables")
    return folder / "tables"


def without_a_shard(folder: Path, model: Model) -> Path:
    model.build(folder / "cut", shard_bytes=65536)
    next((folder / "cut").rglob("*.shard")).unlink()
    return folder / "cut"


@pytest.mark.parametrize(
    ("make", "error", "named"),
    [
        (damaged, tierstore.TierStoreError, "catalog"),
        (missing, tierstore.StoreNotReadyError, "no store"),
        (other_hash, tierstore.FingerprintMismatchError, "fingerprint"),
        (other_tables, tierstore.ConfigError, "tables are layers.1, layers.14, plain, and there layers.1, layers.14"),
        (without_a_shard, tierstore.TierStoreError, "shard"),
    ],
)
@pytest.mark.parametrize("dram_bytes", [CACHED, RESIDENT], ids=["cached", "resident"])
def test_a_version_that_cannot_take_its_place_is_refused_and_the_old_is_served(
    placed: Path, newer: Path, socket: Path, tmp_path: Path, other: Model, rows: tuple[np.ndarray, np.ndarray],
    make: Any, error: type[Exception], named: str, dram_bytes: int,
) -> None:  # fmt: skip
    with serving(placed, socket, dram_bytes) as daemon, tierstore.connect(socket) as store:
        bad = make(tmp_path, other)
        # Not counted before the first refusal: who attaches is sent copies, which are closed when they are sent.
        fds = []
        with Traffic(store, NAME, KEYS, *rows) as traffic:
            for _ in range(4):
                with pytest.raises(error, match=named):
                    request(socket, "swap", store=str(bad))
                traffic.go_on()
                assert set(traffic.seen) == {0}
                fds.append(len(os.listdir("/proc/self/fd")))
        assert daemon.state == "serving"
        assert (daemon.stat().store.version, daemon.stat().store.previous) == (1, None)
        eventually(lambda: len(os.listdir("/proc/self/fd")) <= fds[0])  # nothing of those after the first is left open
        assert request(socket, "swap", store=str(newer))["version"] == 2  # and a good one is taken as ever
        eventually(lambda: store.stats()["attached"]["version"] == 2)
        np.testing.assert_array_equal(store[NAME].lookup(KEYS), rows[1])


def test_a_swap_whose_reads_fail_leaves_the_old_version_whole(
    placed: Path, newer: Path, socket: Path, rows: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(placed, socket, CACHED) as daemon, tierstore.connect(socket) as store:
        for _ in range(20):
            store[NAME].lookup(KEYS)
        request(socket, "replan")
        whole = SharedTiers.write
        calls = []

        def fails(self: Any, version: Any, *arguments: Any) -> Any:
            if version.number == 2:
                calls.append(whole(self, version, *arguments))
                if len(calls) == 2:
                    raise tierstore.DaemonError("the disk is gone")
                return calls[0]
            return whole(self, version, *arguments)

        monkeypatch.setattr(SharedTiers, "write", fails)
        with pytest.raises(tierstore.DaemonError, match="the disk is gone"):
            request(socket, "swap", store=str(newer))
        monkeypatch.undo()
        with Traffic(store, NAME, KEYS, *rows) as traffic:
            for _ in range(3):  # slots that the new version's entries were written to are free, not the old's
                traffic.go_on()
                request(socket, "replan")
        assert set(traffic.seen) == {0}
        assert daemon.stat().store.version == 1


def test_a_swap_that_fails_while_it_is_published_leaves_nothing_of_the_new_version(
    placed: Path, newer: Path, socket: Path, rows: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(placed, socket, CACHED) as daemon, tierstore.connect(socket) as store:
        slots = daemon._host.tiers.slots
        index, calls = StaticSlots.index, []

        def fails(self: StaticSlots, *arguments: Any) -> None:
            calls.append(self)
            if len(calls) == 2 * len(slots):  # the last table of what the new version is published with
                raise MemoryError("no more")
            index(self, *arguments)

        monkeypatch.setattr(StaticSlots, "index", fails)
        with pytest.raises(tierstore.DaemonError):
            request(socket, "swap", store=str(newer))
        monkeypatch.undo()
        for each in slots.values():
            assert each.num_free == len(each.keys) - each.num_live
        with Traffic(store, NAME, KEYS, *rows) as traffic:
            request(socket, "replan")
            traffic.go_on()
            assert set(traffic.seen) == {0}
            assert request(socket, "swap", store=str(newer))["version"] == 2
            eventually(lambda: 1 in traffic.seen)


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachments, "GRACE_PERIOD_S", 0.1)


@pytest.mark.usefixtures("short_waits")
def test_tags_of_twenty_swaps_never_give_a_row_of_another_version(
    placed: Path, socket: Path, tmp_path: Path, rows: tuple[np.ndarray, np.ndarray], model: Model
) -> None:
    copies = [tmp_path / f"copy{number}" for number in range(TAGS + 4)]  # more versions than there are tags
    models = [model, other_model(tmp_path / "checkpoint")]
    for number, copy in enumerate(copies):  # each has an identity of its own, and the rows of one of two
        models[number % 2].build(copy, attachments={"number": str(number).encode()})
    tags = []
    with serving(placed, socket, CACHED) as daemon, tierstore.connect(socket) as store:
        for number, copy in enumerate(copies):
            request(socket, "swap", store=str(copy))
            eventually(lambda number=number: store.stats()["attached"]["version"] == number + 2)
            for _ in range(2):
                np.testing.assert_array_equal(store[NAME].lookup(KEYS), rows[number % 2])
            eventually(lambda: daemon.stat().feed.queued_keys == 0)
            tags.append(daemon._host.epochs.current.tag)
        assert all(0 <= tag < TAGS for tag in tags)
        assert all(one != after for one, after in pairwise(tags))
        request(socket, "rollback")  # a version that was served keeps what is cached of it
        assert daemon._host.epochs.current.tag == tags[-2]
        eventually(lambda: store.stats()["attached"]["version"] == len(copies) + 2)
        np.testing.assert_array_equal(store[NAME].lookup(KEYS), rows[len(copies) % 2])


def test_a_stopped_client_holds_up_no_swap_and_is_right_when_it_goes_on(
    placed: Path, newer: Path, socket: Path, rows: tuple[np.ndarray, np.ndarray]
) -> None:
    read, write = os.pipe()
    with ServeProcess(placed, socket, "--dram", "900KiB", "--replan", "off"):
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                look_up_until_told(socket, rows, write)
            os._exit(1)
        os.close(write)
        with killed(child), tierstore.connect(socket) as store, open(read) as said:
            assert said.readline() == "0\n"
            for version, path in ((2, newer), (3, placed)):
                os.kill(child, signal.SIGSTOP)
                os.waitpid(child, os.WUNTRACED)
                started = time.monotonic()
                assert request(socket, "swap", store=str(path))["version"] == version
                assert time.monotonic() - started < 30 + attachments.GRACE_PERIOD_S
                eventually(lambda version=version: store.stats()["attached"]["version"] == version)
                np.testing.assert_array_equal(store[NAME].lookup(KEYS), rows[(version + 1) % 2])
                os.kill(child, signal.SIGCONT)
                assert said.readline() == f"{(version + 1) % 2}\n"


def look_up_until_told(socket: Path, rows: tuple[np.ndarray, np.ndarray], write: int) -> None:
    """Says which version answers whenever that changes, and "wrong" if none does; for ever."""
    with tierstore.connect(socket) as store:
        last = -1
        while True:
            out = store[NAME].lookup(KEYS)
            found = next((number for number, version in enumerate(rows) if np.array_equal(out, version)), None)
            if found is None:
                os.write(write, b"wrong\n")
                return
            if found != last:
                last = found
                os.write(write, f"{found}\n".encode())


def test_clients_that_attach_during_swaps_get_one_version_or_the_other(
    placed: Path, newer: Path, socket: Path, rows: tuple[np.ndarray, np.ndarray]
) -> None:
    wrong: list[str] = []
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            try:
                with tierstore.connect(socket) as store:
                    for _ in range(3):
                        out = store[NAME].lookup(KEYS)
                        if not any(np.array_equal(out, version) for version in rows):
                            wrong.append("rows")
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error}")
                return

    with serving(placed, socket, CACHED) as daemon:
        threads = [threading.Thread(target=come_and_go) for _ in range(3)]
        for thread in threads:
            thread.start()
        for path in [newer, placed] * 3:
            request(socket, "swap", store=str(path))
        stop.set()
        for thread in threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()
        assert wrong == []
        eventually(lambda: daemon.stat().clients.attached == 0)


@pytest.fixture
def daemon(placed: Path, socket: Path) -> Iterator[Daemon]:
    with serving(placed, socket, CACHED) as opened:
        yield opened


def test_a_replan_and_a_swap_at_once_wait_for_each_other(
    daemon: Daemon, newer: Path, placed: Path, socket: Path, rows: tuple[np.ndarray, np.ndarray]
) -> None:
    faults = []

    def replan() -> None:
        try:
            for _ in range(5):
                request(socket, "replan")
        except Exception as error:
            faults.append(error)

    with tierstore.connect(socket) as store, Traffic(store, NAME, KEYS, *rows):
        thread = threading.Thread(target=replan)
        thread.start()
        for path in [newer, placed, newer]:
            request(socket, "swap", store=str(path))
        thread.join(WAIT_S)
        assert faults == []
        eventually(lambda: store.stats()["attached"]["version"] == 4)
        np.testing.assert_array_equal(store[NAME].lookup(KEYS), rows[1])
    assert daemon.stat().learning.replans >= 8


def swapping_once(act: Any, socket: Path, store: Path) -> Any:
    """Returns act, which the second time that it is called has a daemon swap first."""
    calls = []

    def swaps(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            request(socket, "swap", store=str(store))
        return act(*arguments)

    return swaps


@pytest.mark.parametrize("swap_comes", ["before", "after"])
@pytest.mark.parametrize("how", ["rows", "submit_rows"])
def test_row_ids_of_tokens_and_of_none_are_of_one_version_though_a_swap_comes_meanwhile(
    placed: Path, newer: Path, socket: Path, model: Model, other: Model, monkeypatch: pytest.MonkeyPatch, how: str,
    swap_comes: str,
) -> None:  # fmt: skip
    ids = model.row_ids(NAME, KEYS)
    ids[::2, 3] = 7  # no token's: read one by one, beside the tokens
    expected = [np.where((ids >= 0)[..., None], each.rows[NAME][ids], 0) for each in (model, other)]
    with serving(placed, socket, CACHED), tierstore.connect(socket) as store:
        old = store._engine.link.engine

        def swap() -> None:
            request(socket, "swap", store=str(newer))
            eventually(lambda: store.version == 2)

        def with_a_swap(*arguments: Any) -> Any:
            if swap_comes == "before":
                swap()
                assert old.close(WAIT_S)
            answered = getattr(NativeEngine, how)(old, *arguments)
            swap()
            return answered

        monkeypatch.setattr(old, how, with_a_swap)
        out = np.zeros((*ids.shape, expected[0].shape[-1] + 1), dtype=np.uint8)[:, :, 1:]
        if how == "rows":
            store[NAME].rows(ids, out)
        else:
            store[NAME].submit_rows(ids, out).wait(timeout_s=60)
        np.testing.assert_array_equal(out, expected[swap_comes == "before"])


def test_strided_outputs_of_one_submit_are_of_one_version(
    placed: Path, socket: Path, rows: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(placed, socket, CACHED), tierstore.connect(socket) as store:
        outs = [np.zeros((2 * len(KEYS), *rows[0].shape[1:]), dtype=np.uint8)[::2] for _ in range(2)]
        submits = []
        submit = store._engine.submit
        monkeypatch.setattr(store._engine, "submit", lambda asked: submits.append(len(asked)) or submit(asked))
        store.submit({NAME: (KEYS, outs[0]), "layers.14": (KEYS, outs[1])}).wait(WAIT_S)
        np.testing.assert_array_equal(outs[0], rows[0])
        assert submits == [2]  # both tables at once: one engine, one version


@pytest.mark.parametrize("chunk_bytes", [4000, 1 << 20], ids=["in parts", "whole"])
def test_a_lookup_by_grpc_is_of_one_version_though_a_swap_comes_between_its_parts(
    placed: Path,
    newer: Path,
    socket: Path,
    rows: tuple[np.ndarray, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    chunk_bytes: int,
) -> None:
    pytest.importorskip("grpc")
    monkeypatch.setattr(remote_answers, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(remote_requests, "UNARY_BYTES_MAX", 0)  # all are streamed
    daemon = Daemon(placed, socket, CACHED, replan_s=None)
    try:
        daemon.start(remote=Remote("127.0.0.1:0", None, None, None))
        with tierstore.connect(f"grpc://{daemon.remote_address}") as store:
            np.testing.assert_array_equal(store[NAME].lookup(KEYS), rows[0])
            monkeypatch.setattr(Answers, "_look_up", swapping_once(Answers._look_up, socket, newer))
            out = store[NAME].lookup(np.concatenate([KEYS, KEYS]))
            assert any(np.array_equal(out, np.concatenate([each, each])) for each in rows)
            np.testing.assert_array_equal(store[NAME].lookup(KEYS), store[NAME].lookup(KEYS))
    finally:
        assert daemon.close()
