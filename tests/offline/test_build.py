"""build: the same bytes however often it was interrupted, and nothing that opens before it is whole."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.marks import slow_but
from support.stores import Model, make_model

import tierstore
from tierstore import durable
from tierstore.formats.catalog import read_catalog
from tierstore.offline import build as build_module
from tierstore.offline import shards, store_lock
from tierstore.offline.build import build_store


def digests(store: Path) -> dict[str, str]:
    return {
        str(f.relative_to(store)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(store.rglob("*.shard"))
    }


def test_a_built_store_holds_the_checkpoint_row_by_row(model: Model, built: Path) -> None:
    image = read_catalog(built)
    for name, rows in model.rows.items():
        layout = image.tables[name]
        row_bytes = rows.shape[1]
        assert layout.page_bytes == 4096
        for row_id in {0, 1, layout.rows_per_page - 1, layout.rows_per_page, len(rows) - 1} & set(range(len(rows))):
            page, slot = divmod(row_id, (4096 - 16) // row_bytes)
            shard, page_in_shard = divmod(page, layout.pages_per_shard)
            data = (built / image.shards[name][shard].file).read_bytes()
            at = page_in_shard * 4096 + slot * row_bytes
            assert data[at : at + row_bytes] == rows[row_id].tobytes()


def test_digests_in_the_catalog_are_the_files_own(built: Path) -> None:
    records = [shard for shards in read_catalog(built).shards.values() for shard in shards.values()]
    assert {shard.file: shard.sha256 for shard in records} == digests(built)


@pytest.mark.parametrize("jobs", slow_but([1, 7], [1, 2, 7]))
@pytest.mark.parametrize("shard_bytes", [4096, 65536, 1 << 30])
def test_rows_do_not_depend_on_jobs_or_shards(model: Model, tmp_path: Path, jobs: int, shard_bytes: int) -> None:
    report = model.build(tmp_path / "store", jobs=jobs, shard_bytes=shard_bytes)
    assert report.shards_kept == 0
    with tierstore.open(tmp_path / "store") as store:
        for name, rows in model.rows.items():
            np.testing.assert_array_equal(store[name].rows(np.arange(len(rows))), rows)


@pytest.mark.parametrize("num_rows", [1, 101, 102, 103, 204])
def test_the_last_page_may_be_partly_filled(tmp_path: Path, num_rows: int) -> None:
    import safetensors.numpy

    from tierstore.formats.checkpoint import Checkpoint, Plane, TableSource
    from tierstore.spec import TableSpec

    rows = np.random.default_rng(num_rows).integers(0, 256, (num_rows, 40), dtype=np.uint8)  # 102 rows a page
    safetensors.numpy.save_file({"w": rows}, tmp_path / "m.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "m.safetensors")
    source = TableSource(TableSpec.plain("w", num_rows, 40, "raw", 40), (Plane(40, (checkpoint.tensors["w"],)),))
    build_store(tmp_path / "store", [source], origin=checkpoint.to_dict(), attachments={}, shard_bytes=4096)
    with tierstore.open(tmp_path / "store") as store:
        np.testing.assert_array_equal(store["w"].rows(np.arange(num_rows)), rows)


def test_building_again_does_nothing(model: Model, own_store: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in own_store.rglob("*.shard")}
    report = model.build(own_store, shard_bytes=65536)
    assert (report.shards_built, report.bytes_written) == (0, 0)
    assert report.shards_kept == len(before)
    assert {file: file.stat().st_mtime_ns for file in own_store.rglob("*.shard")} == before


FAILING = ["write", "fsync", "rename", "record_shard", "create_catalog", "mark_ready", "sync_folder", "sync_shard"]


class FailingCall:
    """Lets `countdown` calls through and fails the next one."""

    def __init__(self, call, countdown: int) -> None:
        self.call, self.countdown, self.failed = call, countdown, False

    def __call__(self, *arguments, **options):
        self.countdown -= 1
        if self.countdown == -1:
            self.failed = True
            raise OSError(errno.ENOSPC, "No space left on device", "somewhere")
        return self.call(*arguments, **options)


@pytest.mark.parametrize("operation", FAILING)
def test_a_build_that_fails_anywhere_resumes_to_the_same_bytes(
    model: Model, built: Path, tmp_path: Path, operation: str
) -> None:
    """Fails operation 1, 2, 3, ... of each kind until none is hit; every time the rest is built by the same command."""
    expected = digests(built)
    origin = model.checkpoint.to_dict()
    for countdown in range(200):
        store = tmp_path / str(countdown)
        with pytest.MonkeyPatch.context() as patch:
            owner, name = {
                "write": (build_module.os, "write"),
                "fsync": (build_module.os, "fsync"),
                "rename": (Path, "rename"),
                "sync_shard": (durable, "sync_folder"),
                "sync_folder": (shards, "sync_folder"),
                "record_shard": (shards, "record_shard"),
            }.get(operation, (build_module, operation))
            failing = FailingCall(getattr(owner, name), countdown)
            patch.setattr(owner, name, lambda *a, failing=failing, **k: failing(*a, **k))
            try:
                model.build(store, shard_bytes=65536, jobs=1, origin=origin)
            except tierstore.BudgetError:
                assert failing.failed
        if failing.failed:
            with pytest.raises((tierstore.StoreNotReadyError, tierstore.FormatError)):
                tierstore.open(store)
            model.build(store, shard_bytes=65536, jobs=1)
        assert digests(store) == expected
        assert not list(store.rglob("*.new"))
        if not failing.failed:
            assert countdown > 0
            return
    pytest.fail("the operation never stopped failing")


def test_one_failing_worker_stops_the_others_and_keeps_their_shards(model: Model, tmp_path: Path, monkeypatch) -> None:
    failing = FailingCall(os.write, 9)
    monkeypatch.setattr(build_module.os, "write", failing)
    with pytest.raises(tierstore.BudgetError, match="finished shards are kept"):
        model.build(tmp_path / "store", shard_bytes=65536, jobs=4)
    monkeypatch.undo()
    finished = sum(len(shards) for shards in read_catalog(tmp_path / "store", must_be_ready=False).shards.values())
    report = model.build(tmp_path / "store", shard_bytes=65536, jobs=4)
    assert report.shards_kept == finished
    assert report.shards_built == len(digests(tmp_path / "store")) - finished > 0


def test_a_real_full_disk_is_named_and_left_resumable(model: Model, tmp_path: Path) -> None:
    """On a file system of 1 MiB, which root can mount; the preflight's own refusal is tested apart."""
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(mount)], capture_output=True).returncode:
        pytest.skip("this user may not mount a small file system")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build_module, "_check_room", lambda *_: None)
            with pytest.raises(tierstore.BudgetError, match="No space left"):
                model.build(mount / "store", shard_bytes=65536)
        with pytest.raises(tierstore.TierStoreError):
            tierstore.open(mount / "store")
        subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build_module, "SPARE_DISK_BYTES", 0)
            model.build(mount / "store", shard_bytes=65536)
        with tierstore.open(mount / "store") as store:
            np.testing.assert_array_equal(store["plain"].rows(np.arange(33)), model.rows["plain"])
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_what_cannot_fit_is_refused_before_anything_is_written(model: Model, tmp_path: Path, monkeypatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(build_module.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(tierstore.BudgetError, match=r"needs .* MiB more .*1000 bytes"):
        model.build(tmp_path / "store")
    assert not (tmp_path / "store").exists()


def everything_under(folder: Path) -> dict[str, bytes | None]:
    """All files and folders but LMDB's lock, in which each reader leaves its process id."""
    found = {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else None for f in folder.rglob("*")}
    return {name: data for name, data in found.items() if not name.endswith("catalog.mdb-lock")}


@pytest.mark.parametrize(
    "place", ["foreign", "another checkpoint", "no room", "network", "no room, new parents", "jobs"]
)
def test_a_build_that_refuses_leaves_everything_as_it_was(
    model: Model, own_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    store = {"another checkpoint": own_store, "no room, new parents": tmp_path / "some" / "where"}.get(place)
    store = store or tmp_path / "store"
    (own_store / "build.lock").unlink()  # as in a copy of a store
    builder = make_model(tmp_path / "other", seed=1) if place == "another checkpoint" else model
    if place == "foreign":
        store.mkdir()
        (store / "song.mp3").write_bytes(b"la")
    if place == "network":
        monkeypatch.setattr(build_module, "file_system_of", lambda _: "nfs4")
    if place.startswith("no room"):
        monkeypatch.setattr(build_module, "SPARE_DISK_BYTES", 1 << 62)
    before = everything_under(tmp_path)
    with pytest.raises((tierstore.ConfigError, tierstore.BudgetError)):
        builder.build(store, shard_bytes=65536, jobs=0 if place == "jobs" else 1)
    assert everything_under(tmp_path) == before


def test_foreign_files_that_appear_before_the_lock_is_held_are_refused(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_flock = store_lock.fcntl.flock

    def flock(fd: int, operation: int) -> None:
        (tmp_path / "store" / "song.mp3").write_bytes(b"la")
        real_flock(fd, operation)

    monkeypatch.setattr(store_lock.fcntl, "flock", flock)
    with pytest.raises(tierstore.ConfigError, match=r"holds 1 other files \(song\.mp3"):
        model.build(tmp_path / "store")
    assert everything_under(tmp_path / "store") == {"song.mp3": b"la"}


def test_a_lock_that_was_removed_meanwhile_is_not_held(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening a lock and holding it, a build that refuses may remove it: then it excludes nobody."""
    real_flock = store_lock.fcntl.flock

    def flock(fd: int, operation: int) -> None:
        (tmp_path / "store" / "build.lock").unlink()
        real_flock(fd, operation)

    monkeypatch.setattr(store_lock.fcntl, "flock", flock)
    with pytest.raises(tierstore.ConfigError, match="another build"):
        model.build(tmp_path / "store")


@pytest.mark.parametrize("below", [".", "store"])
def test_a_file_in_place_of_a_store_is_said_to_be_a_file(model: Model, tmp_path: Path, below: str) -> None:
    (tmp_path / "song.mp3").write_bytes(b"la")
    with pytest.raises(tierstore.ConfigError, match=r"song\.mp3 is a file; a store is a folder"):
        model.build(tmp_path / "song.mp3" / below)


def test_a_store_is_built_and_opened_where_a_path_is_no_utf_8(model: Model, tmp_path: Path) -> None:
    store = tmp_path / os.fsdecode(b"store-\xff")
    model.build(store)
    with tierstore.open(store) as opened:
        np.testing.assert_array_equal(opened["plain"].rows(np.arange(33)), model.rows["plain"])


def test_the_preflight_says_what_will_be_written(model: Model, tmp_path: Path) -> None:
    plans = []
    report = model.build(tmp_path / "store", shard_bytes=65536, on_plan=plans.append)
    (plan,) = plans
    assert plan.num_rows == sum(len(rows) for rows in model.rows.values())
    assert plan.table_bytes == sum(rows.nbytes for rows in model.rows.values())
    assert (
        plan.store_bytes == report.bytes_written == sum(f.stat().st_size for f in (tmp_path / "store").rglob("*.shard"))
    )
    assert plan.num_shards == report.shards_built == len(digests(tmp_path / "store"))
    assert plan.bytes_needed > plan.store_bytes


def test_progress_reaches_the_whole(model: Model, tmp_path: Path) -> None:
    seen = []
    model.build(tmp_path / "store", on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_another_checkpoint_or_other_options_do_not_mix(model: Model, own_store: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(tierstore.ConfigError, match="another checkpoint"):
        other.build(own_store, shard_bytes=65536)
    with pytest.raises(tierstore.ConfigError, match="other tables, shard size or hash"):
        model.build(own_store, shard_bytes=131072)
    with pytest.raises(tierstore.ConfigError, match="other tables, shard size or hash"):
        model.build(own_store, shard_bytes=65536, attachments={"note": b"another"})


def test_a_folder_with_other_files_is_left_alone(model: Model, tmp_path: Path) -> None:
    (tmp_path / "song.mp3").touch()
    with pytest.raises(tierstore.ConfigError, match=r"song\.mp3"):
        model.build(tmp_path)


def test_two_builds_of_one_store_do_not_run_at_once(model: Model, tmp_path: Path) -> None:
    def build_again(_: object) -> None:
        with pytest.raises(tierstore.ConfigError, match="another build"):
            model.build(tmp_path / "store")

    model.build(tmp_path / "store", on_plan=build_again)


def test_a_lost_shard_of_a_finished_store_is_named(model: Model, own_store: Path) -> None:
    shard = next(own_store.rglob("*.shard"))
    shard.unlink()
    with pytest.raises(tierstore.FormatError, match="missing or short in a finished store"):
        model.build(own_store, shard_bytes=65536)


def test_network_file_systems_need_a_flag(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("nfs4", "fuse.glusterfs", "of-tomorrow"):
        monkeypatch.setattr(build_module, "file_system_of", lambda _, kind=kind: kind)
        with pytest.raises(tierstore.ConfigError, match=rf"{kind}.*--allow-network-fs"):
            model.build(tmp_path / "store")
    assert not (tmp_path / "store").exists()
    model.build(tmp_path / "store", allow_network_fs=True)


@pytest.mark.parametrize("options", [{"jobs": 0}, {"jobs": 65}, {"shard_bytes": 100}], ids=str)
def test_options_out_of_range_are_refused(model: Model, tmp_path: Path, options: dict) -> None:
    with pytest.raises(tierstore.ConfigError, match=next(iter(options)).replace("_", ".")):
        model.build(tmp_path / "store", **options)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(errno.EROFS, "for writing, or give a path elsewhere"), (errno.EACCES, "readable and writable")],
)
def test_a_target_that_cannot_be_written_is_named(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, remedy: str
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(build_module.Path, "mkdir", refuse)
    with pytest.raises(tierstore.ConfigError, match=f"{os.strerror(code)}.*{remedy}.*finished shards are kept"):
        model.build(tmp_path / "store")


def test_a_build_of_a_large_table_stays_within_its_memory(tmp_path: Path) -> None:
    """192 MiB of rows through a build in a process of its own: it may grow by the chunks of its jobs,
    not by the table."""
    script = """
import json, sys
import numpy as np
from tierstore.offline.build import build_store
from tierstore.formats.checkpoint import Checkpoint, Plane, TableSource
from tierstore.spec import TableSpec
folder, rows = sys.argv[1], 192 * 4096
header = json.dumps({"w": {"dtype": "U8", "shape": [rows, 256], "data_offsets": [0, rows * 256]}}).encode()
with open(folder + "/m.safetensors", "wb") as file:
    file.write(len(header).to_bytes(8, "little") + header)
    file.truncate(8 + len(header) + rows * 256)
checkpoint = Checkpoint.open(folder)
source = TableSource(TableSpec.plain("w", rows, 256, "raw", 256), (Plane(256, (checkpoint.tensors["w"],)),))
def peak_kib():  # not ru_maxrss: it begins with what the parent had at the fork
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
before = peak_kib()
build_store(folder + "/store", [source], origin=checkpoint.to_dict(), attachments={}, shard_bytes=16 << 20, jobs=2)
print(peak_kib() - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=300, check=True
    )
    assert int(result.stdout) < 64 * 1024  # KiB
