"""Each cause that the system can refuse for, over each command that can meet it: named as it is, with its own remedy.

Children are forked from one process that has everything imported, so that the limits meet the commands' own work.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.text_store import TextStore

NOBODY = 65534
# What no message of a command may say, whatever the cause.
NEVER = (
    re.compile(r"Traceback"),
    re.compile(r"\[Errno"),
    re.compile(r"\.new\b"),
    re.compile(r"/tmp[a-z0-9_]{8}\b"),
    re.compile(r"rebuild|copy it again"),
)

DRIVER = """
import contextlib, io, json, os, resource, sys, sysconfig
# What is imported late otherwise:
import difflib, encodings.ascii, encodings.idna, html, numpy.ma, numpy.random, secrets
import lmdb, rich.console, rich.table, rich.progress, tierstore, engram_adapter.profiles
import tierstore.tools.terminal
from concurrent.futures import ThreadPoolExecutor
from tierstore.tools import build, cli, epochs, inspect, plan, profile, synth, trace, verify

sysconfig.get_config_vars()

def limit(how, value):
    if how == "nofile":
        listed = os.listdir("/proc/self/fd")
        used = {int(fd) for fd in listed if os.path.lexists(f"/proc/self/fd/{fd}")}
        most = next(n for n in range(1 << 16) if sum(fd not in used for fd in range(n)) == value + 1) - 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    elif how == "fsize":
        resource.setrlimit(resource.RLIMIT_FSIZE, (value, value))
    elif how == "user":
        os.setgroups([]), os.setgid(value), os.setuid(value)

def act(arguments):
    if arguments[0] == "open":
        tierstore.open(arguments[1], dram="8MiB", io=arguments[2]).close()
        return 0
    if arguments[0] == "record":
        with tierstore.open(arguments[1], dram="8MiB") as store:
            store.start_trace(arguments[2])
            store.stop_trace()
        return 0
    return cli.run(arguments)

