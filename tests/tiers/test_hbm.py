"""The hbm tier through the contract of all stores, its budget to the byte, and what it refuses; on a GPU,
or interpreted."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from contract.store_contract import StoreContract
from support.device import DEVICE
from support.shapes import HEADS, POISON, ROW_BYTES
from support.stores import Model, place_some, random_keys

import tierstore
from tierstore.offline.place import place_entries
from tierstore.offline.placement_file import Chosen
from tierstore.tiers.hbm.device import PinnedMemory, open_device


def open_hbm(path: Path, **options: Any) -> tierstore.Store:
    return tierstore.open(path, **({"dram": "500KiB", "hbm": "256KiB", "device": DEVICE} | options))


class HbmStore(StoreContract):
    """With a placement, part of it in HBM."""

    @pytest.fixture
    def built(self, placed: Path) -> Path:
        return placed


class TestHbmStore(HbmStore):
    """Part of the placement in HBM, part in DRAM, the rest in its file."""

    def open_store(self, path: Path) -> tierstore.Store:
        return open_hbm(path)


class TestSmallestHbmStore(HbmStore):
    """The least that the error names."""

    def open_store(self, path: Path) -> tierstore.Store:
        return open_hbm(path, hbm=least_budget(path))


@pytest.mark.slow
class TestHbmInPlace(StoreContract):
    """What neither HBM nor DRAM has comes from the checkpoint's own files."""

    @pytest.fixture
    def built(self, in_place_placed: Path) -> Path:
        return in_place_placed

    def open_store(self, path: Path) -> tierstore.Store:
        return open_hbm(path)


class TestHbmAboveResidentTables(HbmStore):
    """DRAM holds every row; HBM the hottest entries."""

    def open_store(self, path: Path) -> tierstore.Store:
        return open_hbm(path, dram="64MiB")


class TestHbmStoreWithoutPlacement(StoreContract):
    """Nothing says what is hot: the tier stays empty."""

    def open_store(self, path: Path) -> tierstore.Store:
        return open_hbm(path, io="pread")


def least_budget(path: Path) -> int:
    with pytest.raises(tierstore.BudgetError, match="hbm") as caught:
        open_hbm(path, hbm=1)
    return int(str(caught.value).split("below the ")[1].split()[0])


def test_the_least_budget_that_the_error_names_is_enough_and_exact(placed: Path) -> None:
    least = least_budget(placed)
    with open_hbm(placed, hbm=least) as store:
        assert store.stats()["memory"]["hbm_bytes"] <= least
        assert min(store.stats()["placement"]["hbm_entries"][name] for name in ("layers.1", "layers.14")) == 1
    with pytest.raises(tierstore.BudgetError, match=str(least)):
        open_hbm(placed, hbm=least - 1)


@pytest.mark.parametrize("hbm", ["64KiB", "200KiB", "333333", "1MiB"])
def test_the_tier_takes_one_block_of_the_device_within_its_budget(placed: Path, hbm: str) -> None:
    with open_hbm(placed, hbm=hbm) as store:
        memory = store.stats()["memory"]
        assert store._engine._tier._block.numel() == memory["hbm_bytes"] <= memory["hbm_budget_bytes"]
        assert memory["dram_bytes"] <= memory["budget_bytes"]
        entries = store.stats()["placement"]["hbm_entries"]
        if hbm != "1MiB":  # what is left would not hold one more entry of each table with its part of two indexes
            assert memory["hbm_budget_bytes"] - memory["hbm_bytes"] < 2 * (320 * 2 + 2 * 64 + 512)
        assert entries["plain"] == 0


