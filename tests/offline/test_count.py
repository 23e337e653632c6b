"""Items counted in bounded memory: the sums of numpy.unique whatever the memory, or a named error; never litter."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.held import held

from tierstore.errors import BudgetError, ConfigError
from tierstore.offline import count as counting
from tierstore.offline.count import Counted, ItemCounter

ITEM_COSTS = {1: 2 * 24 + 48 + 8, 2: 2 * 32 + 48 + 16, 3: 2 * 40 + 48 + 24}  # bytes of memory an item, by weights


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = held()
    yield
    assert held() <= before


@pytest.fixture
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are merged by as few items at a time as memory says, down to one."""
    monkeypatch.setattr(counting, "BLOCK_ITEMS_MIN", 1)


def random_items(rng: np.random.Generator, count: int, spread: int) -> np.ndarray:
    """Items of which many are equal, or equal in one word only; both words use all their bits."""
    edges = np.array([0, 1, 2**63, 2**64 - 1], dtype=np.uint64)
    return rng.choice(np.concatenate([rng.integers(0, 2**64, spread, dtype=np.uint64), edges]), (count, 2))


def expected_of(items: np.ndarray, weights: np.ndarray) -> Counted:
    distinct, inverse = np.unique(items, axis=0, return_inverse=True)
    sums = np.zeros((len(distinct), weights.shape[1]), dtype=np.int64)
    np.add.at(sums, inverse.reshape(-1), weights)
    return distinct, sums


def assert_counted(blocks: Iterator[Counted], expected: Counted) -> int:
    """Checks blocks, none of them empty, and returns how many there were."""
    found = list(blocks)
    assert all(len(items) == len(sums) > 0 for items, sums in found)
    assert np.concatenate([items for items, _ in found]).tolist() == expected[0].tolist()
    assert np.concatenate([sums for _, sums in found]).tolist() == expected[1].tolist()
    return len(found)


@pytest.mark.usefixtures("tiny_blocks")
@pytest.mark.parametrize("num_weights", [1, 2, 3])
@pytest.mark.parametrize("capacity", [1, 2, 7, 100, 1999, 2000, 2001, 100_000])
@pytest.mark.parametrize("spread", [3, 2000])
def test_sums_equal_numpys_whatever_the_memory(tmp_path: Path, num_weights: int, capacity: int, spread: int) -> None:
    rng = np.random.default_rng([num_weights, capacity, spread])
    count = 300 if capacity < 100 else 2000  # several hundred runs are enough
    items, weights = random_items(rng, count, spread), rng.integers(0, 50, (count, num_weights))
    with ItemCounter(tmp_path, num_weights, ITEM_COSTS[num_weights] * capacity) as counter:
        start = 0
        while start < count:
            end = start + int(rng.integers(0, 120))
            counter.add(items[start:end], weights[start:end])
            start = end
        assert list(tmp_path.iterdir()) == []
        num_blocks = assert_counted(counter.merged(), expected_of(items, weights))
        assert (counter.bytes_spilled > 0) == (capacity <= count)
        assert num_blocks > 1 or capacity != 100
    assert list(tmp_path.iterdir()) == []


