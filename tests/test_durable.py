"""Reads and writes are exact under short system calls; a replaced file is old or new, never a part."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from tierstore.durable import read_exactly, read_up_to, replace_file, replacing, write_all
from tierstore.errors import FormatError

DATA = bytes(range(256)) * 5


@pytest.fixture
def fd(tmp_path: Path) -> int:
    (tmp_path / "file").write_bytes(DATA)
    return os.open(tmp_path / "file", os.O_RDWR)


@pytest.fixture
def short_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every system call moves 7 bytes at most, as it may."""
    preadv, pwrite, write = os.preadv, os.pwrite, os.write
    monkeypatch.setattr(os, "preadv", lambda fd, views, start: preadv(fd, [views[0][:7]], start))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, start: pwrite(fd, data[:7], start))
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))


@pytest.mark.usefixtures("short_calls")
def test_short_reads_are_put_together(fd: int) -> None:
    out = np.full((2, 30), 0xEE, dtype=np.uint8)
    read_exactly(fd, out, 100, "a file")
    assert out.tobytes() == DATA[100:160]


@pytest.mark.usefixtures("short_calls")
@pytest.mark.parametrize("byte_start", [None, 0, 3])
def test_short_writes_are_put_together(tmp_path: Path, byte_start: int | None) -> None:
    numbers = np.arange(50, dtype=np.int64).reshape(5, 10)
    with (tmp_path / "new").open("wb") as file:
        write_all(file.fileno(), numbers, byte_start)
        write_all(file.fileno(), np.empty(0, dtype=np.int64), byte_start)
    assert (tmp_path / "new").read_bytes() == b"\0" * (byte_start or 0) + numbers.tobytes()


def test_a_file_that_ends_early_is_named_with_both_numbers(fd: int) -> None:
    out = np.empty(100, dtype=np.uint8)
    with pytest.raises(FormatError, match="a trace: the file ends 60 bytes early, at byte 1280"):
        read_exactly(fd, out, 1240, "a trace")
    assert read_up_to(fd, out, 1240) == 40
    assert out[:40].tobytes() == DATA[1240:]


def test_what_came_before_an_error_of_the_disk_is_kept_for_who_asks(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def failing(descriptor: int, views: list[memoryview], byte_start: int) -> int:
        if byte_start >= 50:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, [views[0][: 50 - byte_start]], byte_start)

    monkeypatch.setattr(os, "preadv", failing)
    out, errors = np.zeros(100, dtype=np.uint8), list[tuple[int | None, int]]()
    assert read_up_to(fd, out, 10, lambda error, at: errors.append((error.errno, at))) == 40
    assert errors == [(errno.EIO, 50)]
    assert out[:40].tobytes() == DATA[10:50]
    with pytest.raises(OSError, match="Input/output error"):
        read_up_to(fd, out, 10)


def test_a_replaced_file_is_the_new_one_and_nothing_else_is_left(tmp_path: Path) -> None:
    file = tmp_path / "file"
    (tmp_path / "file.new").write_bytes(b"what a killed writer left")
    replace_file(file, DATA, mode=0o600)
    assert file.read_bytes() == DATA
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("operation", ["open", "write", "fsync", "rename"])
def test_a_file_whose_replacement_fails_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def failing(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, operation, failing)
        with pytest.raises(OSError, match="No space left"):
            replace_file(tmp_path / "file", DATA)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"file": b"old"}


def test_a_body_that_is_interrupted_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def write_and_stop() -> None:
        with replacing(tmp_path / "file", tmp_path / "other") as fd:
            write_all(fd, DATA)
            assert (tmp_path / "other").stat().st_size == len(DATA)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"file": b"old"}


def test_the_bytes_are_synced_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(Path(f"/proc/self/fd/{fd}").resolve().name), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda old, new: (done.append("rename"), rename(old, new)))
    replace_file(tmp_path / "file", DATA)
    assert done == ["file.new", "rename", tmp_path.name]
