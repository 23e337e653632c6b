"""The C++ tests of what is shared: races, every way of reading, a writer killed after each instruction of what it does.

Built plainly here. `make sanitize` builds and runs the same under ThreadSanitizer, then under AddressSanitizer and
UndefinedBehaviorSanitizer, which takes some minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.repository import REPOSITORY

CPU = REPOSITORY / "kernels" / "cpu"
PROGRAMS = REPOSITORY / "tests" / "kernels" / "cpp"
BINDINGS = "module.cpp"  # the files that are the Python face, by the end of their name
NOT_ALLOWED = 77
FLAGS = os.environ.get("TIERSTORE_TEST_CXXFLAGS", "-O1").split()


def compile_cpp(folder: Path, *arguments: str) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    command = [compiler, "-std=c++17", "-g", *FLAGS, f"-I{CPU}", *arguments, "-pthread"]
    subprocess.run(command, check=True, timeout=600, cwd=folder)


def build(folder: Path, name: str, files: list[Path]) -> Path:
    compile_cpp(folder, *map(str, files), str(PROGRAMS / f"{name}.cpp"), "-o", name)
    return folder / name


def check(program: Path, *arguments: str) -> None:
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=600)
    if done.returncode == NOT_ALLOWED:
        pytest.skip("this system does not let a process trace its own child")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checked" in done.stdout


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The lookup path, compiled, a file a core at a time."""
    folder = tmp_path_factory.mktemp("cpp")
    files = [str(path) for path in CPU.glob("*.cpp") if not path.name.endswith(BINDINGS)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda file: compile_cpp(folder, "-c", file), files))
    return list(folder.glob("*.o"))


@pytest.fixture(scope="module")
def lookup_path_test(objects: list[Path]) -> Path:
    return build(objects[0].parent, "lookup_path_test", objects)


@pytest.fixture(scope="module")
def reports_test(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("cpp"), "reports_test", [CPU / "reports.cpp", CPU / "key_counts.cpp"])


@pytest.fixture(scope="module")
def mailbox_test(objects: list[Path]) -> Path:
    return build(objects[0].parent, "mailbox_test", objects)


@pytest.fixture(scope="module")
def scarcity_test(objects: list[Path]) -> Path:
    return build(objects[0].parent, "scarcity_test", objects)


@pytest.mark.parametrize("what", ["cache", "engine", "epochs", "kill"])
def test_the_lookup_path_keeps_its_promises_in_cpp(lookup_path_test: Path, what: str, tmp_path: Path) -> None:
    check(lookup_path_test, what, *([str(tmp_path)] if what in ("engine", "epochs") else []))


@pytest.mark.parametrize("what", ["ring", "counts", "kill"])
def test_reports_keep_their_promises_in_cpp(reports_test: Path, what: str) -> None:
    check(reports_test, what)


@pytest.mark.parametrize("what", ["devices", "wild"])
def test_mailboxes_keep_their_promises_in_cpp(mailbox_test: Path, what: str, tmp_path: Path) -> None:
    check(mailbox_test, what, str(tmp_path))


@pytest.mark.parametrize("what", ["memory", "threads", "cancel", "ring"])
def test_nothing_is_lost_when_memory_threads_or_the_ring_give_out_in_cpp(
    scarcity_test: Path, what: str, tmp_path: Path
) -> None:
    if what in ("threads", "ring") and "-fsanitize=thread" in FLAGS:
        pytest.skip("ThreadSanitizer has its own pthread_create and syscall, which the test would have to replace")
    trials = "10000" if os.environ.get("TIERSTORE_SOAK") else "300"
    check(scarcity_test, what, str(tmp_path), *([trials] if what == "cancel" else []))
