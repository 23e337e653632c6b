"""A reslice whose disk is full, or whose process is killed, at any operation: the same call goes on to the same stores.

Operations are counted below libc, LMDB's own among them; each time another one fails, or the process dies in it.
"""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from support.durable_replay import run_recorded

NUM_PARTS = 4  # of a sweep, each a program of its own: one program has a time limit
PREPARED = (
    f"NUM_PARTS = {NUM_PARTS}\n"
    + """
import ctypes, logging, os, shutil, signal
from pathlib import Path
import numpy as np
import tierstore
from support.trainable import in_bits, make_trainable
from tierstore.errors import TierStoreError
libc = ctypes.CDLL(None)
logging.disable()
root = Path(sys.argv[1])
os.chdir(root)
made = make_trainable(root / "model", 300, codecs={"a": "bf16"})
parts = [Path(f"half-{index}") for index in range(2)]
for index, path in enumerate(parts):
    made.model.build(path, slice=(index, 2), shard_bytes=4096)
    with tierstore.open_training(path, tierstore.RowWiseAdagrad(lr=0.05, eps=1e-8), dram="4MiB") as training:
        spec = training["a"].spec
        ids = np.arange(spec.row_start, spec.row_end, 3)
        training["a"].apply(ids, np.ones((len(ids), 32), dtype=np.float32))
        training.commit(1).wait()

def reslice(into):
    return tierstore.reslice(parts, into, 2, jobs=1)

def rows_of(path):
    with tierstore.open_training(path) as training:
        assert training.commits[-1].step == 1
        spec = training["a"].spec
        return in_bits(training["a"].gather(np.arange(spec.row_start, spec.row_end))).tobytes()

def files_of(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.glob("shards/*/*"))}

expected = [(rows_of(path), files_of(path)) for path in reslice(Path("whole")).stores]
libc.durable_fail_at(0, 0)
start = libc.durable_count()
reslice(Path("counted"))
num_operations = libc.durable_count() - start
shutil.rmtree("counted")

def check(at):
    new = Path("new")
    for path in sorted(new.glob("[0-9]")):  # whole, or not there
        assert rows_of(path) == expected[int(path.name)][0], at
    stores = reslice(new).stores
    assert [(rows_of(path), files_of(path)) for path in stores] == expected, at
    assert sorted(os.listdir(new)) == ["0", "1"], at
    shutil.rmtree(new)
"""
)
FULL = """
num_failed = 0
for at in range(int(sys.argv[2]), num_operations + 1, NUM_PARTS):
    libc.durable_fail_at(at, int(sys.argv[3]))
    try:
        reslice(Path("new"))
    except TierStoreError as error:
        num_failed += 1
        assert "new" in str(error) and str(root) not in str(error).split(":")[0], error
        assert ".resliced" not in str(error), error
    libc.durable_fail_at(0, 0)
    check(at)
assert num_operations >= num_failed > 40 // NUM_PARTS, (num_operations, num_failed)
"""
KILLED = """
for at in range(int(sys.argv[2]), num_operations + 1, NUM_PARTS):
    child = os.fork()
    if child == 0:
        libc.durable_die_at(at)
        reslice(Path("new"))
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == -signal.SIGKILL, (at, num_operations, status)
    check(at)
assert num_operations > 40
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1, NUM_PARTS + 1))
def test_a_disk_that_is_full_at_any_operation_leaves_no_half_store_and_the_same_call_goes_on(
    tmp_path: Path, first: int
) -> None:
    run_recorded(PREPARED + FULL, tmp_path, str(first), str(errno.ENOSPC))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1, NUM_PARTS + 1))
def test_a_reslice_killed_at_any_operation_leaves_no_half_store_and_the_same_call_goes_on(
    tmp_path: Path, first: int
) -> None:
    run_recorded(PREPARED + KILLED, tmp_path, str(first))
