"""A daemon whose disk fails, and limits that are too small: a named error for what needs it,
and everything else goes on."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.served import KIB, MIB, request, serving
from support.stores import Model, random_keys
from support.waiting import WAIT_S, eventually

import tierstore
from tierstore.daemon.daemon import Daemon
from tierstore.tiers.nvme import choose_io

NAME = "layers.1"
CACHED = 900 * KIB
PERSISTENT = 1 << 40
KEYS = random_keys(np.random.default_rng(0), 120)
WARM, COLD = KEYS[:40], KEYS[40:]


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "socket"


@pytest.fixture(params=["uring", "mmap", "pread"])
def io(request: pytest.FixtureRequest) -> str:
    try:
        return choose_io(request.param).mode
    except tierstore.TierStoreError as error:
        pytest.skip(str(error))


def warmed(store: tierstore.Store) -> np.ndarray:
    """Looks WARM up until all of it is in DRAM; returns its rows."""

    def is_warm() -> bool:
        store[NAME].lookup(WARM)
        return bool((store[NAME].explain(WARM)[WARM >= 0] == "recency").all())

    eventually(is_warm)
    return store[NAME].lookup(WARM)


def native(store: tierstore.Store) -> Any:
    return store._engine.link.engine._engine


@pytest.mark.parametrize("fault", ["failing", "short", "corrupt"])
def test_a_client_whose_disk_fails_has_its_dram_hits_and_others_have_all(
    built: Path, socket: Path, model: Model, io: str, fault: str
) -> None:
    with (
        serving(built, socket, CACHED, io=io) as daemon,
        tierstore.connect(socket, io=io) as store,
        tierstore.connect(socket, io=io) as other,
    ):
        rows = warmed(store)
        native(store).inject(fault, 0, PERSISTENT)
        for _ in range(3):
            with pytest.raises(tierstore.CorruptPageError, match=NAME):
                store[NAME].lookup(COLD)
            np.testing.assert_array_equal(store[NAME].lookup(WARM), rows)
        np.testing.assert_array_equal(other[NAME].lookup(COLD), model.expected(NAME, COLD))
        native(store).inject("none")
        np.testing.assert_array_equal(store[NAME].lookup(KEYS), model.expected(NAME, KEYS))
        assert daemon.stat().clients.attached == 2


@pytest.mark.parametrize("fault", ["failing", "short", "corrupt"])
def test_a_daemon_whose_disk_fails_counts_it_and_feeds_again_when_it_is_well(
    built: Path, socket: Path, model: Model, fault: str
) -> None:
    with serving(built, socket, CACHED) as daemon, tierstore.connect(socket) as store:
        warmed(store)
        engine = daemon._host.epochs.current.engine._engine
        engine.inject(fault, 0, PERSISTENT)
        errors = daemon.stat().feed.errors
        for _ in range(3):
            np.testing.assert_array_equal(store[NAME].lookup(KEYS), model.expected(NAME, KEYS))
        eventually(lambda: daemon.stat().feed.errors > errors)
        request(socket, "replan")  # reads, too, and does without what it cannot have
        np.testing.assert_array_equal(store[NAME].lookup(KEYS), model.expected(NAME, KEYS))
        engine.inject("none")

        def is_fed() -> bool:
            np.testing.assert_array_equal(store[NAME].lookup(COLD), model.expected(NAME, COLD))
            return bool((store[NAME].explain(COLD)[COLD >= 0] != "pages").all())

        eventually(is_fed)


def test_shards_that_are_cut_off_while_serving_cost_only_what_is_not_in_dram(
    own_store: Path, socket: Path, io: str
) -> None:
    with serving(own_store, socket, CACHED, io=io) as daemon, tierstore.connect(socket, io=io) as store:
        rows = warmed(store)
        for shard in (own_store / "shards").rglob("*.shard"):
            os.truncate(shard, 0)
        for _ in range(3):
            with pytest.raises(tierstore.CorruptPageError, match=f"of table {NAME}"):
                store[NAME].lookup(COLD)
            np.testing.assert_array_equal(store[NAME].lookup(WARM), rows)
        eventually(lambda: daemon.stat().feed.errors > 0)
        assert daemon.stat().daemon.state == "serving"


def test_a_cgroup_that_has_less_than_the_budget_is_said_before_anything_is_taken(
    built: Path, socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tierstore.store.embedded.available_memory", lambda: (123_456, "cgroup"))
    with pytest.raises(tierstore.BudgetError, match=r"123456|123,456") as raised:
        Daemon(built, socket, CACHED)
    assert "cgroup" in str(raised.value)
    assert not socket.exists()


SERVE = "from tierstore.tools.cli import run; sys.exit(run(['serve', *sys.argv[1:]]))"
LOOK_UP = """
import numpy as np
import tierstore
try:
    with tierstore.connect(sys.argv[1]) as store:
        store["layers.1"].lookup(np.arange(300, dtype=np.int64).reshape(100, 3))
        print("looked up", store.stats()["io"])
except tierstore.TierStoreError as error:
    print(type(error).__name__, error)
"""


def limited(limit: int, value: int, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs code in a process with a limit of resource.setrlimit, set after its modules are loaded."""
    head = "import resource, sys\nimport numpy, tierstore.daemon.daemon, tierstore.tools.serve\n"
    limits = f"resource.setrlimit({limit}, ({value}, resource.getrlimit({limit})[1]))\n"
    return subprocess.run(
        [sys.executable, "-c", head + limits + code, *map(str, arguments)],
        capture_output=True, text=True, timeout=WAIT_S, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (resource.RLIMIT_FSIZE, "raise the limit: ulimit -f unlimited"),
        (resource.RLIMIT_AS, "raise the limit (ulimit -v"),
    ],
    ids=["a file's length", "address space"],
)
def test_a_limit_of_the_process_below_the_budget_is_a_named_refusal(
    built: Path, socket: Path, limit: int, said: str
) -> None:
    """RLIMIT_FSIZE bounds each memfd as if it were a file, RLIMIT_AS all that is mapped, beginning with the catalog."""
    done = limited(limit, 128 * KIB, SERVE, built, "--socket", socket, "--dram", "64MiB")
    assert done.returncode == 1, done.stderr
    assert said in done.stderr
    assert "raise the" in done.stderr
    assert "damaged" not in done.stderr
    assert "Traceback" not in done.stderr
    assert not socket.exists()


@pytest.fixture
def daemon(built: Path, socket: Path) -> Iterator[Daemon]:
    with serving(built, socket, 64 * MIB) as opened:
        yield opened


def test_a_client_that_may_map_or_open_too_little_is_told_and_the_others_are_served(
    daemon: Daemon, socket: Path
) -> None:
    for limit, value, said in (
        (resource.RLIMIT_AS, MIB, r"BudgetError the control block: Cannot allocate memory: .*ulimit -v"),
        (resource.RLIMIT_NOFILE, 6, "DaemonError .*than this process may have open"),
    ):
        done = limited(limit, value, LOOK_UP, socket)
        assert done.returncode == 0, done.stderr
        assert re.match(said, done.stdout), done.stdout
        eventually(lambda: daemon.stat().clients.attached == 0)
    with tierstore.connect(socket) as store:
        assert store[NAME].lookup(KEYS).any()


def test_no_locked_memory_is_needed(daemon: Daemon, socket: Path) -> None:
    done = limited(resource.RLIMIT_MEMLOCK, 0, LOOK_UP, socket)
    assert done.stdout.startswith("looked up"), done.stdout + done.stderr
    del daemon
