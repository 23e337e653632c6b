"""Pages are written in order and whole, past the page cache where that can be had, and nothing writes afterwards."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.held import held

from tierstore.offline import page_writer
from tierstore.offline.page_writer import writing

SHAPE = 4, 4096
CHUNKS = [4, 4, 4, 4, 3]  # pages


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "shard", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def chunks() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (pages, SHAPE[1]), dtype=np.uint8) for pages in CHUNKS]


def write(fd: int) -> None:
    with writing(fd, SHAPE) as writer:
        for chunk in chunks():
            pages = writer.buffer()[: len(chunk)]
            pages[:] = chunk
            writer.write(pages)
        writer.finish()


def content(tmp_path: Path) -> bytes:
    return (tmp_path / "shard").read_bytes()


def expected() -> bytes:
    return b"".join(chunk.tobytes() for chunk in chunks())


def is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def test_what_is_written_is_what_was_given_in_its_order(fd: int, tmp_path: Path) -> None:
    write(fd)
    assert content(tmp_path) == expected()


def test_a_file_system_without_direct_writes_is_written_all_the_same(
    fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    page_writer._report_cached_writes.cache_clear()
    real = fcntl.fcntl

    def refuse(descriptor: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, command, argument)

    monkeypatch.setattr(page_writer.fcntl, "fcntl", refuse)
    with caplog.at_level(logging.INFO):
        write(fd)
        os.lseek(fd, 0, os.SEEK_SET)
        write(fd)
    assert content(tmp_path) == expected()
    assert [record.message for record in caplog.records if "page cache" in record.message] == [
        "shards are written through the page cache: their file system has no direct writes ([Errno 22] Invalid "
        "argument)"
    ]


def test_a_file_system_that_takes_the_flag_and_no_write_is_written_all_the_same(
    fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = os.write, 0

    def write_slowly(descriptor: int, data: Any) -> int:
        nonlocal refused
        if is_direct(descriptor):
            refused += 1
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, data)

    page_writer.write_past_cache(fd)
    if not is_direct(fd):
        pytest.skip("this file system has no direct writes at all")
    monkeypatch.setattr(os, "write", write_slowly)
    write(fd)
    assert refused == 1
    assert content(tmp_path) == expected()


def test_a_write_that_fails_is_raised_where_the_caller_is(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        write(fd)
    with writing(fd, SHAPE) as writer:
        writer.write(writer.buffer())
        with pytest.raises(OSError, match="No space left"):
            writer.finish()


def test_nothing_is_written_once_the_writer_was_left(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, begun, go_on = os.write, threading.Event(), threading.Event()
    ended = []

    def write_slowly(descriptor: int, data: Any) -> int:
        begun.set()
        assert go_on.wait(60)
        written = real(descriptor, data)
        ended.append(written)
        return written

    monkeypatch.setattr(os, "write", write_slowly)
    before = held()
    with contextlib.suppress(KeyboardInterrupt), writing(fd, SHAPE) as writer:
        writer.write(writer.buffer())
        writer.write(writer.buffer())
        assert begun.wait(60)
        go_on.set()
        raise KeyboardInterrupt
    num_ended = len(ended)
    assert 1 <= num_ended <= 2
    assert held() <= before
    assert len(ended) == num_ended


def test_a_buffer_is_not_given_again_before_it_was_written(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, go_on = os.write, threading.Event()

    def write_slowly(descriptor: int, data: Any) -> int:
        assert go_on.wait(60)
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write_slowly)
    with writing(fd, SHAPE) as writer:
        for number in range(page_writer.BUFFERS):
            buffer = writer.buffer()
            buffer[:] = number + 1
            writer.write(buffer)
        taken: list[np.ndarray] = []
        taker = threading.Thread(target=lambda: taken.append(writer.buffer()))
        taker.start()
        taker.join(0.05)
        assert not taken
        go_on.set()
        taker.join(60)
        assert (taken[0] == 1).all()
        writer.finish()
