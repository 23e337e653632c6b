"""The catalog: nothing opens before the ready mark, and damage is named before it is believed."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from support.repository import REPOSITORY, TESTS
from support.stores import Model

import tierstore
from tierstore.daemon.daemon import Daemon
from tierstore.formats import catalog
from tierstore.formats.catalog import read_catalog
from tierstore.tools.cli import run


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
    assert image.origin == model.checkpoint.to_dict()
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
    with pytest.raises(tierstore.FormatError, match="not a tierstore store"):
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


@pytest.mark.parametrize("eighth", range(6))
def test_a_truncated_catalog_is_an_error_and_no_signal(own_store: Path, eighth: int) -> None:
    file = own_store / "catalog.mdb"
    os.truncate(file, file.stat().st_size * eighth // 8)
    with pytest.raises(tierstore.FormatError, match="cut short"):
        tierstore.open(own_store)


def test_a_catalog_that_is_cut_anywhere_is_an_error_or_has_lost_free_pages_only(own_store: Path) -> None:
    file, expected = own_store / "catalog.mdb", read_catalog(own_store)
    refused = 0
    for num_bytes in range(file.stat().st_size - 1, 0, -1111):
        os.truncate(file, num_bytes)
        try:
            assert read_catalog(own_store) == expected
        except tierstore.FormatError:
            refused += 1
    assert refused > 1


def test_a_store_without_its_ready_mark_does_not_open(own_store: Path) -> None:
    edit(own_store, "ready", lambda _: None)
    with pytest.raises(tierstore.StoreNotReadyError, match=r"not finished \(\d+ of \d+ shards\)"):
        tierstore.open(own_store)


def test_a_newer_store_is_refused_with_both_versions(own_store: Path) -> None:
    edit_json(own_store, "format", format_version=99)
    with pytest.raises(tierstore.FormatError, match=r"store format 99, this tierstore .* reads 1, 2, 3, 4, 5, 6;"):
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
        ("table/layers.1", {"seed": 1 << 40}),
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


# Damages a catalog, case by case, each time in a file that was whole before: a read must give the whole catalog's
# contents or a named error; where it gives them, now and then a write and another read must too. The case at hand goes
# to standard output first, so that it is known if a signal ends the process.
SWEEP = """
import os, random, sys
from pathlib import Path
from tierstore.errors import TierStoreError
from tierstore.daemon.daemon import Daemon
from tierstore.formats import catalog

store, seed, kind = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
file, whole, expected = store / "catalog.mdb", (store / "catalog.mdb").read_bytes(), catalog.read_catalog(store)
table, shards = next(iter(expected.shards.items()))
rng = random.Random(seed)
if kind == "bits":
    cases = [
        (page + at, bytes([whole[page + at] ^ 1 << bit]))
        for page in range(0, len(whole), 4096) for at in range(160 if page < 8192 else 120) for bit in range(8)
    ]
else:
    damages = [b"\\0", b"\\xff", b"\\xf0\\xff\\xff\\x7f", rng.randbytes(1), rng.randbytes(8)]
    cases = [(rng.randrange(len(whole) - 8), rng.choice(damages)) for _ in range(1500)]
refused = 0
for number, (at, damage) in enumerate(cases):
    os.pwrite(1, f"{at:8} {damage.hex():16}".encode(), 0)
    with file.open("r+b") as stream:
        stream.seek(at)
        stream.write(damage)
    try:
        assert catalog.read_catalog(store) == expected, "read as something else"
        if number % 16 == 0:
            catalog.record_shard(store, table, 0, shards[0])
            assert catalog.read_catalog(store) == expected, "read as something else after a write"
            file.write_bytes(whole)
    except TierStoreError:
        refused += 1
    with file.open("r+b") as stream:
        stream.seek(at)
        stream.write(whole[at : at + len(damage)])
assert catalog.read_catalog(store) == expected
os.pwrite(1, f"{len(cases)} cases, {refused} refused".ljust(40).encode(), 0)
"""


@pytest.fixture
def large_catalog(built: Path, tmp_path: Path) -> Path:
    """A catalog with all that LMDB has: two levels of pages, a value in pages of its own, a free list."""
    image = read_catalog(built)
    tables = {name: image.tables[name] for name in ("layers.1", "plain")}
    catalog.create_catalog(tmp_path, tables, image.origin, {"map": bytes(range(256)) * 17, "more": bytes(1900)})
    for name in tables:
        for index, shard in image.shards[name].items():
            catalog.record_shard(tmp_path, name, index, shard)
    catalog.mark_ready(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "seed"),
    [("bytes", 1), *(pytest.param(*rest, marks=pytest.mark.slow) for rest in [("bits", 0), ("bytes", 2)])],
)
def test_damage_anywhere_in_the_catalog_is_named_or_harmless_and_never_a_signal(
    large_catalog: Path, tmp_path_factory: pytest.TempPathFactory, kind: str, seed: int
) -> None:
    log = tmp_path_factory.mktemp("sweep") / "log"
    in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # thousands of writes, each synced
    with log.open("w") as stream, tempfile.TemporaryDirectory(dir=in_memory) as folder:
        shutil.copy(large_catalog / "catalog.mdb", folder)
        command = [sys.executable, "-c", SWEEP, folder, str(seed), kind]
        done = subprocess.run(command, stdout=stream, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 0, (done.returncode, log.read_text(), done.stderr)
    assert int(log.read_text().split(" cases, ")[1].split()[0]) > 100


def test_a_catalog_that_a_killed_writer_left_is_read_as_of_its_last_commit(large_catalog: Path) -> None:
    """LMDB reuses the pages of the older meta page's tree: they may be half written, and nobody reads them."""
    file = large_catalog / "catalog.mdb"
    expected, before = read_catalog(large_catalog), file.read_bytes()
    table, shards = next(iter(expected.shards.items()))
    catalog.record_shard(large_catalog, table, 0, shards[0])
    after = file.read_bytes()
    metas = range(2 * 4096)
    unfinished = bytes(before[i] if i in metas else after[i] for i in range(len(after)))
    file.write_bytes(unfinished)
    assert read_catalog(large_catalog) == expected


