"""Large lookups that several threads share: the whole contract, and what the number of threads may be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from contract.rows_contract import NAME, expected_rows, some_ids
from contract.store_contract import StoreContract
from support.shapes import ENTRY_BYTES, POISON, ROW_BYTES
from support.stores import Model, random_keys
from support.threads import steady_count, threads_of_this_process
from support.waiting import eventually

import tierstore
from tierstore.errors import ConfigError
from tierstore.tiers import native, nvme
from tierstore.tiers.memory import usable_cores

THREADS = 3


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads take two entries at a time, so that nearly every lookup is a large one."""
    monkeypatch.setattr(native, "PART_BYTES", 2 * ENTRY_BYTES)


class TestSharedLookupsOfACache(StoreContract):
    """Entries come and go while threads copy them."""

    def open_store(self, path: Path) -> tierstore.Store:
        return tierstore.open(path, dram="600KiB", threads=THREADS)


@pytest.fixture(params=["600KiB", "64MiB"], ids=["cached", "resident"])
def store(request: pytest.FixtureRequest, built: Path) -> Iterator[tierstore.Store]:
    with tierstore.open(built, dram=request.param, threads=THREADS) as opened:
        yield opened


def ends_with(expected: int) -> None:
    """A thread that was joined is listed for a moment more."""
    eventually(lambda: threads_of_this_process() == expected)


def test_threads_come_with_the_first_large_lookup_and_go_with_the_store(built: Path, model: Model) -> None:
    keys = random_keys(np.random.default_rng(0), 400)
    with tierstore.open(built, dram="64MiB", threads=THREADS) as store:
        before = steady_count()
        store["layers.1"].lookup(keys[:2])
        assert threads_of_this_process() == before
        np.testing.assert_array_equal(store["layers.1"].lookup(keys), model.expected("layers.1", keys))
        assert threads_of_this_process() == before + THREADS - 1
    ends_with(before)


def test_one_thread_is_the_callers(built: Path) -> None:
    with tierstore.open(built, dram="64MiB", threads=1) as store:
        before = steady_count()
        store["layers.1"].lookup(random_keys(np.random.default_rng(0), 400))
        assert threads_of_this_process() == before


@pytest.mark.parametrize("dram", ["600KiB", "64MiB"], ids=["cached", "resident"])
def test_counters_sources_and_rows_are_those_of_one_thread(built: Path, model: Model, dram: str) -> None:
    keys, found = random_keys(np.random.default_rng(1), 300), []
    for threads in (THREADS, 1):
        with tierstore.open(built, dram=dram, threads=threads) as store:
            sources = np.empty((300, 3), dtype=np.uint8)
            rows = store["layers.1"].lookup(keys, sources=sources)
            np.testing.assert_array_equal(rows, model.expected("layers.1", keys))
            stats = store.stats()
            found.append((sources.tolist(), stats["hits"], stats["sentinels"], stats["tables"]))
    assert found[0] == found[1]


@pytest.mark.parametrize("place", [0, 150, 299])
def test_a_key_outside_the_table_in_any_part_is_refused(store: tierstore.Store, place: int) -> None:
    keys = random_keys(np.random.default_rng(2), 300)
    keys[place, 1] = -2
    with pytest.raises(ValueError, match="key"):
        store["layers.1"].lookup(keys)


@pytest.mark.parametrize("dram", ["600KiB", "64MiB"], ids=["cached", "resident"])
@pytest.mark.parametrize("form", ["tokens", "single rows", "strided", "a range"])
def test_rows_by_their_ids_and_their_counters_are_those_of_one_thread(
    built: Path, model: Model, dram: str, form: str
) -> None:
    ids, found = some_ids(model, 4, 300), []
    ids = ids.reshape(-1) if form == "single rows" else ids
    within = (300, 1500) if form == "a range" else None
    for threads in (THREADS, 1):
        with tierstore.open(built, dram=dram, threads=threads) as store:
            before = steady_count()
            buffer = np.full((*ids.shape, ROW_BYTES + 5), POISON, dtype=np.uint8)
            out = buffer[..., 2:-3] if form == "strided" else np.full((*ids.shape, ROW_BYTES), POISON, dtype=np.uint8)
            for _ in range(2):  # from the shards, then what the cache keeps
                store[NAME].rows(ids, out, within=within)
                np.testing.assert_array_equal(out, expected_rows(model, ids, within))
            if dram == "64MiB":  # else one more may read pages
                assert threads_of_this_process() == before + threads - 1
            stats = store.stats()
            found.append((stats["sentinels"], stats["rows"], stats["tables"]))
    assert found[0] == found[1]


