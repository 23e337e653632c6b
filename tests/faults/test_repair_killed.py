"""A repair killed with SIGKILL at each of its durable operations, or interrupted: every file is as it was, or whole."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.repository import TESTS
from support.stores import Model, make_model

import tierstore
from tierstore.formats.catalog import read_catalog

WAIT_S = 120
# Kills itself before its n-th call of anything that changes what is on disk.
CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from support.stores import make_model
import tierstore
model, left = make_model(Path(sys.argv[1])), [int(sys.argv[3])]
def counted(real):
    def call(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call
for name in ("write", "pwrite", "fsync", "rename", "unlink", "mkdir", "rmdir", "ftruncate"):
    setattr(os, name, counted(getattr(os, name)))
report = tierstore.verify(sys.argv[2], model, repair=True, jobs=1)
assert report.faults == [], report.faults
print(len(report.repaired))
"""


def digests(store: Path) -> dict[str, str]:
    files = [*store.rglob("*.shard"), *store.rglob("*.placement")]
    return {str(file.relative_to(store)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def damage(store: Path) -> None:
    image = read_catalog(store)
    flipped, lost = (store / image.shards["layers.1"][index].file for index in (0, 1))
    placed = store / image.placements[1].file
    for file, at in ((flipped, 5000), (placed, placed.stat().st_size - 4000)):
        data = bytearray(file.read_bytes())
        data[at] ^= 1
        file.write_bytes(data)
    lost.unlink()


def test_a_repair_killed_at_every_durable_operation_leaves_old_files_or_whole_ones(
    placed: Path, model: Model, tmp_path: Path
) -> None:
    good = digests(placed)
    damaged_store = tmp_path / "damaged"
    shutil.copytree(placed, damaged_store)
    damage(damaged_store)
    damaged = digests(damaged_store)
    assert damaged != good
    kills = 0
    for step in range(1, 200):
        store = tmp_path / str(step)
        shutil.copytree(damaged_store, store)
        command = [sys.executable, "-c", CHILD, str(tmp_path / "again"), str(store), str(step)]
        done = subprocess.run([*command, str(TESTS)], capture_output=True, text=True, timeout=WAIT_S)
        now = digests(store)
        if done.returncode == 0:
            assert done.stdout == "3\n"
            assert now == good
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        kills += 1
        assert all(now.get(file) in (good[file], damaged.get(file)) for file in good)
        assert now.keys() <= good.keys()
        assert tierstore.verify(store, model, repair=True).faults == []
        assert digests(store) == good
        assert not [*store.rglob("*.new"), *store.rglob("work-*")]
        shutil.rmtree(store)
    else:
        raise AssertionError("it never came to an end")
    assert kills > 10


@pytest.mark.parametrize("repair", [False, True])
def test_ctrl_c_ends_a_verification_or_repair_at_once_and_leaves_no_temporary_file(
    tmp_path: Path, repair: bool
) -> None:
    """Each read of a chunk takes a tenth of a second, as on a slow disk: what is under way ends,
    and nothing else begins."""
    model = make_model(tmp_path / "checkpoint")
    model.build(tmp_path / "store", shard_bytes=4096)
    for shard in (tmp_path / "store").rglob("*.shard"):
        shard.unlink()
    child = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from support.stores import make_model
import tierstore
model, real = make_model(Path(sys.argv[1])), os.preadv
def slow(*arguments):
    os.write(1, b"reading\\n")  # of two threads, each line whole
    time.sleep(0.1)
    return real(*arguments)
os.preadv = slow
try:
    tierstore.verify(sys.argv[2], *([model, True] if sys.argv[4] == "True" else []), jobs=2)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    if not repair:
        model.build(tmp_path / "whole", shard_bytes=4096)
    store = tmp_path / ("store" if repair else "whole")
    tests = str(TESTS)
    arguments = [str(tmp_path / "checkpoint"), str(store), tests, str(repair)]
    with subprocess.Popen([sys.executable, "-c", child, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(8):  # by then all shards wait for a thread
            assert process.stdout.readline() == "reading\n"
        os.kill(process.pid, signal.SIGINT)
        said = process.communicate(timeout=WAIT_S)[0].splitlines()
    num_shards = sum(table.num_shards for table in read_catalog(store).tables.values())
    assert said[-1] == "interrupted"
    assert said.count("reading") < num_shards / 4
    assert not list(store.rglob("*.new"))
