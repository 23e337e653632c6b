"""A build killed with SIGKILL at random moments, resumed each time: the same shards as an undisturbed one's."""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.repository import TESTS
from support.stores import make_model

import tierstore
from tierstore.offline.verify import verify_store

CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from support.stores import make_model
model = make_model(Path(sys.argv[1]), seed=3)
print("ready", flush=True)
sys.stdin.readline()
options = {"shard_bytes": 16384, "jobs": 2, "in_place": bool(int(sys.argv[4]))}
model.build(Path(sys.argv[2]), on_progress=lambda done, total: print(done, flush=True), **options)
"""


def digests(store: Path) -> dict[str, str]:
    return {f.name + f.parent.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in store.rglob("*.shard")}


@pytest.mark.parametrize("in_place", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["shards", "in place"])
def test_a_build_killed_twenty_times_ends_bit_identical(tmp_path: Path, in_place: bool) -> None:
    model = make_model(tmp_path / "checkpoint", seed=3)
    model.build(tmp_path / "undisturbed", shard_bytes=16384, jobs=2, in_place=in_place)
    expected = digests(tmp_path / "undisturbed")
    rng = random.Random(0)
    store = tmp_path / "store"
    kills = finished = 0
    for _ in range(200):
        command = [
            sys.executable,
            "-c",
            CHILD,
            str(tmp_path / "checkpoint"),
            str(store),
            str(TESTS),
            str(int(in_place)),
        ]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.stdin.write("go\n")
        child.stdin.flush()
        try:
            child.wait(timeout=rng.uniform(0.0, 0.12) if kills < 20 else 60)  # the moment of the kill, not a limit
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            kills += 1
        child.communicate(timeout=60)
        assert child.returncode in (0, -signal.SIGKILL)
        if child.returncode == 0:
            assert digests(store) == expected
            assert verify_store(store, sources=model.sources).faults == []
            finished += 1
            if kills == 20:
                break
            shutil.rmtree(store)  # it was faster than the kill: begin anew, the kills go on
        else:
            # Each child writes the checkpoint anew: a store in place is refused until it has noted that.
            refusals = (
                (tierstore.StoreNotReadyError, tierstore.FormatError) if in_place else tierstore.StoreNotReadyError
            )
            assert_does_not_open_unless_whole(store, expected, refusals)
    assert kills == 20
    assert finished >= 1


def assert_does_not_open_unless_whole(store: Path, expected: dict[str, str], refusals) -> None:
    """The kill may have come after the ready mark; before it, nothing opens."""
    try:
        tierstore.open(store).close()
    except refusals:
        return
    assert digests(store) == expected