@pytest.mark.parametrize("place", [0, 150, 299])
def test_a_row_outside_the_table_in_any_part_is_refused(store: tierstore.Store, model: Model, place: int) -> None:
    ids = some_ids(model, 5, 300)
    ids[place, 1] = len(model.rows[NAME])
    with pytest.raises(ValueError, match="row"):
        store[NAME].rows(ids)


def test_a_forked_child_has_threads_of_its_own(store: tierstore.Store, model: Model) -> None:
    keys = random_keys(np.random.default_rng(3), 300)
    expected = model.expected("layers.1", keys)
    np.testing.assert_array_equal(store["layers.1"].lookup(keys), expected)
    child = os.fork()
    if child == 0:
        right = np.array_equal(store["layers.1"].lookup(keys), expected) and threads_of_this_process() >= THREADS
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    np.testing.assert_array_equal(store["layers.1"].lookup(keys), expected)


@pytest.mark.parametrize("threads", [0, -1, 1025, True, 2.0, "2"])
def test_a_number_of_threads_that_is_none_is_refused(built: Path, threads: object) -> None:
    with pytest.raises(ConfigError, match=r"threads: .* is no number from 1 to 1,024"):
        tierstore.open(built, dram="64MiB", threads=threads)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"threads: .* is no number from 1 to 1,024"):
        tierstore.connect(built / "no.sock", threads=threads)  # type: ignore[arg-type]


def test_by_default_there_are_as_many_threads_as_cores_at_most_sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, wanted in ((1, 1), (2, 2), (64, 16)):
        monkeypatch.setattr(nvme, "usable_cores", lambda cores=cores: cores)
        assert nvme.choose_io("pread").num_threads == wanted
    assert nvme.choose_io("pread", 5).num_threads == 5


@pytest.mark.parametrize("readers", [0, -1, 257, True, 2.0, "2"])
def test_a_number_of_readers_that_is_none_is_refused(built: Path, readers: object) -> None:
    with pytest.raises(ConfigError, match=r"readers: .* is no number from 1 to 256"):
        tierstore.open(built, dram="64MiB", readers=readers)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"readers: .* is no number from 1 to 256"):
        tierstore.connect(built / "no.sock", readers=readers)  # type: ignore[arg-type]


def test_by_default_there_are_two_page_readers_a_core_at_least_four(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, wanted in ((1, 4), (2, 4), (16, 32), (512, 256)):
        monkeypatch.setattr(nvme, "usable_cores", lambda cores=cores: cores)
        assert nvme.choose_io("pread").num_readers == wanted
    assert nvme.choose_io("pread", readers=5).num_readers == 5


@pytest.mark.parametrize(
    ("membership", "files", "wanted"),
    [
        ("0::/", {}, 64),
        ("0::/pod/box", {"pod/cpu.max": "250000 100000", "pod/box/cpu.max": "max 100000"}, 3),
        ("0::/pod", {"pod/cpu.max": "10000 100000"}, 1),
        (
            "4:cpu,cpuacct:/box",
            {"cpu,cpuacct/box/cpu.cfs_quota_us": "800000", "cpu,cpuacct/box/cpu.cfs_period_us": "100000"},
            8,
        ),
        ("4:cpu:/box", {"cpu/box/cpu.cfs_quota_us": "-1", "cpu/box/cpu.cfs_period_us": "100000"}, 64),
    ],
)
def test_cores_are_those_that_the_cgroups_pay_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, membership: str, files: dict[str, str], wanted: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "membership").write_text(membership + "\n")
    assert usable_cores(tmp_path, tmp_path / "membership") == wanted


@pytest.mark.skipif(nvme.choose_io("auto").mode != "uring", reason="this system has no io_uring")
def test_files_and_staging_are_registered_with_the_kernel(built: Path) -> None:
    with tierstore.open(built, dram="600KiB") as store:
        engine = store._engine._engine
        assert engine.registered_readers() == engine.page_readers()[0] > 0
