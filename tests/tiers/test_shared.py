"""Shared blocks: whoever holds a descriptor, whatever they try with it,
changes no byte and no length under its readers."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import resource
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.daemon_peers import NOBODY, as_root, in_child
from support.held import open_files

from tierstore.errors import BudgetError, DaemonError
from tierstore.tiers.shared import SharedBlock, make_client_block, map_block

NUM_BYTES = 4 << 20
MADV_REMOVE, MADV_POPULATE_WRITE, PR_SET_DUMPABLE = 9, 23, 4
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE = 1, 2, 16
USERS = [None, pytest.param(NOBODY, marks=as_root)]

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


def checked(outcome: int | None) -> int:
    """What a call of libc's returned; raises `OSError` where that says that it failed."""
    if outcome in (None, -1, 2**64 - 1):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    assert outcome is not None
    return outcome


def mapped(fd: int, protection: int = mmap.PROT_READ) -> int:
    return checked(libc.mmap(None, NUM_BYTES, protection, mmap.MAP_SHARED, fd, 0))


def write_by_mapping(fd: int) -> None:
    ctypes.memset(mapped(fd, mmap.PROT_READ | mmap.PROT_WRITE), 0xEE, 100)


def write_by_mprotect(fd: int) -> None:
    memory = mapped(fd)
    checked(libc.mprotect(memory, NUM_BYTES, mmap.PROT_READ | mmap.PROT_WRITE))
    ctypes.memset(memory, 0xEE, 100)


def write_by_own_memory_file(fd: int) -> None:
    memory = mapped(fd)
    own = os.open("/proc/self/mem", os.O_RDWR)
    os.pwrite(own, b"\xee" * 100, memory)


def send_another_file(fd: int) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"\xee" * 100)
        file.flush()
        os.sendfile(fd, file.fileno(), 0, 100)


ATTACKS: dict[str, Callable[[int], Any]] = {
    "write": lambda fd: os.pwrite(fd, b"\xee" * 100, 0),
    "writable mapping": write_by_mapping,
    "mprotect": write_by_mprotect,
    "/proc/self/mem": write_by_own_memory_file,
    "sendfile": send_another_file,
    "cut": lambda fd: os.ftruncate(fd, 4096),
    "cut by name": lambda fd: os.truncate(f"/proc/self/fd/{fd}", 4096),
    "open to cut": lambda fd: os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_TRUNC),
    "lengthen": lambda fd: os.ftruncate(fd, NUM_BYTES + 4096),
    "allocate beyond": lambda fd: os.posix_fallocate(fd, NUM_BYTES, 4096),
    "punch": lambda fd: checked(libc.fallocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 0, 8192)),
    "zero": lambda fd: checked(libc.fallocate(fd, FALLOC_ZERO_RANGE, 0, 8192)),
    "madvise remove": lambda fd: checked(libc.madvise(mapped(fd), 8192, MADV_REMOVE)),
    "madvise write": lambda fd: checked(libc.madvise(mapped(fd), 8192, MADV_POPULATE_WRITE)),
    "more seals": lambda fd: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
}


def attack(fd: int) -> str:
    """Tries everything with a descriptor and with one reopened for writing; returns what was done,
    and which could be had."""
    libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # as a process that began as this user: /proc/self is its own
    fds, done = [fd], []
    with contextlib.suppress(OSError):
        fds.append(os.open(f"/proc/self/fd/{fd}", os.O_RDWR))
    for name, act in ATTACKS.items():
        for number, tried in enumerate(fds):
            with contextlib.suppress(OSError):
                act(tried)
                done.append(f"{name} {number}")
    return json.dumps([len(fds), done])


@pytest.mark.parametrize("user", USERS)
def test_a_client_cannot_change_a_block_by_its_descriptor(user: int | None) -> None:
    block = SharedBlock("tierstore-test", NUM_BYTES)
    rows = np.random.default_rng(0).integers(0, 256, NUM_BYTES, dtype=np.uint8)
    block.array[:] = rows
    said = in_child(lambda: attack(block.fd), user)
    num_fds, done = json.loads(said)
    assert np.array_equal(block.array, rows)
    assert os.fstat(block.fd).st_size == NUM_BYTES
    assert done == []
    if user is not None:
        assert num_fds == 1  # it could not even be reopened for writing
    block.array[:100] = 7  # the maker still can
    reader = map_block(block.fd, NUM_BYTES, "the block")
    assert (reader[:100] == 7).all()
    del reader
    block.close()


