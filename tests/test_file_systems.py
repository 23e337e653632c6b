"""A path is on a local disk only if its kind of file system is known to be local."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import tierstore
from tierstore import file_systems
from tierstore.file_systems import file_system_of, warn_unless_local, why_not_local


@pytest.mark.parametrize(
    "kind", ["ext4", "xfs", "btrfs", "zfs", "bcachefs", "f2fs", "ext2", "ext3", "tmpfs", "ramfs", "overlay", "virtiofs"]
)
def test_kinds_that_are_known_to_be_local_are(kind: str) -> None:
    assert why_not_local(kind) == ""


@pytest.mark.parametrize(
    "kind", ["nfs4", "cifs", "fuse.glusterfs", "fuse.juicefs", "beegfs", "fuse.s3fs", "fuse.rclone", "gpfs", "lustre"]
)
def test_kinds_that_are_known_to_be_remote_are_called_so(kind: str) -> None:
    assert why_not_local(kind) == f"a network file system ({kind})"


@pytest.mark.parametrize("kind", ["fuse", "fuse.of-tomorrow", "newfs", "unknown", ""])
def test_kinds_that_nobody_knows_are_not_taken_for_local(kind: str) -> None:
    assert "network" not in why_not_local(kind)
    assert why_not_local(kind)


def mounted(monkeypatch: pytest.MonkeyPatch, *mounts: tuple[object, str]) -> None:
    partitions = [SimpleNamespace(mountpoint=str(point), fstype=kind) for point, kind in mounts]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: partitions)  # noqa: ARG005


def test_the_innermost_and_last_mount_over_a_path_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path.resolve() / "inner"
    mounted(monkeypatch, ("/", "ext4"), (inner, "autofs"), (inner, "nfs4"), (f"{inner}-too", "cifs"))
    assert file_system_of(inner / "store") == "nfs4"
    assert file_system_of(tmp_path) == "ext4"


def test_without_psutils_sources_the_kernels_own_list_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path.resolve() / "a folder"
    escaped = str(folder).replace(" ", "\\040")
    lines = f"1 0 0:1 / / rw,relatime shared:1 - ext4 /dev/a rw\n2 1 0:2 /x {escaped} rw - fuse.juicefs jfs rw\n"
    (tmp_path / "mountinfo").write_text(lines)
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(file_systems, "MOUNTS", tmp_path / "mountinfo")
    assert file_system_of(folder) == "fuse.juicefs"
    assert file_system_of(tmp_path) == "ext4"
    monkeypatch.setattr(file_systems, "MOUNTS", tmp_path / "none")
    assert file_system_of(tmp_path) == "unknown"


def test_both_sources_agree_about_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = file_system_of(tmp_path)
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "none"))
    assert file_system_of(tmp_path) == expected != "unknown"


def test_a_store_on_a_network_opens_and_says_so_once(
    built: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file_systems._warn_once.cache_clear()
    mounted(monkeypatch, ("/", "fuse.s3fs"))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            tierstore.open(built, dram="8MiB").close()
        warn_unless_local(built)
    said = [record.getMessage() for record in caplog.records if "network file system" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith(f"{built} is on a network file system (fuse.s3fs)")
    file_systems._warn_once.cache_clear()
