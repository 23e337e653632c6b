"""A daemon's static set, read in place by clients' devices: under epochs, versions,
and clients and daemons that fail."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.device import DEVICE
from support.served import KIB, Traffic, make_newer, request, serving
from support.shapes import HEADS, POISON, ROW_BYTES
from support.stores import Model, random_keys
from support.waiting import WAIT_S, eventually

import tierstore
from tierstore import kernels
from tierstore.attached import hbm as attached_hbm
from tierstore.attached.hbm import AttachedHbm
from tierstore.daemon import attachments
from tierstore.daemon.daemon import Daemon
from tierstore.store.store import Store

NAME = "layers.1"
KEYS = random_keys(np.random.default_rng(0), 60, distinct=40)
DRAM, HBM = 900 * KIB, "64KiB"  # HBM holds some of the placement, the daemon's static set more


OPTIONS = {"hbm": HBM, "device": DEVICE, "staging": "1MiB"}
CONNECT = f"tierstore.connect(sys.argv[1], **{OPTIONS})"


def connect(socket: Path) -> Store:
    return tierstore.connect(socket, **OPTIONS)


class Looker:
    """A thread that looks the same keys up from the device without a pause;
    every lookup must give one version's rows."""

    def __init__(self, store: Store, keys: np.ndarray, *versions: np.ndarray) -> None:
        self.lookup = store.open_lookup(NAME, len(keys))
        self._keys = torch.from_numpy(keys).to(DEVICE)
        self._versions = [rows.reshape(-1) for rows in versions]
        self.seen, self.wrong = [0] * len(versions), 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def look_up(self) -> np.ndarray:
        out = torch.full((len(self._keys), HEADS, ROW_BYTES), POISON, dtype=torch.uint8, device=DEVICE)
        self.lookup.start(self._keys, out)
        self.lookup.finish()
        rows: np.ndarray = out.cpu().numpy()
        return rows

    def _run(self) -> None:
        while not self._ended.is_set():
            rows = self.look_up().reshape(-1)
            right = [bool(np.array_equal(rows, each)) for each in self._versions]
            self.seen = [count + one for count, one in zip(self.seen, right, strict=True)]
            self.wrong += not any(right)

    def __enter__(self) -> Looker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(timeout=60)
        assert not self._thread.is_alive()
        self.lookup.check()
        assert self.wrong == 0


def in_records(store: Store) -> int:
    """Keys that the device found in the static set, so far."""
    return int(store._engine._tier.counters()[list(store.tables).index(NAME)]["records"].sum())


def exchange(daemon: Daemon, number: int, times: int = 1) -> None:
    """Has half of what is asked for make way for the other half in the static set, by turns; two epochs each."""
    pairs = sorted({(order, key) for row in KEYS.tolist() for order, key in enumerate(row) if key >= 0})
    slots = daemon._host.tiers.slots[NAME]
    for turn in range(number, number + times):
        held = {(int(slots.order_index[at]), int(slots.keys[at])): at for at in np.flatnonzero(slots.live).tolist()}
        enter = [pair for pair in pairs[turn % 2 :: 2] if pair not in held]
        leave = [at for pair, at in held.items() if pair in pairs[1 - turn % 2 :: 2]] or list(held.values())[
            : len(enter)
        ]
        daemon._host.epochs.change({}, {NAME: np.array(leave, dtype=np.int64)})
        enter = enter[: min(slots.capacity - slots.num_live, slots.num_free)]
        order_index = np.array([order for order, _ in enter], dtype=np.uint8)
        daemon._host.epochs.change({NAME: (order_index, np.array([key for _, key in enter], dtype=np.int64))}, {})


def raising(error: Exception) -> Callable[[], None]:
    """A function that raises."""

    def act() -> None:
        raise error

    return act


def held(daemon: Daemon) -> list[tuple[int, int]]:
    """How often clients hold epochs, even ones and odd ones, by client and version."""
    everybody = daemon._host.attachments
    blocks = [block for each in (*everybody._of.values(), *everybody._orphans) for block in each.blocks.values()]
    return [kernels.active_pins(block) for block in blocks]


