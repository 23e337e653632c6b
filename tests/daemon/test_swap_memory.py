"""A swap outlives its daemon: started again as before, it serves what was swapped in;
who gets another version is told."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from support.remote_servers import serving as serving_remote
from support.served import KIB, ServeProcess, make_newer, request, serving
from support.stores import Model, random_keys
from support.waiting import eventually

import tierstore
from tierstore import durable
from tierstore.daemon.remembered import RememberedSwap
from tierstore.daemon.swap_file import HEAD, Swap, SwapFile
from tierstore.errors import ConfigError, DaemonError, FormatError
from tierstore.formats.catalog import read_catalog
from tierstore.remote.client import connect_remote
from tierstore.tiers.slots import StaticSlots

NAME = "layers.1"
KEYS = random_keys(np.random.default_rng(3), 60)
CACHED = 900 * KIB
SERVE = ("--dram", "1300KiB", "--replan", "off")
SWAP = Swap("/stores/a", "aa", "/stores/b", "bb", "/stores/a")


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    return make_newer(tmp_path_factory.mktemp("newer"))


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "socket"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="tierstore")
    return caplog


def served_by(daemon: ServeProcess) -> str:
    return str(request(daemon.socket, "stat")["store"]["path"])


def test_a_daemon_that_was_killed_serves_what_was_swapped_in(
    placed: Path, newer: tuple[Path, Model], socket: Path
) -> None:
    expected = newer[1].expected(NAME, KEYS)
    with ServeProcess(placed, socket, *SERVE) as daemon:
        store = tierstore.connect(socket)
        request(socket, "swap", store=str(newer[0]))
        eventually(lambda: np.array_equal(store[NAME].lookup(KEYS), expected))
        daemon.end(signal.SIGKILL)
    with store, ServeProcess(placed, socket, *SERVE) as daemon:
        remembered = daemon.line("event=swap_remembered")
        assert str(newer[0]) in remembered
        assert f"instead_of={placed}" in remembered
        assert "--forget-swap" in remembered
        assert served_by(daemon) == str(newer[0])
        eventually(lambda: store.stats()["attached"]["now"])
        np.testing.assert_array_equal(store[NAME].lookup(KEYS), expected)
        assert request(socket, "rollback")["store"] == str(placed)  # what was before is known too
        daemon.end(signal.SIGKILL)
    with ServeProcess(placed, socket, *SERVE) as daemon:
        assert served_by(daemon) == str(placed)
        assert not Path(f"{socket}.swap").exists()


@pytest.mark.parametrize("ends", ["another store", "--forget-swap"])
def test_another_store_or_a_word_forgets_the_swap(
    placed: Path, newer: tuple[Path, Model], own_store: Path, socket: Path, ends: str
) -> None:
    with serving(placed, socket, CACHED):
        request(socket, "swap", store=str(newer[0]))
    assert Path(f"{socket}.swap").exists()
    store = own_store if ends == "another store" else placed
    with serving(store, socket, CACHED, forget_swap=ends != "another store") as daemon:
        assert daemon.store_path == str(store)
    with serving(placed, socket, CACHED) as daemon:  # and for good
        assert daemon.store_path == str(placed)


def test_a_chain_of_swaps_is_remembered_by_its_last(
    placed: Path, newer: tuple[Path, Model], own_store: Path, socket: Path
) -> None:
    with serving(placed, socket, CACHED):
        request(socket, "swap", store=str(newer[0]))
        request(socket, "swap", store=str(own_store))
    with serving(placed, socket, CACHED, placement=1) as daemon:  # the number is of the command line's store
        assert daemon.store_path == str(own_store)
        assert request(socket, "rollback")["store"] == str(newer[0])
    with serving(placed, socket, CACHED) as daemon:
        assert daemon.store_path == str(newer[0])
        request(socket, "swap", store=str(placed))  # as the command line says: nothing to remember
    assert not Path(f"{socket}.swap").exists()


def test_a_link_that_was_set_to_another_store_is_another_store(
    placed: Path, newer: tuple[Path, Model], model: Model, socket: Path, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    named = tmp_path / "current"
    named.symlink_to(placed)
    with serving(named, socket, CACHED):
        request(socket, "swap", store=str(newer[0]))
    named.unlink()
    model.build(tmp_path / "next", shard_bytes=65536)
    named.symlink_to(tmp_path / "next")
    with serving(named, socket, CACHED) as daemon:
        assert daemon.store_path == str(named)
    assert "swap_forgotten " in said.text


def test_a_swapped_in_store_that_does_not_open_is_said_and_not_forgotten(
    placed: Path, newer: tuple[Path, Model], socket: Path, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(newer[0], copied)
    with serving(placed, socket, CACHED):
        request(socket, "swap", store=str(copied))
    copied.rename(tmp_path / "away")
    with serving(placed, socket, CACHED) as daemon:
        assert daemon.store_path == str(placed)
    (line,) = [line for line in said.text.splitlines() if "swapped_in_store_not_served " in line]
    assert str(copied) in line
    assert "--forget-swap" in line
    (tmp_path / "away").rename(copied)
    with serving(placed, socket, CACHED) as daemon:
        assert daemon.store_path == str(copied)


def test_the_swapped_in_store_is_served_though_the_one_before_is_deleted(
    own_store: Path, newer: tuple[Path, Model], socket: Path
) -> None:
    with serving(own_store, socket, CACHED):
        request(socket, "swap", store=str(newer[0]))
    shutil.rmtree(own_store)
    with serving(own_store, socket, CACHED) as daemon:
        assert daemon.store_path == str(newer[0])


def test_a_swap_that_cannot_be_remembered_is_refused_before_any_client_sees_it(
    placed: Path, newer: tuple[Path, Model], socket: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(placed, socket, CACHED) as daemon, tierstore.connect(socket) as store:

        def full(_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("tierstore.durable.sync_folder", full)
        with pytest.raises(
            DaemonError, match=r"socket\.swap cannot be written.*: No space left on device: .*; then swap again"
        ):
            request(socket, "swap", store=str(newer[0]))
        monkeypatch.undo()
        assert sorted(path.name for path in socket.parent.iterdir()) == ["socket", "socket.lock"]
        assert daemon.store_path == str(placed)
        np.testing.assert_array_equal(store[NAME].lookup(KEYS), model.expected(NAME, KEYS))
        assert request(socket, "swap", store=str(newer[0]))["version"] == 2


def test_a_swap_that_fails_while_it_is_published_is_not_remembered(
    placed: Path, newer: tuple[Path, Model], socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(placed, socket, CACHED) as daemon:
        written, index = [], StaticSlots.index

        def fails(self: StaticSlots, *arguments: object) -> None:
            if Path(f"{socket}.swap").exists():
                written.append(self)
                raise MemoryError("no more")
            index(self, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(StaticSlots, "index", fails)
        with pytest.raises(DaemonError):
            request(socket, "swap", store=str(newer[0]))
        assert written
        assert daemon.store_path == str(placed)
    assert not Path(f"{socket}.swap").exists()


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    file = SwapFile(str(tmp_path / "s"))
    assert file.read() is None
    odd = Swap("/stores/\udcff\n", "aa", "/stores/ü", "bb", "/x")
    for swap in (SWAP, odd):
        file.write(swap)
        assert file.read() == swap
        assert Path(file.path).stat().st_mode & 0o777 == 0o600
    assert file.forget()
    assert not file.forget()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fails", ["fsync", "rename", "open", "sync_folder"])
def test_a_file_that_cannot_be_replaced_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    file = SwapFile(str(tmp_path / "s"))
    file.write(SWAP)

    def failing(*_: object, **__: object) -> None:
        monkeypatch.undo()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable if fails == "sync_folder" else os, fails, failing)
    with pytest.raises(DaemonError, match="No space left"):
        file.write(Swap("/stores/a", "aa", "/stores/c", "cc", "/stores/b"))
    assert file.read() == SWAP
    assert os.listdir(tmp_path) == ["s.swap"]


def test_the_file_is_as_format_md_says(tmp_path: Path) -> None:
    file = SwapFile(str(tmp_path / "s"))
    file.write(SWAP)
    lines = Path(file.path).read_bytes().split(b"\n")
    assert lines[0] == b"tierstore swap 1"
    assert json.loads(lines[1]) == vars(SWAP)
    assert lines[2] == hashlib.sha256(b"\n".join(lines[:2]) + b"\n").hexdigest().encode()
    assert lines[3:] == [b""]


def test_every_flipped_bit_and_every_cut_is_a_named_error(tmp_path: Path) -> None:
    file = SwapFile(str(tmp_path / "s"))
    file.write(SWAP)
    good = Path(file.path).read_bytes()
    damaged = [good[:end] for end in range(len(good) - 1)]
    damaged += [good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :] for at in range(len(good) - 1)]
    for data in damaged:
        Path(file.path).write_bytes(data)
        with pytest.raises(FormatError, match=r"s\.swap is damaged .*--forget-swap"):
            file.read()
    body = HEAD + b'{"store": 1}\n'
    Path(file.path).write_bytes(body + hashlib.sha256(body).hexdigest().encode() + b"\n")
    with pytest.raises(FormatError, match="is damaged"):
        file.read()


def test_a_damaged_file_keeps_a_daemon_from_starting_until_it_is_told_to_forget(placed: Path, socket: Path) -> None:
    Path(f"{socket}.swap").write_text("x")
    with pytest.raises(FormatError, match=r"socket\.swap is damaged .*start with --forget-swap"):
        serving(placed, socket, CACHED).__enter__()
    with serving(placed, socket, CACHED, forget_swap=True) as daemon:
        assert daemon.store_path == str(placed)
    assert not Path(f"{socket}.swap").exists()


def test_a_file_that_others_could_have_written_is_not_believed(tmp_path: Path) -> None:
    file = SwapFile(str(tmp_path / "s"))
    file.write(SWAP)
    os.chmod(file.path, 0o666)
    with pytest.raises(ConfigError, match=r"mode 666\) may have been written by another user"):
        file.read()
    os.rename(file.path, tmp_path / "aside")
    os.symlink(tmp_path / "aside", file.path)
    with pytest.raises(ConfigError, match="cannot be read"):
        file.read()
    assert file.forget()


def test_a_client_is_told_once_of_another_version_than_it_had(
    placed: Path, newer: tuple[Path, Model], socket: Path, said: pytest.LogCaptureFixture
) -> None:
    with serving(placed, socket, CACHED):
        store = tierstore.connect(socket)
    with store:
        with serving(newer[0], socket, CACHED):
            eventually(lambda: "attached, to another" in said.text or "attached again, to another" in said.text)
            np.testing.assert_array_equal(store[NAME].lookup(KEYS), newer[1].expected(NAME, KEYS))
        with serving(newer[0], socket, CACHED):
            eventually(lambda: store.stats()["attached"]["now"])
    (record,) = [record for record in said.records if "another version of the store" in record.getMessage()]
    assert record.levelno == logging.WARNING
    for path in (placed, newer[0]):
        assert str(path) in record.getMessage()
        assert read_catalog(path).identity[:12] in record.getMessage()


def test_a_client_by_grpc_is_told_once_of_another_version_than_it_had(
    placed: Path, newer: tuple[Path, Model], said: pytest.LogCaptureFixture
) -> None:
    with serving_remote(placed) as server:
        address = server.address
        store = connect_remote(f"grpc://{address}", timeout_s=60)
    with store:
        for _ in range(2):
            with serving_remote(newer[0], address):
                for _ in range(2):
                    np.testing.assert_array_equal(store[NAME].lookup(KEYS), newer[1].expected(NAME, KEYS))
        assert store.build == read_catalog(newer[0]).identity
    (record,) = [record for record in said.records if "another version of the store" in record.getMessage()]
    assert record.levelno == logging.WARNING
    assert read_catalog(placed).identity[:12] in record.getMessage()
    assert str(newer[0]) in record.getMessage()


def test_what_is_remembered_is_decided_by_the_path_and_the_build(
    placed: Path, newer: tuple[Path, Model], tmp_path: Path
) -> None:
    file = SwapFile(str(tmp_path / "s"))
    identities = [read_catalog(path).identity for path in (placed, newer[0])]
    file.write(Swap(os.path.realpath(placed), identities[0], str(newer[0]), identities[1], str(placed)))
    relative = os.path.relpath(placed)
    assert RememberedSwap(file, relative).serves == str(newer[0])
    assert RememberedSwap(file, f"{placed}/../{placed.name}/").is_other
    assert not RememberedSwap(file, newer[0]).is_other
    assert file.read() is None
    file.write(Swap(os.path.realpath(placed), "of an earlier build", str(newer[0]), identities[1], str(placed)))
    assert not RememberedSwap(file, placed).is_other
    assert file.read() is None
