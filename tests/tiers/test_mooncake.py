"""A store's shards in Mooncake: put, read by page, and named errors within a time limit for all that can be wrong.

Against the real Mooncake if it is installed, and against a folder that stands in for it, everywhere.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from support.held import held
from support.mooncakes import IS_INSTALLED, FakeMooncake, RealMooncake
from support.stores import Model, random_keys
from support.text_store import good, good_json
from support.waiting import eventually

import tierstore
from tierstore.errors import BudgetError, ConfigError, CorruptPageError, StoreNotReadyError
from tierstore.formats.catalog import CATALOG_FILE, read_catalog
from tierstore.offline.mooncake import put_shards
from tierstore.tiers import mooncake as mooncake_module
from tierstore.tiers.mooncake import Address, MooncakeClient

DRAM = "600KiB"
WAIT_S = 3.0  # the real one needs a while for its first answer
KEYS = random_keys(np.random.default_rng(0), 40)
Mooncake = FakeMooncake | RealMooncake


@pytest.fixture(
    params=[
        "fake",
        pytest.param(
            "real",
            marks=pytest.mark.skipif(not IS_INSTALLED, reason="mooncake is not installed: the extra 'mooncake'"),
        ),
    ]
)
def mooncake(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mooncake]:
    folder = tmp_path / "mooncake"
    folder.mkdir()
    made = RealMooncake(folder) if request.param == "real" else FakeMooncake(folder, monkeypatch)
    monkeypatch.setattr(mooncake_module, "SERVED_WAIT_S", WAIT_S)
    yield made
    made.close()


@pytest.fixture
def bare(built: Path, tmp_path: Path) -> Path:
    """A folder with the catalog alone."""
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(built / CATALOG_FILE, folder)
    return folder


def first_object(path: Path) -> str:
    return f"tierstore/{read_catalog(path).base_identity}/layers.1/0/0"


def check_right(store: tierstore.Store, model: Model) -> None:
    """Reads pages: no cache keeps rows that are asked for by id, two of each page."""
    for name in ("layers.1", "layers.14"):
        ids = np.arange(0, store[name].spec.num_rows, 7)
        np.testing.assert_array_equal(store[name].rows(ids), model.rows[name][ids])


def worker() -> psutil.Process:
    alive = [each for each in psutil.Process().children() if each.status() != psutil.STATUS_ZOMBIE]
    (found,) = [each for each in alive if "mooncake_worker" in " ".join(each.cmdline())]
    return found


def check_right_soon(store: tierstore.Store, model: Model) -> None:
    """Until a worker that has ended is started again, errors are named."""
    end = time.monotonic() + 30
    while True:
        try:
            return check_right(store, model)
        except (StoreNotReadyError, TimeoutError):
            assert time.monotonic() < end
            time.sleep(0.05)


def test_what_was_put_is_served_to_whoever_has_the_catalog_alone(
    mooncake: Mooncake, built: Path, bare: Path, model: Model
) -> None:
    layouts = read_catalog(built).tables.values()
    put = good_json("mooncake", "put", built, mooncake.address)
    assert put == {
        "num_objects": sum(layout.num_shards for layout in layouts),
        "num_bytes": sum(layout.store_bytes for layout in layouts),
        "num_kept": 0,
    }
    again = good("mooncake", "put", built, mooncake.address).stdout
    assert f"{put['num_objects']} of them were there before" in again
    before, shared = held(), os.listdir("/dev/shm")
    for dram in (DRAM, "4MiB"):
        with tierstore.open(bare, dram=dram, pages=mooncake.address) as store:
            check_right(store, model)
            np.testing.assert_array_equal(store["layers.1"].lookup(KEYS), model.expected("layers.1", KEYS))
            worker()
    assert held() <= before
    assert not [name for name in set(os.listdir("/dev/shm")) - set(shared) if "tierstore" in name]


def test_objects_that_are_missing_short_or_others_are_named_and_put_again(
    mooncake: Mooncake, built: Path, bare: Path, model: Model
) -> None:
    name = first_object(built)
    num_bytes = read_catalog(built).shards["layers.1"][0].num_bytes
    with pytest.raises(StoreNotReadyError, match=f"has no object {name}; put the shards: tierstore mooncake put"):
        tierstore.open(bare, dram=DRAM, pages=mooncake.address)
    put_shards(built, mooncake.address)
    with tierstore.open(bare, dram=DRAM, pages=mooncake.address) as store:
        for damage, text in (
            (lambda: mooncake.replace(name, 100), "the object ends before it"),
            (lambda: mooncake.replace(name, num_bytes), "in tierstore/.*: .*; put it again: .* --replace"),
            (lambda: mooncake.remove(name), "there is no such object"),
        ):
            damage()
            with pytest.raises(CorruptPageError, match=text):
                check_right(store, model)
            put_shards(built, mooncake.address, replace=True)
            check_right(store, model)


def test_a_mooncake_that_stops_is_named_within_the_limit_and_read_again_when_it_goes_on(
    mooncake: Mooncake, built: Path, bare: Path, model: Model
) -> None:
    put_shards(built, mooncake.address)
    with tierstore.open(bare, dram=DRAM, pages=mooncake.address) as store:
        mooncake.stop()
        started = time.monotonic()
        # The worker ends then; what it had not taken up, as on a busy machine, is an error of that.
        says = r"of mooncake://127.0.0.1:\d+: (no answer within 3 s|the process that reads it has ended)"
        with pytest.raises((TimeoutError, StoreNotReadyError), match=says):
            check_right(store, model)
        assert time.monotonic() - started < 3 * WAIT_S
        mooncake.go_on()
        check_right_soon(store, model)


def test_a_worker_that_dies_is_started_again(mooncake: Mooncake, built: Path, bare: Path, model: Model) -> None:
    put_shards(built, mooncake.address)
    with tierstore.open(bare, dram=DRAM, pages=mooncake.address) as store:
        check_right(store, model)
        killed = worker()
        killed.send_signal(signal.SIGKILL)
        check_right_soon(store, model)
        assert worker().pid != killed.pid


def test_a_library_that_crashes_is_an_error_and_no_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: Path, bare: Path, model: Model
) -> None:
    fake = FakeMooncake(tmp_path, monkeypatch)
    put_shards(built, fake.address)
    with tierstore.open(bare, dram=DRAM, pages=fake.address) as store:
        (tmp_path / "crash").touch()
        with pytest.raises(StoreNotReadyError, match="has ended, and starts anew; try again"):
            check_right(store, model)
        check_right_soon(store, model)


PARENT = """
import sys
from tierstore.tiers import mooncake
import tierstore, importlib.util
importlib.util.find_spec = lambda _: True
store = tierstore.open(sys.argv[1], dram="600KiB", pages=sys.argv[2])
print("open", flush=True)
sys.stdin.read()
"""


def left_folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("tierstore-mooncake-*"))


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder for sockets, whose paths must be short."""
    with tempfile.TemporaryDirectory(prefix="ts-", dir="/tmp") as folder:
        yield Path(folder)


