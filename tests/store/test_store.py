"""The store in process, through the contract, and what only it promises: budgets, forks, early tickets."""

from __future__ import annotations

import gc
import multiprocessing
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from contract.store_contract import StoreContract
from support.held import open_files
from support.shapes import ENTRY_BYTES, HEADS, POISON, ROW_BYTES
from support.stores import Model, open_behind_hbm, random_keys

import tierstore
from tierstore.tiers import native


class TestResidentStore(StoreContract):
    """Budget above all tables: every row in DRAM."""

    def open_store(self, path: Path) -> tierstore.Store:
        return tierstore.open(path, dram="64MiB")


class TestCachedStore(StoreContract):
    """Budget of about a third of the tables: entries come and go. Pages by io_uring, where there is one."""

    def open_store(self, path: Path) -> tierstore.Store:
        return tierstore.open(path, dram="600KiB")


class TestSmallestStore(StoreContract):
    """The least budget there is: one set of entries a table, one key a read batch."""

    def open_store(self, path: Path) -> tierstore.Store:
        return tierstore.open(path, dram=least_budget(path))


class TestMmapStore(StoreContract):
    """Pages by memory maps and read-ahead."""

    def open_store(self, path: Path) -> tierstore.Store:
        return tierstore.open(path, dram="600KiB", io="mmap")


class TestPreadStore(StoreContract):
    """Pages by a pool of threads."""

    def open_store(self, path: Path) -> tierstore.Store:
        return tierstore.open(path, dram="300KiB", io="pread")


class PlacedStore(StoreContract):
    """With a placement, part of it in DRAM and part in its file."""

    @pytest.fixture
    def built(self, placed: Path) -> Path:
        return placed


class TestPlacedStore(PlacedStore):
    """By io_uring, where there is any."""

    def open_store(self, path: Path) -> tierstore.Store:
        return tierstore.open(path, dram="400KiB")


class TestPlacedMmapStore(PlacedStore):
    """By memory maps."""

    def open_store(self, path: Path) -> tierstore.Store:
        return tierstore.open(path, dram="400KiB", io="mmap")


class TestPlacedPreadStore(PlacedStore):
    """By threads of pread, with room for the whole placement."""

    def open_store(self, path: Path) -> tierstore.Store:
        return tierstore.open(path, dram="1MiB", io="pread")


class TestPlacedBehindHbmStore(PlacedStore):
    """Where the static set begins behind the entries of HBM, which nobody holds here."""

    def open_store(self, path: Path) -> tierstore.Store:
        return open_behind_hbm(path, 600)


class TestPlacedResidentStore(PlacedStore):
    """Where every table fits whole, a placement has nothing to add."""

    def open_store(self, path: Path) -> tierstore.Store:
        return tierstore.open(path, dram="64MiB")


def least_budget(path: Path) -> int:
    with pytest.raises(tierstore.BudgetError, match="staging") as caught:
        tierstore.open(path, dram=1)
    return int(str(caught.value).split("below the ")[1].split()[0])


def test_the_least_budget_that_the_error_names_is_enough_and_exact(built: Path) -> None:
    least = least_budget(built)
    with tierstore.open(built, dram=least) as store:
        assert store.stats()["memory"]["dram_bytes"] <= least
    with pytest.raises(tierstore.BudgetError, match=str(least - 2000)):
        tierstore.open(built, dram=least - 2000)


