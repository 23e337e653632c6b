"""What a store was built from: files that change, are replaced, copied or completed before,
during and after a build."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner

import tierstore
from engram_adapter import build_checkpoint
from tierstore.formats.catalog import read_catalog, record_origin
from tierstore.tools.verify import command as verify_command

ROWS, DIM = 20_000, 64
SHARD_BYTES = 1 << 20


def write_rows(file: Path, value: float) -> np.ndarray:
    rows = np.full((ROWS, DIM), value, np.float32) + np.arange(ROWS, dtype=np.float32)[:, None]
    safetensors.numpy.save_file({"w": rows}, file)
    return rows


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "m").mkdir()
    write_rows(tmp_path / "m" / "model.safetensors", 0)
    return tmp_path / "m"


def build(model: Path, store: Path, **options: object) -> tierstore.offline.build.BuildReport:
    fixed = {"tensor": "w", "shard_bytes": SHARD_BYTES, "jobs": 1}
    return build_checkpoint(model, store, **fixed, **options)  # type: ignore[arg-type]


def rows_of(store: Path) -> np.ndarray:
    with tierstore.open(store, dram="16MiB") as opened:
        return opened["w"].rows(np.arange(ROWS)).reshape(ROWS, -1).view(np.float32)


def damage(file: Path, row: int) -> None:
    """Overwrites one row in place, between the blocks that the digest samples, as a bad download has it."""
    header_bytes = int.from_bytes(file.read_bytes()[:8], "little")
    with file.open("r+b") as stream:
        stream.seek(8 + header_bytes + row * DIM * 4)
        stream.write(b"\xaa" * DIM * 4)


def no_shard_is_made(*_: object) -> None:
    raise AssertionError("a shard was made again, or compared")


def test_a_file_that_was_replaced_after_the_build_is_noticed_by_the_next_one(model: Path, tmp_path: Path) -> None:
    file = model / "model.safetensors"
    shutil.copy(file, tmp_path / "good")
    damage(file, 1000)
    build(model, tmp_path / "store")
    shutil.copy(tmp_path / "good", file)
    with pytest.raises(tierstore.ConfigError, match=r"model\.safetensors changed .* 1 of 6 shards hold other rows"):
        build(model, tmp_path / "store")
    assert (rows_of(tmp_path / "store")[1000] != rows_of(tmp_path / "store")[999] + 1).all(), "it was left as it is"


def test_a_copied_or_touched_checkpoint_is_compared_once_and_then_known(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(model, tmp_path / "store")
    shutil.copytree(model, tmp_path / "copy")
    os.utime(tmp_path / "copy" / "model.safetensors", (1, 1))
    assert build(tmp_path / "copy", tmp_path / "store").shards_kept == 6
    monkeypatch.setattr("tierstore.offline.shards._write_pages", no_shard_is_made)
    assert build(tmp_path / "copy", tmp_path / "store").shards_kept == 6
    with pytest.raises(AssertionError, match="compared"):
        build(model, tmp_path / "store")  # the files are others again


def test_an_unfinished_build_makes_those_shards_again_whose_rows_have_changed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = model / "model.safetensors"
    shutil.copy(file, tmp_path / "good")
    damage(file, 1000)
    with monkeypatch.context() as stopped:
        stopped.setattr("tierstore.offline.build.mark_ready", lambda _path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(model, tmp_path / "store")
    shutil.copy(tmp_path / "good", file)
    report = build(model, tmp_path / "store")
    assert (report.shards_built, report.shards_kept) == (1, 5)
    np.testing.assert_array_equal(rows_of(tmp_path / "store"), write_rows(tmp_path / "again", 0))


@pytest.mark.parametrize("how", ["in place", "replaced", "removed", "sampled block, with its old time"])
def test_a_file_that_changes_during_the_build_leaves_no_store_and_no_shard_that_counts(
    model: Path, tmp_path: Path, how: str
) -> None:
    file = model / "model.safetensors"
    shutil.copy2(file, tmp_path / "good")
    before = file.stat()

    def change(_done: int, _total: int) -> None:
        if (tmp_path / "changed").exists():
            return
        if how == "removed":
            file.rename(tmp_path / "away")
        elif how == "replaced":
            shutil.copy(file, tmp_path / "new")
            (tmp_path / "new").rename(file)
        else:
            damage(file, 1000 if how == "in place" else 0)
        if how.startswith("sampled"):
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        (tmp_path / "changed").touch()

    with pytest.raises(tierstore.FormatError, match=r"model\.safetensors.* (change|was removed)"):
        build(model, tmp_path / "store", on_progress=change)
    with pytest.raises(tierstore.StoreNotReadyError):
        tierstore.open(tmp_path / "store")
    assert not read_catalog(tmp_path / "store", must_be_ready=False).shards["w"]
    if how == "removed":
        (tmp_path / "away").rename(file)
    with file.open("r+b") as stream:  # the same inode, bytes and time as before
        stream.write((tmp_path / "good").read_bytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    build(model, tmp_path / "store")
    np.testing.assert_array_equal(rows_of(tmp_path / "store"), write_rows(tmp_path / "again", 0))


def test_a_file_that_changes_between_its_header_and_the_build_is_noticed(model: Path) -> None:
    checkpoint = tierstore.formats.checkpoint.Checkpoint.open(model)
    damage(model / "model.safetensors", 1000)
    with pytest.raises(tierstore.FormatError, match="changed while it was read"):
        checkpoint.to_dict()


def test_a_store_of_an_older_tierstore_opens_and_is_compared_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(model, tmp_path / "store")
    origin = read_catalog(tmp_path / "store").origin
    old = {"digest": origin["digest"]}
    old["files"] = [{key: entry[key] for key in ("name", "bytes", "header_sha256")} for entry in origin["files"]]
    record_origin(tmp_path / "store", old)
    np.testing.assert_array_equal(rows_of(tmp_path / "store"), write_rows(tmp_path / "again", 0))
    assert build(model, tmp_path / "store").shards_kept == 6
    assert read_catalog(tmp_path / "store").origin == origin
    monkeypatch.setattr("tierstore.offline.shards._write_pages", no_shard_is_made)
    assert build(model, tmp_path / "store").shards_kept == 6


def test_a_checkpoint_of_which_more_files_came_later_is_the_same_one(model: Path, tmp_path: Path) -> None:
    names = {"w": "model.safetensors", "lm_head.weight": "other.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    build(model, tmp_path / "store")
    safetensors.numpy.save_file({"lm_head.weight": np.zeros((5, 4), np.float32)}, model / "other.safetensors")
    assert build(model, tmp_path / "store").shards_kept == 6
    verified = CliRunner().invoke(verify_command, [str(tmp_path / "store"), "--source", str(model)])
    assert verified.exit_code == 0, verified.output
    write_rows(model / "model.safetensors", 5)
    with pytest.raises(tierstore.ConfigError, match="of another checkpoint"):
        build(model, tmp_path / "store")


def test_a_hole_in_the_table_is_refused_by_name_and_one_elsewhere_is_not(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"w": np.ones((ROWS, DIM), np.float32), "z": np.ones(1 << 20, np.uint8)}, file)
    header_bytes = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    spans = {name: entry["data_offsets"] for name, entry in json.loads(file.read_bytes()[8:header_bytes]).items()}
    for name in ("z", "w"):
        start, end = (header_bytes + at for at in spans[name])
        data = file.read_bytes()
        with (tmp_path / "part").open("wb") as sparse:
            sparse.write(data[: start + 8192])
            sparse.seek(end - 8192)
            sparse.write(data[end - 8192 :])
        (tmp_path / "part").rename(file)
        if name == "z":
            build(file, tmp_path / "store")
        else:
            with pytest.raises(
                tierstore.ConfigError, match=r"model\.safetensors: bytes \d+ to \d+, of tensor w, were never"
            ):
                build(file, tmp_path / "other")
            build(file, tmp_path / "other", allow_holes=True)


def test_the_record_of_a_checkpoint_says_what_tells_its_files_from_others(model: Path, tmp_path: Path) -> None:
    build(model, tmp_path / "store")
    found = (model / "model.safetensors").stat()
    [entry] = read_catalog(tmp_path / "store").origin["files"]
    assert (entry["bytes"], entry["mtime_ns"], entry["inode"]) == (found.st_size, found.st_mtime_ns, found.st_ino)
    assert len(entry["samples_sha256"]) == 64