def test_hot_keys_come_from_hbm_then_dram_then_nvme(own_store: Path, model: Model) -> None:
    chosen = place_some(own_store)["layers.1"]
    with open_hbm(own_store) as store:
        table = store["layers.1"]
        in_hbm = store.stats()["placement"]["hbm_entries"]["layers.1"]
        in_dram = store.stats()["placement"]["static_entries"]["layers.1"]
        assert in_hbm > 50
        assert in_dram > 50
        keys = np.full((len(chosen.keys), 3), -1, dtype=np.int64)
        keys[np.arange(len(keys)), chosen.order_index] = chosen.keys
        found = table.explain(keys)[np.arange(len(keys)), chosen.order_index]
        assert set(found[:in_hbm]) == {"hbm"}
        start = in_hbm // 512 * 512  # DRAM's records begin at whole units of the file
        assert set(found[in_hbm : start + in_dram]) <= {"static"}
        assert set(found[max(in_hbm, start + in_dram) :]) <= {"record"}
        np.testing.assert_array_equal(table.lookup(keys), model.expected("layers.1", keys))
        hits = store.stats()["tables"]["layers.1"]["hits"]
        assert hits["hbm"] == in_hbm
        assert store.stats()["keys"] == len(keys)


def test_keys_in_hbm_cost_no_read(placed: Path, model: Model) -> None:
    with open_hbm(placed, hbm="4MiB") as store:
        keys = random_keys(np.random.default_rng(3), 700)[:120]
        keys[store["layers.1"].explain(keys) != "hbm"] = -1
        assert (keys >= 0).sum() > 100
        np.testing.assert_array_equal(store["layers.1"].lookup(keys), model.expected("layers.1", keys))
        assert store.stats()["pages_read"] == 0
        assert store.stats()["hits"] == {"hbm": int((keys >= 0).sum()), "dram": 0, "nvme": 0}


