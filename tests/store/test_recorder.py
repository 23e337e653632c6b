"""A running store records every access to the sampled keys, and nothing that it records changes what it answers."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.shapes import ENTRY_BYTES, HEADS, POISON, ROW_BYTES
from support.stores import Model, random_keys

import tierstore
from tierstore.errors import ConfigError, CorruptPageError, FormatError, StoreNotReadyError
from tierstore.formats.key_trace import KeyBlock, KeyTraceWriter, read_key_blocks, read_key_trace_info
from tierstore.store import recorder
from tierstore.store.recorder import RecordingEngine, is_sampled

MASK = 2**64 - 1
DRAM = {"cached": "600KiB", "resident": "64MiB"}


@pytest.fixture(params=DRAM)
def store(request: pytest.FixtureRequest, built: Path) -> Iterator[tierstore.Store]:
    with tierstore.open(built, dram=DRAM[request.param]) as store:
        yield store


def accesses_of(path: Path) -> list[tuple[int, int, int, int]]:
    """(batch, table, order index, key) of each access in a trace, in order."""
    return [
        (int(batch), int(table), int(order), int(key))
        for block in read_key_blocks(path)
        for table, order, key, batch in zip(*block, strict=True)
    ]


def expected_accesses(batch: int, table: int, keys: np.ndarray) -> list[tuple[int, int, int, int]]:
    return [(batch, table, order, key) for token in keys.tolist() for order, key in enumerate(token) if key >= 0]


def splitmix(table: int, order: int, key: int) -> int:
    """SplitMix64's output for a key, in Python integers."""
    mixed = (key + ((table << 8) + order + 1) * 0x9E3779B97F4A7C15) & MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
    return mixed ^ (mixed >> 31)


