"""Every way of reading pages, through the contract, and the choice among them."""

from __future__ import annotations

import errno
import logging
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from contract.reader_contract import ReaderContract
from support.stores import Model, random_keys

import tierstore
from tierstore import kernels
from tierstore.formats.catalog import read_catalog
from tierstore.tiers.nvme import IoChoice, choose_io


class TestUring(ReaderContract):
    """io_uring with O_DIRECT."""

    def open_store(self, path: Path, dram: str = "600KiB") -> tierstore.Store:
        store = tierstore.open(path, dram=dram, io="uring")
        if store.stats()["io"] != "uring":
            pytest.skip("this kernel or container forbids io_uring")
        return store


class TestUringBuffered(ReaderContract):
    """io_uring where the file system has no O_DIRECT."""

    def open_store(self, path: Path, dram: str = "600KiB") -> tierstore.Store:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tierstore.tiers.nvme.open_direct", lambda _: -1)
            return tierstore.open(path, dram=dram, io="uring")


class TestMmap(ReaderContract):
    """Memory maps with process_madvise."""

    def open_store(self, path: Path, dram: str = "600KiB") -> tierstore.Store:
        return tierstore.open(path, dram=dram, io="mmap")


class TestMmapWithFadvise(ReaderContract):
    """Memory maps where process_madvise is forbidden."""

    def open_store(self, path: Path, dram: str = "600KiB") -> tierstore.Store:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "probe_process_madvise", lambda: errno.EPERM)
            return tierstore.open(path, dram=dram, io="mmap")


class TestPread(ReaderContract):
    """A pool of threads."""

    def open_store(self, path: Path, dram: str = "600KiB") -> tierstore.Store:
        return tierstore.open(path, dram=dram, io="pread")


@pytest.mark.parametrize(
    ("io", "uring_errno", "madvise_errno", "expected", "said"),
    [
        ("auto", 0, 0, IoChoice("uring"), []),
        ("uring", 0, 0, IoChoice("uring"), []),
        ("auto", errno.EPERM, 0, IoChoice("mmap", True), ["io_uring", "EPERM"]),
        ("uring", errno.ENOSYS, 0, IoChoice("mmap", True), ["io_uring", "ENOSYS"]),
        ("auto", errno.EPERM, errno.EPERM, IoChoice("mmap", False), ["io_uring", "process_madvise"]),
        ("mmap", 0, 0, IoChoice("mmap", True), []),
        ("mmap", 0, errno.ENOSYS, IoChoice("mmap", False), ["process_madvise", "ENOSYS"]),
        ("pread", 0, 0, IoChoice("pread"), []),
    ],
)
def test_io_falls_back_to_what_the_kernel_allows_and_says_so(
    io: str,
    uring_errno: int,
    madvise_errno: int,
    expected: IoChoice,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(kernels, "probe_uring", lambda: uring_errno)
    monkeypatch.setattr(kernels, "probe_process_madvise", lambda: madvise_errno)
    with caplog.at_level(logging.WARNING):
        assert choose_io(io) == expected
    for word in said:
        assert word in caplog.text
    assert bool(caplog.text) == bool(said)


def test_a_pipe_in_place_of_a_shard_is_named_and_does_not_block(own_store: Path) -> None:
    shard = min((own_store / "shards").glob("*/*.shard"))
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(tierstore.FormatError, match=r"shard 0 of table layers\.1 .*no regular file"):
        tierstore.open(own_store, dram="600KiB")


# A filter as container runtimes install it: the named system calls fail with EPERM.
# Numbers are those of x86-64 and arm64.
SECCOMP = """
import ctypes, struct, sys
calls = [425, 426, 427, 440]  # io_uring_setup, _enter, _register, process_madvise
code = [(0x20, 0, 0, 0)]  # load the number of the system call
for position, number in enumerate(calls):
    code.append((0x15, len(calls) - position, 0, number))  # equal: jump to the last instruction
code += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050001)]  # allow; errno 1 (EPERM)
program = b"".join(struct.pack("HBBI", *instruction) for instruction in code)
buffer = ctypes.create_string_buffer(program, len(program))
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
filter_ = Filter(len(code), ctypes.addressof(buffer))
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
if libc.prctl(22, 2, ctypes.byref(filter_), 0, 0) != 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    sys.exit(77)
"""


@pytest.mark.parametrize("io", ["auto", "uring", "mmap"])
def test_a_container_that_forbids_io_uring_and_process_madvise_still_serves(built: Path, io: str) -> None:
    job = f"""
        import numpy as np, tierstore
        from tierstore import kernels
        assert kernels.probe_uring() == 1 and kernels.probe_process_madvise() == 1
        keys = np.arange(60).reshape(20, 3)
        with tierstore.open({str(built)!r}, dram="600KiB", io={io!r}) as store:
            rows = store["layers.1"].lookup(keys)
            assert store.stats()["io"] == "mmap" and store.stats()["pages_read"] > 0
        with tierstore.open({str(built)!r}, dram="64MiB") as resident:
            assert np.array_equal(rows, resident["layers.1"].lookup(keys))
    """
    code = SECCOMP + textwrap.dedent(job)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if done.returncode == 77:
        pytest.skip("this system does not let a process filter its own system calls")
    assert done.returncode == 0, done.stderr
    assert "process_madvise is not to be had (EPERM)" in done.stderr


def test_fewer_page_readers_serve_if_the_kernel_gives_less_and_a_warning_says_so(
    built: Path, model: Model, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too few descriptors for every page reader's ring: fewer page readers serve, and a warning says how many."""
    for module in ("nvme", "native"):  # the limit stays as it is set here
        monkeypatch.setattr(f"tierstore.tiers.{module}.allow_open_files", lambda _: None)
    if kernels.probe_uring() != 0:
        pytest.skip("io_uring is not to be had here")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with tierstore.open(built, dram="32MiB", placement="none", io="uring") as store:
        assert store._backing._plan.staging.num_readers > 1
        asked = store._backing._plan.staging.num_readers
    wanted = 2 + sum(2 * layout.num_shards for layout in read_catalog(built).tables.values())  # shards, and two rings
    used = {int(fd) for fd in os.listdir("/proc/self/fd")}
    free = [fd for fd in range(max(used) + wanted + 2) if fd not in used]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[wanted], limits[1]))
        store = tierstore.open(built, dram="32MiB", io="uring")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with store:
        assert f"of {asked} readers could be had" in caplog.text
        keys = random_keys(np.random.default_rng(0), 20)
        np.testing.assert_array_equal(store["layers.1"].lookup(keys), model.expected("layers.1", keys))
