"""Placements damaged under good checksums, made on disks that fail, opened by those who are interrupted:
rows or a name."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from support.held import open_files
from support.stores import Model, make_model
from support.text_store import good, good_json

import tierstore
from tierstore import durable, kernels
from tierstore.formats.catalog import read_catalog
from tierstore.formats.checkpoint import Checkpoint, Plane, TableSource
from tierstore.formats.placement import head_bytes, read_head
from tierstore.offline import place, placement_file
from tierstore.offline.build import build_store
from tierstore.offline.place import place_entries
from tierstore.offline.placement_file import Chosen
from tierstore.spec import TableSpec
from tierstore.tiers import placed


def chosen_keys(count: int, static_fraction: float = 0.5) -> Chosen:
    """Keys of the first order, ascending."""
    keys = np.sort(np.random.default_rng(0).integers(0, 2**63 - 1, count, dtype=np.int64))
    return Chosen(np.zeros(count, dtype=np.uint8), keys, static_fraction)


def tokens_of(chosen: Chosen, num_orders: int = 3) -> np.ndarray:
    keys = np.full((len(chosen.keys), num_orders), -1, dtype=np.int64)
    keys[np.arange(len(keys)), chosen.order_index] = chosen.keys
    return keys


def with_indexes(store: Path, change: Callable[[np.ndarray], None]) -> None:
    """Changes every index of the current placement, records of `kernels.INDEX_BUCKET`, and seals it again."""
    image = read_catalog(store)
    assert image.epoch is not None
    file = store / image.placements[image.epoch].file
    with file.open("r+b") as stream:
        placement = read_head(file, stream.fileno(), image.placements[image.epoch], image.tables)
        for name, table in placement.tables.items():
            indexes = []
            for index in table.indexes:
                stream.seek(index.byte_start)
                buckets = np.frombuffer(stream.read(index.num_bytes), dtype=kernels.INDEX_BUCKET).copy()
                change(buckets)
                stream.seek(index.byte_start)
                stream.write(buckets.tobytes())
                indexes.append(replace(index, checksum=kernels.crc32c(buckets.view(np.uint8))))
            placement.tables[name] = replace(table, indexes=tuple(indexes))
        stream.seek(0)
        stream.write(head_bytes(placement))


def build_plain_tables(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """Builds folder/store of plain tables, uint8 [num_rows, row_bytes] each."""
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder / "model.safetensors")
    sources = []
    for name, rows in tensors.items():
        spec = TableSpec.plain(name, len(rows), rows.shape[1], "raw", rows.shape[1])
        sources.append(TableSource(spec, (Plane(rows.shape[1], (checkpoint.tensors[name],)),)))
    build_store(folder / "store", sources, origin=checkpoint.to_dict(), attachments={})


@pytest.mark.parametrize("io", ["uring", "mmap", "pread"])
def test_a_record_that_an_index_gives_to_many_keys_is_handed_to_its_own_only(tmp_path: Path, io: str) -> None:
    """Read for its own key, it was not looked at again for the others in the batch:
    they got what lay in memory before."""
    model = make_model(tmp_path / "model", layers=tuple(range(1, 10)))
    model.build(tmp_path / "store")
    chosen = chosen_keys(8, static_fraction=0.0)
    place_entries(tmp_path / "store", {"layers.9": chosen})

    def all_to_the_first(buckets: np.ndarray) -> None:
        buckets["places"][buckets["keys"] >= 0] = 0

    with_indexes(tmp_path / "store", all_to_the_first)
    keys = tokens_of(chosen)
    with tierstore.open(tmp_path / "store", dram="4MiB", io=io) as store:
        assert store.stats()["memory"]["staging_bytes"] > 200_000  # enough to read many entries in one read batch
        with pytest.raises(tierstore.CorruptPageError, match=r"placed entry 0 of table layers\.9.*key is wrong"):
            store["layers.9"].lookup(keys)
        np.testing.assert_array_equal(store["layers.9"].lookup(keys[:1]), model.expected("layers.9", keys[:1]))


def test_buckets_beyond_all_descriptors_are_filled_through_one_file(
    own_store: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each had a file, open to the end: 100 GiB of packed entries ran out of descriptors,
    and their preflight was short."""
    chosen = chosen_keys(600, static_fraction=0.0)
    monkeypatch.setattr(placement_file, "BUCKET_BYTES", 1000)  # two records of 336 bytes
    most_files, most_bytes = 0, 0
    plans: list[place.PlacePreflight] = []

    def look(_done: int, _of: int) -> None:
        nonlocal most_files, most_bytes
        most_files = max(most_files, len(os.listdir("/proc/self/fd")))
        files = [path for path in (own_store / "placements").rglob("*") if path.is_file()]
        most_bytes = max(most_bytes, sum(path.stat().st_size for path in files))

    before = len(os.listdir("/proc/self/fd"))
    place_entries(own_store, {"layers.1": chosen}, on_preflight=plans.append, on_progress=look)
    assert most_files < before + 20
    assert most_bytes <= plans[0].bytes_needed - placement_file.SPARE_DISK_BYTES
    with tierstore.open(own_store, dram="400KiB") as store:
        keys = tokens_of(chosen)
        np.testing.assert_array_equal(store["layers.1"].lookup(keys), model.expected("layers.1", keys))