def test_a_parent_that_is_killed_leaves_no_folder(
    tmp_path: Path, short: Path, monkeypatch: pytest.MonkeyPatch, built: Path, bare: Path
) -> None:
    """Its worker removes it; if that is killed, too, the next start does."""
    fake, folder = FakeMooncake(tmp_path, monkeypatch), short
    put_shards(built, fake.address)
    command, environment = [sys.executable, "-c", PARENT, str(bare), fake.address], os.environ | {"TMPDIR": str(folder)}
    for with_worker in (False, True):
        parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        with parent:
            assert parent.stdout is not None
            assert parent.stdout.readline() == "open\n"
            (left,) = left_folders(folder)
            workers = psutil.Process(parent.pid).children()
            parent.kill()
            for each in workers if with_worker else ():
                each.kill()
        psutil.wait_procs(workers, timeout=60)
        if not with_worker:
            eventually(lambda: not left_folders(folder), "the worker removes the folder")
    assert left_folders(folder) == [left]
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with tierstore.open(bare, dram=DRAM, pages=fake.address):
        assert left in left_folders(folder)  # so young, it may be one in the making
        assert len(left_folders(folder)) == 2
        (served,) = set(left_folders(folder)) - {left}
        for each in (left, served):
            os.utime(each, (1, 1))
        with tierstore.open(bare, dram=DRAM, pages=fake.address):
            assert left not in left_folders(folder)
            assert served in left_folders(folder)
    assert left_folders(folder) == []