def test_a_budget_above_the_machine_is_refused_with_both_numbers(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierstore.store.embedded.available_memory", lambda: (123_456, "cgroup"))
    with pytest.raises(tierstore.BudgetError, match=r"cgroup has 120\.56 KiB"):
        tierstore.open(built, dram="64MiB")


@pytest.mark.parametrize("dram", ["1GiBB", -1, "x", "", None, True, "0.3B"])
def test_a_budget_that_is_no_size_is_refused(built: Path, dram: object) -> None:
    with pytest.raises(tierstore.ConfigError, match="dram"):
        tierstore.open(built, dram=dram)


@pytest.mark.parametrize("option", [{"io": "fast"}, {"hbm": "1GiB"}, {"device": "cuda:0"}, {"placement": 3}])
def test_options_that_do_not_exist_are_refused(built: Path, option: dict) -> None:
    with pytest.raises(tierstore.ConfigError, match=next(iter(option))):
        tierstore.open(built, **option)


def test_hits_are_served_without_reading(built: Path, model: Model) -> None:
    keys = random_keys(np.random.default_rng(0), 20)
    with tierstore.open(built, dram="600KiB") as store:
        store["layers.1"].lookup(keys)
        before = store.stats()
        np.testing.assert_array_equal(store["layers.1"].lookup(keys), model.expected("layers.1", keys))
        after = store.stats()
    assert after["pages_read"] == before["pages_read"] > 0
    assert after["hits"]["nvme"] == before["hits"]["nvme"]
    assert after["zero_miss_batches"] == before["zero_miss_batches"] + 1


def test_row_ids_of_whole_tokens_go_through_the_cache(built: Path, model: Model) -> None:
    keys = random_keys(np.random.default_rng(1), 20)
    with tierstore.open(built, dram="600KiB") as store:
        store["layers.1"].lookup(keys)
        pages_read = store.stats()["pages_read"]
        store["layers.1"].rows(model.row_ids("layers.1", keys))
        assert store.stats()["pages_read"] == pages_read
        assert store.stats()["rows"] == 0


def test_pages_of_one_batch_are_read_once(built: Path) -> None:
    with tierstore.open(built, dram="600KiB") as store:
        store["layers.1"].rows(np.zeros(500, dtype=np.int64))
        assert store.stats()["pages_read"] == 1


def test_wait_times_out_and_can_be_called_again(built: Path, model: Model) -> None:
    keys = random_keys(np.random.default_rng(2), 5)
    with tierstore.open(built, dram="600KiB") as store:
        store._engine._engine.inject("slow", 0, 1000)
        out = np.full((5, HEADS, ROW_BYTES), POISON, dtype=np.uint8)
        ticket = store.submit({"layers.1": (keys, out)})
        with pytest.raises(TimeoutError):
            ticket.wait(timeout_s=0.01)
        store._engine._engine.inject("none")
        ticket.wait(timeout_s=60)
        np.testing.assert_array_equal(out, model.expected("layers.1", keys))


def test_tickets_beyond_the_limit_wait_for_earlier_ones(built: Path, model: Model, monkeypatch) -> None:
    monkeypatch.setattr("tierstore.tiers.native.JOBS_MAX", 1)
    rng = np.random.default_rng(3)
    with tierstore.open(built, dram="600KiB") as store:
        steps = [(random_keys(rng, 25), np.full((25, HEADS, ROW_BYTES), POISON, dtype=np.uint8)) for _ in range(20)]
        tickets = [store.submit({"layers.1": step}) for step in steps]
        for ticket, (keys, out) in zip(tickets, steps, strict=True):
            ticket.wait(timeout_s=60)
            np.testing.assert_array_equal(out, model.expected("layers.1", keys))


def _lookup_in_child(store, model: Model, results) -> None:
    keys = random_keys(np.random.default_rng(4), 50)
    out = np.full((50, HEADS, ROW_BYTES), POISON, dtype=np.uint8)
    store.submit({"layers.1": (keys, out)}).wait(timeout_s=60)
    results.put(np.array_equal(out, model.expected("layers.1", keys)))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_ticket_that_has_ended_keeps_no_buffer(built: Path) -> None:
    rng = np.random.default_rng(0)
    with tierstore.open(built, dram="300KiB") as store:
        buffers = []
        for _ in range(20):
            out = np.empty((60, HEADS, ROW_BYTES), dtype=np.uint8)
            buffers.append(weakref.ref(out))
            store.submit({"layers.1": (rng.integers(0, 2**60, (60, 3)), out)}).wait(timeout_s=60)
            del out
        assert [buffer() for buffer in buffers] == [None] * 20


def test_a_ticket_that_nobody_waits_for_keeps_no_buffer_either(built: Path) -> None:
    with tierstore.open(built, dram="300KiB") as store:
        out = np.empty((60, HEADS, ROW_BYTES), dtype=np.uint8)
        buffer = weakref.ref(out)
        store.submit({"layers.1": (np.random.default_rng(1).integers(0, 2**60, (60, 3)), out)})
        del out
        deadline = time.monotonic() + 60
        while buffer() is not None:  # the main thread drops it between two of its instructions
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.mark.parametrize("dram", ["500KiB", "64MiB"])
@pytest.mark.parametrize("how", ["lookup", "rows", "submit"])
def test_keys_that_another_thread_changes_give_rows_of_the_one_or_the_other(
    built: Path, model: Model, dram: str, how: str
) -> None:
    one, other = random_keys(np.random.default_rng(2), 50), random_keys(np.random.default_rng(3), 50)
    one[one < 0], other[other < 0] = 5, 6
    if how == "rows":
        values = [model.row_ids("layers.1", keys).reshape(-1) for keys in (one, other)]
    else:
        values = [one, other]
    shared, ended = values[0].copy(), threading.Event()
    rows = [model.expected("layers.1", keys) for keys in (one, other)]

    def change() -> None:
        bad = values[0].copy()
        bad.reshape(-1)[::7] = np.iinfo(np.int64).min
        while not ended.is_set():
            for written in (values[1], values[0], values[1], bad, values[0]):
                shared[...] = written

    thread = threading.Thread(target=change)
    thread.start()
    answered, ends = 0, time.monotonic() + 60  # how often keys are refused is the scheduler's choice
    try:
        with tierstore.open(built, dram=dram) as store:
            while answered < 100 and time.monotonic() < ends:
                out = np.full((50, HEADS, ROW_BYTES), POISON, dtype=np.uint8)
                try:
                    if how == "lookup":
                        store["layers.1"].lookup(shared, out)
                    elif how == "rows":
                        store["layers.1"].rows(shared, out.reshape(-1, 40))
                    else:
                        store.submit({"layers.1": (shared, out)}).wait(timeout_s=60)
                except ValueError:
                    continue
                answered += 1
                units = (1200, 40) if how == "rows" else (150, ENTRY_BYTES)  # what one id asks for
                found, *wanted = (each.reshape(units) for each in (out, *rows))
                assert ((found == wanted[0]).all(axis=1) | (found == wanted[1]).all(axis=1)).all()
    finally:
        ended.set()
        thread.join()
    assert answered


def test_closed_descriptors_are_an_error_at_once_that_says_so(built: Path) -> None:
    code = (
        "import os, sys, time, numpy as np, tierstore\n"
        "store = tierstore.open(sys.argv[1], dram='500KiB', io=sys.argv[2])\n"
        "os.closerange(3, 1000)\n"
        "started = time.monotonic()\n"
        "for early in (False, True):\n"
        "    keys, out = np.arange(300).reshape(-1, 3), np.empty((100, 24, 40), dtype=np.uint8)\n"
        "    try:\n"
        "        store.submit({'layers.1': (keys, out)}).wait(60) if early else store['layers.1'].lookup(keys, out)\n"
        "    except tierstore.StoreNotReadyError as error:\n"
        "        assert 'os.closerange' in str(error), error\n"
        "    else:\n"
        "        raise AssertionError('rows of files that are closed')\n"
        "assert time.monotonic() - started < 20\n"
        "os._exit(0)\n"
    )
    for io in ("auto", "mmap", "pread"):
        subprocess.run([sys.executable, "-c", code, str(built), io], check=True, timeout=120)


def test_a_store_works_on_both_sides_of_a_fork(built: Path, model: Model) -> None:
    context = multiprocessing.get_context("fork")
    with tierstore.open(built, dram="600KiB") as store:
        keys = random_keys(np.random.default_rng(5), 40)
        out = np.full((40, HEADS, ROW_BYTES), POISON, dtype=np.uint8)
        store.submit({"layers.1": (keys, out)}).wait(timeout_s=60)  # the submit thread now exists
        results = context.Queue()
        child = context.Process(target=_lookup_in_child, args=(store, model, results))
        child.start()
        assert results.get(timeout=60)
        child.join(timeout=60)
        assert child.exitcode == 0
        np.testing.assert_array_equal(store["layers.1"].lookup(keys), model.expected("layers.1", keys))


FORKING_THREADS = """
import os, sys, threading
import tierstore

sys.setswitchinterval(1e-6)
stores = [tierstore.open(sys.argv[1], dram="600KiB") for _ in range(4)]

def fork_often():
    for _ in range(60):
        child = os.fork()
        if child == 0:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0

threads = [threading.Thread(target=fork_often) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for store in stores:
    store.close()
"""


def test_threads_that_fork_at_once_do_not_wait_for_each_other_for_ever(built: Path) -> None:
    """One held some of the stores' locks and waited for the interpreter; the other had that,
    and waited for those locks."""
    command = [sys.executable, "-W", "ignore", "-c", FORKING_THREADS, str(built)]
    subprocess.run(command, check=True, timeout=120)


CLOSING_FORKS = """
import os, sys, threading, time
may_close = threading.Event()
# After the stores' own, with what these hold held:
os.register_at_fork(before=lambda: (may_close.set(), time.sleep(0.05)))
import numpy as np
import tierstore
keys, stop = np.arange(6, dtype=np.int64).reshape(2, 3), threading.Event()
stores = [tierstore.open(sys.argv[1], dram="600KiB")]
def look_up():
    while not stop.is_set():
        try:
            stores[0]["layers.1"].lookup(keys)
        except tierstore.StoreNotReadyError:
            pass
def close():
    while may_close.wait() and not stop.is_set():
        may_close.clear()
        stores[0].close()
        stores[0] = tierstore.open(sys.argv[1], dram="600KiB")
threads = [threading.Thread(target=act) for act in (look_up, look_up, close)]
for thread in threads:
    thread.start()
for _ in range(5):
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    time.sleep(0.1)  # opened again
stop.set()
may_close.set()
for thread in threads:
    thread.join()
"""


def test_a_fork_while_a_store_closes_under_lookups_does_not_wait_for_ever(built: Path) -> None:
    """Who forked held the store's lock; a lookup that ended waited for it with the interpreter's."""
    command = [sys.executable, "-W", "ignore", "-c", CLOSING_FORKS, str(built)]
    subprocess.run(command, check=True, timeout=120)


def test_a_closed_store_that_is_still_named_keeps_no_memory_and_its_counts(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its block was let go only with the store itself."""
    blocks: list[weakref.ref] = []
    real = native.allocate

    def allocate(num_bytes: int) -> np.ndarray:
        block = real(num_bytes)
        blocks.append(weakref.ref(block))
        return block

    monkeypatch.setattr(native, "allocate", allocate)
    store = tierstore.open(built, dram="600KiB")
    store["layers.1"].lookup(random_keys(np.random.default_rng(0), 20))
    counted = store.stats()["hits"]
    store.close()
    assert store.stats()["hits"] == counted
    gc.collect()
    assert [block() for block in blocks] == [None]


def test_closing_gives_back_every_descriptor(built: Path) -> None:
    before = open_files()
    for _ in range(5):
        with tierstore.open(built, dram="600KiB") as store:
            store["layers.1"].lookup(np.ones((3, 3), dtype=np.int64))
    assert open_files() <= before


def test_importing_the_store_loads_neither_torch_nor_triton() -> None:
    code = "import tierstore, engram_adapter, sys; assert 'torch' not in sys.modules and 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("is_closed", "is_finalizing", "closes"), [(True, True, 0), (True, False, 1), (False, True, 1)]
)
def test_a_closed_store_that_dies_with_the_interpreter_is_left_alone(
    built: Path, monkeypatch: pytest.MonkeyPatch, is_closed: bool, is_finalizing: bool, closes: int
) -> None:
    """Modules that closing needs may be gone by then: a program over gRPC that did not close ended with a traceback."""
    called = []
    with tierstore.open(built) as store:
        opened = store._opened
        with monkeypatch.context() as patched:
            patched.setattr(opened, "is_closed", is_closed)
            patched.setattr(opened, "close", lambda: called.append(1))
            type(opened).__del__(opened, is_finalizing=lambda: is_finalizing)
    assert len(called) == closes
