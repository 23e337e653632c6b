"""MemoryError at every line of ours that a lookup, a trace or a close goes through: nothing is lost,
and the next call works.

A trace function raises at line 1, 2, 3 ... of our own Python until a call ends before the next one; of a trace, which
goes through hundreds of lines, at every line with TIERSTORE_SOAK=1, else at every seventh. Lines that only leave a
`with` are passed over: there, no code of ours runs that could be out of memory. What the C++ side does without memory
is tests/kernels/cpp/scarcity_test.cpp's.
"""

from __future__ import annotations

import linecache
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from support.held import held
from support.repository import REPOSITORY
from support.shapes import HEADS, ROW_BYTES
from support.stores import Model, random_keys
from support.waiting import WAIT_S

import tierstore
from tierstore.daemon.daemon import Daemon

NAME = "layers.1"
OURS = (str(REPOSITORY / "tierstore"), str(REPOSITORY / "kernels"))
CANARY = 0x3C
# Begins of lines that take no memory; os.close, which ends a `finally`, is one system call of a number that is there.
NO_MEMORY = ("with ", "finally:", "else:", "try:", "os.close(")
STEP = 1 if os.environ.get("TIERSTORE_SOAK") else 7


class Failing:
    """Raises MemoryError at one line of our code, in this thread; `hit` says whether there was such a line."""

    def __init__(self, number: int) -> None:
        self.left, self.hit = number, False

    def __enter__(self) -> Failing:
        sys.settrace(self._on_call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _on_call(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        callers: FrameType | None = frame
        while callers is not None:
            if callers.f_code.co_name == "__del__":  # what it raised would be swallowed
                return None
            callers = callers.f_back
        return self._on_line if os.path.realpath(frame.f_code.co_filename).startswith(OURS) else None

    def _on_line(self, frame: FrameType, event: str, _argument: Any) -> Any:
        if event != "line" or self.hit:
            return self._on_line
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if not line.startswith(NO_MEMORY):
            if self.left == 0:
                self.hit = True
                raise MemoryError(f"on purpose, at {frame.f_code.co_filename}:{frame.f_lineno}")
            self.left -= 1
        return self._on_line


def sweep(act: Callable[[], object], check: Callable[[bool], None], step: int = 1) -> int:
    """Fails line after line of act until it ends before the next; returns how many there were. check:
    whether it ended well."""
    number = 0
    while True:
        failing, ended = Failing(number), False
        try:
            with failing:
                act()
            ended = True
        except MemoryError as error:
            assert failing.hit
            print(error)
        check(ended)
        if not failing.hit:
            assert ended
            return number
        number += step


@pytest.fixture(params=["embedded", "attached"])
def open_store(request: pytest.FixtureRequest, placed: Path, tmp_path: Path) -> Iterator[Callable[[], tierstore.Store]]:
    if request.param == "embedded":
        yield lambda: tierstore.open(placed, dram="500KiB")
        return
    daemon = Daemon(placed, tmp_path / "socket", 900 << 10, replan_s=None)
    daemon.start()
    try:
        yield lambda: tierstore.connect(tmp_path / "socket", staging="1MiB")
    finally:
        assert daemon.close()


def all_is_well(store: tierstore.Store, model: Model) -> None:
    keys = random_keys(np.random.default_rng(99), 20)
    np.testing.assert_array_equal(store[NAME].lookup(keys), model.expected(NAME, keys))
    deadline = time.monotonic() + WAIT_S
    while len(set(store._engine.native.page_readers())) > 1:
        assert time.monotonic() < deadline, store._engine.native.page_readers()
        time.sleep(0.001)


# A ticket may have been there already when `wait` raised: its buffer is not the caller's yet.
TICKETS = ("submit", "submit rows")
LOOKUPS = ("lookup", "strided lookup", "rows", "whole rows", "strided rows", "strided submit", *TICKETS, "explain")


@pytest.mark.parametrize("how", LOOKUPS)
def test_a_lookup_without_memory_raises_and_costs_nothing_later(open_store: Any, model: Model, how: str) -> None:
    rng = np.random.default_rng(1)
    with open_store() as store:
        table, left = store[NAME], []

        def act() -> None:
            keys = rng.integers(0, 2**60, (30, 3))
            ids = model.row_ids(NAME, keys)
            wide = np.full((30, 24, 80), CANARY, dtype=np.uint8)
            out = wide[:, :, :40] if "strided" in how else np.full((30, HEADS, ROW_BYTES), CANARY, dtype=np.uint8)
            left[:] = [out]
            if how == "explain":
                table.explain(keys)
            elif how == "rows":
                table.rows(ids.reshape(-1), out.reshape(-1, 40))
            elif how in ("whole rows", "strided rows"):
                table.rows(ids, out)
            elif how == "submit rows":
                table.submit_rows(ids, out, within=(0, table.spec.num_rows)).wait(WAIT_S)
            elif "lookup" in how:
                table.lookup(keys[:, ::-1], out)
                keys = keys[:, ::-1]
            else:
                store.submit({NAME: (keys, out)}).wait(WAIT_S)
            if how != "explain":
                np.testing.assert_array_equal(out, model.expected(NAME, keys))

        def check(ended: bool) -> None:
            if not ended and left and how not in TICKETS:
                left[0][...] = CANARY
                all_is_well(store, model)
                assert (left[0] == CANARY).all()
            all_is_well(store, model)

        assert sweep(act, check) > 5


def test_a_trace_without_memory_leaves_neither_file_nor_descriptor_nor_thread(
    open_store: Any, model: Model, tmp_path: Path
) -> None:
    folder = tmp_path / "traces"
    folder.mkdir()
    keys = random_keys(np.random.default_rng(2), 30)
    with open_store() as store:
        all_is_well(store, model)
        before = held()

        def act() -> None:
            store.start_trace(folder / "keys.trace", 1)
            store[NAME].lookup(keys)
            assert store.stop_trace().num_accesses == (keys >= 0).sum()
            (folder / "keys.trace").unlink()

        def check(_ended: bool) -> None:
            store.stop_trace()
            for file in folder.glob("*.trace"):
                file.unlink()  # a whole one, of a call that failed after it was made
            assert not list(folder.iterdir())
            assert held() <= before

        assert sweep(act, check, STEP) > 100
        all_is_well(store, model)


def test_a_close_without_memory_is_completed_by_the_next(open_store: Any, model: Model) -> None:
    keys = random_keys(np.random.default_rng(3), 100)
    number, hit = 0, True
    while hit:
        store = open_store()
        out = np.full((100, HEADS, ROW_BYTES), CANARY, dtype=np.uint8)
        store.submit({NAME: (keys, out)})
        failing = Failing(number)
        try:
            with failing:
                store.close()
        except MemoryError:
            assert failing.hit
        store.close()
        np.testing.assert_array_equal(out, model.expected(NAME, keys))
        with pytest.raises(tierstore.StoreNotReadyError):
            store[NAME].lookup(keys)
        number, hit = number + 1, failing.hit
    assert number > 5


SCARCE = """
import resource, sys, time
from pathlib import Path
import numpy as np, tierstore

store = tierstore.open(sys.argv[1], dram="400KiB", io=sys.argv[2])
keys = np.random.default_rng(0).integers(0, 2**60, (100, 3))
out = np.zeros((100, 24, 40), dtype=np.uint8)
expected = np.load(sys.argv[3])
status = Path("/proc/self/status").read_text()
used = int(next(line for line in status.splitlines() if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), resource.RLIM_INFINITY))  # less than a thread's stack
for _ in range(3):
    store.submit({"layers.1": (keys, out)}).wait(30)
    assert np.array_equal(out, expected)
    out[:] = 0
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.submit({"layers.1": (keys, out)}).wait(30)
assert np.array_equal(out, expected)
started = time.monotonic()
store.close()
assert time.monotonic() - started < 10, "close waited for what nobody carries"
print("good")
"""


@pytest.mark.parametrize("io", ["auto", "mmap", "pread"])
def test_submit_works_where_no_thread_can_be_had_and_close_does_not_hang(
    built: Path, model: Model, io: str, tmp_path: Path
) -> None:
    keys = np.random.default_rng(0).integers(0, 2**60, (100, 3))
    np.save(tmp_path / "expected.npy", model.expected(NAME, keys))
    command = [sys.executable, "-c", SCARCE, str(built), io, str(tmp_path / "expected.npy")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (0, "good\n"), ran.stderr[-1500:]