def test_a_catalog_reads_well_while_another_process_writes_it(large_catalog: Path) -> None:
    expected = read_catalog(large_catalog)
    code = f"""
import sys
from pathlib import Path
from tierstore.formats.catalog import read_catalog, record_shard
store = Path(sys.argv[1])
for _ in range(60):
    for index, shard in read_catalog(store).shards["{next(iter(expected.shards))}"].items():
        record_shard(store, "{next(iter(expected.shards))}", index, shard)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(large_catalog)]) as writer:
        while writer.poll() is None:
            assert read_catalog(large_catalog) == expected
        assert writer.returncode == 0


def _open_often(path: Path, results: Any) -> None:
    for _ in range(20):
        read_catalog(path)
    results.put("done")


@pytest.mark.parametrize("refused", ["is_file", "open"])
def test_a_store_that_may_not_be_read_is_named_with_its_remedy(
    own_store: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path if refused == "is_file" else os, refused, refuse)
    with pytest.raises(
        tierstore.ConfigError, match=r"cannot read .*catalog\.mdb: Permission denied; make it readable for this user"
    ):
        tierstore.open(own_store)


def test_many_threads_and_processes_read_one_catalog(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY)  # where the processes find this file, as tests.formats.test_catalog
    monkeypatch.syspath_prepend(TESTS)
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


# Overwrites a catalog in place again and again, cuts it and lets it grow, while the product opens the store: it gives
# the catalog's contents, or a named error. In a process of its own, which a signal would end.
OVERWRITTEN = """
import os, random, sys, threading
from pathlib import Path
from tierstore.errors import TierStoreError
from tierstore.formats.catalog import read_catalog
store, seconds = Path(sys.argv[1]), float(sys.argv[2])
file = store / "catalog.mdb"
whole, expected = file.read_bytes(), read_catalog(store)
ended = threading.Event()

def overwrite():
    rng = random.Random(0)
    with file.open("r+b", buffering=0) as stream:
        while not ended.is_set():
            kind = rng.randrange(4)
            if kind == 0:
                os.truncate(file, rng.randrange(len(whole)))
            elif kind == 1:
                os.pwrite(stream.fileno(), rng.randbytes(64), rng.randrange(len(whole)))
            else:
                os.pwrite(stream.fileno(), whole, 0)

thread = threading.Thread(target=overwrite)
thread.start()
threading.Timer(seconds, ended.set).start()
good = refused = 0
while not ended.is_set():
    try:
        assert read_catalog(store) == expected, "read as something else"
        good += 1
    except TierStoreError:
        refused += 1
thread.join()
print(good, refused)
"""


def test_a_catalog_that_is_overwritten_and_cut_while_it_is_read_is_right_or_a_named_error(large_catalog: Path) -> None:
    command = [sys.executable, "-c", OVERWRITTEN, str(large_catalog), "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stderr)
    good, refused = map(int, done.stdout.split())
    assert good > 0
    assert refused > 0


def test_what_only_reads_a_store_never_opens_lmdb(
    own_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a reader opened LMDB")

    (own_store / "catalog.mdb-lock").unlink()
    monkeypatch.setattr(lmdb, "open", refuse)
    tierstore.open(own_store).close()
    for arguments in (["inspect"], ["inspect", "--json"], ["verify"], ["epochs"]):
        assert run([*arguments, str(own_store)]) == 0
    assert run(["plan", str(own_store), str(tmp_path / "missing.profile"), "--dram", "1GiB", "--dry-run"]) == 1
    assert run(["profile", str(own_store), str(tmp_path / "missing.trace"), "-o", str(tmp_path / "p")]) == 1
    daemon = Daemon(own_store, tmp_path / "socket", 4 << 20, replan_s=None)
    try:
        daemon.start()
        with tierstore.connect(tmp_path / "socket") as store:
            assert list(store.tables)
    finally:
        daemon.close()
    assert not (own_store / "catalog.mdb-lock").exists()


def test_a_damaged_catalog_is_refused_before_a_writer_maps_it(large_catalog: Path) -> None:
    image = read_catalog(large_catalog)
    table, shards = next(iter(image.shards.items()))
    with (large_catalog / "catalog.mdb").open("r+b") as stream:
        stream.seek(2 * 4096)
        stream.write(bytes(8192))
    with pytest.raises(tierstore.FormatError, match="damaged"):
        catalog.record_shard(large_catalog, table, 0, shards[0])