@contextlib.contextmanager
def killing(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kills a process at the end, whatever came before."""
    try:
        yield
    finally:
        process.kill()


def mappings(daemon: Daemon) -> list[str]:
    """The permissions of this process's mappings of the daemon's static block; the first is the daemon's."""
    inode = str(os.fstat(daemon._host.tiers.static.fd).st_ino)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    return sorted((line[1] for line in lines if line[4] == inode and "tierstore-static" in line[5]), reverse=True)


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    return make_newer(tmp_path_factory.mktemp("newer"))


def test_the_device_reads_the_static_set_where_it_lies(placed: Path, model: Model, tmp_path: Path) -> None:
    rows = model.expected(NAME, KEYS)
    with serving(placed, tmp_path / "s", DRAM, gpu_clients=True) as daemon, connect(tmp_path / "s") as store:
        assert daemon.stat().clients.list[0].on_gpu
        assert daemon.stat().epochs.alive == 1
        looker = Looker(store, KEYS, rows)
        np.testing.assert_array_equal(looker.look_up(), rows)
        explained = store[NAME].explain(KEYS)
        assert 0 < in_records(store) <= (explained == "static").sum()
        np.testing.assert_array_equal(store[NAME].lookup(KEYS), rows)


def test_gpu_clients_read_through_the_host_unless_the_operator_allows_more(
    placed: Path, model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = model.expected(NAME, KEYS)
    with serving(placed, tmp_path / "s", DRAM) as daemon, connect(tmp_path / "s") as store:
        assert "--gpu-clients" in caplog.text
        assert not daemon.stat().clients.list[0].on_gpu
        np.testing.assert_array_equal(Looker(store, KEYS, rows).look_up(), rows)
        assert in_records(store) == 0


def test_only_who_asks_gets_it_writable_and_only_until_it_is_locked(
    placed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tierstore.tiers.hbm.tier as tier

    while_locked: list[list[str]] = []

    def lock(_device: Any, memory: np.ndarray) -> str | None:
        if memory.base is not None and memory.nbytes:
            while_locked.append(mappings(daemon))
        return None

    monkeypatch.setattr(tier, "lock", lock)
    with serving(placed, tmp_path / "s", DRAM, gpu_clients=True) as daemon:
        assert mappings(daemon) == ["rw-s"]
        with tierstore.connect(tmp_path / "s"):
            assert mappings(daemon) == ["rw-s", "r--s"]
        gc.collect()
        with connect(tmp_path / "s") as store:
            assert ["rw-s", "rw-s"] in while_locked
            assert mappings(daemon) == ["rw-s", "r--s"]
            records = store._backing._hbm._static.parts[0].records
            child = os.fork()
            if not child:
                faulthandler.disable()
                ctypes.memset(records.ctypes.data, 1, 1)  # kills it
                os._exit(0)
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == -signal.SIGSEGV


def test_epochs_pass_under_lookups(placed: Path, model: Model, tmp_path: Path) -> None:
    rows = model.expected(NAME, KEYS)
    with serving(placed, tmp_path / "s", DRAM, gpu_clients=True) as daemon, connect(tmp_path / "s") as store:
        with (
            Looker(store, KEYS, rows) as looker,
            Traffic(store, NAME, KEYS, rows, threads=1),
        ):
            for number in range(6):
                before, epoch, found = looker.seen[0], daemon._host.epochs.newest, in_records(store)
                exchange(daemon, number)
                assert daemon._host.epochs.newest > epoch
                eventually(lambda before=before: looker.seen[0] > before + 2)
                eventually(lambda found=found: in_records(store) > found)
        assert daemon.stat().epochs.alive == 1


def test_slots_that_a_device_reads_are_not_overwritten(
    placed: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = model.expected(NAME, KEYS)
    monkeypatch.setattr(attachments, "PIN_WAIT_S", 0.2)
    monkeypatch.setattr(attachments, "GRACE_PERIOD_S", 0.1)
    with serving(placed, tmp_path / "s", DRAM, gpu_clients=True) as daemon, connect(tmp_path / "s") as store:
        looker = Looker(store, KEYS, rows)
        with store._backing._hbm._lock:  # it does not see that there is another epoch
            with pytest.raises(
                tierstore.DaemonError, match=rf"GPU of process {os.getpid()} still pins.*end that process"
            ):
                exchange(daemon, 0, times=10)
            assert daemon.stat().epochs.alive == 2
            with pytest.raises(tierstore.DaemonError, match="still pins"):
                request(tmp_path / "s", "swap", store=str(placed))
            for _ in range(3):
                np.testing.assert_array_equal(looker.look_up(), rows)
        monkeypatch.setattr(attachments, "PIN_WAIT_S", WAIT_S)
        exchange(daemon, 0, times=2)  # it has seen it, and left
        np.testing.assert_array_equal(looker.look_up(), rows)
        assert in_records(store) > 0


def test_a_connection_that_is_gone_does_not_end_what_the_device_reads(
    placed: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = model.expected(NAME, KEYS)
    monkeypatch.setattr(attachments, "PIN_WAIT_S", 0.2)
    with serving(placed, tmp_path / "s", DRAM, gpu_clients=True) as daemon, connect(tmp_path / "s") as store:
        looker = Looker(store, KEYS, rows)
        with store._backing._hbm._lock:
            daemon._host.attachments.clients()[0].drop("for the test")
            eventually(lambda: daemon._host.attachments._orphans)
            with pytest.raises(tierstore.DaemonError, match="still pins"):
                exchange(daemon, 0, times=10)
            np.testing.assert_array_equal(looker.look_up(), rows)
        monkeypatch.setattr(attachments, "PIN_WAIT_S", WAIT_S)
        eventually(lambda: store.stats()["attached"]["now"])  # by itself, and on the GPU again
        eventually(lambda: daemon.stat().clients.list[0].on_gpu)
        before = in_records(store)
        with Looker(store, KEYS, rows):
            eventually(lambda: in_records(store) > before)
            exchange(daemon, 0, times=3)


def test_a_client_that_was_killed_holds_nothing(placed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachments, "PIN_WAIT_S", 0.1)
    with serving(placed, tmp_path / "s", DRAM, gpu_clients=True) as daemon:
        script = f"import signal, sys, tierstore\nstore = {CONNECT}\nprint(flush=True)\nsignal.pause()"
        client = subprocess.Popen([sys.executable, "-c", script, tmp_path / "s"], stdout=subprocess.PIPE)
        assert client.stdout is not None
        with client, killing(client):
            assert client.stdout.readline() == b"\n"
            assert sum(map(sum, held(daemon))) == 1
            client.send_signal(signal.SIGSTOP)
            epochs = daemon._host.epochs.newest
            with pytest.raises(tierstore.DaemonError, match=f"process {client.pid} still pins"):
                exchange(daemon, 0, times=10)
            assert daemon._host.epochs.newest == epochs + 1
        eventually(lambda: not daemon._host.attachments.clients())
        exchange(daemon, 0, times=3)
        assert not held(daemon)


def test_a_pin_taken_after_the_connection_ended_still_counts(
    placed: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = model.expected(NAME, KEYS)
    monkeypatch.setattr(attachments, "PIN_WAIT_S", 0.2)
    with (
        serving(placed, tmp_path / "s", DRAM, gpu_clients=True, clients_max=1) as daemon,
        contextlib.ExitStack() as stack,
    ):
        fill = AttachedHbm.fill

        def without_a_connection(hbm: AttachedHbm) -> None:
            fill(hbm)
            daemon._host.attachments.clients()[0].drop("for the test")
            eventually(lambda: not daemon._host.attachments.clients())
            stack.enter_context(tierstore.connect(tmp_path / "s"))  # has its place, so that it does not come back

        with monkeypatch.context() as patched:
            patched.setattr(AttachedHbm, "fill", without_a_connection)
            store = stack.enter_context(connect(tmp_path / "s"))
        looker = Looker(store, KEYS, rows)
        with store._backing._hbm._lock, pytest.raises(tierstore.DaemonError, match="still pins"):
            exchange(daemon, 0, times=10)
        np.testing.assert_array_equal(looker.look_up(), rows)
        assert in_records(store) > 0
        monkeypatch.setattr(attachments, "PIN_WAIT_S", WAIT_S)
        exchange(daemon, 0)  # it follows all the same
        np.testing.assert_array_equal(looker.look_up(), rows)


def test_a_device_that_cannot_follow_keeps_what_it_has_and_tries_again(
    placed: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = model.expected(NAME, KEYS)
    monkeypatch.setattr(attachments, "PIN_WAIT_S", 0.2)
    monkeypatch.setattr(attached_hbm, "FOLLOW_RETRY_S", 0.05)
    with serving(placed, tmp_path / "s", DRAM, gpu_clients=True) as daemon, connect(tmp_path / "s") as store:
        looker = Looker(store, KEYS, rows)
        with monkeypatch.context() as patched:
            patched.setattr(store._engine, "name_records", raising(RuntimeError("a graph is being captured")))
            with pytest.raises(tierstore.DaemonError, match="still pins"):
                exchange(daemon, 0, times=10)
            eventually(lambda: "older epoch of the daemon's static set: a graph is being captured" in caplog.text)
            np.testing.assert_array_equal(looker.look_up(), rows)
            assert sum(map(sum, held(daemon))) == 2
        monkeypatch.setattr(attachments, "PIN_WAIT_S", WAIT_S)
        exchange(daemon, 0, times=3)
        monkeypatch.setattr(attachments, "PIN_WAIT_S", 0.2)
        np.testing.assert_array_equal(looker.look_up(), rows)
        eventually(lambda: sum(map(sum, held(daemon))) == 1)
        with monkeypatch.context() as patched:
            patched.setattr(store._engine, "name_records", raising(RuntimeError("again")))
            with pytest.raises(tierstore.DaemonError, match="still pins"):
                exchange(daemon, 0, times=10)
            store.close()
        eventually(lambda: not sum(map(sum, held(daemon))))
        exchange(daemon, 0, times=3)


def test_a_client_that_became_another_program_holds_nothing(placed: Path, tmp_path: Path) -> None:
    with serving(placed, tmp_path / "s", DRAM, gpu_clients=True) as daemon:
        script = f"import os, sys, tierstore\nstore = {CONNECT}\nos.execv('/bin/sleep', ['sleep', '600'])"
        client = subprocess.Popen([sys.executable, "-c", script, tmp_path / "s"])
        with client, killing(client):
            eventually(lambda: Path(f"/proc/{client.pid}/comm").read_text() == "sleep\n")
            eventually(lambda: not daemon._host.attachments.clients())
            exchange(daemon, 0, times=3)
            assert not held(daemon)


def test_endless_reconnects_leave_no_descriptor_and_no_thread(placed: Path, tmp_path: Path) -> None:
    with serving(placed, tmp_path / "s", DRAM, gpu_clients=True) as daemon:
        script = f"import sys, tierstore\nstore = {CONNECT}\nprint(flush=True)\nsys.stdin.read()"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        client = subprocess.Popen([sys.executable, "-c", script, tmp_path / "s"], **pipes)
        assert client.stdout is not None
        with client, killing(client):
            assert client.stdout.readline() == b"\n"
            for _ in range(6):
                (before,) = daemon._host.attachments.clients()
                before.drop("for the test")
                eventually(lambda before=before: (now := daemon._host.attachments.clients()) and now != [before])
                eventually(lambda: sum(map(sum, held(daemon))) == 1)
            assert len(daemon._host.attachments._orphans) <= 2
            exchange(daemon, 0, times=3)


def test_a_daemon_ends_while_it_waits_for_a_device(placed: Path, tmp_path: Path) -> None:
    with (
        serving(placed, tmp_path / "s", DRAM, gpu_clients=True) as daemon,
        connect(tmp_path / "s") as store,
        ThreadPoolExecutor(1) as pool,
        store._backing._hbm._lock,
    ):
        change = pool.submit(exchange, daemon, 0, 10)
        eventually(lambda: daemon._host.attachments.waiting_for == [os.getpid()])
        assert daemon.close()
        with pytest.raises(tierstore.DaemonError):
            change.result(timeout=60)


def test_a_closed_client_holds_nothing(placed: Path, tmp_path: Path) -> None:
    with serving(placed, tmp_path / "s", DRAM, gpu_clients=True) as daemon:
        store = connect(tmp_path / "s")
        assert sum(map(sum, held(daemon))) == 1
        store.close()
        eventually(lambda: not daemon._host.attachments.clients())
        exchange(daemon, 0)
        exchange(daemon, 1)


def test_versions_pass_under_lookups(placed: Path, newer: tuple[Path, Model], model: Model, tmp_path: Path) -> None:
    rows = [each.expected(NAME, KEYS[:20]) for each in (model, newer[1])]
    with serving(placed, tmp_path / "s", DRAM, gpu_clients=True) as daemon, connect(tmp_path / "s") as store:
        with Looker(store, KEYS[:20], *rows) as looker:
            for version, path in ((2, newer[0]), (3, placed), (4, newer[0])):
                before = looker.seen[(version - 1) % 2]
                assert request(tmp_path / "s", "swap", store=str(path))["ok"]
                eventually(lambda version=version: store.stats()["attached"]["version"] == version)
                eventually(lambda before=before, now=(version - 1) % 2: looker.seen[now] > before + 2)
                found = in_records(store)
                exchange(daemon, version)
                eventually(lambda found=found: in_records(store) > found)
        assert mappings(daemon).count("rw-s") == 1


def test_a_device_reads_another_daemons_entries_through_the_host(
    placed: Path, model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = model.expected(NAME, KEYS)
    with contextlib.ExitStack() as stack:
        with serving(placed, tmp_path / "s", DRAM, gpu_clients=True):
            store = stack.enter_context(connect(tmp_path / "s"))
            looker = Looker(store, KEYS, rows)
            looker.look_up()
        eventually(lambda: not store.stats()["attached"]["now"])
        found = in_records(store)
        np.testing.assert_array_equal(looker.look_up(), rows)  # what is mapped already goes on to serve
        assert in_records(store) > found
        with serving(placed, tmp_path / "s", DRAM, gpu_clients=True):
            eventually(lambda: store.stats()["attached"]["now"])
            eventually(lambda: re.search("the daemon is another than before", caplog.text))
            found = in_records(store)
            np.testing.assert_array_equal(looker.look_up(), rows)
            assert in_records(store) == found
            store.close()


def test_a_store_without_a_placement_has_what_the_daemon_has_learned(built: Path, model: Model, tmp_path: Path) -> None:
    rows = model.expected(NAME, KEYS)
    with serving(built, tmp_path / "s", DRAM, gpu_clients=True) as daemon:
        exchange(daemon, 0)
        with connect(tmp_path / "s") as attached:
            np.testing.assert_array_equal(Looker(attached, KEYS, rows).look_up(), rows)
            assert in_records(attached) > 0


def test_a_forked_child_leaves_what_its_parent_holds(placed: Path, model: Model, tmp_path: Path) -> None:
    rows = model.expected(NAME, KEYS)
    with serving(placed, tmp_path / "s", DRAM, gpu_clients=True) as daemon, connect(tmp_path / "s") as store:
        before = held(daemon)
        for close in (True, False):
            child = os.fork()
            if not child:
                if close:
                    store.close()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        assert held(daemon) == before
        np.testing.assert_array_equal(Looker(store, KEYS, rows).look_up(), rows)
