"""Blocks in use are brought onto huge pages in the background, and how much of them is there is known."""

from __future__ import annotations

import gc
import mmap
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from support.stores import Model, random_keys
from support.threads import steady_count, threads_of_this_process
from support.waiting import eventually

import tierstore
from tierstore import kernels
from tierstore.tiers import huge_pages
from tierstore.tiers.memory import allocate
from tierstore.tiers.shared import SharedBlock

HUGE_BYTES = 2 << 20
BLOCK_BYTES = 16 << 20


def small_pages(num_bytes: int = BLOCK_BYTES) -> np.ndarray:
    """A block of bytes that are their place's, on small pages that the kernel may collapse."""
    block = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_NOHUGEPAGE)
    array = np.frombuffer(block, dtype=np.uint8)
    array[:] = expected(num_bytes)
    block.madvise(mmap.MADV_HUGEPAGE)
    return array


def expected(num_bytes: int) -> np.ndarray:
    return (np.arange(num_bytes, dtype=np.uint64) * 0x9E3779B97F4A7C15 >> 56).astype(np.uint8)


needs_collapse = pytest.mark.skipif(
    huge_pages.share_collapsed(HUGE_BYTES) < 1, reason="this kernel collapses no memory when it is asked to"
)


@needs_collapse
def test_small_pages_become_huge_ones_while_threads_read_and_write_them() -> None:
    block = small_pages()
    pages = kernels.HugePages(block, 0.0)
    assert pages.look()[1] == 0
    stop = threading.Event()
    wrong: list[int] = []
    wanted = expected(BLOCK_BYTES)

    def read() -> None:
        while not stop.is_set():
            if not np.array_equal(block, wanted):
                wrong.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert pages.start()
        # All but what the block's ends have of a huge page.
        eventually(lambda: pages.look()[1] >= BLOCK_BYTES - 2 * HUGE_BYTES)
    finally:
        stop.set()
        reader.join()
        pages.stop()
    assert not wrong
    assert BLOCK_BYTES - 2 * HUGE_BYTES <= pages.collapsed_bytes() <= BLOCK_BYTES
    assert pages.last() == pages.look() == (BLOCK_BYTES, pages.last()[1])


def test_any_number_of_threads_may_stop_it_at_once() -> None:
    block = allocate(64 << 20)
    block[::4096] = 1
    for _ in range(20):
        pages = kernels.HugePages(block, 0.0)
        assert pages.start()
        eventually(lambda pages=pages: pages.last()[0] > 0)  # it is at work
        threads = [threading.Thread(target=pages.stop, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in threads)


def test_what_nobody_touched_is_not_brought_into_memory() -> None:
    block = allocate(BLOCK_BYTES)
    block[: BLOCK_BYTES // 2 : 4096] = 1
    pages = kernels.HugePages(block, 0.0)
    assert pages.start()
    eventually(lambda: pages.last()[0] > 0)
    pages.stop()
    assert pages.look()[0] <= BLOCK_BYTES // 2 + HUGE_BYTES


def test_a_thread_that_waits_ends_at_once_when_it_is_stopped_or_forgotten() -> None:
    before = steady_count()
    stopped, forgotten = (kernels.HugePages(small_pages(), 3600.0) for _ in range(2))
    assert stopped.start()
    assert forgotten.start()
    assert threads_of_this_process() == before + 2
    stopped.stop()
    stopped.stop()
    del forgotten
    gc.collect()
    eventually(lambda: threads_of_this_process() == before)


def test_a_forked_child_forgets_it_and_ends_by_itself() -> None:
    pages = kernels.HugePages(small_pages(), 3600.0)
    assert pages.start()
    child = os.fork()
    if child == 0:
        pages.stop()
        present_bytes, _ = pages.look()
        del pages
        gc.collect()
        os._exit(0 if present_bytes == BLOCK_BYTES else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    pages.stop()


def test_only_a_block_that_may_be_written_is_taken() -> None:
    block = small_pages()
    block.flags.writeable = False
    for wrong in (block, np.zeros(8, dtype=np.int64), np.zeros((8, 8), dtype=np.uint8)[:, ::2], np.zeros(0, np.uint8)):
        with pytest.raises(ValueError, match="block"):
            kernels.HugePages(wrong, 1.0)


def test_the_memory_of_a_shared_block_goes_when_it_is_closed() -> None:
    block = SharedBlock("closed-block", huge_pages.BLOCK_BYTES_MIN)
    assert block.huge_pages is not None
    assert "closed-block" in Path("/proc/self/maps").read_text()
    block.close()
    assert "closed-block" not in Path("/proc/self/maps").read_text()


def test_a_small_block_has_no_thread() -> None:
    before = steady_count()
    assert huge_pages.keep_on_huge_pages(allocate(huge_pages.BLOCK_BYTES_MIN - 1)) is None
    assert threads_of_this_process() == before
    assert huge_pages.bytes_on_huge_pages([None]) == (0, 0)


@pytest.mark.parametrize("dram", ["600KiB", "64MiB"], ids=["cached", "resident"])
def test_a_store_says_how_much_of_its_memory_is_on_huge_pages(
    built: Path, model: Model, monkeypatch: pytest.MonkeyPatch, dram: str
) -> None:
    monkeypatch.setattr(huge_pages, "BLOCK_BYTES_MIN", 1)
    monkeypatch.setattr(huge_pages, "FIRST_LOOK_S", 0.0)
    keys = random_keys(np.random.default_rng(0), 400)
    with tierstore.open(built, dram=dram, threads=1) as store:
        table = store["layers.1"]
        for _ in range(3):
            np.testing.assert_array_equal(table.lookup(keys), model.expected("layers.1", keys))
        eventually(lambda: store.stats()["memory"]["present_bytes"] > 0)
        memory = store.stats()["memory"]
        assert 0 <= memory["huge_page_bytes"] <= memory["present_bytes"] <= memory["dram_bytes"] + (1 << 20)
        thread = store._engine.huge_pages
        assert thread is not None
    assert store._engine.huge_pages is None
