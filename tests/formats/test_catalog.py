"""The catalog: nothing opens before the ready mark, and damage is named before it is believed."""

from __future__ import annotations

import json
import multiprocessing
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from stores import Model

import tierstore
from tierstore.formats.catalog import read_catalog


def bitwise_crc32c(data: bytes) -> int:
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


def edit(store: Path, key: str, change: Callable[[bytes | None], bytes | None]) -> None:
    """Changes one record of a catalog, with a right checksum; None removes it."""
    with lmdb.open(str(store / "catalog.mdb"), subdir=False, map_size=1 << 30) as env, env.begin(write=True) as txn:
        old = txn.get(key.encode())
        new = change(None if old is None else old[:-4])
        if new is None:
            txn.delete(key.encode())
        else:
            txn.put(key.encode(), new + struct.pack("<I", bitwise_crc32c(key.encode() + new)))


def edit_json(store: Path, key: str, **changes: Any) -> None:
    edit(store, key, lambda old: json.dumps(json.loads(old or b"{}") | changes).encode())


def test_a_catalog_says_what_was_built(built: Path, model: Model) -> None:
    image = read_catalog(built)
    assert image.ready
    assert image.format_version == 1
    assert image.origin == model.checkpoint.as_record()
    assert image.attachments == {"note": b"kept"}
    for source in model.sources:
        layout = image.tables[source.spec.name]
        assert layout.spec == source.spec
        assert sorted(image.shards[source.spec.name]) == list(range(layout.num_shards))
        pages = [page for index in range(layout.num_shards) for page in range(*layout.shard_pages(index))]
        assert pages == list(range(layout.num_pages))


@pytest.mark.parametrize("place", ["missing", "empty", "only a lock"])
def test_no_store_is_said_to_be_no_store(tmp_path: Path, place: str) -> None:
    path = tmp_path / "store"
    if place != "missing":
        path.mkdir()
    if place == "only a lock":
        (path / "build.lock").touch()
    with pytest.raises(tierstore.StoreNotReadyError, match="tierstore build"):
        tierstore.open(path)


def test_a_foreign_folder_or_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "song.mp3").write_bytes(b"la")
    with pytest.raises(tierstore.FormatError, match="no tierstore store"):
        tierstore.open(tmp_path)
    with pytest.raises(tierstore.FormatError, match="is a file"):
        tierstore.open(tmp_path / "song.mp3")


@pytest.mark.parametrize(
    "content", [b"", b"x" * 100, b"x" * 100_000, bytes(8192)], ids=["empty", "short", "long", "zeros"]
)
def test_a_catalog_that_is_no_lmdb_file_is_refused(own_store: Path, content: bytes) -> None:
    (own_store / "catalog.mdb").write_bytes(content)
    with pytest.raises(tierstore.FormatError, match=r"catalog\.mdb"):
        tierstore.open(own_store)


def test_an_lmdb_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path / "catalog.mdb"), subdir=False) as env, env.begin(write=True) as txn:
        txn.put(b"hello", b"a world of another kind")
    with pytest.raises(tierstore.FormatError, match="checksum"):
        tierstore.open(tmp_path)


@pytest.mark.parametrize("eighth", range(8))
def test_a_truncated_catalog_is_an_error_and_no_signal(own_store: Path, eighth: int) -> None:
    file = own_store / "catalog.mdb"
    os.truncate(file, file.stat().st_size * eighth // 8)
    with pytest.raises(tierstore.FormatError, match="cut short"):
        tierstore.open(own_store)


def test_a_store_without_its_ready_mark_does_not_open(own_store: Path) -> None:
    edit(own_store, "ready", lambda _: None)
    with pytest.raises(tierstore.StoreNotReadyError, match=r"not finished \(\d+ of \d+ shards\)"):
        tierstore.open(own_store)


def test_a_newer_store_is_refused_with_both_versions(own_store: Path) -> None:
    edit_json(own_store, "format", format_version=2)
    with pytest.raises(tierstore.FormatError, match=r"store format 2, this tierstore .* reads 1"):
        tierstore.open(own_store)


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_of_a_record_is_noticed(own_store: Path, model: Model, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with lmdb.open(str(own_store / "catalog.mdb"), subdir=False, map_size=1 << 30) as env, env.begin(write=True) as txn:
        pairs = [(bytes(key), bytearray(value)) for key, value in txn.cursor()]
        key, value = pairs[int(rng.integers(len(pairs)))]
        value[int(rng.integers(len(value)))] ^= 1 << int(rng.integers(8))
        txn.put(key, bytes(value))
    with pytest.raises(tierstore.FormatError, match="checksum"):
        tierstore.open(own_store)
    with pytest.raises(tierstore.FormatError):
        model.build(own_store, shard_bytes=65536)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("table/layers.1", {"rows_per_page": 5}),
        ("table/layers.1", {"num_pages": 5}),
        ("table/layers.1", {"page_bytes": 4095}),
        ("table/layers.1", {"pages_per_shard": 0}),
        ("table/layers.1", {"pages_per_shard": "many"}),
        ("table/layers.1", {"folder": "../../etc"}),
        ("table/layers.1", {"folder": "/etc"}),
        ("table/layers.1", {"spec": {}}),
        ("shard/layers.1/00000000", {"num_bytes": 1}),
        ("shard/layers.1/00000000", {"file": "../elsewhere"}),
        ("shard/layers.1/00009999", {"num_bytes": 1}),
        ("shard/layers.9/00000000", {"num_bytes": 1}),
    ],
    ids=str,
)
def test_a_record_that_contradicts_itself_is_refused(own_store: Path, key: str, changes: dict) -> None:
    edit_json(own_store, key, **changes)
    with pytest.raises(tierstore.FormatError):
        tierstore.open(own_store)


@pytest.mark.parametrize("key", ["format", "origin", "tables", "table/layers.1", "shard/layers.1/00000000"])
def test_a_missing_record_is_refused(own_store: Path, key: str) -> None:
    edit(own_store, key, lambda _: None)
    with pytest.raises(tierstore.FormatError):
        tierstore.open(own_store)


def _open_often(path: Path, results: Any) -> None:
    for _ in range(20):
        read_catalog(path)
    results.put("done")


def test_many_threads_and_processes_read_one_catalog(built: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_open_often, args=(built, results)) for _ in range(2)]
    for process in processes:
        process.start()
    threads = [threading.Thread(target=_open_often, args=(built, results)) for _ in range(6)]
    for thread in threads:
        thread.start()
    assert [results.get(timeout=120) for _ in range(8)] == ["done"] * 8
    for process in processes:
        process.join(timeout=60)


def test_a_store_on_a_read_only_mount_opens(own_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_store / "catalog.mdb-lock").unlink()
    monkeypatch.setattr("os.access", lambda *_: False)
    assert read_catalog(own_store).ready
    assert not (own_store / "catalog.mdb-lock").exists()