for line in sys.stdin:
    job = json.loads(line)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        sys.stdout = sys.stderr = said = io.StringIO()
        try:
            limit(job["how"], job["value"])
            status = act(job["arguments"])
        except Exception as error:
            status = 1
            print(f"{type(error).__module__}.{type(error).__name__}: {error}")
        os.write(writing, json.dumps([status, said.getvalue()[-6000:]]).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as answer:
        got = answer.read()
    _, ended = os.waitpid(child, 0)
    print(json.dumps(json.loads(got) if got else [-ended, "the child ended by itself"]), flush=True)
"""


class Driver:
    """Runs commands in children, each under a limit."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, how: str, value: int, *arguments: object) -> tuple[int, str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {"how": how, "value": value, "arguments": [str(argument) for argument in arguments]}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        status, said = json.loads(self._process.stdout.readline())
        for pattern in NEVER:
            assert not pattern.search(said), f"{arguments}: {said}"
        return status, said

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    opened = Driver()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def everybodys() -> Iterator[Path]:
    """A folder that all users may enter, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="tierstore-test-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def linked(source: Path, destination: Path) -> Path:
    """Another name of a file, or of all files of a folder; copies if it is another disk."""
    try:
        return Path(shutil.copytree(source, destination, copy_function=os.link))
    except (NotADirectoryError, shutil.Error):
        return Path(shutil.copytree(source, destination) if source.is_dir() else shutil.copy(source, destination))


@pytest.fixture(scope="module")
def inputs(text: TextStore, everybodys: Path) -> dict[str, Path]:
    """What commands read. All users may."""
    np.save(everybodys / "ids.npy", np.arange(500, dtype=np.int32) % 50)
    made = {"model": text.store.parent / "model", "store": text.store, "trace": text.trace, "profile": text.profile}
    return {"ids": everybodys / "ids.npy"} | {name: linked(path, everybodys / path.name) for name, path in made.items()}


# Commands that write, by the name of what they make; {out} is a folder.
WRITERS: dict[str, tuple[str, ...]] = {
    "synth": ("synth", "{out}/m", "--family", "qwen4_exp", "--size", "1MiB"),
    "build": ("build", "{model}", "{out}/s", "--shard-bytes", "262144"),
    "trace": ("trace", "{ids}", "-o", "{out}/t.trace"),
    "profile": ("profile", "{store}", "{trace}", "-o", "{out}/p.profile"),
    "record": ("record", "{store}", "{out}/k.trace"),
}
READERS: dict[str, tuple[str, ...]] = {
    "open uring": ("open", "{store}", "uring"),
    "open mmap": ("open", "{store}", "mmap"),
    "inspect": ("inspect", "{store}"),
    "verify": ("verify", "{store}", "--source", "{model}"),
}


def filled(arguments: tuple[str, ...], **paths: Path) -> list[str]:
    return [argument.format(**paths) for argument in arguments]


@pytest.mark.parametrize("name", [*WRITERS, *READERS])
def test_too_few_open_files_are_named_at_whichever_file_it_is(
    driver: Driver, inputs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """The process may open 0, 1, 2 ... more files, until the command does not need more."""
    for more in range(60):
        (tmp_path / str(more)).mkdir()
        arguments = filled((WRITERS | READERS)[name], **inputs, out=tmp_path / str(more))
        status, said = driver.run("nofile", more, *arguments)
        if status == 0:
            break
        assert "Too many open files" in said, f"{more} more: {said}"
        assert "limit" in said
    assert status == 0
    assert more > 0


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("num_bytes", [0, 100, 5000, 100_000])
def test_a_limit_of_file_sizes_is_named(
    driver: Driver, inputs: dict[str, Path], tmp_path: Path, name: str, num_bytes: int
) -> None:
    arguments = filled(WRITERS[name], **inputs, out=tmp_path)
    status, said = driver.run("fsize", num_bytes, *arguments)
    assert status == 0 or ("File too large" in said and "ulimit -f" in said), said
    assert status != 0 or num_bytes


@pytest.mark.parametrize("name", WRITERS)
def test_a_missing_folder_is_named(driver: Driver, inputs: dict[str, Path], tmp_path: Path, name: str) -> None:
    status, said = driver.run("", 0, *filled(WRITERS[name], **inputs, out=tmp_path / "none"))
    makes_folders = name in ("synth", "build")
    assert makes_folders == (status == 0), said
    assert makes_folders or f"there is no folder {tmp_path}/none; make it (mkdir -p {tmp_path}/none)" in said


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_this_user_may_not_write_is_named(
    driver: Driver, inputs: dict[str, Path], everybodys: Path, name: str
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user; as a user, the folder below would be one's own")
    status, said = driver.run("user", NOBODY, *filled(WRITERS[name], **inputs, out=everybodys))
    assert status != 0
    assert f"Permission denied: user {NOBODY} may not write in {everybodys} (owner 0, mode 755)" in said, said


@pytest.mark.parametrize("name", READERS)
def test_a_store_that_this_user_may_not_read_is_named(
    driver: Driver, inputs: dict[str, Path], everybodys: Path, name: str
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    closed = Path(shutil.copytree(inputs["store"], everybodys / f"closed {name}"))
    for shard in closed.rglob("*.shard"):
        shard.chmod(0o600)
    status, said = driver.run("user", NOBODY, *filled(READERS[name], **{**inputs, "store": closed}))
    if name == "inspect":  # it reads the catalog only
        assert status == 0, said
        return
    assert status != 0
    assert f"Permission denied: user {NOBODY} may not read {closed}" in said, said
    assert "make it readable for this user" in said


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Any]:
    """Mounts a small file system; skips where this user may not."""
    points: list[Path] = []

    def mount(options: str) -> Path:
        point = tmp_path / f"mount{len(points)}"
        point.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(point)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this user may not mount a small file system")
        points.append(point)
        return point

    yield mount
    for point in points:
        subprocess.run(["umount", str(point)], check=True)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_system_that_is_mounted_read_only_is_named(
    driver: Driver, inputs: dict[str, Path], mounted: Any, name: str
) -> None:
    point = mounted("size=200m,ro")
    status, said = driver.run("", 0, *filled(WRITERS[name], **inputs, out=point))
    assert status != 0
    assert f"Read-only file system: {point} is mounted so; mount {point} for writing" in said, said


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_named_with_what_is_free(
    driver: Driver, inputs: dict[str, Path], mounted: Any, name: str
) -> None:
    point = mounted("size=8k")
    (point / "filler").write_bytes(bytes(8192))
    status, said = driver.run("", 0, *filled(WRITERS[name], **inputs, out=point))
    assert status != 0
    assert re.search(r"0 B \(0 bytes\) (are )?free|0 B free \(0 bytes\)", said), said
    assert re.search(r"free some|give a path on another disk", said)


def test_a_disk_without_inodes_is_named_so(driver: Driver, inputs: dict[str, Path], mounted: Any) -> None:
    point = mounted("size=4m,nr_inodes=1")
    _, said = driver.run("", 0, *filled(WRITERS["trace"], **inputs, out=point))
    assert "no file can be added (0 inodes are free)" in said


def test_a_plan_into_a_read_only_store_names_the_mount_and_keeps_the_epoch(
    driver: Driver, inputs: dict[str, Path], own: Path, mounted: Any
) -> None:
    point = mounted("size=300m")
    subprocess.run(["cp", "-r", str(own), str(point / "store")], check=True)
    subprocess.run(["mount", "-o", "remount,ro", str(point)], check=True)
    status, said = driver.run("", 0, "plan", point / "store", inputs["profile"], "--dram", "16MiB")
    assert status == 1
    assert f"Read-only file system: {point} is mounted so" in said, said