def test_hundreds_of_runs_are_merged_in_blocks_of_the_least_size(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    items = random_items(rng, 100_000, 400)
    with ItemCounter(tmp_path, 1, ITEM_COSTS[1] * 300) as counter:
        counter.add(items, 0)
        assert assert_counted(counter.merged(), expected_of(items, np.ones((100_000, 1), dtype=np.int64))) > 1


@pytest.mark.parametrize("capacity", [40, 4000])
def test_items_of_a_column_count_once_in_it(tmp_path: Path, capacity: int) -> None:
    rng = np.random.default_rng(1)
    items, columns = random_items(rng, 1000, 5), rng.integers(0, 2, 1000)
    with ItemCounter(tmp_path, 2, ITEM_COSTS[2] * capacity) as counter:
        for column in (0, 1):
            counter.add(items[columns == column], column)
        assert_counted(counter.merged(), expected_of(items, np.eye(2, dtype=np.int64)[columns]))


@pytest.mark.parametrize("weight", [2**32 - 1, 2**32, 2**57, -1, -(2**57)])
def test_sums_of_every_size_come_back(tmp_path: Path, weight: int) -> None:
    items = np.zeros((40, 2), dtype=np.uint64)
    items[::4, 1] = 7
    weights = np.full((40, 2), weight)
    weights[:, 1] = 3
    with ItemCounter(tmp_path, 2, ITEM_COSTS[2]) as counter:  # every item is a run: nothing is summed before writing
        counter.add(items, weights)
        counter.add(items[1:2], np.array([[1, 0]], dtype=np.int8))
        assert [block[1].tolist() for block in counter.merged()] == [[[30 * weight + 1, 90], [10 * weight, 30]]]


@pytest.mark.parametrize("capacity", [5, 500])
def test_blocks_can_be_had_again_but_nothing_added(tmp_path: Path, capacity: int) -> None:
    items = random_items(np.random.default_rng(2), 100, 9)
    expected = expected_of(items, np.ones((100, 1), dtype=np.int64))
    with ItemCounter(tmp_path, 1, ITEM_COSTS[1] * capacity) as counter:
        counter.add(items, 0)
        halfway = counter.merged()
        next(halfway)
        assert_counted(counter.merged(), expected)
        with pytest.raises(ValueError, match="make another"):
            counter.add(items, 0)
    with pytest.raises(ValueError, match="make another"):
        counter.add(items, 0)
    counter.close()


@pytest.mark.usefixtures("tiny_blocks")
@pytest.mark.parametrize("capacity", [100, 5000])
def test_a_merge_says_how_far_it_is(tmp_path: Path, capacity: int) -> None:
    items = random_items(np.random.default_rng(1), 2000, 2000)
    with ItemCounter(tmp_path, 1, ITEM_COSTS[1] * capacity) as counter:
        counter.add(items, 0)
        for _ in range(2):  # a second merge begins anew
            blocks = counter.merged()
            told = [counter.num_merged for _ in blocks]
            assert [done for done, _ in told] == sorted(done for done, _ in told)
            ((last, total),) = {told[-1]}
            assert last == total >= len(np.unique(items, axis=0))
            assert {of for _, of in told} == {total}


def test_no_items_give_no_blocks(tmp_path: Path) -> None:
    with ItemCounter(tmp_path, 1) as counter:
        counter.add(np.empty((0, 2), dtype=np.uint64), 0)
        assert list(counter.merged()) == []
        assert counter.bytes_spilled == 0


def test_strided_items_and_narrow_weights_are_taken_and_left_as_they_were(tmp_path: Path) -> None:
    items = random_items(np.random.default_rng(3), 60, 4)
    given, weights = np.repeat(items, 2, axis=0)[::2], np.arange(60, dtype=np.uint8)[::-1, None]
    kept = given.copy()
    with ItemCounter(tmp_path, 1, ITEM_COSTS[1] * 7) as counter:
        counter.add(given, weights)
        assert_counted(counter.merged(), expected_of(items, weights.astype(np.int64)))
    np.testing.assert_array_equal(given, kept)


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    items = np.zeros((3, 2), dtype=np.uint64)
    for memory_bytes, num_weights in ((ITEM_COSTS[1] - 1, 1), (0, 1), (1 << 20, 0)):
        with pytest.raises(BudgetError, match=f"{memory_bytes} bytes"):
            ItemCounter(tmp_path, num_weights, memory_bytes)
    with ItemCounter(tmp_path, 2) as counter:
        for bad in (items.astype(np.int64), items.astype(float)):
            with pytest.raises(TypeError, match="expected uint64"):
                counter.add(bad, 0)
        for weights in (np.ones((3, 2)), np.ones((3, 2), dtype=np.uint64)):
            with pytest.raises(TypeError, match="expected int64"):
                counter.add(items, weights)
        for shaped in (items[0], items.reshape(2, 3), items[None]):
            with pytest.raises(ValueError, match="items are"):
                counter.add(shaped, 0)
        for shape in ((3, 1), (2, 2), (6,)):
            with pytest.raises(ValueError, match="weights are"):
                counter.add(items, np.ones(shape, dtype=np.int64))
        for column in (-1, 2):
            with pytest.raises(ValueError, match=f"column {column}"):
                counter.add(items, column)
        assert list(counter.merged()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with ItemCounter(tmp_path / "gone", 1, ITEM_COSTS[1] * 4) as counter:
        counter.add(np.zeros((5, 2), dtype=np.uint64), 0)
        with pytest.raises(ConfigError, match="gone"):
            counter.merged()


FAULTS = [("pwrite", errno.ENOSPC, BudgetError), ("pwrite", errno.EIO, ConfigError), ("preadv", errno.EIO, ConfigError)]


@pytest.mark.usefixtures("tiny_blocks")
@pytest.mark.parametrize("persistent", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize(("call", "code", "error"), FAULTS, ids=str)
def test_a_disk_that_fails_at_any_call_gives_a_named_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, error: type[Exception], persistent: bool
) -> None:
    items = random_items(np.random.default_rng(4), 60, 9)
    expected = expected_of(items, np.ones((60, 1), dtype=np.int64))
    real: Callable[..., int] = getattr(os, call)
    for failing in range(1, 1000):
        calls = 0

        def fail(*arguments: object, failing: int = failing) -> int:
            nonlocal calls
            calls += 1
            if calls == failing or (persistent and calls > failing):
                raise OSError(code, os.strerror(code))
            return real(*arguments)

        monkeypatch.setattr(os, call, fail)
        with ItemCounter(tmp_path, 1, ITEM_COSTS[1] * 16) as counter:
            message = ""
            try:
                counter.add(items, 0)
                assert_counted(counter.merged(), expected)
            except error as raised:
                message = str(raised)
            assert (message == "") == (calls < failing)
            assert message == "" or os.strerror(code) in message
        monkeypatch.setattr(os, call, real)
        assert list(tmp_path.iterdir()) == []
        if calls < failing:
            break
    assert failing > 4


def test_a_run_that_was_not_written_is_never_missing_silently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the disk works again, the last buffer is written again; a run that was lost before keeps being an error."""
    items = random_items(np.random.default_rng(5), 20, 9)
    real = os.pwrite

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with ItemCounter(tmp_path, 1, ITEM_COSTS[1] * 16) as counter:
        counter.add(items[:16], 0)
        counter._wait()
        counter.add(items[16:], 0)
        monkeypatch.setattr(os, "pwrite", fail)
        with pytest.raises(BudgetError, match="free some, or give a path on another disk"):
            counter.merged()
        monkeypatch.setattr(os, "pwrite", real)
        assert_counted(counter.merged(), expected_of(items, np.ones((20, 1), dtype=np.int64)))
    with ItemCounter(tmp_path, 1, ITEM_COSTS[1] * 16) as counter:
        monkeypatch.setattr(os, "pwrite", fail)
        counter.add(items[:16], 0)
        for _ in range(2):
            with pytest.raises(BudgetError, match="free some, or give a path on another disk"):
                counter.merged()
        monkeypatch.setattr(os, "pwrite", real)
        with pytest.raises(BudgetError, match="free some, or give a path on another disk"):
            counter.merged()


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = random_items(np.random.default_rng(6), 50, 9)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, start: real(fd, data[:11], start))
    with ItemCounter(tmp_path, 1, ITEM_COSTS[1] * 16) as counter:
        counter.add(items, 0)
        assert_counted(counter.merged(), expected_of(items, np.ones((50, 1), dtype=np.int64)))


COUNT_AND = """
import os, pathlib, signal, sys
import numpy as np
from tierstore.offline.count import ItemCounter

def kilobytes(name):  # not getrusage's peak: that begins with the parent's
    status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0])

rng = np.random.default_rng(0)
before = kilobytes("VmRSS")
with ItemCounter(sys.argv[1], 2, 32 << 20) as counter:
    for step in range(60):
        counter.add(rng.integers(0, 2**64, (50_000, 2), dtype=np.uint64), step % 2)
    assert counter.bytes_spilled > 32 << 20
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    assert sum(len(items) for items, _ in counter.merged()) == 3_000_000
print(kilobytes("VmHWM") - before)
"""


def run_counting(folder: Path, what: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COUNT_AND, str(folder), what], capture_output=True, text=True, timeout=120, check=False
    )


def test_a_process_that_is_killed_leaves_nothing_in_the_folder(tmp_path: Path) -> None:
    assert run_counting(tmp_path, "die").returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_memory_stays_within_what_was_asked(tmp_path: Path) -> None:
    """Three million items, 32 MiB; the allocator and the interpreter get another 16."""
    done = run_counting(tmp_path, "finish")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < (32 + 16) << 10