@pytest.mark.parametrize(("module", "failing"), [(place, "publish_placement"), (durable, "sync_folder")])
def test_a_disk_that_is_full_when_all_is_written_gets_its_space_back(
    own_store: Path, model: Model, monkeypatch: pytest.MonkeyPatch, module: ModuleType, failing: str
) -> None:
    """The file stayed, nobody's, and kept the disk full; the error was a bare OSError."""
    place_entries(own_store, {"layers.1": chosen_keys(50)})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(module, failing, full)
        with pytest.raises(
            tierstore.BudgetError, match=r"No space left on device: .* are needed, .* are free.*keeps epoch 1"
        ):
            place_entries(own_store, {"layers.1": chosen_keys(60)})
    assert [file.name for file in (own_store / "placements").iterdir()] == ["00000001.placement"]
    keys = tokens_of(chosen_keys(60))
    with tierstore.open(own_store, dram="400KiB") as store:
        assert store.stats()["placement"]["epoch"] == 1
        np.testing.assert_array_equal(store["layers.1"].lookup(keys), model.expected("layers.1", keys))


def test_a_placement_that_was_published_stays_when_its_maker_is_interrupted(
    own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = place.publish_placement

    def publish_and_interrupt(*arguments: Any) -> None:
        published(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(place, "publish_placement", publish_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        place_entries(own_store, {"layers.1": chosen_keys(50)})
    with tierstore.open(own_store, dram="400KiB") as store:
        assert store.stats()["placement"]["epoch"] == 1


def test_an_interrupted_open_does_not_load_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All reads were queued, and an interrupt came through when the last had ended: minutes, of a large static set."""
    rows = np.random.default_rng(0).integers(0, 256, (40_000, 1000), dtype=np.uint8)
    build_plain_tables(tmp_path, {"t": rows})
    chosen = Chosen(np.zeros(30_000, dtype=np.uint8), np.arange(30_000), static_fraction=1.0)
    place_entries(tmp_path / "store", {"t": chosen})
    monkeypatch.setattr(placed, "LOAD_THREADS", 1)
    monkeypatch.setattr(placed, "LOAD_BYTES", 1)
    before = open_files()
    loads, given_up = 0, threading.Event()

    def checked(*arguments: Any) -> int:
        nonlocal loads
        loads += 1
        assert loads == 1 or given_up.wait(60)  # so that no machine is too busy for the interrupt to come first
        return invalidate(*arguments)

    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    def shutdown(pool: ThreadPoolExecutor, wait: bool = True, *, cancel_futures: bool = False) -> None:
        real_shutdown(pool, wait=False, cancel_futures=cancel_futures)
        given_up.set()
        real_shutdown(pool, wait=wait)

    invalidate, real_shutdown = kernels.invalidate_bad_records, ThreadPoolExecutor.shutdown
    monkeypatch.setattr(kernels, "invalidate_bad_records", checked)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shutdown)
    with pytest.raises(KeyboardInterrupt):
        tierstore.open(tmp_path / "store", dram="32MiB", on_progress=interrupt)
    assert 0 < loads < 30, "of 59"
    assert open_files() <= before


@pytest.mark.parametrize("part", [{"static_fraction": 1.5}, {"static_fraction": float("nan")}, {"hbm_entries": 51}])
def test_what_no_reader_would_open_is_not_published(own_store: Path, part: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"table layers\.1: static_fraction .* hbm_entries .* 50 entries"):
        place_entries(own_store, {"layers.1": replace(chosen_keys(50), **part)})
    assert not read_catalog(own_store).placements


def test_details_that_do_not_fit_are_named_before_the_work(own_store: Path) -> None:
    """They were found too long when every row had been read and written."""

    def started(*_: object) -> None:
        raise AssertionError

    with pytest.raises(tierstore.FormatError, match=r"at most 65536 fit; shorten its details"):
        place_entries(own_store, {"layers.1": chosen_keys(50)}, details={"plan": "x" * 70_000}, on_progress=started)
    assert list((own_store / "placements").iterdir()) == []


@pytest.mark.slow
def test_many_tables_are_planned_by_the_keys_of_a_running_store(tmp_path: Path) -> None:
    """What was expected of a hundred tables did not fit the placement's head, and the plan ended in an error."""
    rng = np.random.default_rng(0)
    tensors = {f"t{number}": rng.integers(0, 256, (2000, 64), dtype=np.uint8) for number in range(100)}
    build_plain_tables(tmp_path, tensors)
    with tierstore.open(tmp_path / "store", dram="4MiB", io="mmap") as store:
        store.start_trace(tmp_path / "keys.trace", share=1)
        for _ in range(100):
            for name in tensors:
                store[name].lookup(np.minimum(rng.zipf(1.3, (100, 1)), 2000) - 1)
        store.stop_trace()
    good("profile", tmp_path / "store", tmp_path / "keys.trace", "-o", tmp_path / "keys.profile")
    plan = good_json("plan", tmp_path / "store", tmp_path / "keys.profile", "--dram", "4MiB")
    assert len(plan["groups"]) == 100
    (epoch,) = good_json("epochs", tmp_path / "store")
    assert epoch["details"]["plan"]["dram_bytes"] == 4 << 20
    with tierstore.open(tmp_path / "store", dram="4MiB") as store:
        for name, rows in tensors.items():
            found = store[name].lookup(np.arange(2000)[:, None])
            np.testing.assert_array_equal(found[:, 0], rows)
