"""Whatever was not synced may be lost or torn: a store opens at a commit that was published, whole, and goes on.

Operations are recorded below libc, LMDB's own among them, and replayed up to every moment. A full or failing disk and
SIGKILL at every operation come from the same place.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
from support.durable_replay import MARK, SYNC, crashes, read_log, run_recorded
from support.training_runs import is_state, make_training, play

from tierstore.training.commits import remove_unnamed
from tierstore.training.writer_lock import WriterLock

RECORD = """
import ctypes
from pathlib import Path
from support.training_runs import play
libc = ctypes.CDLL(None)
play(Path(sys.argv[1]) / "store", lambda number: libc.durable_mark(b"state %d" % number))
"""

# A third commit in copies of a store, in which another operation fails, or the process dies, each time.
THIRD = """
import ctypes, logging, os, shutil
from pathlib import Path
from support.training_runs import State, begin, is_state, third_commit
from tierstore.errors import TierStoreError
from tierstore.training.commits import remove_unnamed
from tierstore.training.writer_lock import WriterLock
libc = ctypes.CDLL(None)
logging.disable()
root = Path(sys.argv[1])
trained, before = begin(root / "first")
shutil.copytree(root / "first", root / "whole")
libc.durable_fail_at(0, 0)
rows = third_commit(root / "whole", trained)
num_operations = libc.durable_count()
after = State(3, {2: before.commits[2], 3: rows})
assert is_state(root / "whole", after)

def check(store, at):
    left = sorted(path.name for path in (store / "training").iterdir())
    found = before if is_state(store, before) else after
    assert is_state(store, found), f"at operation {at}: neither commit 2 nor commit 3, but {left}"
    with WriterLock(store):
        assert remove_unnamed(store) == []
    assert is_state(store, found)
    if found is before:
        third_commit(store, trained)
        assert is_state(store, after), f"at operation {at}"
    return found is after
"""
FAIL = (
    THIRD
    + """
num_done = num_failed = 0
for at in range(1, num_operations + 1):
    store = root / "copy"
    shutil.copytree(root / "first", store)
    libc.durable_fail_at(at, int(sys.argv[2]))
    try:
        third_commit(store, trained)
    except TierStoreError as error:
        assert str(root) in str(error) and str(store) in str(error), error
        num_failed += 1
    libc.durable_fail_at(0, 0)
    num_done += check(store, at)
    shutil.rmtree(store)
assert num_operations > num_failed > 20, (num_operations, num_failed)
assert num_done <= num_operations - num_failed + 2, (num_done, num_failed)  # LMDB's last write may be there anyhow
"""
)
KILL = (
    THIRD
    + """
import signal
num_done = 0
for at in range(1, num_operations + 1):
    store = root / "copy"
    shutil.copytree(root / "first", store)
    child = os.fork()
    if child == 0:
        libc.durable_die_at(at)
        third_commit(store, trained)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    num_done += check(store, at)
    shutil.rmtree(store)
assert 0 < num_done < num_operations / 2
"""
)


def check_crashes(tmp_path: Path, num_torn: int, every: int) -> None:
    root, before, log = tmp_path / "disk", tmp_path / "before", tmp_path / "log"
    root.mkdir()
    make_training(root / "store")
    shutil.copytree(root, before)
    run_recorded(RECORD, root, log=log)
    operations = read_log(log, root)
    states = play(make_training(tmp_path / "undisturbed"), lambda _: None)
    assert sum(operation.what == SYNC for operation in operations) > 20, "LMDB's syncs are among them"
    passed, num_looked_at = 0, 0
    moments = {*range(0, len(operations), every), len(operations)}
    for done, how, folder in crashes(before, operations, tmp_path / "crashed", num_torn, moments=moments):
        passed = sum(operation.what == MARK for operation in operations[:done])
        store = folder / "store"
        allowed = states[passed : passed + 2]
        found = [state for state in allowed if is_state(store, state)]
        assert found, f"after {done} of {len(operations)} operations, what was not synced {how}"
        with WriterLock(store):  # the next training cleans up, and finds the same
            assert remove_unnamed(store) == []
        assert is_state(store, found[0])
        num_looked_at += 1
    assert passed == len(states) - 1
    assert num_looked_at > 50


def test_power_lost_at_any_moment_leaves_a_commit_that_was_published(tmp_path: Path) -> None:
    check_crashes(tmp_path, num_torn=1, every=5)


@pytest.mark.slow
def test_power_lost_at_every_moment_leaves_a_commit_that_was_published(tmp_path: Path) -> None:
    check_crashes(tmp_path, num_torn=5, every=1)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=["full", "failing"])
def test_a_disk_that_fails_at_any_operation_costs_no_commit_and_leaves_no_file(tmp_path: Path, error: int) -> None:
    run_recorded(FAIL, tmp_path, str(error))


def test_a_process_killed_at_any_operation_leaves_a_commit_that_was_published(tmp_path: Path) -> None:
    run_recorded(KILL, tmp_path)
