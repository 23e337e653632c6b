"""The C++ tests of the lookup path: races, every way of reading, a writer killed after each instruction of an update.

Built plainly here. `make sanitize` builds and runs the same under ThreadSanitizer, then under AddressSanitizer and
UndefinedBehaviorSanitizer, which takes some minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY

PROGRAM = REPOSITORY / "tests" / "kernels" / "cpp" / "lookup_path_test.cpp"
BINDINGS = "module.cpp"  # the files that are the Python face, by the end of their name
NOT_ALLOWED = 77
FLAGS = os.environ.get("TIERSTORE_TEST_CXXFLAGS", "-O1").split()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    cpu = REPOSITORY / "kernels" / "cpu"
    sources = [str(path) for path in sorted(cpu.glob("*.cpp")) if not path.name.endswith(BINDINGS)]
    target = tmp_path_factory.mktemp("cpp") / "lookup_path_test"
    command = [compiler, "-std=c++17", "-g", *FLAGS, f"-I{cpu}", *sources, str(PROGRAM), "-o", str(target), "-pthread"]
    subprocess.run(command, check=True, timeout=600)
    return target


@pytest.mark.parametrize("what", ["cache", "engine", "epochs", "kill"])
def test_the_lookup_path_keeps_its_promises_in_cpp(program: Path, what: str, tmp_path: Path) -> None:
    arguments = [what, str(tmp_path)] if what in ("engine", "epochs") else [what]
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=600)
    if done.returncode == NOT_ALLOWED:
        pytest.skip("this system does not let a process trace its own child")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checked" in done.stdout