def test_the_attacks_change_a_block_that_is_not_sealed() -> None:
    fd = os.memfd_create("tierstore-test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, NUM_BYTES)
    said = in_child(lambda: attack(fd))
    num_fds, done = json.loads(said)
    os.close(fd)
    assert num_fds == 2
    for name in ("write", "writable mapping", "mprotect", "sendfile", "cut", "lengthen", "punch", "madvise remove"):
        assert f"{name} 0" in done, name


@pytest.mark.parametrize("user", USERS)
def test_a_client_writes_its_own_block_and_cannot_change_its_length(user: int | None) -> None:
    fd, memory = make_client_block("tierstore-test", NUM_BYTES)
    done = json.loads(in_child(lambda: attack(fd), user))[1]
    assert "writable mapping 0" in done
    assert (memory[:100] == 0xEE).any() or "punch 0" in done or "zero 0" in done
    assert not {
        name for name in done if name[:-2] in ("cut", "cut by name", "open to cut", "lengthen", "allocate beyond")
    }
    assert os.fstat(fd).st_size == NUM_BYTES
    memory.sum()  # all of it is still there: a page that had gone would be a signal
    os.close(fd)


def test_readers_map_without_the_right_to_write() -> None:
    block = SharedBlock("tierstore-test", 8192)
    reader = map_block(block.fd, 8192, "the block")
    assert not reader.flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        reader.flags.writeable = True
    with pytest.raises(DaemonError, match=r"the block: .*tierstore serve"):
        map_block(block.fd, 8192, "the block", writable=True)
    block.close()
    assert reader.sum() == 0  # the memory lives as long as someone maps it


def unsealed(num_bytes: int) -> int:
    fd = os.memfd_create("tierstore-test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, num_bytes)
    return fd


def sealed(num_bytes: int) -> int:
    fd = unsealed(num_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd


@pytest.mark.parametrize(
    ("make", "num_bytes", "named"),
    [
        (lambda: unsealed(8192), 8192, "8192 bytes with seals 0x0, expected 8192 with a sealed length"),
        (lambda: sealed(4096), 8192, "4096 bytes with seals 0x2, expected 8192"),
        (lambda: sealed(8192), 0, "expected 0"),
        (lambda: sealed(8192), -4096, "expected -4096"),
        (lambda: sealed(8192), 5000, "expected 5000"),
        (lambda: os.open("/dev/zero", os.O_RDONLY), 4096, "Invalid argument"),
        (lambda: os.pipe()[0], 4096, "Invalid argument"),
    ],
    ids=["unsealed", "short", "nothing", "negative", "parts of pages", "device", "pipe"],
)
def test_a_descriptor_that_is_no_block_is_refused_by_name(make: Callable[[], int], num_bytes: int, named: str) -> None:
    fd = make()
    with pytest.raises(DaemonError, match=f"the static block: .*{named}.*tierstore serve"):
        map_block(fd, num_bytes, "the static block")
    os.close(fd)


def test_a_closed_descriptor_is_refused_by_name() -> None:
    fd = sealed(4096)
    os.close(fd)
    with pytest.raises(DaemonError, match="Bad file descriptor"):
        map_block(fd, 4096, "the static block")


def test_all_of_a_block_is_there_and_told_as_it_comes() -> None:
    told: list[int] = []
    num_bytes = (130 << 20) + 4096  # two steps, a part of one, and the end of a huge page
    block = SharedBlock("tierstore-test", num_bytes, told.append)
    assert sum(told) == num_bytes
    assert len(told) == 3
    assert os.fstat(block.fd).st_blocks * 512 >= num_bytes
    assert not block.array.any()
    block.close()
    block.close()


def test_memory_that_there_is_not_is_refused_and_nothing_is_left_open() -> None:
    before = open_files()
    with pytest.raises(BudgetError, match=r"256\.00 TiB .*tierstore-test.*--dram"):
        SharedBlock("tierstore-test", 1 << 48)
    assert open_files() <= before


def test_a_limit_of_the_system_is_named() -> None:
    def act() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        SharedBlock("tierstore-test", NUM_BYTES)
        return "made"

    said = in_child(act)
    assert said.startswith("BudgetError: 4.00 MiB (4194304 bytes) of shared memory for tierstore-test"), said
    assert os.strerror(errno.EFBIG) in said