def test_a_trace_of_all_keys_has_every_access_in_order(store: tierstore.Store, model: Model, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    keys = [random_keys(rng, count, distinct=20) for count in (30, 1, 0, 50)]
    store["layers.1"].lookup(keys[0])
    store.start_trace(tmp_path / "t", share=1)
    expected = []
    for batch, part in enumerate(keys):
        np.testing.assert_array_equal(store["layers.14"].lookup(part), model.expected("layers.14", part))
        expected += expected_accesses(batch, 1, part)
    info = store.stop_trace()
    store["layers.1"].lookup(keys[0])
    assert info == read_key_trace_info(tmp_path / "t")
    assert (info.num_accesses, info.num_batches, info.num_dropped) == (len(expected), 4, 0)
    assert [(table.name, table.orders) for table in info.tables] == [
        ("layers.1", (2, 3, 4)),
        ("layers.14", (2, 3, 4)),
        ("plain", (1,)),
    ]
    assert all(table.fingerprint == store[table.name].spec.fingerprint for table in info.tables)
    assert accesses_of(tmp_path / "t") == expected


def test_strided_lookups_submits_and_rows_by_key_are_recorded(
    store: tierstore.Store, model: Model, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    keys = random_keys(rng, 24)
    store.start_trace(tmp_path / "t", share=1)
    out = np.full((24, HEADS, ROW_BYTES), POISON, dtype=np.uint8)
    store["layers.1"].lookup(keys[::-2])
    expected = expected_accesses(0, 0, keys[::-2])
    plain_keys, plain_out = np.array([[3], [-1], [32]]), np.full((3, 1, 24), POISON, dtype=np.uint8)
    store.submit({"layers.14": (keys, out), "plain": (plain_keys, plain_out)}).wait(timeout_s=60)
    expected += expected_accesses(1, 1, keys) + expected_accesses(1, 2, plain_keys)
    np.testing.assert_array_equal(out, model.expected("layers.14", keys))
    strided = np.full((24, 24, 80), POISON, dtype=np.uint8)[:, :, ::2]
    store.submit({"layers.1": (keys, strided)}).wait(timeout_s=60)
    expected += expected_accesses(2, 0, keys)
    store["layers.1"].rows(model.row_ids("layers.1", keys))
    if "layers.1" not in store.stats()["memory"]["resident_tables"]:  # those rows are read without their keys
        expected += expected_accesses(3, 0, keys)
    store.stop_trace()
    assert accesses_of(tmp_path / "t") == expected


@pytest.mark.parametrize("share", [1 / 16, 0.5, 0.999])
def test_a_sample_has_all_accesses_of_its_keys_and_none_of_the_others(
    store: tierstore.Store, tmp_path: Path, share: float
) -> None:
    rng = np.random.default_rng(2)
    keys = random_keys(rng, 800, distinct=600)
    expected = []
    for name in ("a", "b"):
        store.start_trace(tmp_path / name, share=share)
        for batch, part in enumerate(np.split(keys, 8)):
            store["layers.1"].lookup(part)
            if name == "a":
                expected += expected_accesses(batch, 0, part)
        assert store.stop_trace().sample_rate == share
    sampled = [access for access in expected if splitmix(*access[1:]) < int(share * 2**64)]
    assert accesses_of(tmp_path / "a") == accesses_of(tmp_path / "b") == sampled
    distinct = {access[1:] for access in expected}
    kept = {access[1:] for access in sampled}
    assert abs(len(kept) / len(distinct) - share) < 5 * (share * (1 - share) / len(distinct)) ** 0.5 + 1e-9


@pytest.mark.parametrize("seed", [0, 1])
def test_the_sample_is_drawn_by_table_order_and_key(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 1000, 500).astype(np.uint16)
    order = rng.integers(0, 256, 500).astype(np.uint8)
    keys = rng.integers(0, 2**63 - 1, 500, endpoint=True)
    expected = [
        splitmix(*access) < int(0.3 * 2**64)
        for access in zip(table.tolist(), order.tolist(), keys.tolist(), strict=True)
    ]
    assert is_sampled(table, order, keys, 0.3).tolist() == expected
    assert is_sampled(table, order, keys, 1.0).all()


@pytest.mark.parametrize("limit", ["QUEUE_KEYS_MAX", "QUEUE_LOOKUPS_MAX"])
def test_what_the_thread_has_no_time_for_is_counted_and_not_recorded(
    store: tierstore.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    add, busy, go_on = KeyTraceWriter.add, threading.Event(), threading.Event()

    def wait(writer: KeyTraceWriter, accesses: KeyBlock) -> None:
        busy.set()
        assert go_on.wait(timeout=60)
        add(writer, accesses)

    monkeypatch.setattr(KeyTraceWriter, "add", wait)
    monkeypatch.setattr(recorder, limit, 1)
    keys = random_keys(np.random.default_rng(3), 40)
    store.start_trace(tmp_path / "t", share=1)
    store["layers.1"].lookup(keys[:5])
    assert busy.wait(timeout=60)
    store["layers.1"].lookup(keys)  # taken, since nothing else waits
    for _ in range(3):
        store["layers.1"].lookup(keys[:7])
    go_on.set()
    info = store.stop_trace()
    dropped = expected_accesses(2, 0, keys[:7])
    assert (info.num_batches, info.num_dropped) == (5, 3 * len(dropped))
    assert accesses_of(tmp_path / "t") == expected_accesses(0, 0, keys[:5]) + expected_accesses(1, 0, keys)


def test_a_lookup_larger_than_what_is_sampled_at_once_is_recorded_whole(
    store: tierstore.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "GROUP_KEYS_MAX", 7)
    keys = random_keys(np.random.default_rng(4), 20)
    store.start_trace(tmp_path / "t", share=1)
    store["layers.1"].lookup(keys)
    store["plain"].lookup(np.array([[1], [2]]))
    store.stop_trace()
    plain = expected_accesses(1, 2, np.array([[1], [2]]))
    assert accesses_of(tmp_path / "t") == expected_accesses(0, 0, keys) + plain


def test_lookups_of_many_threads_are_each_recorded_once(store: tierstore.Store, model: Model, tmp_path: Path) -> None:
    faults = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(20):
            keys = random_keys(rng, 7)
            if not np.array_equal(store["layers.1"].lookup(keys), model.expected("layers.1", keys)):
                faults.append(seed)

    store.start_trace(tmp_path / "t", share=1)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    info = store.stop_trace()
    assert not faults
    assert (info.num_batches, info.num_dropped) == (120, 0)
    found = sorted(access[1:] for access in accesses_of(tmp_path / "t"))
    expected = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        expected += [access[1:] for _ in range(20) for access in expected_accesses(0, 0, random_keys(rng, 7))]
    assert found == sorted(expected)


def test_traces_start_and_stop_under_lookups(store: tierstore.Store, model: Model, tmp_path: Path) -> None:
    keys = random_keys(np.random.default_rng(4), 3)
    expected = model.expected("layers.1", keys)
    done, faults = threading.Event(), []

    def work() -> None:
        while not done.is_set():
            if not np.array_equal(store["layers.1"].lookup(keys), expected):
                faults.append("rows")

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        store.start_trace(tmp_path / "t", share=1)
        info = store.stop_trace()
        assert info.num_accesses + info.num_dropped == info.num_batches * int((keys >= 0).sum())
    done.set()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert not faults


def test_a_lookup_that_fails_is_not_recorded(own_store: Path, tmp_path: Path) -> None:
    for shard in own_store.rglob("*.shard"):
        shard.write_bytes(bytes(shard.stat().st_size))
    with tierstore.open(own_store, dram="600KiB") as store:
        store.start_trace(tmp_path / "t", share=1)
        with pytest.raises(CorruptPageError):
            store["layers.1"].lookup(np.array([[1, 2, 3]]))
        with pytest.raises(ValueError, match="below -1"):
            store["layers.1"].lookup(np.array([[1, -2, 3]]))
        assert store.stop_trace().num_batches == 0


def test_without_a_trace_no_lookup_passes_a_recorder(store: tierstore.Store, tmp_path: Path) -> None:
    engine, table = store._engine, store["layers.1"]
    for _ in range(2):
        assert store._engine is table._engine is engine
        assert table._try_lookup == engine.try_lookup
        store.start_trace(tmp_path / "t")
        assert isinstance(store._engine, RecordingEngine)
        assert table._engine is store._engine
        store.stop_trace()
    assert store.stop_trace() is None


def test_one_trace_at_a_time_of_a_sound_share_and_place(store: tierstore.Store, tmp_path: Path) -> None:
    for share in (0, -1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="expected above 0 and at most 1"):
            store.start_trace(tmp_path / "t", share=share)
    with pytest.raises(ConfigError, match="not a regular file"):
        store.start_trace(tmp_path)
    with pytest.raises(ConfigError, match=f"there is no folder {tmp_path}/none; make it"):
        store.start_trace(tmp_path / "none" / "t")
    store.start_trace(tmp_path / "t")
    with pytest.raises(ConfigError, match=r"a trace is running, to .*t; stop it first"):
        store.start_trace(tmp_path / "u")
    store.close()
    with pytest.raises(StoreNotReadyError, match="is closed"):
        store.start_trace(tmp_path / "u")
    assert [file.name for file in tmp_path.iterdir()] == ["t"]


def test_closing_the_store_ends_its_trace(store: tierstore.Store, tmp_path: Path) -> None:
    keys = random_keys(np.random.default_rng(5), 9)
    store.start_trace(tmp_path / "t", share=1)
    store["layers.1"].lookup(keys)
    store.close()
    store.close()
    assert accesses_of(tmp_path / "t") == expected_accesses(0, 0, keys)


def test_a_trace_that_runs_when_the_process_ends_is_whole(built: Path, tmp_path: Path) -> None:
    code = (
        "import sys, numpy, tierstore\n"
        "store = tierstore.open(sys.argv[1], dram='600KiB')\n"
        "store.start_trace(sys.argv[2], share=1)\n"
        "store['layers.1'].lookup(numpy.array([[5, 6, 7]]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(built), str(tmp_path / "t")], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert accesses_of(tmp_path / "t") == expected_accesses(0, 0, np.array([[5, 6, 7]]))


def test_a_killed_process_leaves_no_trace_under_its_name(built: Path, tmp_path: Path) -> None:
    code = (
        "import os, sys, numpy, tierstore\n"
        "store = tierstore.open(sys.argv[1], dram='600KiB')\n"
        "store.start_trace(sys.argv[2], share=1)\n"
        "store['layers.1'].lookup(numpy.array([[5, 6, 7]]))\n"
        "os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(built), str(tmp_path / "t")], check=True, timeout=120)
    assert [file.name for file in tmp_path.iterdir()] == ["t.new"]
    with pytest.raises(FormatError, match="its head says 0"):
        read_key_trace_info(tmp_path / "t.new")


def test_a_forked_child_has_no_recorder_and_the_parents_goes_on(
    store: tierstore.Store, model: Model, tmp_path: Path
) -> None:
    keys = random_keys(np.random.default_rng(6), 9)
    expected = model.expected("layers.1", keys)
    store.start_trace(tmp_path / "t", share=1)
    store["layers.1"].lookup(keys)
    child = os.fork()
    if not child:
        good = False
        try:  # whatever happens, the child must not go on with the tests
            good = not isinstance(store._engine, RecordingEngine) and store.stop_trace() is None
            good = good and np.array_equal(store["layers.1"].lookup(keys), expected)
            store.start_trace(tmp_path / "child", share=1)
            good = good and np.array_equal(store["layers.1"].lookup(keys[:2]), expected[:2])
            store.close()
        finally:
            os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    store["layers.1"].lookup(keys[:3])
    assert store.stop_trace().num_batches == 2
    assert accesses_of(tmp_path / "t") == expected_accesses(0, 0, keys) + expected_accesses(1, 0, keys[:3])
    assert accesses_of(tmp_path / "child") == expected_accesses(0, 0, keys[:2])


@pytest.mark.parametrize("by_close", [False, True], ids=["stop", "close"])
def test_a_full_disk_ends_the_trace_and_not_the_lookups(
    store: tierstore.Store, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_close: bool
) -> None:
    def fail(*_: object) -> None:
        failed.set()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    failed = threading.Event()
    monkeypatch.setattr(KeyTraceWriter, "add", fail)
    keys = random_keys(np.random.default_rng(7), 5)
    store.start_trace(tmp_path / "t", share=1)
    for _ in range(3):
        np.testing.assert_array_equal(store["layers.1"].lookup(keys), model.expected("layers.1", keys))
        assert failed.wait(timeout=60)
    with pytest.raises(OSError, match="No space left"):
        store.close() if by_close else store.stop_trace()
    assert not list(tmp_path.iterdir())
    store.close()
    with pytest.raises(StoreNotReadyError):
        store["layers.1"].lookup(keys)


def test_single_pairs_are_recorded_under_their_orders(store: tierstore.Store, model: Model, tmp_path: Path) -> None:
    tokens = random_keys(np.random.default_rng(8), 20)
    pairs = np.array([5, 3, 59, 3, 1], dtype=np.int32)
    keys, out = tokens.reshape(-1)[pairs], np.full((5, ENTRY_BYTES), POISON, dtype=np.uint8)
    store.start_trace(tmp_path / "t", share=1)
    pending = store._engine.submit_pairs(1, keys, pairs, out)
    if pending is not None:
        pending.wait(60)
    store.stop_trace()
    np.testing.assert_array_equal(out, model.expected("layers.14", tokens).reshape(60, ENTRY_BYTES)[pairs])
    expected = [(0, 1, int(pair) % 3, int(key)) for key, pair in zip(keys, pairs, strict=True) if key >= 0]
    assert accesses_of(tmp_path / "t") == expected