def test_a_damaged_placed_entry_never_reaches_hbm(
    own_store: Path, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = place_some(own_store)["layers.1"]
    placement = next((own_store / "placements").iterdir())
    data = bytearray(placement.read_bytes())
    entry = model.expected("layers.1", _alone(chosen, 5))[0].reshape(3, -1)[chosen.order_index[5]].tobytes()
    at = data.index(entry)
    data[at + 7] ^= 1
    placement.write_bytes(data)
    with caplog.at_level(logging.ERROR), open_hbm(own_store) as store:
        assert "left out of HBM" in caplog.text
        keys = _alone(chosen, 5)
        assert "hbm" not in store["layers.1"].explain(keys)
        assert set(store["layers.1"].explain(keys).flat) == {"none", "pages"}  # and nobody else looks at that record
        np.testing.assert_array_equal(store["layers.1"].lookup(keys), model.expected("layers.1", keys))
        good = _alone(chosen, 6)
        np.testing.assert_array_equal(store["layers.1"].lookup(good), model.expected("layers.1", good))


def _alone(chosen: Any, place: int) -> np.ndarray:
    """Keys of one token that asks for one placed entry only."""
    keys = np.full((1, 3), -1, dtype=np.int64)
    keys[0, chosen.order_index[place]] = chosen.keys[place]
    return keys


def test_a_forked_child_reads_what_the_device_holds_from_the_placement_file(placed: Path, model: Model) -> None:
    with open_hbm(placed) as store:
        keys = random_keys(np.random.default_rng(1), 700)[:60]
        assert (store["layers.1"].explain(keys) == "hbm").any()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                same = np.array_equal(store["layers.1"].lookup(keys), model.expected("layers.1", keys))
                code = 0 if same and store.device is None else 2
                store.close()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        np.testing.assert_array_equal(store["layers.1"].lookup(keys), model.expected("layers.1", keys))


def exit_code_of_child(act: Callable[[], bool]) -> int | None:
    """Forks, has the child act, and returns 0 where that was true; None where it has not ended after 30 s."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if act() else 2
        finally:
            os._exit(code)
    for _ in range(3000):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def test_a_child_forked_while_entries_change_closes_its_store(
    own_store: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tierstore.tiers.hbm.engine as engine

    place_some(own_store)
    keys = random_keys(np.random.default_rng(1), 700)[:20]
    right = model.expected("layers.1", keys)
    with open_hbm(own_store) as store:
        changing, go_on = threading.Event(), threading.Event()

        def change(*_: Any) -> int:
            changing.set()
            assert go_on.wait(60)
            return 0

        monkeypatch.setattr(engine, "change_entries", change)
        thread = threading.Thread(target=store.change_hbm)
        thread.start()
        assert changing.wait(60)

        def act() -> bool:
            same = np.array_equal(store["layers.1"].lookup(keys), right)
            store.close()
            return same

        try:
            assert exit_code_of_child(act) == 0
        finally:
            go_on.set()
            thread.join(60)


def test_page_locked_memory_stays_the_parents_and_a_childs_lookup_says_so(placed: Path) -> None:
    with open_hbm(placed) as store:
        lookup = store.open_lookup("layers.1", 2)
        address = store._engine._tier.pinned.block.ctypes.data
        flags, within = "", False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                within = int(match[1], 16) <= address < int(match[2], 16)
            elif within and line.startswith("VmFlags:"):
                flags = line
        assert "dc" in flags.split()  # "do not copy area on fork": what a device writes to stays where it is

        def act() -> bool:
            with pytest.raises(tierstore.StoreNotReadyError, match="forked"):
                lookup.check()
            return True

        assert exit_code_of_child(act) == 0
        lookup.check()


def test_without_a_placement_the_empty_tier_is_said_once(built: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), open_hbm(built) as store:
        assert [record.message for record in caplog.records if "hbm stays empty" in record.message] != []
        assert store.stats()["placement"]["hbm_entries"] == {"layers.1": 0, "layers.14": 0, "plain": 0}


def test_progress_counts_what_goes_to_hbm_too(placed: Path) -> None:
    seen: list[tuple[int, int]] = []
    with open_hbm(placed, on_progress=lambda done, total: seen.append((done, total))):
        pass
    assert seen[-1][0] >= seen[-1][1] > 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "cuda:0", "hbm": None}, "device='cuda:0' is for the hbm tier"),
        ({"device": "nowhere"}, "'nowhere' is no device"),
        ({"device": "meta"}, "runs on CUDA devices"),
        ({"hbm": "much"}, "hbm: 'much' is not a size"),
        ({"hbm": -1}, "hbm: -1 bytes is below 0"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(placed: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(tierstore.ConfigError, match=says):
        open_hbm(placed, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named_with_the_remedy(placed: Path) -> None:
    with pytest.raises(tierstore.ConfigError, match=r"finds no GPU here.*device='cpu'"):
        open_hbm(placed, device="cuda:0")


@pytest.mark.skipif(DEVICE != "cpu", reason="the kernels are native")
def test_opening_on_the_cpu_makes_all_kernels_alike(placed: Path) -> None:
    code = (
        "import os, sys, tierstore\n"
        "os.environ.pop('TRITON_INTERPRET', None)\n"
        "with tierstore.open(sys.argv[1], dram='500KiB', hbm='256KiB', device='cpu'): pass\n"
        "os.environ.pop('TRITON_INTERPRET', None)\n"
        "import importlib, pkgutil, tierstore.kernels.gpu as gpu\n"
        "from triton.runtime.interpreter import InterpretedFunction\n"
        "from triton.runtime.jit import KernelInterface\n"
        "names = [each.name for each in pkgutil.iter_modules(gpu.__path__)]\n"
        "found = [f for n in names for f in vars(importlib.import_module(f'{gpu.__name__}.{n}')).values()\n"
        "         if isinstance(f, KernelInterface)]\n"
        "assert len(found) > 10 and all(isinstance(f, InterpretedFunction) for f in found), found\n"
        "import torch\n"  # and they run whatever the environment says by then
        "with tierstore.open(sys.argv[1], dram='500KiB', hbm='256KiB', device='cpu') as store:\n"
        "    lookup = store.open_lookup('layers.1', 2)\n"
        "    lookup.start(torch.zeros((2, 3), dtype=torch.int64), torch.empty((2, 24, 40), dtype=torch.uint8))\n"
        "    lookup.finish()\n"
        "    lookup.check()\n"
    )
    subprocess.run([sys.executable, "-c", code, str(placed)], check=True, timeout=120)


def test_kernels_of_the_other_kind_are_refused_by_name(placed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_device(DEVICE)
    import tierstore.kernels.gpu as gpu

    monkeypatch.setattr(gpu, "INTERPRETED", not gpu.INTERPRETED)
    with pytest.raises(tierstore.ConfigError, match="TRITON_INTERPRET=1 before triton is first imported"):
        open_hbm(placed)


def test_a_driver_that_locks_nothing_leaves_staging_by_the_host(
    placed: Path, model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import tierstore.tiers.hbm.tier as tier

    monkeypatch.setattr(tier, "lock", lambda _device, _memory: "error 1 of the driver")
    with caplog.at_level(logging.WARNING), open_hbm(placed) as store:
        assert "cannot be page-locked" in caplog.text
        keys = random_keys(np.random.default_rng(2), 700)[:120]
        np.testing.assert_array_equal(store["layers.1"].lookup(keys), model.expected("layers.1", keys))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, whose driver answers")
def test_a_driver_that_locks_nothing_leaves_no_error_for_the_next_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    import tierstore.tiers.hbm.device as device

    taken: list[Any] = []
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 712, cudaGetErrorString=lambda _: "already registered")
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(device, "_forget_last_error", taken.append)
    cuda = torch.device("cuda", 0)
    assert "already registered (error 712)" in str(device.lock(cuda, np.zeros(8, dtype=np.uint8)))
    assert taken == [cuda]


def test_staging_is_not_given_on_before_the_stream_that_reads_it_has_done(
    own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tierstore.tiers.hbm.tier as tier

    place_some(own_store)
    waited: list[bool] = []
    with open_hbm(own_store) as store:
        above = store._engine._tier
        monkeypatch.setattr(tier, "wait_for_current", lambda _: waited.append(above.lock._is_owned()))
        table = next(table for table in above.tables if table.num_slots)
        above.write(table, np.arange(3), np.zeros((3, table.entry_bytes), dtype=np.uint8))
        assert waited == [True]


def test_pinned_memory_that_is_used_up_is_refused_with_both_numbers() -> None:
    memory = PinnedMemory(open_device(DEVICE), 10_000)
    assert memory.take(4097, "a").shape == (4097,)
    assert memory.left_bytes == 10_000 - 8192
    with pytest.raises(tierstore.BudgetError, match=r"b: 2000 bytes .* 1808 of 10000"):
        memory.take(2000, "b")
    memory.close()


def test_a_closed_store_gives_its_memory_back(placed: Path) -> None:
    store = open_hbm(placed)
    tier = store._engine._tier
    store.close()
    assert tier._block.numel() == 0
    assert store.device is None
    with pytest.raises(tierstore.StoreNotReadyError):
        store.open_lookup("layers.1", 4)


def test_a_closed_store_gives_the_blocks_memory_back_also_where_a_lookup_is_kept(placed: Path) -> None:
    store = open_hbm(placed)
    block, pinned = (weakref.ref(memory) for memory in (store._engine._tier._block, store._engine._tier.pinned.block))
    lookup = store.open_lookup("layers.1", 4)
    store.close()
    gc.collect()
    assert block() is None
    assert pinned() is None
    storage = lookup._table.sources.slots.untyped_storage()
    assert storage.nbytes() < 4096


@pytest.mark.parametrize("closed_by", ["close", "collection"])
def test_a_lookup_that_outlives_its_store_says_so_and_waits_for_nobody(placed: Path, closed_by: str) -> None:
    store = open_hbm(placed)
    lookup = store.open_lookup("layers.1", 2)
    keys = torch.from_numpy(random_keys(np.random.default_rng(1), 700)[:2]).to(DEVICE)
    out = torch.zeros((2, HEADS, ROW_BYTES), dtype=torch.uint8, device=DEVICE)
    lookup.start(keys, out)
    if closed_by == "close":
        store.close()
    del store
    gc.collect()
    begun_s = time.monotonic()
    for act in (
        lookup.finish,
        lookup.check,
        lookup.take_invalid_token_position,
        lookup.num_requests,
        lambda: lookup.start(keys, out),
        lambda: lookup.start_known(keys.cpu().numpy(), out),
    ):
        with pytest.raises(tierstore.StoreNotReadyError, match="is closed"):
            act()
    assert time.monotonic() - begun_s < 10  # the device's own limit is a minute


def test_a_close_lets_a_lookup_under_way_end_and_its_misses_be_answered(placed: Path, model: Model) -> None:
    store = open_hbm(placed)
    lookup = store.open_lookup("layers.1", 2)
    tokens = np.random.default_rng(123).integers(0, 2**62, (2, 3))  # nobody placed these
    keys = torch.from_numpy(tokens).to(DEVICE)
    out = torch.full((2, HEADS, ROW_BYTES), POISON, dtype=torch.uint8, device=DEVICE)
    asked = threading.Event()

    def look_up() -> None:
        with lookup._lock:
            lookup.start(keys, out)
            asked.set()
            lookup.finish()

    thread = threading.Thread(target=look_up)
    thread.start()
    assert asked.wait(60)
    store.close()
    thread.join(60)
    assert not thread.is_alive()
    np.testing.assert_array_equal(out.cpu().numpy(), model.expected("layers.1", tokens))


def test_host_lookups_while_the_store_closes_are_right_or_say_that_it_is_closed(placed: Path, model: Model) -> None:
    keys = random_keys(np.random.default_rng(1), 700)[:20]
    right = model.expected("layers.1", keys)
    for _ in range(5):
        store = open_hbm(placed)
        begun, odd = threading.Barrier(4), []

        def look_up(table: Any, begun: threading.Barrier = begun, odd: list[Any] = odd) -> None:
            begun.wait(60)
            while True:
                try:
                    if not np.array_equal(table.lookup(keys), right):
                        odd.append("wrong rows")
                    table.explain(keys)
                except tierstore.StoreNotReadyError:
                    return
                except Exception as error:
                    odd.append(error)
                    return

        threads = [threading.Thread(target=look_up, args=(store["layers.1"],)) for _ in range(3)]
        for thread in threads:
            thread.start()
        begun.wait(60)
        time.sleep(0.02)
        store.close()
        for thread in threads:
            thread.join(60)
        assert not odd


def place_other(store: Path, chosen: dict[str, Any], seed: int) -> dict[str, Any]:
    """Publishes another placement: half of the entries of the one before, in another order, and half new ones."""
    rng = np.random.default_rng(seed)
    others = {}
    for name, part in chosen.items():
        kept = rng.permutation(len(part.keys))[::2]
        more = rng.integers(0, 2**62, (len(part.keys), 2))
        keys = np.concatenate([part.keys[kept], more[:, 0]])
        order_index = np.concatenate([part.order_index[kept], more[:, 1] % 3]).astype(np.uint8)
        _, first = np.unique(np.stack([order_index, keys]), axis=1, return_index=True)
        mixed = rng.permutation(first)
        others[name] = Chosen(order_index[mixed], keys[mixed], 0.5)
    place_entries(store, others)
    return others


def keys_of(chosen: Any) -> np.ndarray:
    """Tokens that ask for one placed entry each."""
    keys = np.full((len(chosen.keys), 3), -1, dtype=np.int64)
    keys[np.arange(len(keys)), chosen.order_index] = chosen.keys
    return keys


@pytest.mark.parametrize("hbm", ["96KiB", "256KiB", "4MiB"])
def test_epochs_change_and_every_key_is_right_all_the_way(own_store: Path, model: Model, hbm: str) -> None:
    first = place_some(own_store)
    with open_hbm(own_store, hbm=hbm) as store:
        table = store["layers.1"]
        count = store.stats()["placement"]["hbm_entries"]["layers.1"]
        chosen = first
        for seed in range(3):
            chosen = place_other(own_store, chosen, seed)
            assert store.change_hbm() == store.stats()["placement"]["hbm_epoch"] == seed + 2
            keys = keys_of(chosen["layers.1"])
            found = table.explain(keys)[np.arange(len(keys)), chosen["layers.1"].order_index]
            assert set(found[:count]) == {"hbm"}
            assert "hbm" not in found[count:]
            np.testing.assert_array_equal(table.lookup(keys), model.expected("layers.1", keys))
        store.change_hbm(1)
        keys = keys_of(first["layers.1"])
        assert (table.explain(keys) == "hbm").sum() == count
        np.testing.assert_array_equal(table.lookup(keys), model.expected("layers.1", keys))


def test_a_change_of_a_few_entries_more_than_are_spare_finds_room_in_the_index(own_store: Path, model: Model) -> None:
    chosen = place_some(own_store, static_fraction=0.0)  # nothing of DRAM is in the indexes, whose room is needed whole
    with open_hbm(own_store) as store:
        share = store._engine._tier.tables[0].share
        num_spare = share.num_slots - share.num_entries
        assert num_spare > 8
        for num_new in range(num_spare + 1, 2 * num_spare, 2):
            draw = np.random.default_rng(num_new)
            for part in chosen.values():
                part.keys[:num_new] = draw.integers(0, 2**62, num_new)
            place_entries(own_store, chosen)
            store.change_hbm()
            keys = keys_of(chosen["layers.1"])
            assert (store["layers.1"].explain(keys) == "hbm").sum() == share.num_entries
            np.testing.assert_array_equal(store["layers.1"].lookup(keys), model.expected("layers.1", keys))


def test_lookups_are_right_while_epochs_change(own_store: Path, model: Model) -> None:
    first = place_some(own_store)
    second = place_other(own_store, first, 5)
    keys = np.concatenate([keys_of(first["layers.1"])[::7], keys_of(second["layers.1"])[::7]])
    right = model.expected("layers.1", keys)
    wrong, ended = [], threading.Event()
    with open_hbm(own_store, hbm="128KiB") as store:

        def look_up() -> None:
            while not ended.is_set():
                if not np.array_equal(store["layers.1"].lookup(keys), right):
                    wrong.append(1)

        threads = [threading.Thread(target=look_up) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for turn in range(6):
                store.change_hbm(1 + turn % 2)
        finally:
            ended.set()
            for thread in threads:
                thread.join(timeout=60)
        assert not wrong
        assert not any(thread.is_alive() for thread in threads)


def test_a_change_never_writes_a_slot_that_the_newest_index_names(
    own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = place_some(own_store)
    place_other(own_store, first, 6)
    with open_hbm(own_store, placement=1) as store:
        tier = store._engine._tier
        write = type(tier).write
        written = []

        def watched(self: Any, table: Any, slots: np.ndarray, entries: np.ndarray) -> None:
            named = table.in_slots().places
            assert not np.isin(slots, named).any()
            written.extend(slots.tolist())
            write(self, table, slots, entries)

        monkeypatch.setattr(type(tier), "write", watched)
        store.change_hbm(2)
        assert len(written) > 100


def test_a_change_to_what_is_not_there_changes_nothing(own_store: Path, built: Path) -> None:
    place_some(own_store)
    with open_hbm(own_store) as store:
        with pytest.raises(tierstore.ConfigError, match="epoch 9 does not exist"):
            store.change_hbm(9)
        assert store.stats()["placement"]["hbm_epoch"] == 1
    with tierstore.open(built, dram="1MiB") as store, pytest.raises(tierstore.ConfigError, match="no hbm tier"):
        store.change_hbm()


class SlowPending:
    """Reads that end when somebody waits for them."""

    def __init__(self, out: np.ndarray, value: int) -> None:
        self._out, self._value = out, value
        self.ended = False

    def done(self) -> bool:
        return self.ended

    def wait(self, _timeout_s: float | None) -> None:
        self._out[:] = self._value
        self.ended = True

    def cancel(self) -> None:
        self.ended = True

    def detach(self) -> None:
        pass


def test_a_submit_that_meets_two_versions_ends_the_olds_reads_before_the_new_ones_begin(
    placed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_hbm(placed) as store:
        below = store._engine._engine
        versions, begun = iter([1, 2, 2, 2]), []

        def submit(requests: Any) -> SlowPending:
            assert all(pending.ended for pending in begun)
            begun.append(SlowPending(requests[0][2], len(begun)))
            return begun[-1]

        with monkeypatch.context() as patch:
            patch.setattr(type(below), "version", property(lambda _: next(versions)))
            patch.setattr(below, "submit", submit)
            out = np.full((4, HEADS, ROW_BYTES), POISON, dtype=np.uint8)
            pending = store._engine.submit([(0, np.full((4, 3), -1, dtype=np.int64), out)])
        assert pending is begun[1]
        pending.wait(1.0)
        assert (out == 1).all()
        assert len(begun) == 2