def test_a_worker_that_cannot_be_started_is_tried_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: Path, bare: Path, model: Model,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    fake = FakeMooncake(tmp_path, monkeypatch)
    put_shards(built, fake.address)
    monkeypatch.setattr(mooncake_module, "SERVED_WAIT_S", 0.2)
    monkeypatch.setattr(mooncake_module, "START_PAUSE_S", 0.01)
    monkeypatch.setattr(mooncake_module, "START_PAUSE_S_MAX", 0.05)
    start, tries = MooncakeClient._start, []
    faults: list[Exception] = [
        OSError(errno.EAGAIN, "no process"),
        RuntimeError("can't start new thread"),
        MemoryError(),
    ]

    def failing(client: MooncakeClient) -> subprocess.Popen[str]:
        tries.append(client)
        if len(tries) <= 3:
            raise faults[len(tries) - 1]
        return start(client)

    with tierstore.open(bare, dram=DRAM, pages=fake.address) as store:
        check_right(store, model)
        (tmp_path / "refuse").touch()  # and then it ends at once
        monkeypatch.setattr(MooncakeClient, "_start", failing)
        worker().send_signal(signal.SIGKILL)
        eventually(lambda: len(tries) > 4, "it is tried again")
        with pytest.raises((StoreNotReadyError, TimeoutError), match=fake.address):
            check_right(store, model)
        (tmp_path / "refuse").unlink()
        check_right_soon(store, model)
    for words in ("no process", "can't start new thread", "MemoryError", "client does not start"):
        assert words in caplog.text


def test_one_without_room_or_without_a_master_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: Path
) -> None:
    fake = FakeMooncake(tmp_path, monkeypatch)
    (tmp_path / "full").touch()
    with pytest.raises(BudgetError, match=r"has no room for tierstore/.*: 0 B of .* are put"):
        put_shards(built, fake.address)
    (tmp_path / "refuse").touch()
    with pytest.raises(ConfigError, match="client does not start"):
        put_shards(built, fake.address)
    (tmp_path / "hang").touch()
    monkeypatch.setattr("tierstore.tiers.mooncake.START_LIMIT_S", 1.0)
    with pytest.raises(ConfigError, match="no answer within 1 s"):
        tierstore.open(built, pages=fake.address)


@pytest.mark.skipif(IS_INSTALLED, reason="mooncake is installed")
def test_without_the_package_its_extra_is_named(built: Path) -> None:
    with pytest.raises(ConfigError, match="needs the extra 'mooncake'"):
        tierstore.open(built, pages="mooncake://127.0.0.1:1")


@pytest.mark.parametrize(
    "text",
    [
        "mooncake://host",
        "http://127.0.0.1:1",
        "mooncake://127.0.0.1:x",
        "mooncake://127.0.0.1:1/a",
        "mooncake://h:1?x=1",
    ],
)
def test_other_addresses_are_refused(text: str, built: Path) -> None:
    with pytest.raises(ConfigError, match="mooncake://HOST:PORT"):
        tierstore.open(built, pages=text)


def test_an_address_says_where_the_metadata_is_and_what_this_host_is_called() -> None:
    plain = Address.parse("mooncake://127.0.0.1:50051")
    assert (plain.master, plain.metadata, plain.host) == ("127.0.0.1:50051", "P2PHANDSHAKE", "127.0.0.1")
    full = Address.parse("mooncake://127.0.0.1:50051?metadata=http://10.0.0.1:8080/metadata&host=10.0.0.7")
    assert (full.metadata, full.host) == ("http://10.0.0.1:8080/metadata", "10.0.0.7")
